"""Resolving and datagrams by the Network port on both Worlds, and what the host does when it has no more descriptors."""

import asyncio
import errno
import os
import subprocess
import sys
import textwrap

import pytest

from isopod.world.network import TcpAddress, UdpAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.world.recorder import Recorder


class Collector(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: list[tuple[bytes, tuple[str, int]]] = []
        self.errors: list[Exception] = []
        self.lost = False

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.received.append((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


@pytest.mark.row("S9")
async def test_datagrams_both_ways(world: World) -> None:
    first, received = await world.network.open_udp(UdpAddress("127.0.0.1", 0), Collector)
    where = first.get_extra_info("sockname")
    second, answered = await world.network.open_udp(None, Collector, remote=UdpAddress(*where[:2]))
    assert isinstance(received, Collector)
    assert isinstance(answered, Collector)
    second.sendto(b"question")
    await until(lambda: received.received)
    data, sender = received.received[0]
    assert (data, sender[1]) == (b"question", second.get_extra_info("sockname")[1])
    first.sendto(b"answer", sender)
    await until(lambda: answered.received)
    assert answered.received == [(b"answer", tuple(where))]
    for transport in (first, second):
        transport.close()
    await until(lambda: received.lost and answered.lost)


async def test_opening_that_is_cancelled_leaves_no_socket(world: World) -> None:
    for n_turns in range(6):
        opening = asyncio.ensure_future(world.network.open_udp(UdpAddress("127.0.0.1", 0), Collector))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        opening.cancel()
        for transport, _ in [each for each in await asyncio.gather(opening, return_exceptions=True) if not isinstance(each, BaseException)]:
            transport.close()


@pytest.mark.row("S16")
async def test_names_resolve_to_numbers(world: World) -> None:
    found = await world.network.resolve("localhost", 80)
    assert TcpAddress("127.0.0.1", 80) in found
    assert await world.network.resolve("127.0.0.1", 7) == [TcpAddress("127.0.0.1", 7)]
    for name in ("no-such-host.invalid", "a" * 70 + ".example"):
        with pytest.raises(OSError) as caught:
            await world.network.resolve(name)
        assert caught.value.errno == errno.EHOSTUNREACH


async def test_connecting_by_name(world: World) -> None:
    listener = await world.network.listen(TcpAddress("127.0.0.1", 0), lambda: Recorder(echo=True))
    assert isinstance(listener.address, TcpAddress)
    transport, client = await world.network.connect(TcpAddress("localhost", listener.address.port), Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"x")
    assert await client.wait_received(1) == b"x"
    transport.close()
    await client.wait_lost()
    await listener.close()


async def test_the_simulations_names_and_faults(sim_world: SimWorld) -> None:
    network = sim_world.world.network
    sim_world.network.names.set("db.example", ["10.0.0.1", "10.0.0.2"], delay_s=0.5)
    listener = await network.listen(TcpAddress("10.0.0.2", 5432), Recorder)
    began = sim_world.loop.time()
    transport, client = await network.connect(TcpAddress("db.example", 5432), Recorder)
    assert isinstance(client, Recorder)
    assert sim_world.loop.time() - began > 0.5
    transport.close()
    await client.wait_lost()
    sim_world.network.names.set("db.example", [], fails=True)
    with pytest.raises(OSError, match="Temporary failure"):
        await network.resolve("db.example")
    sim_world.network.hang_next()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3600):
            await network.connect(TcpAddress("10.0.0.2", 5432), Recorder)
    await listener.close()


async def test_look_ups_are_bounded(host_world: World) -> None:
    from isopod.world.host.resolve import N_WAITING_MAX

    asking = [asyncio.ensure_future(host_world.network.resolve("localhost")) for _ in range(N_WAITING_MAX + 50)]
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, OSError)]
    assert all(each.errno == errno.EAGAIN for each in refused)
    assert len(outcomes) - len(refused) >= N_WAITING_MAX
    assert await host_world.network.resolve("localhost")


NO_DESCRIPTORS = """
    import asyncio, os, resource, socket, sys, time
    from isopod.world.host.loop import new_loop
    from isopod.world.host.world import make_host_world
    from isopod.world.network import TcpAddress

    made = []

    class Greeter(asyncio.Protocol):
        def connection_made(self, transport):
            made.append(transport)
            transport.write(b"hi")

    async def main():
        loop = asyncio.get_running_loop()
        complaints = []
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        listener = await make_host_world().network.listen(TcpAddress("127.0.0.1", 0), Greeter)
        clients = [socket.socket() for _ in range(40)]
        n_open = len(os.listdir("/proc/self/fd"))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 5, hard))
        for client in clients:
            client.setblocking(False)
            client.connect_ex(tuple(listener.address))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        await asyncio.sleep(1.0)
        n_sleeps = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
        n_served = len(made)
        for transport in made:
            transport.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 200, hard))
        await asyncio.sleep(1.2)
        late = socket.socket()
        late.setblocking(False)
        await loop.sock_connect(late, tuple(listener.address))
        async with asyncio.timeout(40):
            greeting = await loop.sock_recv(late, 2)
        for each in (late, *clients):
            each.close()
        for transport in made:
            transport.abort()
        await listener.close()
        print(n_served, n_sleeps, len(complaints), greeting == b"hi")

    new_loop(sys.argv[1]).run_until_complete(main())
"""


@pytest.mark.row("S9")
@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_no_descriptors_left_neither_spins_nor_stops_the_listener(kind: str) -> None:
    argv = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NO_DESCRIPTORS), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(argv, check=False, capture_output=True, timeout=40, env=environment)
    served, n_sleeps, n_complaints, greets_again = done.stdout.decode().split()
    assert 0 < int(served) < 40, done.stderr
    assert int(n_sleeps) > 0, "a loop that tries again and again never sleeps"
    assert int(n_complaints) <= 4 * 4096, "asyncio tries as often as the queue is long, then rests for a second"
    assert greets_again == "True"


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(40):
        while not condition():
            await asyncio.sleep(0.001)
