"""The first code of a shard's process: pin, find out whether the starter still lives, make loop and World, run the entry.

SIGTERM, SIGINT and SIGHUP do nothing here: a service manager sends them to every process of a program, but it is shard 0 that shuts
down, in its order, and tells the others. kill -9 works as ever.
"""

import asyncio
import ctypes
import os
import signal
import socket
import sys
from importlib import import_module
from typing import Final

from isopod.world.host.daemon import keep_much
from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.host.shards_link import HostLink
from isopod.world.host.world import make_host_world
from isopod.world.shards import Entry

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def main(arguments: tuple[str, int, int, int, LoopKind]) -> None:
    """Run a shard to its end.

    Args:
        arguments: Entry, the link's descriptor, the starter's pid, the processor (-1 for any) and the kind of loop.
    """
    entry, link_fd, parent, cpu, kind = arguments
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _nothing)  # not SIG_IGN: programs that we start would inherit that
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    libc.prctl(_PR_SET_NAME, os.fsencode(sys.argv[1] if len(sys.argv) > 1 else "shard"), 0, 0, 0)
    if os.getppid() != parent:  # it died before we could ask to be told
        return
    if cpu >= 0:
        os.sched_setaffinity(0, [cpu])
    keep_much()
    loop = new_loop(kind)
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_run(entry, link_fd))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _run(entry: str, link_fd: int) -> None:
    link = HostLink(socket.socket(fileno=link_fd))
    world = make_host_world()
    try:
        module, _, name = entry.partition(":")
        function: Entry = getattr(import_module(module), name)
        await function(world, link)
    finally:
        link.close()
        world.close()


def _nothing(*_: object) -> None:
    """Take a signal and do nothing."""
