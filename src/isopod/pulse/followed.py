"""Followed: what a small file with secrets means, kept up to date while it may change.

The file's folder is watched; a change is taken up after a short pause. The file is read again every REREAD_S too: of one that is a link
into another folder, as Kubernetes' secrets are, the folder that is watched tells nothing. A file that cannot be read, or makes no sense,
leaves what held before, and the log says why, once. What the file holds is never logged.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from isopod.runtime.logger import Logger
from isopod.world.disk import Disk
from isopod.world.errors import IsopodError, from_os_error

DEBOUNCE_S: Final = 0.2
WATCH_RETRY_S: Final = 5.0
REREAD_S: Final = 5.0
READ_HINT: Final = "the file must be there, and this process must be allowed to read it"
T = TypeVar("T")


class Followed(Generic[T]):
    """What a file means, between `open` and `close`.

    Args:
        disk: Where it lies.
        path: The file's.
        parse: Makes of its contents what they mean; raises InvalidArgument.
        logger: Told when that changed, or cannot be had.
        n_bytes_max: Of the file.
    """

    def __init__(self, disk: Disk, path: str, parse: Callable[[bytes], T], *, logger: Logger, n_bytes_max: int = 4096) -> None:
        self.path: Final = path
        self._disk = disk
        self._parse = parse
        self._logger = logger
        self._n_bytes_max = n_bytes_max
        self._value: T | None = None
        self._said = ""
        """Why the file could not be read the last time, "" if it could."""
        self._unwatched = ""
        """The same of watching its folder."""
        self._reading = asyncio.Lock()  # of two reads at one time the older one must not win
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def value(self) -> T | None:
        """What holds; None before `open`."""
        return self._value

    async def open(self) -> None:
        """Read the file, and follow it.

        Raises:
            UnavailableError: It cannot be read.
            InvalidArgument: It makes no sense.
        """
        self._value = await self._read()
        loop = asyncio.get_running_loop()
        self._tasks = tuple(loop.create_task(each, name="pulse secret") for each in (self._follow(), self._again()))

    async def close(self) -> None:
        """Follow it no more."""
        tasks, self._tasks = self._tasks, ()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reload(self) -> None:
        """Read the file again now. Raises as `open`; what held before then holds on."""
        async with self._reading:
            found = await self._read()
            self._said = ""
            if found != self._value:
                self._value = found
                self._logger.info("pulse.secret_read", file=self.path)

    async def _read(self) -> T:
        try:
            content = await self._disk.read(self.path, n_bytes_max=self._n_bytes_max)
        except OSError as error:
            failure = from_os_error(error, "read", self.path)
            failure.hint = failure.hint or READ_HINT
            raise failure from error
        return self._parse(content)

    async def _follow(self) -> None:
        while True:
            try:
                async with self._disk.watch(os.path.dirname(self.path) or "/") as watch:
                    self._unwatched = ""
                    await self._look()  # for what happened before the watch began
                    async for name in watch:
                        await asyncio.sleep(DEBOUNCE_S)
                        await self._look()
                        if not name:  # events were lost, or the folder is gone: watch anew
                            break
            except OSError as error:
                if str(error) != self._unwatched:
                    self._unwatched = str(error)
                    self._logger.warning("pulse.secret_not_watched", why=self._unwatched)
            await asyncio.sleep(WATCH_RETRY_S)

    async def _again(self) -> None:
        while True:
            await asyncio.sleep(REREAD_S)
            await self._look()

    async def _look(self) -> None:
        """Read the file again; say why that failed, once."""
        try:
            await self.reload()
        except IsopodError as error:
            if error.message != self._said:
                self._said = error.message
                self._logger.warning("pulse.secret_not_read", why=error.message)
