"""Discovery: which sandboxes there are, by watching the folders in which each has one.

The kernel tells what comes and goes (inotify); nothing is asked again and again. Watched are the roots, all folders on the way to them (so
that a root may come late, vanish and come again), and the folders of sandboxes whose socket is not there yet. Each look at a name decides
anew, from what is on the disk now: a change that is told twice or late does no harm, and after lost ones everything is looked at.

    name in a root --> a folder, no symlink, a name that can be an id? --> its socket is there --> found
                                                                       `-> watch it; after SOCKET_WAIT_S: found all the same, as one that
                                                                           fails, and found once more when its socket comes
    name gone from all roots --> gone

Of two roots with one id the first that has a socket wins; a change of it is told as gone, then found. Where the kernel refuses to watch
(its limits on instances and watches), the roots are listed every `POLL_S` instead; and every `LOOK_S` in any case, for what no watch tells
(a file system mounted over a root).

Rules: nothing on the disk ends `run`; at most `sandboxes_max` sandboxes are known, those beyond are taken in when there is room.
Not here: asking them (`collector`), whose they are (`cri`, `local`). Source: inotify(7).
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Final, NamedTuple

from isopod.pulse.model import ID_BYTES_MAX, SOCKET_NAME, Root, Target
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.disk import FolderChange, FolderWatches
from isopod.world.world import World

SOCKET_WAIT_S: Final = 2.0
"""How long a new folder's socket is waited for before the sandbox is found without."""
LOOK_S: Final = 30.0
POLL_S: Final = 0.4
WATCH_AGAIN_S: Final = 60.0
"""How long it takes until the kernel is asked again for what it refused."""
REFUSED_MAX: Final = 1000
"""Names of no sandboxes that are remembered, so that each is counted and logged once."""
CHANGES_MAX: Final = 10_000
"""Changes that wait to be looked at; of more, everything is looked at instead."""
LOOKS_PER_TURN: Final = 64
_LOOKS_AGAIN_MAX: Final = 3
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR)
_OVERFLOW: Final = FolderChange("", "")
_TIME: Final = FolderChange("", "time")
_ROOM: Final = FolderChange("", "room")
"""Reasons to look at everything."""


class DiscoveryStatistics(NamedTuple):
    """What is known, and what happened since the beginning."""

    n_sandboxes: int
    n_waiting: int
    """Folders whose socket is not there yet."""
    n_found: int
    n_gone: int
    n_refused: int
    """Names that cannot be ids, and symlinks."""
    n_left_out: int
    """Sandboxes beyond the bound, at the last look at everything."""
    n_overflows: int
    """How often the kernel lost changes."""
    is_polling: bool
    """Whether the kernel refused to watch something."""


class Discovery:
    """Watches roots.

    Args:
        world: Whose disk.
        roots: In the order of precedence.
        on_found: Called with a sandbox that is there now; again when its socket came late.
        on_gone: Called with the id of one that is not there any more.
        logger: Told of roots that come and go, and of names that are refused.
        sandboxes_max: How many are known at most.
    """

    def __init__(
        self,
        world: World,
        roots: tuple[Root, ...],
        *,
        on_found: Callable[[Target], None],
        on_gone: Callable[[str], None],
        logger: Logger,
        sandboxes_max: int = 20_000,
    ) -> None:
        self._disk = world.disk
        self._roots = tuple(Root(os.path.normpath(root.path), root.runtime) for root in roots)
        self._on_found = on_found
        self._on_gone = on_gone
        self._logger = logger
        self._sandboxes_max = sandboxes_max
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._changes: dict[FolderChange, None] = {}
        self._overdue: dict[str, None] = {}
        self._watches: FolderWatches | None = None
        self._available = {root.path: False for root in self._roots}
        self._ways = _ways(self._roots)
        self._known: dict[str, Target] = {}
        self._bare: dict[str, None] = {}
        """Known ones that were found without a socket."""
        self._lacking: dict[str, tuple[str, ...]] = {}
        """The folders, by id, in which a socket is waited for."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._refused: dict[str, None] = {}
        self._is_polling = False
        self._left_out = {root.path: 0 for root in self._roots}
        self._unreadable: dict[str, int | None] = {}
        self._n_found = self._n_gone = self._n_refused = self._n_overflows = 0

    def available(self) -> dict[str, bool]:
        """Return which roots are there, by path."""
        return dict(self._available)

    def statistics(self) -> DiscoveryStatistics:
        """Return what is known and what happened."""
        return DiscoveryStatistics(
            n_sandboxes=len(self._known),
            n_waiting=len(self._lacking),
            n_found=self._n_found,
            n_gone=self._n_gone,
            n_refused=self._n_refused,
            n_left_out=sum(self._left_out.values()),
            n_overflows=self._n_overflows,
            is_polling=self._is_polling,
        )

    async def run(self) -> None:
        """Watch until cancelled. What is known stays known: a second run goes on from there."""
        try:
            while True:
                async with AsyncExitStack() as stack, TaskGroup("pulse discovery") as group:
                    self._watches = None
                    self._is_polling = False
                    try:
                        self._watches = await stack.enter_async_context(self._disk.watch_folders())
                    except OSError as error:
                        self._poll("folders", error)
                    listening = None if self._watches is None else group.create_task(self._listen(self._watches))
                    await self._work()
                    if listening is not None:
                        listening.cancel()
        finally:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            self._lacking.clear()

    # --- what is to be looked at ------------------------------------------------------------------------------------------------------

    async def _listen(self, watches: FolderWatches) -> None:
        async for change in watches:
            if len(self._changes) >= CHANGES_MAX:
                self._changes = {_OVERFLOW: None}
            self._changes[change] = None
            self._wake.set()

    async def _work(self) -> None:
        """Look at what changed; return when it is time to ask the kernel again to watch what it refused to."""
        again_s = self._loop.time() + WATCH_AGAIN_S
        self._lacking.clear()
        await self._look_at_all()
        while not self._is_polling or self._loop.time() < again_s:
            try:
                async with asyncio.timeout(POLL_S if self._is_polling else LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                self._changes[_TIME] = None
            self._wake.clear()
            while self._changes or self._overdue:
                await self._step()

    async def _step(self) -> None:
        """Look at all that changed up to now; of what comes meanwhile, the next step sees more in one."""
        changes, self._changes = self._changes, {}
        overdue, self._overdue = self._overdue, {}
        for number, change in enumerate(changes):
            if number % LOOKS_PER_TURN == LOOKS_PER_TURN - 1:
                await asyncio.sleep(0)
            await self._on_change(change)
        for identifier in overdue:
            await self._look(identifier, is_overdue=True)

    async def _on_change(self, change: FolderChange) -> None:
        if not change.folder:
            self._n_overflows += change == _OVERFLOW
            await self._look_at_all()
            return
        for name, root in self._ways.get(change.folder, ()):
            if change.name in ("", name):
                await self._look_at_root(root)
        if change.folder in self._available:
            await (self._look(change.name) if change.name else self._look_at_root(self._root(change.folder)))
            return
        folder, _, identifier = change.folder.rpartition("/")
        if change.name in ("", SOCKET_NAME) and folder in self._available and identifier in self._lacking:
            await self._look(identifier)

    # --- looking ----------------------------------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> None:
        for root in self._roots:
            await self._look_at_root(root)

    async def _look_at_root(self, root: Root) -> None:
        """Compare what a root holds with what is known, and watch it and the way to it."""
        names = await self._names(root)
        if (names is not None) != self._available[root.path]:
            self._available[root.path] = names is not None
            self._logger.info("pulse.root", path=root.path, available=names is not None)
        present = dict.fromkeys(names or ())
        due = self._due(root, present)
        new = [each for each in present if each not in self._known and each not in due]
        for number, identifier in enumerate((*due, *new)):
            if number % LOOKS_PER_TURN == LOOKS_PER_TURN - 1:
                await asyncio.sleep(0)
            if number >= len(due) and self._is_full():
                self._leave_out(root, len(due) + len(new) - number)
                return
            await self._look(identifier)
        self._left_out[root.path] = 0

    async def _names(self, root: Root) -> Sequence[str] | None:
        """Watch a root and the way to it; return what is in it, None if it is not there."""
        if not self._watch_way(root):
            return None
        try:
            names = await self._disk.list(root.path)
            is_there = bool(names) or await self._disk.stat(f"{root.path}/.") is not None
        except OSError as error:
            if error.errno not in _ABSENT and self._unreadable.get(root.path) != error.errno:
                self._unreadable[root.path] = error.errno
                self._logger.warning("pulse.root_unreadable", path=root.path, why=error.strerror or str(error))
            return None
        return names if is_there else None

    def _due(self, root: Root, present: Mapping[str, None]) -> dict[str, None]:
        """Return those that must be looked at again although they are known: what went, and what waits for a socket unwatched."""
        here = f"{root.path}/"
        due = {each: None for each, target in self._known.items() if each not in present and target.socket.startswith(here)}
        for each in (*self._lacking, *self._bare):
            if self._is_polling or each not in present or each not in self._lacking:
                due[each] = None
        return due

    def _watch_way(self, root: Root) -> bool:
        """Watch the folders that lead to a root, as far as they are there, and the root; return whether it is."""
        if self._watches is None:
            return True  # looking shows whether it is
        way = [*_way(root.path), root.path]
        for number, path in enumerate(way):
            if not self._watch(path):
                for beyond in way[number:]:
                    self._watches.remove(beyond)
                return False
        return True

    def _watch(self, path: str) -> bool:
        """Watch a folder; return whether it is there."""
        assert self._watches is not None
        try:
            self._watches.add(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return False
            self._poll(path, error)
        return True

    def _poll(self, path: str, error: OSError) -> None:
        if not self._is_polling:
            self._is_polling = True
            hint = "raise fs.inotify.max_user_watches or max_user_instances" if error.errno in (errno.ENOSPC, errno.EMFILE) else ""
            self._logger.warning("pulse.not_watched", path=path, why=error.strerror or str(error), lists_every_s=POLL_S, hint=hint)

    async def _look(self, identifier: str, *, is_overdue: bool = False) -> None:
        """Find out what is true of one name now, and tell what is new."""
        if not is_identifier(identifier):
            self._refuse(identifier, "it cannot be an id")
            return
        target, has_socket, lacking = await self._find(identifier)
        for _ in range(_LOOKS_AGAIN_MAX):
            if not self._wait_for_socket(identifier, lacking):
                break
            target, has_socket, lacking = await self._find(identifier)  # the socket may have come before the watch
        known = self._known.get(identifier)
        if known is not None and (target is None or target.socket != known.socket):
            self._forget(identifier)
            known = None
        if target is None:
            return
        if known is None and not has_socket and not is_overdue:
            self._start_waiting(identifier)
        elif known is None or (has_socket and identifier in self._bare):
            self._announce(target, has_socket=has_socket)

    async def _find(self, identifier: str) -> tuple[Target | None, bool, tuple[str, ...]]:
        """Return a sandbox as it is now, whether it has a socket, and the folders before that in which there is none yet."""
        lacking: list[str] = []
        first: Target | None = None
        for root in self._roots:
            folder = f"{root.path}/{identifier}"
            target = Target(identifier, root.runtime, f"{folder}/{SOCKET_NAME}")
            try:
                found = await self._disk.stat(folder)
                socket = await self._disk.stat(target.socket) if found is not None and found.is_directory else None
            except OSError as error:
                self._logger.debug("pulse.unreadable", path=folder, why=error.strerror or str(error))
                continue
            if found is None or not found.is_directory:
                if found is not None and found.is_symlink:
                    self._refuse(identifier, "its folder is a symlink")
                continue
            if socket is not None and not socket.is_directory and not socket.is_symlink:
                return target, True, tuple(lacking)
            first = first or target
            lacking.append(folder)
        return first, False, tuple(lacking)

    def _wait_for_socket(self, identifier: str, lacking: tuple[str, ...]) -> bool:
        """Watch the folders in which a socket may still come, and no others; return whether that is new for one of them."""
        before = self._lacking.pop(identifier, ())
        for folder in before:
            if folder not in lacking and self._watches is not None:
                self._watches.remove(folder)
        if not lacking:
            self._stop_waiting(identifier)
            return False
        if identifier not in self._known and not before and self._is_full():
            return False
        self._lacking[identifier] = lacking
        new = [folder for folder in lacking if folder not in before]
        if self._watches is not None:
            for folder in new:
                self._watch(folder)
        return bool(new)

    # --- what is known ----------------------------------------------------------------------------------------------------------------

    def _announce(self, target: Target, *, has_socket: bool) -> None:
        if target.id not in self._known and len(self._known) >= self._sandboxes_max:
            root = next(each for each in self._roots if target.socket.startswith(f"{each.path}/"))
            self._leave_out(root, self._left_out[root.path] + 1)
            return
        self._stop_waiting(target.id)
        if has_socket:
            self._bare.pop(target.id, None)
        else:
            self._bare[target.id] = None
        self._n_found += target.id not in self._known
        self._known[target.id] = target
        self._logger.debug("pulse.sandbox_found", sandbox=target.id, runtime=target.runtime, has_socket=has_socket)
        self._tell(lambda: self._on_found(target), target.id)

    def _forget(self, identifier: str) -> None:
        was_full = self._is_full()
        del self._known[identifier]
        self._bare.pop(identifier, None)
        self._n_gone += 1
        self._logger.debug("pulse.sandbox_gone", sandbox=identifier)
        self._tell(lambda: self._on_gone(identifier), identifier)
        if was_full:
            self._changes[_ROOM] = None
            self._wake.set()

    def _tell(self, call: Callable[[], None], identifier: str) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  whatever a listener does, the others are told
            self._logger.error("pulse.listener_failed", sandbox=identifier, why=f"{type(error).__name__}: {error}")

    def _start_waiting(self, identifier: str) -> None:
        if identifier not in self._timers and identifier in self._lacking:
            self._timers[identifier] = self._loop.call_later(SOCKET_WAIT_S, self._end_waiting, identifier)

    def _end_waiting(self, identifier: str) -> None:
        del self._timers[identifier]
        self._overdue[identifier] = None
        self._wake.set()

    def _stop_waiting(self, identifier: str) -> None:
        timer = self._timers.pop(identifier, None)
        if timer is not None:
            timer.cancel()

    def _is_full(self) -> bool:
        return len(self._known) + len(self._timers) >= self._sandboxes_max

    def _leave_out(self, root: Root, n_sandboxes: int) -> None:
        if not any(self._left_out.values()):
            self._logger.warning("pulse.too_many_sandboxes", sandboxes_max=self._sandboxes_max, n_left_out=n_sandboxes)
        self._left_out[root.path] = n_sandboxes

    def _refuse(self, name: str, why: str) -> None:
        if name in self._refused:
            return
        if len(self._refused) >= REFUSED_MAX:
            del self._refused[next(iter(self._refused))]
        self._refused[name] = None
        self._n_refused += 1
        self._logger.warning("pulse.refused", name=ascii(name[: 2 * ID_BYTES_MAX]), why=why)

    def _root(self, path: str) -> Root:
        return next(root for root in self._roots if root.path == path)


def is_identifier(name: str) -> bool:
    """Return whether a name can be a sandbox's id: no way to other folders, nothing that cannot be seen, not too long."""
    return bool(name) and name not in {".", ".."} and "/" not in name and name.isprintable() and len(name.encode()) <= ID_BYTES_MAX


def _way(path: str) -> list[str]:
    """Return the folders that lead to a path, from "/" on."""
    parts = path.split("/")[1:-1]
    return ["/", *("/" + "/".join(parts[: number + 1]) for number in range(len(parts)))]


def _ways(roots: Iterable[Root]) -> dict[str, list[tuple[str, Root]]]:
    """Return, for each folder on the way to roots, the names in it that lead on, and to which root."""
    found: dict[str, list[tuple[str, Root]]] = {}
    for root in roots:
        steps = [*_way(root.path), root.path]
        for folder, following in pairwise(steps):
            found.setdefault(folder, []).append((following.rpartition("/")[2], root))
    return found
