"""Prepared namespaces: a pool per network that hides what a namespace and a veth pair cost. See `Wiring` for what one of them is.
Taps of virtual machines have no pool: one takes about a millisecond, beside the second that a machine needs.

Rules: `take` never waits for the pool: when it is empty, one is made on the spot. Each `take` wakes one background filler, which makes
one at a time and leaves the other processor to the container that starts. If filling fails it stops until the next `take`, whose caller
gets the error if it lasts. Closing waits for the filler instead of cancelling it: what the kernel was just making would belong to nobody.

Measured (Linux 6.18, 2 processors): a namespace 1.3 ms, a veth pair 1.2 ms, its address 0.3 ms; removing a veth pair 36 ms, nearly all
of it waiting for other processors to have looked away (RCU), so that several side by side take no longer than one. Hence a small pool,
and `unpin` (0.6 ms) apart from `unlink`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from isopod.engine.network import names
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

GUEST_LINK: Final = "eth0"
UNLINKERS: Final = 3
"""Links that are removed at one time: each keeps a thread waiting for some tens of milliseconds."""


class Wiring:
    """Makes and removes what hangs on a bridge: a namespace's file and the host end of its veth pair, both of one name; or a tap.

    Args:
        world: Its kernel and chance are used.
        folder: Where namespaces are pinned.
        prefix: The instance's.
    """

    def __init__(self, world: World, *, folder: str, prefix: str) -> None:
        self._kernel = world.kernel
        self._random = world.random
        self._folder = folder
        self._prefix = prefix
        self._used: dict[str, None] = {}
        self._unlinkers = asyncio.Semaphore(UNLINKERS)

    def path(self, name: str) -> str:
        """Return the namespace's file."""
        return f"{self._folder}/{name}"

    def claim(self, name: str) -> None:
        """Know of one that exists already."""
        self._used[name] = None

    async def make(self, bridge: str) -> str:
        """Make one, without an address, and return its name. Do not cancel.

        Raises:
            OSError: The kernel refused; nothing is left behind.
        """
        name = self._draw(names.veth)
        try:
            await self._kernel.create_namespace(self.path(name))
            await self._kernel.create_veth(name, bridge=bridge, namespace=self.path(name), guest_name=GUEST_LINK)
        except BaseException:
            await self.remove(name)
            raise
        return name

    async def join(self, bridge: str, process: ProcessIdentity) -> str:
        """Hang the namespace of a process that runs on a bridge, without an address, and return the name of the two. Do not cancel.

        Raises:
            OSError: The kernel refused, or the process is gone; nothing is left behind.
        """
        name = self._draw(names.veth)
        try:
            await self._kernel.pin_namespace(self.path(name), pid=process.pid, started_ticks=process.started_ticks)
            await self._kernel.create_veth(name, bridge=bridge, namespace=self.path(name), guest_name=GUEST_LINK)
        except BaseException:
            await self.remove(name)
            raise
        return name

    def draw_tap(self) -> str:
        """Return the name of a tap that is to be made."""
        return self._draw(names.tap)

    async def make_tap(self, name: str, bridge: str) -> None:
        """Make a tap of a drawn name. Do not cancel.

        Raises:
            OSError: The kernel refused; nothing is left behind.
        """
        await self._kernel.create_tap(name, bridge=bridge)

    async def unpin(self, name: str) -> None:
        """End a namespace: at once for us, some milliseconds later for the kernel; where there is none (a tap) is fine. Do not cancel.

        Raises:
            OSError: The kernel refused; it may be tried again.
        """
        await self._kernel.delete_namespace(self.path(name))

    async def unlink(self, name: str) -> None:
        """Return when the link is gone, and its other end with it; one that is not there is fine. Do not cancel.

        Raises:
            OSError: The kernel refused; it may be tried again.
        """
        async with self._unlinkers:
            await self._kernel.delete_link(name)
        self._used.pop(name, None)

    async def remove(self, name: str) -> None:
        """Do both, the second even if the first fails. Do not cancel.

        Raises:
            OSError: The kernel refused; it may be tried again.
        """
        try:
            await self.unpin(name)
        finally:
            await self.unlink(name)

    async def remove_all(self, doomed: Iterable[str]) -> None:
        """Remove several, side by side. Do not cancel.

        Raises:
            OSError: The kernel refused one; the others are gone.
        """
        results = await asyncio.gather(*(self.remove(name) for name in doomed), return_exceptions=True)
        for failure in results:
            if failure is not None:
                raise failure

    def _draw(self, kind: Callable[[str, str], str]) -> str:
        while True:
            name = kind(self._prefix, self._random.token_hex(names.DIGITS)[: names.DIGITS])
            if name not in self._used:
                self._used[name] = None
                return name


class Pool:
    """Ready namespaces on one bridge.

    Args:
        wiring: Makes them.
        bridge: The link they hang on.
        size: How many are kept ready; 0 for none.
        logger: Told when filling fails.
        metrics: Where hits and misses are counted, or None.
    """

    def __init__(self, wiring: Wiring, bridge: str, *, size: int, logger: Logger, metrics: Registry | None) -> None:
        self._wiring = wiring
        self._bridge = bridge
        self._size = size
        self._logger = logger
        self._ready: deque[str] = deque()
        self._filler: asyncio.Task[None] | None = None
        self._is_closed = False
        text = "Namespaces taken for containers, by whether one was ready"
        self._hits, self._misses = (
            None if metrics is None else metrics.counter("isopod_network_pool_takes_total", text, bridge=bridge, ready=ready)
            for ready in ("yes", "no")
        )

    @property
    def n_ready(self) -> int:
        """How many are ready now."""
        return len(self._ready)

    def fill_nowait(self) -> None:
        """Let the filler work if there is something to do."""
        if not self._is_closed and len(self._ready) < self._size and (self._filler is None or self._filler.done()):
            self._filler = asyncio.create_task(self._fill(), name=f"fill the pool of {self._bridge}")

    async def wait_full(self) -> None:
        """Return when the filler rests: the pool is full, closed, or could not be filled."""
        if self._filler is not None:
            await asyncio.gather(self._filler)

    async def take(self) -> str:
        """Return the name of one that is the caller's from now on. Do not cancel.

        Raises:
            OSError: None was ready and the kernel refused another.
        """
        counter = self._hits if self._ready else self._misses
        if counter is not None:
            counter.inc()
        name = self._ready.popleft() if self._ready else None
        self.fill_nowait()
        return await self._wiring.make(self._bridge) if name is None else name

    async def close(self) -> None:
        """Stop filling and remove what is ready. May be called again. Do not cancel.

        Raises:
            OSError: The kernel refused; the next start of the node removes what is left.
        """
        self._is_closed = True
        await self.wait_full()
        doomed = list(self._ready)
        self._ready.clear()
        await self._wiring.remove_all(doomed)

    async def _fill(self) -> None:
        try:
            while len(self._ready) < self._size and not self._is_closed:
                self._ready.append(await self._wiring.make(self._bridge))
        except OSError as error:
            self._logger.warning("network_pool_not_filled", bridge=self._bridge, why=str(error))
