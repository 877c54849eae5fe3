"""Followed: what a small file with secrets means, kept up to date while it may change.

The file's folder is watched; a change is taken up after a short pause. A file that cannot be read, or makes no sense, leaves what held
before, and the log says why, once. What the file holds is never logged.
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
        self._task: asyncio.Task[None] | None = None

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
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="pulse secret")

    async def close(self) -> None:
        """Follow it no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def reload(self) -> None:
        """Read the file again now. Raises as `open`; what held before then holds on."""
        found = await self._read()
        if found != self._value:
            self._value = found
            self._logger.info("pulse.secret_read", file=self.path)

    async def _read(self) -> T:
        try:
            content = await self._disk.read(self.path, n_bytes_max=self._n_bytes_max)
        except OSError as error:
            raise from_os_error(error, "read", self.path) from error
        return self._parse(content)

    async def _follow(self) -> None:
        said = ""
        while True:
            try:
                async with self._disk.watch(os.path.dirname(self.path) or "/") as watch:
                    said = await self._look(said)  # for what happened before the watch began
                    async for name in watch:
                        await asyncio.sleep(DEBOUNCE_S)
                        said = await self._look(said)
                        if not name:  # events were lost, or the folder is gone: watch anew
                            break
            except OSError as error:
                self._logger.warning("pulse.secret_not_watched", why=str(error))
            await asyncio.sleep(WATCH_RETRY_S)

    async def _look(self, said: str) -> str:
        """Read the file again; return what was said about why that failed, "" if it did not."""
        try:
            await self.reload()
        except IsopodError as error:
            if error.message != said:
                self._logger.warning("pulse.secret_not_read", why=error.message)
            return error.message
        return ""
