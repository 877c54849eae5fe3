"""Machines of a simulation as a whole: processes that hang, end and abort, TLS between machines, traces, and many of them."""

import asyncio
import errno
import inspect
import math
import signal

import pytest

from isopod.world.network import ClientTls, ServerTls, TcpAddress
from isopod.world.processes import ProcessIdentity
from isopod.world.sim import LinkQuality, SimCluster, SimWorld, make_sim_world
from tests.net.certificates import client_leaf, client_material, server_material
from tests.world.recorder import Recorder
from tests.world.sim.rig import cluster, seen

pytestmark = pytest.mark.row("B21")


async def test_a_stopped_process_stands_still_and_goes_on_in_order(sim_world: SimWorld) -> None:
    done: list[int] = []

    async def node() -> None:
        for number in range(10):
            sim_world.loop.call_later(0.01 * number, done.append, number)
        await asyncio.sleep(0.1)

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(0.035)
    handle.hang()
    await asyncio.sleep(100)
    assert done == [0, 1, 2, 3]
    handle.resume()
    await handle.wait()
    assert done == list(range(10))


async def test_a_hung_process_that_is_killed_unwinds(sim_world: SimWorld) -> None:
    seen: list[str] = []

    async def node() -> None:
        try:
            await asyncio.sleep(1)
            seen.append("went on")
        finally:
            seen.append("unwound")

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(0.1)
    handle.hang()
    await asyncio.sleep(10)
    handle.kill()
    await asyncio.sleep(0.1)
    assert seen == ["unwound"]


async def test_stop_signals_reach_a_process_and_others_wait_for_it(sim_world: SimWorld) -> None:
    handle = sim_world.spawn_node(asyncio.sleep(1000))
    identity = sim_world.processes.identify(handle.pid)
    assert isinstance(identity, ProcessIdentity)
    await asyncio.sleep(0.01)
    assert sim_world.processes.signal(identity, signal.SIGSTOP)
    assert sim_world.machine.table.live()[-1].owner.is_hung
    sim_world.processes.signal(identity, signal.SIGTERM)
    await asyncio.sleep(1)
    assert not handle.done()
    sim_world.processes.signal(identity, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await handle.wait()


async def test_a_power_cut_is_seen_by_who_waits_for_a_node(sim_world: SimWorld) -> None:
    handle = sim_world.spawn_node(asyncio.sleep(1000))
    await asyncio.sleep(0.01)
    sim_world.power_cut()
    with pytest.raises(asyncio.CancelledError):
        await handle.wait()
    assert handle.aborted is None


async def test_abort_ends_the_process_that_calls_it_and_nothing_else(sim_world: SimWorld) -> None:
    async def node() -> None:
        other = asyncio.create_task(asyncio.sleep(1000))
        await asyncio.sleep(0)
        try:
            sim_world.world.processes.abort("a promise was broken")
        finally:
            assert other.cancelling()

    bystander = sim_world.spawn_node(asyncio.sleep(5))
    handle = sim_world.spawn_node(node())
    with pytest.raises(asyncio.CancelledError):
        await handle.wait()
    assert handle.aborted == "a promise was broken"
    assert bystander.aborted is None
    await bystander.wait()
    with pytest.raises(asyncio.CancelledError, match="in the test itself"):
        sim_world.world.processes.abort("in the test itself")
    assert [abort.name for abort in sim_world.processes.aborts] == ["isopod", "root"]


async def test_programs_and_kernel_calls_fail_and_dawdle_when_asked(sim_world: SimWorld) -> None:
    processes, kernel = sim_world.world.processes, sim_world.world.kernel
    sim_world.processes.fail_next(errno.EAGAIN)
    with pytest.raises(BlockingIOError):
        await processes.run(["/usr/bin/crun", "--version"])
    sim_world.kernel.fail_next(errno.ENOMEM)
    with pytest.raises(OSError) as refused:
        await kernel.create_bridge("br0", "10.1.0.1/24")
    assert refused.value.errno == errno.ENOMEM
    began = sim_world.loop.time()
    await kernel.create_bridge("br0", "10.1.0.1/24")
    assert (await processes.run(["/usr/bin/crun", "--version"])).returncode == 0
    assert sim_world.loop.time() - began < 0.1
    sim_world.processes.delay_s = sim_world.kernel.delay_s = 2.0
    await kernel.create_bridge("br1", "10.2.0.1/24")
    await processes.run(["/usr/bin/crun", "--version"])
    assert sim_world.loop.time() - began > 4.0


async def test_endless_timers_are_late_not_wrong(sim_world: SimWorld) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await asyncio.sleep(math.inf)


def tls_digest(sim: SimCluster) -> str:
    a, b = sim.hosts
    served: list[Recorder] = []

    def accept() -> Recorder:
        served.append(Recorder(echo=True))
        return served[-1]

    async def body() -> None:
        listener = await b.world.network.listen(TcpAddress("0.0.0.0", 7000), accept, tls=ServerTls(server_material(client_auth="required")))
        tls = ClientTls(client_material(client_leaf()), server_name="localhost")
        transport, client = await a.world.network.connect(TcpAddress("node2", 7000), Recorder, tls=tls)
        assert isinstance(client, Recorder)
        for _ in range(20):
            transport.write(bytes(1000))
        await seen(client, 20_000)
        transport.close()
        await listener.close()

    sim.loop.start_trace()
    sim.run(body())
    return sim.loop.trace_digest()


@pytest.mark.row("B22")
def test_tls_between_machines_is_a_function_of_the_seed() -> None:
    digests = []
    for seed in (3, 3, 4):
        with cluster(seed, quality=LinkQuality(loss=0.05, bytes_per_s=50_000)) as sim:
            digests.append(tls_digest(sim))
    assert digests[0] == digests[1] != digests[2]


def test_one_machine_s_draws_change_nothing_on_another() -> None:
    def drawn(n_extra: int) -> tuple[float, str]:
        with cluster() as sim:
            for _ in range(n_extra):
                sim.hosts[0].random.stream("x").random()
            return sim.hosts[1].random.stream("x").random(), sim.hosts[1].random.token_hex(8)

    assert drawn(0) == drawn(5)
    with cluster() as sim:
        assert sim.hosts[0].random.token_hex(8) != sim.hosts[1].random.token_hex(8) != make_world_token()


def make_world_token() -> str:
    sim = make_sim_world(1)
    token = sim.random.token_hex(8)
    sim.close()
    return token


def test_hundreds_of_machines_reach_each_other() -> None:
    with cluster(n_hosts=300) as sim:
        assert (sim.hosts[249].address, sim.hosts[250].address) == ("10.99.0.250", "10.99.1.1")
        served: list[Recorder] = []

        def accept() -> Recorder:
            served.append(Recorder())
            return served[-1]

        async def body() -> None:
            await sim.hosts[0].world.network.listen(TcpAddress("0.0.0.0", 7000), accept)
            nodes = [host.spawn_node(host.world.network.connect(TcpAddress("node1", 7000), Recorder)) for host in sim.hosts[1:]]
            for node in nodes:
                await node.wait()
            await asyncio.sleep(1)

        sim.run(body())
        assert len(served) == 299


def test_a_machine_added_while_it_runs_is_inside_the_partition_that_names_no_more() -> None:
    with cluster() as sim:

        async def body() -> None:
            sim.fabric.partition([["node1"]])
            sim.add_host()
            assert sim.fabric.is_cut("node1", "node3")
            assert not sim.fabric.is_cut("node2", "node3")

        sim.run(body())


def test_an_untraced_run_has_no_digest() -> None:
    with cluster() as sim, pytest.raises(RuntimeError, match="no trace"):
        sim.loop.trace_digest()


async def test_a_process_that_dies_before_its_first_step_leaves_nothing_to_await(sim_world: SimWorld) -> None:
    async def live() -> None:
        raise AssertionError("it never begins")

    killed, cut = live(), live()
    sim_world.spawn_node(killed).kill()
    assert inspect.getcoroutinestate(killed) == inspect.CORO_CLOSED
    sim_world.spawn_node(cut)
    sim_world.power_cut()
    assert inspect.getcoroutinestate(cut) == inspect.CORO_CLOSED
