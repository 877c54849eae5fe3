"""Daemon: what a node's main function needs of the machine before and around its World: environment, config file, group, signals.

Rules: nothing here starts a thread, since the node's private mount namespace is entered after it (setns(2) wants one thread).
"""

import asyncio
import contextlib
import grp
import os
import signal
from collections.abc import Coroutine, Mapping
from typing import Any

STDERR = 2


def environment() -> Mapping[str, str]:
    """Return the process's environment."""
    return os.environ


def set_umask() -> None:
    """Let files have the modes that are asked for, whatever the caller's shell withholds."""
    os.umask(0o022)


def is_root() -> bool:
    """Return whether the process may do everything."""
    return os.geteuid() == 0


def read_text(path: str) -> str | None:
    """Return a text file's contents, None if there is no such file.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def group_id(name: str) -> int | None:
    """Return a group's number, None if the machine has no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def write_stderr(line: bytes) -> None:
    """Write a log line; a reader that went away raises BrokenPipeError, which the logger counts."""
    os.write(STDERR, line)


async def wait_signal() -> str:
    """Return the name of the next SIGTERM or SIGINT; later ones then have their default effect, so a second one ends the process."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[str] = loop.create_future()

    def on(signum: signal.Signals) -> None:
        if not came.done():
            came.set_result(signum.name)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on, signum)
    try:
        return await came
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine to its end on a loop and close the loop."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
