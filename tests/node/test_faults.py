"""What goes wrong around a container: damaged records, clients that leave, commands that fail, operations that meet."""

import asyncio

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.errors import CommandNotRunnable, InvalidArgument, IsopodError, NotFound
from tests.node.rig import IMAGE, Rig


async def test_a_damaged_record_costs_no_data_and_stops_nothing(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="dear", network="bridge")
        path = f"{rig.config.paths['metadata']}/containers/{record.id}.json"
        await rig.kill()
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
        await rig.world.disk.write(path, good)
        await rig.world.disk.remove(path.replace(".json", ".damaged"))
        await rig.start()
        after = await rig.inspect("dear")
        assert (after.status, after.pid, after.network) == ("running", record.pid, record.network)


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
        async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
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
