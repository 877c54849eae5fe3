"""What goes wrong around a container: damaged records, clients that leave, commands that fail, operations that meet."""

import asyncio

import msgspec
import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.node.node import Node
from isopod.node.system import NodeFacts
from isopod.runtime.logger import Logger
from isopod.world.errors import CommandNotRunnable, DiskFull, InvalidArgument, IsopodError, JournalDamaged, NotFound
from isopod.world.sim import SimWorld
from tests.node.rig import IMAGE, Rig, SimBackend


async def go_back_to_files(rig: Rig) -> str:
    """Kill the node and leave its records as a node of format 1 left them; return their folder."""
    records = await rig.list()
    await rig.kill()
    metadata = rig.config.paths["metadata"]
    await rig.world.disk.remove_tree(metadata)
    await rig.world.disk.make_directory(f"{metadata}/containers")
    for record in records:
        plain = msgspec.to_builtins(record)
        del plain["revision"]
        await rig.world.disk.write_atomic(f"{metadata}/containers/{record.id}.json", msgspec.json.encode(plain))
    return f"{metadata}/containers"


@pytest.mark.row("R14", "R25")
async def test_records_of_the_first_format_are_taken_over_while_their_containers_run(rig: Rig) -> None:
    async with rig:
        running = await rig.run_detached("sleep", "1000", name="dear", network="bridge", labels={"tier": "web"})
        await rig.run("sh", "-c", "exit 3", name="done")
        ended = await rig.inspect("done")
        folder = await go_back_to_files(rig)
        await rig.start()
        after = await rig.inspect("dear")
        assert (after.status, after.pid, after.network, after.labels) == ("running", running.pid, running.network, {"tier": "web"})
        assert after.revision > 0
        assert (await rig.inspect("done")).exit_code == ended.exit_code == 3
        assert await rig.world.disk.stat(folder) is None
        assert f"{running.id}.json" in await rig.world.disk.list(f"{folder}.v1")
        await rig.kill()
        await rig.start()
        assert [record.name for record in await rig.list()] == ["dear", "done"]


@pytest.mark.row("R14")
async def test_a_damaged_record_of_the_first_format_costs_no_data_and_stops_nothing(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="dear", network="bridge")
        path = f"{await go_back_to_files(rig)}/{record.id}.json"
        good = await rig.world.disk.read(path)
        await rig.world.disk.write(path, good.replace(b'"running"', b'"dancing"'))
        await rig.start()
        assert await rig.list() == []
        assert record.pid is not None
        assert rig.world.processes.identify(record.pid) is not None
        assert record.id in await rig.world.disk.list(rig.config.paths["containers"])
        other = await rig.run_detached("sleep", "1000", network="bridge")
        assert other.network.ip_address != record.network.ip_address
        await rig.kill()
        kept = f"{rig.config.paths['metadata']}/containers.v1"
        assert await rig.world.disk.list(kept) == [f"{record.id}.damaged"]
        await rig.world.disk.remove(f"{kept}/{record.id}.damaged")
        await rig.world.disk.make_directory(path.rpartition("/")[0])
        await rig.world.disk.write(path, good)
        await rig.start()
        after = await rig.inspect("dear")
        assert (after.status, after.pid, after.network) == ("running", record.pid, record.network)


@pytest.mark.row("R20")
async def test_a_damaged_journal_keeps_the_node_from_starting_and_its_containers_running(sim_world: SimWorld, folder: str) -> None:
    rig = Rig(SimBackend(sim_world, folder), "isopodt")
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="dear")
        await rig.run_detached("sleep", "1000", name="other")
        await rig.kill()
        path = f"{rig.config.paths['metadata']}/current.wal"
        good = await rig.world.disk.read(path)
        at = good.index(b'"dear"')
        await rig.world.disk.write(path, good[:at] + b'"bear"' + good[at + 6 :])
        with pytest.raises(JournalDamaged) as refused:
            await node_of(rig).start()
        assert path in refused.value.message
        assert "isopod journal repair" in refused.value.hint
        assert record.pid is not None
        assert rig.world.processes.identify(record.pid) is not None
        await rig.world.disk.write(path, good)
        await rig.start()
        assert (await rig.inspect("dear")).pid == record.pid


def node_of(rig: Rig) -> Node:
    """A node on a rig's folders, for the errors of its start."""
    facts = NodeFacts(started_at_ns=0, event_loop="sim", core="sim")
    return Node(rig.world, rig.config, Logger(lambda _: None, rig.world.clock), facts)


async def test_create_and_remove_at_once_leave_no_ghost(rig: Rig) -> None:
    async with rig:
        for number in range(10):
            spec = m.ContainerSpec(image=IMAGE, name=f"g{number}", command=("true",), network="none")
            creating = asyncio.ensure_future(rig.client.call(methods.CONTAINER_CREATE, spec))
            removing = asyncio.ensure_future(rig.client.call(methods.CONTAINER_REMOVE, m.RemoveContainer(name=f"g{number}")))
            await asyncio.gather(creating, removing, return_exceptions=True)
        there = [record.name for record in await rig.list()]
        await rig.restart()
        assert [record.name for record in await rig.list()] == there


async def test_an_exec_that_fails_or_is_withdrawn_leaves_nothing_in_the_bundle(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="box")
        bundle = f"{rig.config.paths['run_root']}/bundles/{record.id}"
        before = await rig.world.disk.list(bundle)
        with pytest.raises(CommandNotRunnable):
            await rig.exec("box", "/bin/nope")
        assert await rig.world.disk.list(bundle) == before
        for turns in range(0, 40, 8):
            call = rig.client.open(methods.CONTAINER_EXEC, m.ExecContainer(name="box", command=("sleep", "1000")))
            await call.__aenter__()
            for _ in range(turns):
                await rig.client.call(methods.SYSTEM_VERSION, m.Empty())
            await call.__aexit__(None, None, None)
        async with asyncio.timeout(40):
            while await rig.world.disk.list(bundle) != before:
                await rig.client.call(methods.SYSTEM_VERSION, m.Empty())
        assert (await rig.exec("box", "echo", "fine")).stdout == b"fine\n"


async def test_a_container_left_frozen_by_a_commit_goes_on_after_a_restart(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="box")
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        runtime = [info.runtime.value, "--root", f"{rig.config.paths['run_root']}/runtime"]
        await rig.kill()
        assert (await rig.world.processes.run([*runtime, "pause", record.id])).returncode == 0
        await rig.start()
        assert (await rig.inspect("box")).status == "running"
        assert (await rig.exec("box", "echo", "awake")).stdout == b"awake\n"


async def test_a_commit_of_a_running_container_leaves_it_running(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "echo x > /x; echo ready; sleep 1000", name="box")
        async with rig.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name="box", follow=True)) as call:
            while not isinstance(await call.receive(), m.Stdout):
                pass
        committing = rig.client.call(methods.CONTAINER_COMMIT, m.CommitContainer(name="box", image="snap"))
        image, ran = await asyncio.gather(committing, rig.exec("box", "echo", "meanwhile"))
        assert (image.names, ran.stdout) == (("snap:latest",), b"meanwhile\n")
        assert (await rig.inspect("box")).status == "running"
        assert (await rig.run("cat", "/x", image="snap")).stdout == b"x\n"


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 1e9])
async def test_a_senseless_grace_period_is_refused(rig: Rig, timeout_s: float) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        with pytest.raises(InvalidArgument):
            await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=timeout_s))
        assert (await rig.inspect("box")).status == "running"


async def test_a_stop_under_way_does_not_hold_up_the_nodes_own_end(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="stubborn")
        stopping = asyncio.ensure_future(rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="stubborn", timeout_s=1000)))
        async with asyncio.timeout(40):
            while (await rig.inspect("stubborn")).status != "stopping":
                pass
        started = asyncio.get_running_loop().time()
        await rig.stop()
        assert asyncio.get_running_loop().time() - started < 20
        with pytest.raises(IsopodError):
            await stopping
        await rig.start()
        assert (await rig.inspect("stubborn")).status == "running"


async def test_a_name_that_is_too_long_for_the_disk_is_the_users_mistake(rig: Rig) -> None:
    async with rig:
        with pytest.raises((InvalidArgument, NotFound)):
            await rig.run("true", mounts=(m.Mount(source="/" + "a" * 300, destination="/x"),))


@pytest.mark.row("R19", "R31")
async def test_an_end_that_the_disk_refuses_is_stored_as_soon_as_there_is_room(sim_world: SimWorld, folder: str) -> None:
    rig = Rig(SimBackend(sim_world, folder), "isopodt")
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + (256 << 10)  # too little for one more segment
        for n_chars in (60_000, 1_000, 1):  # until nothing fits any more
            with pytest.raises(DiskFull):
                for number in range(10_000):
                    labels = {"fill": chr(97 + number % 26) * n_chars}
                    await rig.client.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name="box", labels=labels))
        with pytest.raises(DiskFull):
            await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        assert (await rig.exec("box", "echo", "thawed")).stdout == b"thawed\n", "what is not stored has not happened"
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        assert (stopped.status, stopped.exit_code) == ("exited", 137), "the client hears the truth all the same"
        sim_world.disk.capacity_bytes = 1 << 40
        await asyncio.sleep(40)
        events = []
        until_ns = rig.world.clock.now_ns()
        async with rig.client.open(methods.CONTAINER_EVENTS, m.EventsRequest(since_ns=0, until_ns=until_ns, kinds=("status",))) as call:
            events = [item async for item in call if isinstance(item, m.Event)]
        assert [event.status for event in events] == ["starting", "running", "exited"]
        await rig.kill()
        await rig.start()
        after = await rig.inspect("box")
        assert (after.status, after.exit_code, after.finished_at_ns) == ("exited", 137, stopped.finished_at_ns)
