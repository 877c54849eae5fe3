"""Live reload: what changed between two configurations, and who applies it.

Only settings marked live are applied while the program runs; the others are reported as waiting for a restart. A file that cannot be read
or does not fit changes nothing: the old configuration stays, and the outcome says why.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic

import msgspec

from isopod.runtime.config.loader import Loaded
from isopod.runtime.config.schema import T, flatten, leaves, rebuild
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.disk import Disk
from isopod.world.errors import IsopodError, from_os_error

DEBOUNCE_S: Final = 0.25
"""So long after a change it is waited for further ones: editors and deployments write in several steps."""


class Change(msgspec.Struct, frozen=True):
    """One setting that differs. None stands for a section that is not there."""

    key: str
    old: object
    new: object
    is_live: bool


class Outcome(msgspec.Struct, frozen=True):
    """What a reload did."""

    applied: tuple[Change, ...] = ()
    needs_restart: tuple[Change, ...] = ()
    error: str = ""
    """Why nothing, or not all, was applied; "" if all went well."""


def diff(old: T, new: T) -> tuple[Change, ...]:
    """Return the settings in which two configurations of one schema differ, in the schema's order."""
    before, after = flatten(old), flatten(new)
    live = {leaf.key for leaf in leaves(type(old)) if leaf.is_live}
    keys = dict.fromkeys((*before, *after))
    return tuple(Change(key, before.get(key), after.get(key), key in live) for key in keys if before.get(key) != after.get(key))


class LiveConfig(Generic[T]):
    """The configuration a program runs by, and those who want to know when it changes.

    Args:
        loaded: The one it started with.
        read: Reads it anew: files, environment and flags as at the start.
        logger: Where reloads are reported.
    """

    def __init__(self, loaded: Loaded[T], read: Callable[[], Awaitable[Loaded[T]]], logger: Logger) -> None:
        self._loaded = loaded
        self._read = read
        self._logger = logger
        self._subscribers: list[tuple[str, Callable[[object], None]]] = []
        self._busy = asyncio.Lock()

    @property
    def current(self) -> T:
        """What holds now: live changes are in it, those that wait for a restart are not."""
        return self._loaded.config

    @property
    def loaded(self) -> Loaded[T]:
        """The same, with the origins of the values."""
        return self._loaded

    def subscribe(self, key: str, apply: Callable[[object], None]) -> Callable[[], None]:
        """Call `apply` with a setting's new value when a reload changes it.

        Args:
            key: Of a setting marked live.
            apply: Quick; what it raises is reported, and the others are still called.

        Returns:
            What ends the subscription.

        Raises:
            ValueError: The setting is not live.
        """
        if not any(leaf.key == key and leaf.is_live for leaf in leaves(type(self.current))):
            raise ValueError(f"{key} is no live setting")
        entry = (key, apply)
        self._subscribers.append(entry)
        return lambda: self._subscribers.remove(entry)

    async def reload(self) -> Outcome:
        """Read the configuration anew and apply what can be applied. Never raises for what the files say."""
        async with self._busy:
            try:
                fresh = await self._read()
            except (IsopodError, OSError) as error:
                problem = error if isinstance(error, IsopodError) else from_os_error(error, "read", "the configuration")
                self._logger.error("config.refused", error=problem.message, hint=problem.hint)
                return Outcome(error=problem.message)
            changes = diff(self.current, fresh.config)
            applied = tuple(change for change in changes if change.is_live)
            waiting = tuple(change for change in changes if not change.is_live)
            outcome = Outcome(applied, waiting, self._apply(applied))
            values = flatten(self.current) | {change.key: change.new for change in applied}
            origins = dict(self._loaded.origins) | {change.key: fresh.origin(change.key) for change in applied}
            self._loaded = Loaded(rebuild(type(self.current), values), origins, fresh.notes, fresh.files)
            if changes:
                self._logger.info(
                    "config.reloaded", applied=[change.key for change in applied], needs_restart=[change.key for change in waiting]
                )
            return outcome

    def _apply(self, changes: Sequence[Change]) -> str:
        problem = ""
        for change in changes:
            for key, apply in tuple(self._subscribers):
                if key == change.key:
                    try:
                        apply(change.new)
                    except Exception as error:  # noqa: BLE001 - one subscriber's failure is not the others'
                        problem = f"{key}: {error}"
                        self._logger.error("config.not_applied", key=key, error=str(error))
        return problem

    async def watch(self, disk: Disk, folders: Sequence[str], *, debounce_s: float = DEBOUNCE_S) -> None:
        """Reload when something in these folders changes, until cancelled. Folders that do not exist are passed over.

        Args:
            disk: Where they are.
            folders: Of the configuration file and of its drop-ins.
            debounce_s: How long to wait for further changes.
        """
        changed = asyncio.Event()
        async with TaskGroup("config-watch") as group:
            for folder in dict.fromkeys(folders):
                found = await disk.stat(folder)
                if found is not None and (found.is_directory or found.is_symlink):
                    group.create_task(self._watch_folder(disk, folder, changed), name=f"config-watch {folder}")
            while True:
                await changed.wait()
                await asyncio.sleep(debounce_s)
                changed.clear()
                await self.reload()

    async def _watch_folder(self, disk: Disk, folder: str, changed: asyncio.Event) -> None:
        try:
            async with disk.watch(folder) as names:
                async for _ in names:
                    changed.set()
        except OSError as error:  # no watches left, or the folder went: a reload can still be asked for
            self._logger.warning("config.not_watched", folder=folder, error=str(error))
