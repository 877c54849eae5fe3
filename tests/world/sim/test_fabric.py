"""The network between simulated machines: each fault happens when it is asked for, not otherwise, and by seed."""

import asyncio
import errno
import functools
from collections.abc import Sequence

import pytest

from isopod.world.errors import InvalidArgument
from isopod.world.network import TcpAddress, TcpOptions, UdpAddress
from isopod.world.sim import LinkQuality, SimCluster
from isopod.world.sim.clock import EPOCH_NS
from tests.world.recorder import Recorder
from tests.world.sim.rig import call, cluster, digest_of, ended, gone, line, listening, seen, serve, simulated

pytestmark = pytest.mark.row("B21")

SLOW = LinkQuality(latency_s=(0.1, 0.2))


def number(error: Exception | None) -> int | None:
    assert isinstance(error, OSError)
    return error.errno


@simulated(n_hosts=3)
async def test_machines_have_names_addresses_and_an_order(sim: SimCluster) -> None:
    assert [(host.name, host.address) for host in sim.hosts] == [("node1", "10.99.0.1"), ("node2", "10.99.0.2"), ("node3", "10.99.0.3")]
    assert sim.add_host().name == "node4"
    assert sim.host("node4").address == "10.99.0.4"
    with pytest.raises(InvalidArgument, match="node5"):
        sim.host("node5")
    with pytest.raises(InvalidArgument, match="no such machine"):
        sim.fabric.cut("node1", "nobody")
    assert await sim.hosts[0].world.network.resolve("node4", 80) == [TcpAddress("10.99.0.4", 80)]


@simulated(quality=SLOW)
async def test_bytes_arrive_in_order_after_the_links_latency(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    began = sim.loop.time()
    data = bytes(range(256)) * 40
    for start in range(0, len(data), 16):
        there.transport.write(data[start : start + 16])
        await asyncio.sleep(0.0001)
    assert await seen(there.server, len(data)) == data
    assert 0.1 < sim.loop.time() - began < 0.35
    assert there.transport.get_extra_info("peername") == ("10.99.0.2", 7000)
    assert there.served.get_extra_info("peername")[0] == "10.99.0.1"
    there.transport.close()
    assert await ended(there.server)
    statistics = sim.fabric.statistics()
    assert (statistics.n_connections, statistics.n_bytes) == (1, 10_240)
    assert (statistics.n_retransmitted, statistics.n_late, statistics.n_held, statistics.n_resets) == (0, 0, 0, 0)


@simulated()
async def test_a_name_leads_to_another_machine_and_loopback_stays_at_home(sim: SimCluster) -> None:
    a, b = sim.hosts
    here: list[Recorder] = []
    there: list[Recorder] = []
    await serve(a, here)
    await serve(b, there)
    for address in ("localhost", "127.0.0.1", "node1", "10.99.0.1"):
        await call(a, address)
    await call(a, "node2")
    await asyncio.sleep(1)
    assert (len(here), len(there)) == (4, 1)
    await b.world.network.listen(TcpAddress("127.0.0.1", 99), Recorder)
    with pytest.raises(ConnectionRefusedError):
        await call(a, "10.99.0.2", port=99)
    with pytest.raises(OSError) as foreign:
        await a.world.network.listen(TcpAddress("10.99.0.2", 98), Recorder)
    assert foreign.value.errno == errno.EADDRNOTAVAIL
    began = sim.loop.time()
    with pytest.raises(OSError) as nobody:
        await call(a, "10.99.7.7")
    assert nobody.value.errno == errno.EHOSTUNREACH
    assert 2.9 < sim.loop.time() - began < 3.1


@simulated()
async def test_loss_delays_a_stream_and_loses_nothing_of_it(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    sim.fabric.set_link(a, b, LinkQuality(loss=0.3))
    began = sim.loop.time()
    for n in range(200):
        there.transport.write(b"%06d" % n)
        await asyncio.sleep(0.001)
    assert await seen(there.server, 1200) == b"".join(b"%06d" % n for n in range(200))
    assert sim.loop.time() - began > 0.4
    assert sim.fabric.statistics().n_retransmitted > 20


@simulated()
async def test_a_slow_link_takes_its_time(sim: SimCluster) -> None:
    a, b = sim.hosts
    sim.fabric.set_link(a, b, LinkQuality(bytes_per_s=10_000))
    there = await line(a, b)
    began = sim.loop.time()
    there.transport.write(bytes(50_000))
    await seen(there.server, 50_000)
    assert 5 <= sim.loop.time() - began < 5.3
    there.served.write(b"x" * 50_000)
    began = sim.loop.time()
    await seen(there.client, 50_000)
    assert sim.loop.time() - began > 4.9


@simulated()
async def test_a_cut_holds_bytes_back_until_it_heals(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    sim.fabric.partition([[a], [b]])
    there.transport.write(b"held")
    there.served.write(b"too")
    await asyncio.sleep(60)
    assert len(there.server.received) + len(there.client.received) == 0
    sim.fabric.heal()
    healed = sim.loop.time()
    assert await seen(there.server, 4) == b"held"
    assert await seen(there.client, 3) == b"too"
    assert sim.loop.time() - healed < 61
    assert not there.client.lost
    assert sim.fabric.statistics().n_held >= 2


def test_a_long_cut_is_felt_for_some_time_after_it_heals() -> None:
    def late_s(seed: int) -> float:
        with cluster(seed) as sim:

            async def body() -> float:
                there = await line(*sim.hosts)
                sim.fabric.cut("node1", "node2")
                there.transport.write(b"held")
                await asyncio.sleep(60)
                sim.fabric.heal()
                healed = sim.loop.time()
                await seen(there.server, 4)
                return sim.loop.time() - healed

            return sim.run(body())

    found = [late_s(seed) for seed in range(12)]
    assert max(found) > 20
    assert min(found) < 20
    assert max(found) < 61
    assert late_s(3) == found[3]


@simulated()
async def test_a_cut_of_one_direction(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    sim.fabric.cut(a, b)
    assert sim.fabric.is_cut(a, b)
    assert not sim.fabric.is_cut(b, a)
    there.transport.write(b"lost on the way")
    there.served.write(b"hello")
    assert await seen(there.client, 5) == b"hello"
    await asyncio.sleep(30)
    assert there.server.received == b""
    there.served.write(bytes(150_000))  # whose acknowledgements do not come back
    await asyncio.sleep(30)
    assert len(there.client.received) <= 5 + (64 << 10)
    sim.fabric.heal(a, b)
    await seen(there.client, 150_005)
    assert await seen(there.server, 15) == b"lost on the way"


@simulated()
async def test_a_cut_connection_dies_of_the_user_timeout_at_the_end_that_waits(sim: SimCluster) -> None:
    a, b = sim.hosts
    options = TcpOptions(user_timeout_s=20, keepalive_idle_s=0)
    there = await line(a, b, options=options)
    plain = await line(a, b, port=7001, options=TcpOptions(keepalive_idle_s=0))
    sim.fabric.partition([[a], [b]])
    began = sim.loop.time()
    there.transport.write(b"x")
    plain.transport.write(b"x")
    assert number(await gone(there.client)) == errno.ETIMEDOUT
    assert 19 < sim.loop.time() - began < 21
    assert number(await gone(plain.client)) == errno.ETIMEDOUT
    assert 900 < sim.loop.time() - began < 950
    sim.fabric.heal()
    await asyncio.sleep(300)
    assert not there.server.lost  # nobody told it
    assert not there.server.at_end
    there.served.write(b"y")
    assert number(await gone(there.server)) == errno.ECONNRESET
    assert sim.fabric.statistics().n_timed_out == 2


@simulated()
async def test_keepalive_notices_a_dead_way_without_traffic(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b, options=TcpOptions(keepalive_idle_s=10, keepalive_interval_s=1, keepalive_count=3))
    silent = await line(a, b, port=7001)
    sim.fabric.cut(b, a)
    began = sim.loop.time()
    assert number(await gone(there.client)) == errno.ETIMEDOUT
    assert 3 <= sim.loop.time() - began < 14
    await asyncio.sleep(5000)
    assert not silent.client.lost


@simulated()
async def test_connecting_over_a_cut_is_tried_again_and_ends_in_time(sim: SimCluster) -> None:
    a, b = sim.hosts
    servers: list[Recorder] = []
    await serve(b, servers)
    sim.fabric.cut(b, a)
    began = sim.loop.time()
    with pytest.raises(TimeoutError) as late:
        await call(a, b.address)
    assert late.value.errno == errno.ETIMEDOUT
    assert 126 < sim.loop.time() - began < 128
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await call(a, b.address)
    attempt = asyncio.create_task(call(a, b.address))
    await asyncio.sleep(2.0)
    sim.fabric.heal()
    await attempt
    with pytest.raises(ConnectionRefusedError):
        await call(a, b.address, port=1)


def test_a_partition_divides_groups_and_heals() -> None:
    with cluster(n_hosts=5) as sim:
        names = [host.name for host in sim.hosts]
        sim.fabric.partition([["node1", "node2"], [sim.hosts[2]]])
        whole = {("node1", "node2"), ("node4", "node5")}
        for a in names:
            for b in names:
                if a != b:
                    assert sim.fabric.is_cut(a, b) == ((min(a, b), max(a, b)) not in whole)
        sim.fabric.heal()
        sim.fabric.isolate("node3")
        assert [name for name in names if sim.fabric.is_cut(name, "node3")] == ["node1", "node2", "node4", "node5"]
        assert not sim.fabric.is_cut("node1", "node2")
        sim.fabric.heal()
        assert not any(sim.fabric.is_cut(a, b) for a in names for b in names)
        with pytest.raises(InvalidArgument, match="twice"):
            sim.fabric.partition([["node1"], ["node1"]])


@simulated(n_hosts=3)
async def test_a_reset_ends_connections_at_both_ends(sim: SimCluster) -> None:
    a, b, c = sim.hosts
    there, other = await line(a, b), await line(a, c)
    assert sim.fabric.reset(a, b) == 1
    assert number(await gone(there.client)) == errno.ECONNRESET
    assert number(await gone(there.server)) == errno.ECONNRESET
    other.transport.write(b"fine")
    assert await seen(other.server, 4) == b"fine"


@simulated()
async def test_a_killed_process_ends_its_connections_as_a_kernel_does(sim: SimCluster) -> None:
    a, b = sim.hosts
    servers: list[Recorder] = []

    handle = b.spawn_node(listening(b, servers))
    await asyncio.sleep(1)
    _, quiet = await call(a, b.address)
    loud_end, loud = await call(a, b.address)
    await asyncio.sleep(1)
    servers[1].transport.pause_reading()  # type: ignore[union-attr]
    loud_end.write(b"never read")
    await asyncio.sleep(1)
    handle.kill()
    assert await ended(quiet)
    assert number(await gone(loud)) == errno.ECONNRESET
    with pytest.raises(ConnectionRefusedError):
        await call(a, b.address)


@simulated(quality=SLOW)
async def test_writing_to_who_is_gone_is_answered_with_a_reset(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    there.served.abort()
    there.transport.write(b"does not know yet")
    assert not there.client.lost
    assert number(await gone(there.client)) in (errno.ECONNRESET, None)


@simulated(quality=SLOW)
async def test_bytes_on_their_way_to_a_process_that_dies_are_answered_with_a_reset(sim: SimCluster) -> None:
    a, b = sim.hosts
    servers: list[Recorder] = []

    handle = b.spawn_node(listening(b, servers))
    await asyncio.sleep(1)
    end, client = await call(a, b.address)
    await asyncio.sleep(1)
    handle.kill()
    end.write(b"late")
    await asyncio.sleep(2)
    end.write(b"later")
    assert number(await gone(client)) == errno.ECONNRESET
    assert sim.fabric.statistics().n_resets == 1


@simulated()
async def test_a_paused_reader_holds_the_writer_up(sim: SimCluster) -> None:
    a, b = sim.hosts
    there = await line(a, b)
    there.served.pause_reading()
    there.transport.write(bytes(1_000_000))
    await asyncio.sleep(10)
    assert there.transport.get_write_buffer_size() == 1_000_000 - (208 << 10)
    there.served.resume_reading()
    assert await seen(there.server, 1_000_000) == bytes(1_000_000)
    assert there.transport.get_write_buffer_size() == 0


@simulated()
async def test_a_machine_without_power_is_silent_and_resets_what_is_old_once_it_is_back(sim: SimCluster) -> None:
    a, b = sim.hosts
    servers: list[Recorder] = []

    b.spawn_node(listening(b, servers))
    await asyncio.sleep(1)
    end, told = await call(a, b.address)
    _, silent = await call(a, b.address)
    _, alive = await call(a, b.address, options=TcpOptions(keepalive_idle_s=30))
    b.power_off()
    assert not b.is_up
    end.write(b"into the dark")
    attempt = asyncio.create_task(call(a, b.address))
    await asyncio.sleep(10)
    assert not told.lost
    assert not attempt.done()
    b.power_on()
    with pytest.raises(ConnectionRefusedError):
        await attempt
    assert number(await gone(told)) == errno.ECONNRESET
    assert number(await gone(alive)) == errno.ECONNRESET
    await asyncio.sleep(1000)
    assert not silent.lost
    b.spawn_node(listening(b, servers))
    await asyncio.sleep(1)
    await call(a, b.address)


@simulated()
async def test_a_hung_process_is_served_by_its_kernel_only(sim: SimCluster) -> None:
    a, b = sim.hosts
    servers: list[Recorder] = []
    ticks: list[float] = []

    async def node() -> None:
        await serve(b, servers, echo=True)
        while True:
            await asyncio.sleep(0.1)
            ticks.append(sim.loop.time())

    handle = b.spawn_node(node())
    await asyncio.sleep(1)
    end, client = await call(a, b.address)
    handle.hang()
    assert handle.is_hung
    await asyncio.sleep(0.5)
    n_ticks = len(ticks)
    end.write(b"anybody?")
    _, second = await call(a, b.address)  # the backlog takes it
    await asyncio.sleep(100)
    assert len(ticks) == n_ticks
    assert client.received == b""
    assert not client.lost
    assert not second.lost
    handle.resume()
    assert await seen(client, 8) == b"anybody?"
    await asyncio.sleep(1)
    assert len(servers) == 2
    assert len(ticks) >= n_ticks + 9
    handle.hang()
    handle.kill()
    assert await ended(client)
    assert handle.done()


class Datagrams(asyncio.DatagramProtocol):
    """Keeps what comes."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.senders: list[tuple[str, int]] = []
        self.errors: list[Exception] = []

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.seen.append(data)
        self.senders.append(addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)


async def send_datagrams(sim: SimCluster, n: int) -> Sequence[bytes]:
    """Send numbered datagrams from the first machine to the second; return what came."""
    a, b = sim.hosts[:2]
    _, got = await b.world.network.open_udp(UdpAddress("0.0.0.0", 9), Datagrams)
    assert isinstance(got, Datagrams)
    sender, _ = await a.world.network.open_udp(None, Datagrams)
    for each in range(n):
        sender.sendto(b"%d" % each, ("10.99.0.2", 9))
        await asyncio.sleep(0.001)
    await asyncio.sleep(1)
    assert {host for host, _ in got.senders} <= {"10.99.0.1"}
    return got.seen


def test_datagrams_cross_unharmed_unless_asked() -> None:
    with cluster() as sim:
        assert sim.run(send_datagrams(sim, 100)) == [b"%d" % each for each in range(100)]


def test_datagrams_are_lost_doubled_and_overtaken_when_asked() -> None:
    with cluster(quality=LinkQuality(loss=0.2, duplication=0.2, reordering=0.2)) as sim:
        got = list(sim.run(send_datagrams(sim, 300)))
        counts = sim.fabric.statistics()
        assert len(got) == 300 - counts.n_datagrams_lost + counts.n_datagrams_doubled
        assert min(counts.n_datagrams_lost, counts.n_datagrams_doubled, counts.n_late) > 20
        numbers = [int(each) for each in got]
        assert numbers != sorted(numbers)


def test_datagrams_over_a_cut_are_gone() -> None:
    with cluster() as sim:
        sim.fabric.cut("node1", "node2")
        assert sim.run(send_datagrams(sim, 10)) == []
        assert sim.fabric.statistics().n_datagrams_lost == 10


@simulated()
async def test_a_datagram_to_nobody_is_answered_unless_the_way_back_is_cut(sim: SimCluster) -> None:
    sender, protocol = await sim.hosts[0].world.network.open_udp(None, Datagrams, remote=UdpAddress("10.99.0.2", 77))
    assert isinstance(protocol, Datagrams)
    sim.fabric.cut("node2", "node1")
    sender.sendto(b"nobody answers")
    await asyncio.sleep(1)
    assert protocol.errors == []
    sim.fabric.heal()
    sender.sendto(b"nobody is there")
    await asyncio.sleep(1)
    assert [number(error) for error in protocol.errors] == [errno.ECONNREFUSED]
    sender.close()


@pytest.mark.parametrize(
    "quality",
    [
        LinkQuality(latency_s=(1, 0)),
        LinkQuality(latency_s=(-1, 0)),
        LinkQuality(loss=1.0),
        LinkQuality(loss=-0.1),
        LinkQuality(duplication=1.1),
        LinkQuality(reordering=2),
        LinkQuality(bytes_per_s=0),
    ],
)
def test_a_quality_that_cannot_be_is_refused(quality: LinkQuality) -> None:
    with cluster() as sim, pytest.raises(InvalidArgument):
        sim.fabric.set_link("node1", "node2", quality)


@simulated()
async def test_clocks_jump_and_drift_each_on_its_own(sim: SimCluster) -> None:
    a, b = sim.hosts
    fired: list[tuple[str, float]] = []

    async def timer(name: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(100)
        assert loop.time() - began == pytest.approx(100, abs=0.001)
        fired.append((name, sim.loop.elapsed_ns / 1e9))

    began_s = sim.loop.time()
    b.clock.drift_ppm = 100_000
    handles = [a.spawn_node(timer("a")), b.spawn_node(timer("b"))]
    for handle in handles:
        await handle.wait()
    assert [(name, round(at_s - began_s, 2)) for name, at_s in fired] == [("b", 90.91), ("a", 100.0)]
    assert b.clock.monotonic_ns() - a.clock.monotonic_ns() == pytest.approx(10e9, rel=0.01)
    before = b.clock.monotonic_ns()
    b.clock.drift_ppm = -100_000
    assert b.clock.monotonic_ns() == before
    await asyncio.sleep(100)
    assert b.clock.monotonic_ns() - a.clock.monotonic_ns() == pytest.approx(0, abs=10e6)
    wall, monotonic = a.clock.now_ns(), a.clock.monotonic_ns()
    a.clock.step_ns(-3600 * 10**9)
    assert a.clock.now_ns() == wall - 3600 * 10**9
    assert a.clock.monotonic_ns() == monotonic
    assert b.clock.now_ns() > EPOCH_NS
    with pytest.raises(InvalidArgument):
        a.clock.drift_ppm = 300_000


async def chatter(sim: SimCluster) -> None:
    """Everything at once, for digests."""
    a, b, c = sim.hosts
    sim.fabric.set_all(LinkQuality(loss=0.1, reordering=0.1, duplication=0.1))
    lines = [await line(a, b), await line(b, c), await line(c, a)]
    for n in range(50):
        for each in lines:
            each.transport.write(b"%d" % n)
        if n == 20:
            sim.fabric.partition([["node1"]])
        if n == 40:
            sim.fabric.heal()
        await asyncio.sleep(0.05)
    await send_datagrams(sim, 20)
    b.power_cut()
    await asyncio.sleep(5)


def test_equal_seeds_give_equal_histories() -> None:
    body = functools.partial(chatter)
    first = digest_of(5, body)
    assert first == digest_of(5, body)
    assert first != digest_of(6, body)


def test_the_digest_covers_what_is_sent_and_the_trace_is_readable() -> None:
    digests, traces = [], []
    for data in (b"one", b"two"):
        with cluster(1) as sim:
            lines: list[bytes] = []
            sim.loop.start_trace(lines.append)

            async def body(sim: SimCluster = sim, data: bytes = data) -> None:
                there = await line(*sim.hosts)
                there.transport.write(data)
                await seen(there.server, 3)

            sim.run(body())
            digests.append(sim.loop.trace_digest())
            traces.append(b"".join(lines).decode().splitlines())
    assert digests[0] != digests[1]
    differing = [(left, right) for left, right in zip(*traces, strict=True) if left != right]
    assert len(differing) == 1
    assert "node2 net node1>node2 3 " in differing[0][0]
    times = [int(each.split()[0]) for each in traces[0]]
    assert times == sorted(times)
