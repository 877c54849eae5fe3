"""kill -9 of a node, and a power cut: what ends and what stays."""

import asyncio

import pytest

from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld
from tests.world.recorder import Recorder


async def test_a_killed_node_has_no_more_effects(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    cleaned: list[str] = []

    async def deep() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            cleaned.append("ran")
            await disk.write("/home/cleanup", b"must not exist")
            cleaned.append("had an effect")

    async def node() -> None:
        sim_world.loop.call_later(5, lambda: cleaned.append("timer"))
        await disk.write("/home/before", b"")
        await asyncio.gather(*(asyncio.ensure_future(deep()) for _ in range(3)))

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(1)
    assert (handle.is_alive, handle.done()) == (True, False)
    handle.kill()
    assert (handle.is_alive, handle.done()) == (False, True)
    await asyncio.sleep(10)
    assert cleaned == ["ran"] * 3
    assert await disk.list("/home") == ["before"]
    with pytest.raises(asyncio.CancelledError):
        await handle.wait()


async def test_a_task_that_refuses_to_be_cancelled_is_ended_all_the_same(sim_world: SimWorld) -> None:
    rounds: list[int] = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                rounds.append(1)
                if len(rounds) > 3:
                    raise

    handle = sim_world.spawn_node(stubborn())
    await asyncio.sleep(0.5)
    handle.kill()
    await asyncio.sleep(5)
    assert len(rounds) == 4


async def test_its_connections_listeners_and_locks_end(sim_world: SimWorld) -> None:
    world = sim_world.world
    address = UnixAddress("/run/node.sock")
    server = Recorder()

    async def node() -> None:
        assert await world.disk.lock("/run/lock", b"first") is not None
        await world.network.listen(address, lambda: server)
        await asyncio.Event().wait()

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(0.1)
    assert await world.disk.lock("/run/lock", b"second") is None
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"hello")
    await server.wait_received(5)
    handle.kill()
    await client.wait_end()
    assert not server.lost  # a dead process is told nothing
    with pytest.raises(ConnectionRefusedError):
        await world.network.connect(address, Recorder)
    assert await world.disk.stat(address.path) is not None
    lock = await world.disk.lock("/run/lock", b"third")
    assert lock is not None
    lock.close()
    transport.close()
    listener = await world.network.listen(address, Recorder)
    await listener.close()


async def test_nodes_have_pids_of_their_own_and_results(sim_world: SimWorld) -> None:
    async def who() -> int:
        await asyncio.sleep(1)
        return sim_world.world.processes.own_pid()

    async def fails() -> None:
        raise ZeroDivisionError

    first, second, third = sim_world.spawn_node(who()), sim_world.spawn_node(who()), sim_world.spawn_node(fails())
    assert await first.wait() == first.pid != await second.wait() == second.pid
    assert sim_world.world.processes.own_pid() not in (first.pid, second.pid)
    with pytest.raises(ZeroDivisionError):
        await third.wait()
    assert sim_world.world.processes.identify(first.pid) is None


async def test_what_the_kernel_holds_stays_after_a_kill_and_goes_with_the_power(sim_world: SimWorld) -> None:
    world = sim_world.world

    async def node() -> None:
        await world.kernel.create_bridge("x0", "10.1.0.1/24")
        await world.disk.write_atomic("/home/durable", b"")
        await world.disk.write("/home/volatile", b"")
        await world.processes.spawn(["/usr/bin/crun", "--version"], env={})
        await asyncio.Event().wait()

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(1)
    boot = world.processes.boot_id()
    handle.kill()
    assert (await world.kernel.inventory("x", [])).links == ("x0",)
    assert world.processes.boot_id() == boot
    sim_world.power_cut()
    assert (await world.kernel.inventory("x", [])).links == ()
    assert await world.disk.list("/home") == ["durable"]
    assert world.processes.boot_id() != boot
