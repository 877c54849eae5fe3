"""What the tests of several simulated machines share."""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from isopod.world.network import TcpAddress, TcpOptions
from isopod.world.sim import LinkQuality, SimCluster, SimHost
from isopod.world.sim.streams import StreamEnd
from tests.world.recorder import Recorder

PORT = 7000
LAN = LinkQuality()


@contextmanager
def cluster(seed: int = 1, n_hosts: int = 2, quality: LinkQuality = LAN) -> Iterator[SimCluster]:
    """Open a cluster; it fails if a callback failed unseen."""
    sim = SimCluster(seed, n_hosts, n_events_max=2_000_000, quality=quality)
    unseen: list[str] = []
    sim.loop.set_exception_handler(lambda _, context: unseen.append(f"{context.get('message')}: {context.get('exception')!r}"))
    try:
        yield sim
    finally:
        sim.close()
    assert unseen == []


def simulated(
    *, n_hosts: int = 2, quality: LinkQuality = LAN
) -> Callable[[Callable[[SimCluster], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Make a body that gets a cluster into a test."""

    def decorate(body: Callable[[SimCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def test() -> None:
            with cluster(n_hosts=n_hosts, quality=quality) as sim:
                sim.run(body(sim))

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


class Line:
    """A connection between two machines, and what both ends saw."""

    def __init__(self, client: Recorder, server: Recorder, transport: StreamEnd) -> None:
        self.client = client
        self.server = server
        self.transport = transport

    @property
    def served(self) -> StreamEnd:
        assert isinstance(self.server.transport, StreamEnd)
        return self.server.transport


async def serve(host: SimHost, servers: list[Recorder], *, port: int = PORT, options: TcpOptions | None = None, echo: bool = False) -> None:
    """Listen on a machine; the protocols of its connections go into `servers`."""

    def accept() -> Recorder:
        servers.append(Recorder(echo=echo))
        return servers[-1]

    await host.world.network.listen(TcpAddress("0.0.0.0", port), accept, options=options)


async def listening(host: SimHost, servers: list[Recorder]) -> None:
    """Be a node that listens until it is killed."""
    await serve(host, servers)
    await asyncio.Event().wait()


async def call(host: SimHost, address: str, *, port: int = PORT, options: TcpOptions | None = None) -> tuple[StreamEnd, Recorder]:
    """Connect from a machine."""
    transport, protocol = await host.world.network.connect(TcpAddress(address, port), Recorder, options=options)
    assert isinstance(transport, StreamEnd)
    assert isinstance(protocol, Recorder)
    return transport, protocol


async def line(a: SimHost, b: SimHost, *, port: int = PORT, options: TcpOptions | None = None) -> Line:
    """Connect a to b."""
    servers: list[Recorder] = []
    await serve(b, servers, port=port, options=options)
    transport, client = await call(a, b.address, port=port, options=options)
    while not servers or servers[0].transport is None:
        await asyncio.sleep(0.001)
    return Line(client, servers[0], transport)


async def seen(recorder: Recorder, n_bytes: int) -> bytes:
    """Return once so many bytes came, however long that takes in virtual time."""
    while len(recorder.received) < n_bytes and not recorder.lost:
        await asyncio.sleep(0.001)
    return bytes(recorder.received)


async def ended(recorder: Recorder) -> bool:
    """Return whether a connection ended in good order, however long that takes."""
    while not recorder.at_end and not recorder.lost:
        await asyncio.sleep(0.05)
    return recorder.at_end


async def gone(recorder: Recorder) -> Exception | None:
    """Return how a connection ended, however long that takes."""
    while not recorder.lost:
        await asyncio.sleep(0.05)
    return recorder.error


def digest_of(seed: int, body: "functools.partial[Coroutine[Any, Any, None]]") -> str:
    """Return the digest of a body that gets a cluster of three."""
    with cluster(seed, 3) as sim:
        sim.loop.start_trace()
        sim.run(body(sim))
        return sim.loop.trace_digest()
