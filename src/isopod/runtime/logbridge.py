"""What libraries say through the stdlib's `logging` comes out of isopod's logger: one stream of lines, in one form.

The event is "log", the library's logger and its words are facts. Levels below the bridge's are not even formatted. Records of other threads
are handed over to the loop the bridge was made in: a logger and its sink belong to one thread.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from isopod.runtime.logger import LEVELS, Level, Logger

EVENT: Final = "log"


class BridgeHandler(logging.Handler):
    """Hands records on to a logger.

    Args:
        logger: Where they go.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger
        self._own_thread = _thread_of(logging.LogRecord(EVENT, 0, "", 0, "", None, None))
        self._loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or let the loop's thread write it."""
        if self._loop is None or _thread_of(record) == self._own_thread:
            self._write(record)
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._write, record)

    def _write(self, record: logging.LogRecord) -> None:
        """Write one record; one that cannot be formatted is written as it is."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = f"{record.msg} {record.args}"
        facts: dict[str, object] = {"logger": record.name, "message": message}
        if record.exc_info:
            facts["traceback"] = logging.Formatter().formatException(record.exc_info)
        if record.levelno >= logging.ERROR:
            self._logger.error(EVENT, **facts)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(EVENT, **facts)
        elif record.levelno >= logging.INFO:
            self._logger.info(EVENT, **facts)
        else:
            self._logger.debug(EVENT, **facts)


def _thread_of(record: logging.LogRecord) -> int | None:
    return record.thread


def bridge_logging(logger: Logger, *, level: Level = "warning", name: str = "") -> Callable[[], None]:
    """Let a logger of the stdlib, by default the root of all, write to `logger` alone.

    Args:
        logger: Where records go.
        level: The least level handed on.
        name: The stdlib's logger.

    Returns:
        What puts back its handlers and level.
    """
    root = logging.getLogger(name or None)
    handlers, before, propagates = root.handlers[:], root.level, root.propagate
    bridge = BridgeHandler(logger)
    root.handlers[:] = [bridge]
    root.setLevel(LEVELS[level])
    root.propagate = False

    def undo() -> None:
        root.handlers[:] = handlers
        root.setLevel(before)
        root.propagate = propagates

    return undo
