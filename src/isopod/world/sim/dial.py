"""Dialling: how a connection to another machine comes about, as the kernel does it (tcp(7), tcp_syn_retries = 6)."""

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Final

from isopod.world.sim.fabric import Link, Station
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.view import fail

if TYPE_CHECKING:
    from isopod.world.sim.network import SimListener

_PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_NO_NEIGHBOUR_S: Final = 3.0
_SYN_BYTES: Final = 60


async def dial(loop: SimLoop, source: Station, host: str, port: int) -> "tuple[SimListener, Link]":
    """Return who listens at another machine's address, and the link to it, when a connection stands.

    Raises:
        OSError: ECONNREFUSED, ETIMEDOUT after 127 s, EHOSTUNREACH.
    """
    where = f"{host}:{port}"
    target = source.fabric.at(host)
    if target is None:
        await asyncio.sleep(_NO_NEIGHBOUR_S)
        fail(errno.EHOSTUNREACH, where)
    link = source.fabric.link(source, target)
    for pause_s in _PAUSES_S:
        until_ns = loop.elapsed_ns + round(pause_s * 1e9)
        if await _passes(loop, link):
            listener = None if target.network is None else target.network.find_tcp(host, port)
            if await _passes(loop, link.back):
                if listener is None or not listener.is_open:
                    source.fabric.counts.n_refused += 1
                    fail(errno.ECONNREFUSED, where)
                source.fabric.counts.n_connections += 1
                return listener, link
        await _wait_until(loop, until_ns)
    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), where)


async def _passes(loop: SimLoop, link: Link) -> bool:
    """Send one segment without data; return whether it arrived."""
    if link.is_blocked or link.is_lost():
        return False
    await _wait_until(loop, link.delay_ns(_SYN_BYTES, loop.elapsed_ns))
    return not link.is_blocked


async def _wait_until(loop: SimLoop, at_ns: int) -> None:
    if at_ns > loop.elapsed_ns:
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_at_ns(at_ns, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
    loop.owner().check()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
