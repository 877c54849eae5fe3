"""Rules: what the packet filter of an instance is to hold now, and the changes that bring it there, one after the other.

A container that comes or goes changes a few elements, in one transaction: what leads to it goes first, its guard when its link has gone.
Where that is refused (somebody flushed the tables), the tables are made anew as a whole; if that is refused too, nothing has changed,
here neither. Who needs no element costs no call.
"""

import asyncio
from collections.abc import Iterable, Sequence

from isopod.engine.network.filter import Bridge, Plug, render_added, render_guard, render_guard_removal, render_removed, render_table
from isopod.world.kernel import Kernel


class Rules:
    """The tables of an instance.

    Args:
        kernel: Applies them.
        table: Their name.
    """

    def __init__(self, kernel: Kernel, table: str) -> None:
        self._kernel = kernel
        self._table = table
        self._bridges: Sequence[Bridge] = ()
        self._plugs: dict[str, Plug] = {}
        self._has_guard = False
        self._lock = asyncio.Lock()

    async def begin(self, bridges: Sequence[Bridge], plugs: Iterable[Plug], *, has_guard: bool) -> None:
        """Make the tables as they should be.

        Args:
            bridges: All bridge networks.
            plugs: The containers on them.
            has_guard: Whether there is a bridge table of an earlier node.

        Raises:
            OSError: The kernel refused.
        """
        async with self._lock:
            self._bridges, self._plugs, self._has_guard = bridges, {plug.link: plug for plug in plugs}, has_guard
            await self._apply_whole()

    async def set_bridges(self, bridges: Sequence[Bridge]) -> None:
        """Change the list of networks. Raises OSError; nothing has changed then."""
        async with self._lock:
            before = self._bridges
            self._bridges = bridges
            try:
                await self._apply_whole()
            except BaseException:
                self._bridges = before
                raise

    async def add(self, plug: Plug) -> None:
        """Let a container's link in. Raises OSError; nothing has changed then."""
        async with self._lock:
            self._plugs[plug.link] = plug
            try:
                await self._change(render_added(self._table, plug))
            except BaseException:
                del self._plugs[plug.link]
                raise

    async def unpublish(self, link: str) -> None:
        """Let nothing lead to a link any more; its guard stays. One that is not there is fine. Raises OSError; nothing has changed then."""
        plug = self._plugs.get(link)
        if plug is not None and plug.ports:
            await self._reduce(link, plug._replace(ports=()))

    async def remove(self, link: str) -> None:
        """Take out all that was added for a link; one that is not there is fine. Raises OSError; nothing has changed then."""
        await self._reduce(link, None)

    async def _reduce(self, link: str, rest: Plug | None) -> None:
        async with self._lock:
            plug = self._plugs.pop(link, None)
            if plug is None:
                return
            gone = plug
            if rest is not None:
                self._plugs[link] = rest
                gone = plug._replace(mac="", bytes_per_s_out=None)
            try:
                await self._change(render_removed(self._table, gone))
            except BaseException:
                self._plugs[link] = plug
                raise

    async def _change(self, script: str) -> None:
        """Apply a change of elements; the guard is made when the first and removed when the last link needs it."""
        if not script:
            return
        if self._needs_guard != self._has_guard:
            await self._apply_whole()
            return
        try:
            await self._kernel.apply_filter(script)
        except OSError:
            await self._apply_whole()

    async def _apply_whole(self) -> None:
        plugs = list(self._plugs.values())
        script = render_table(self._table, self._bridges, plugs)
        if self._needs_guard:
            script += render_guard(self._table, plugs)
        elif self._has_guard:
            script += render_guard_removal(self._table)
        await self._kernel.apply_filter(script)
        self._has_guard = self._needs_guard

    @property
    def _needs_guard(self) -> bool:
        return any(plug.is_guarded for plug in self._plugs.values())
