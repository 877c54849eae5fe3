"""Daemon: what a node's main function needs of the machine before and around its World: environment, config file, group, signals.

Rules: nothing here starts a thread, since the node's private mount namespace is entered after it (setns(2) wants one thread).
"""

import asyncio
import contextlib
import gc
import grp
import os
import select
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Final, Protocol

STDERR = 2
CONFIG_BYTES_MAX: Final = 1 << 20
GARBAGE_OBJECTS: Final = 20_000
"""How many more objects than before may be there when cycles are looked for: some megabytes."""
LEFT_OVER_S: Final = 1.0
"""How long tasks may take to end that are left when the main one has ended."""
_STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def environment() -> Mapping[str, str]:
    """Return the process's environment."""
    return os.environ


def set_umask() -> None:
    """Let files have the modes that are asked for, whatever the caller's shell withholds."""
    os.umask(0o022)


def keep_much() -> None:
    """Look for cycles of garbage seldom: for a process whose memory is mostly what stays, and is walked through at each look.

    What is in no cycle goes when its last reference does, as ever.
    """
    gc.set_threshold(GARBAGE_OBJECTS, 20, 20)


def is_root() -> bool:
    """Return whether the process may do everything."""
    return os.geteuid() == 0


def read_bytes(path: str) -> bytes | None:
    """Return a file's contents, None if there is no such file. OSError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(CONFIG_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_names(folder: str) -> list[str]:
    """Return the sorted names in a folder, [] if there is none."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def group_id(name: str) -> int | None:
    """Return a group's number, None if the machine has no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def write_stderr(line: bytes) -> None:
    """Write a log line; a reader that went away raises BrokenPipeError, which the logger counts."""
    os.write(STDERR, line)


def write_some_stderr(data: bytes) -> int:
    """Write what standard error takes without waiting and return how many bytes that was; BrokenPipeError if its reader went away.

    The descriptor is shared with whoever started the process and stays blocking: a pipe that poll(2) calls writable takes PIPE_BUF bytes.
    """
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    written = 0
    while written < len(data) and poll.poll(0):
        written += os.write(STDERR, data[written : written + select.PIPE_BUF])
    return written


@contextlib.contextmanager
def on_hangup(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in the running loop for each SIGHUP that comes during the block."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


class SignalActions(Protocol):
    """What a daemon's signals do; each method gets the signal's name. `runtime.shutdown.ShutdownSignals` is one."""

    def stop(self, name: str) -> None:
        """Go down, in order: the first SIGTERM or SIGINT."""

    def force(self, name: str) -> None:
        """Go down without waiting: SIGQUIT, or the second SIGTERM or SIGINT."""

    def status(self, name: str) -> None:
        """Say how things are: SIGUSR1."""

    def dump(self, name: str) -> None:
        """Say all that is counted: SIGUSR2."""


@contextlib.contextmanager
def handle_signals(actions: SignalActions) -> Iterator[None]:
    """Call a method of `actions` in the running loop for each signal that comes during the block.

    After a forced stop SIGTERM, SIGINT and SIGQUIT have their default effect again: a third one ends a process that does not answer.
    """
    loop = asyncio.get_running_loop()
    asked: list[str] = []

    def on_stop(name: str) -> None:
        asked.append(name)
        if len(asked) == 1:
            actions.stop(name)
        else:
            on_force(name)

    def on_force(name: str) -> None:
        asked.append(name)
        for signum in _STOPS:
            loop.remove_signal_handler(signum)
        actions.force(name)

    handlers: dict[signal.Signals, Callable[[str], None]] = {
        signal.SIGTERM: on_stop,
        signal.SIGINT: on_stop,
        signal.SIGQUIT: on_force,
        signal.SIGUSR1: actions.status,
        signal.SIGUSR2: actions.dump,
    }
    for signum, handler in handlers.items():
        loop.add_signal_handler(signum, handler, signum.name)
    try:
        yield
    finally:
        for signum in handlers:
            loop.remove_signal_handler(signum)


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine to its end on a loop, end what tasks it left, close the loop."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(_end_tasks())
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


async def _end_tasks() -> None:
    """Cancel what a forced way down left running, and give it a moment. One that does not end even then is let go of."""
    left = [task for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name) if task is not asyncio.current_task()]
    ended = asyncio.Event()

    def on_done(_: asyncio.Task[Any]) -> None:
        if all(task.done() for task in left):
            ended.set()

    for task in left:
        task.add_done_callback(on_done)
        task.cancel()
    if left:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEFT_OVER_S):
                await ended.wait()
