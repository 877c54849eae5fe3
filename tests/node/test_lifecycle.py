"""The life of containers through the daemon's socket, the same bodies on the kernel and in the simulation."""

import asyncio

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.errors import AlreadyExists, CommandNotRunnable, InUse, InvalidArgument, NotFound, WrongState
from tests.node.rig import IMAGE, Rig


@pytest.mark.row("R1", "R2")
async def test_run_attached_shows_output_and_exit_code(rig: Rig) -> None:
    async with rig:
        result = await rig.run("sh", "-c", "echo hello; echo oops >&2; exit 7")
        assert result == (7, b"hello\n", b"oops\n")


@pytest.mark.row("R2")
async def test_stdin_reaches_the_command_and_ends(rig: Rig) -> None:
    async with rig:
        result = await rig.run("cat", stdin=b"some\nlines\n")
        assert result == (0, b"some\nlines\n", b"")


@pytest.mark.row("R2")
async def test_run_detached_answers_while_it_runs(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="sleeper")
        assert (record.status, record.name, record.exit_code) == ("running", "sleeper", None)
        assert record.pid is not None
        assert record.started_at_ns is not None


@pytest.mark.row("R3")
async def test_start_starts_a_stopped_one_and_refuses_a_running_one(rig: Rig) -> None:
    async with rig:
        await rig.run("sh", "-c", "echo once", name="again")
        async with rig.client.open(methods.CONTAINER_START, m.StartContainer(name="again", attach=True)) as call:
            items = [item async for item in call]
            reply = await call.reply()
        assert m.Stdout(data=b"once\n") in items
        assert reply.exit_code == 0
        await rig.run_detached("sleep", "1000", name="busy")
        with pytest.raises(WrongState, match="busy is running"):
            await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="busy"))


@pytest.mark.row("R4")
async def test_stop_ends_it_and_says_how(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="stubborn")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="stubborn", timeout_s=0.2))
        assert (stopped.status, stopped.exit_code, stopped.pid) == ("exited", 137, None)
        assert stopped.finished_at_ns is not None
        again = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="stubborn"))
        assert again == stopped


@pytest.mark.row("R4")
async def test_a_command_that_heeds_sigterm_ends_by_itself(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "trap 'exit 3' TERM; echo ready; while true; do sleep 0.05; done", name="polite")
        await wait_for_log(rig, "polite", b"ready\n")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="polite", timeout_s=10))
        assert stopped.exit_code == 3


@pytest.mark.row("R5")
async def test_rm_removes_a_stopped_one_and_refuses_a_running_one(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="thing")
        with pytest.raises(WrongState, match="thing is running"):
            await rig.remove("thing")
        await rig.remove("thing", force=True)
        with pytest.raises(NotFound, match="thing"):
            await rig.inspect("thing")
        assert await rig.list() == []
        await rig.kill()
        await rig.start()
        assert await rig.list() == []
        assert record.id not in await rig.world.disk.list(rig.config.paths["containers"])


@pytest.mark.row("R6")
async def test_list_shows_running_ones_or_all(rig: Rig) -> None:
    async with rig:
        await rig.run("true", name="done")
        await rig.run_detached("sleep", "1000", name="live")
        running = await rig.client.call(methods.CONTAINER_LIST, m.ListContainers())
        assert [record.name for record in running.containers] == ["live"]
        everything = await rig.client.call(methods.CONTAINER_LIST, m.ListContainers(all=True))
        assert [record.name for record in everything.containers] == ["live", "done"]


@pytest.mark.row("R7")
async def test_exec_runs_the_given_command_inside(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "echo mark > /tmp/mark; echo ready; sleep 1000", name="host")
        await wait_for_log(rig, "host", b"ready\n")
        assert await rig.exec("host", "cat", "/tmp/mark") == (0, b"mark\n", b"")
        assert await rig.exec("host", "sh", "-c", "exit 9") == (9, b"", b"")
        assert await rig.exec("host", "cat", stdin=b"in\n") == (0, b"in\n", b"")


@pytest.mark.row("R7")
async def test_exec_refuses_what_cannot_be(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="host")
        with pytest.raises(CommandNotRunnable) as missing:
            await rig.exec("host", "/bin/nope")
        assert missing.value.exit_code == 127
        await rig.run("true", name="over")
        with pytest.raises(WrongState, match="over is exited"):
            await rig.exec("over", "true")
        with pytest.raises(NotFound):
            await rig.exec("nobody", "true")


@pytest.mark.row("R8")
async def test_logs_hold_what_was_written(rig: Rig) -> None:
    async with rig:
        await rig.run("sh", "-c", "echo one; echo two; echo three >&2", name="writer")
        assert await rig.logs("writer") == (None, b"one\ntwo\n", b"three\n")
        assert (await rig.logs("writer", tail=1))[1:] == (b"", b"three\n")


@pytest.mark.row("R8")
async def test_logs_follow_until_the_end(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "for i in 1 2 3 4 5; do echo line $i; sleep 0.05; done", name="slow")
        followed = await rig.logs("slow", follow=True)
        assert followed.stdout == b"".join(b"line %d\n" % i for i in range(1, 6))


@pytest.mark.row("R9")
async def test_commit_keeps_what_was_changed(rig: Rig) -> None:
    async with rig:
        await rig.run("sh", "-c", "echo changed > /kept; rm /etc/notes", name="maker")
        image = await rig.client.call(methods.CONTAINER_COMMIT, m.CommitContainer(name="maker", image="made"))
        assert len(image.layers) == 2
        assert await rig.run("cat", "/kept", image="made") == (0, b"changed\n", b"")
        assert (await rig.run("cat", "/etc/notes", image="made")).exit_code == 1


@pytest.mark.row("R14")
async def test_a_record_says_all_that_is_known(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached(
            *("sleep", "1000"),
            name="full",
            env={"A": "b"},
            labels={"team": "x"},
            working_dir="/tmp",
            user="user",
            hostname="box",
            network="bridge",
            resources=m.Resources(memory_bytes_max=64 << 20, cpus=0.5, pids_max=20),
        )
        assert len(record.__struct_fields__) >= 20
        assert (record.env["A"], record.labels, record.working_dir) == ("b", {"team": "x"}, "/tmp")
        assert (record.user, record.hostname) == ("user", "box")
        assert record.resources == m.Resources(memory_bytes_max=64 << 20, cpus=0.5, pids_max=20)
        assert record.network.ip_address is not None
        assert record.network.ip_address.startswith("10.88.0.")
        assert (record.network.gateway, record.network.prefix_length) == ("10.88.0.1", 24)
        assert record.network.mac_address is not None
        assert record.health == "none"
        assert record.created_at_ns <= (record.started_at_ns or 0) <= record.updated_at_ns
        assert record.boot_id == rig.world.processes.boot_id()


async def test_user_environment_and_place_reach_the_command(rig: Rig) -> None:
    async with rig:
        script = "id -u; pwd; hostname; env"
        result = await rig.run("sh", "-c", script, env={"A": "b c"}, user="user", working_dir="/tmp", hostname="box")
        lines = result.stdout.decode().splitlines()
        assert lines[:3] == ["1000", "/tmp", "box"]
        assert {"A=b c", "HOME=/home", "HOSTNAME=box"} <= set(lines[3:])


@pytest.mark.row("R2")
async def test_auto_remove_leaves_nothing_and_frees_the_name(rig: Rig) -> None:
    async with rig:
        for _ in range(2):
            assert (await rig.run("true", name="once", auto_remove=True)).exit_code == 0
            assert await rig.list() == []


async def test_what_cannot_start_says_why(rig: Rig) -> None:
    async with rig:
        with pytest.raises(CommandNotRunnable, match="no such command") as missing:
            await rig.run("/bin/nope", name="missing")
        assert missing.value.exit_code == 127
        record = await rig.inspect("missing")
        assert (record.status, record.exit_code) == ("exited", 127)
        with pytest.raises(CommandNotRunnable) as refused:
            await rig.run("/etc/notes", auto_remove=True)
        assert refused.value.exit_code == 126
        assert [each.name for each in await rig.list()] == ["missing"]


async def test_requests_that_make_no_sense_are_refused(rig: Rig) -> None:
    async with rig:
        with pytest.raises(NotFound, match="no such image: nowhere"):
            await rig.run("true", image="nowhere")
        with pytest.raises(NotFound, match="no such network: elsewhere"):
            await rig.run("true", network="elsewhere")
        with pytest.raises(InvalidArgument, match="no such file or folder"):
            await rig.run("true", mounts=(m.Mount(source=f"{rig.folder}/absent", destination="/data"),))
        with pytest.raises(InvalidArgument, match="neither given nor set"):
            await rig.run()
        await rig.run("true", name="taken")
        with pytest.raises(AlreadyExists, match="taken"):
            await rig.run("true", name="taken")
        assert [record.name for record in await rig.list()] == ["taken"]


async def test_an_image_in_use_is_not_removed(rig: Rig) -> None:
    async with rig:
        await rig.run("true", name="user")
        with pytest.raises(InUse, match="user"):
            await rig.client.call(methods.IMAGE_REMOVE, m.RemoveImage(name=IMAGE))
        await rig.remove("user")
        await rig.client.call(methods.IMAGE_REMOVE, m.RemoveImage(name=IMAGE))
        with pytest.raises(NotFound):
            await rig.run("true")


async def test_signals_reach_the_first_process(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "trap 'exit 5' USR1; echo ready; while true; do sleep 0.05; done", name="listener")
        await wait_for_log(rig, "listener", b"ready\n")
        await rig.client.call(methods.CONTAINER_KILL, m.KillContainer(name="listener", signal=10))
        assert (await rig.wait("listener")).exit_code == 5


@pytest.mark.row("R10")
async def test_networks_persist_and_overlaps_are_refused(rig: Rig) -> None:
    async with rig:
        made = await rig.client.call(methods.NETWORK_CREATE, m.NetworkSpec(name="inner", subnet="10.89.7.0/24"))
        assert (made.gateway, made.driver) == ("10.89.7.1", "bridge")
        await rig.restart()
        again = await rig.client.call(methods.NETWORK_INSPECT, m.NetworkNameRequest(name="inner"))
        assert (again.subnet, again.bridge) == (made.subnet, made.bridge)
        with pytest.raises((AlreadyExists, InvalidArgument)):
            await rig.client.call(methods.NETWORK_CREATE, m.NetworkSpec(name="other", subnet="10.89.7.128/25"))
        record = await rig.run_detached("sleep", "1000", name="guest", network="inner")
        assert (record.network.ip_address or "").startswith("10.89.7.")
        with pytest.raises(InUse, match="guest"):
            await rig.client.call(methods.NETWORK_REMOVE, m.NetworkNameRequest(name="inner"))
        await rig.remove("guest", force=True)
        await rig.client.call(methods.NETWORK_REMOVE, m.NetworkNameRequest(name="inner"))


@pytest.mark.row("R31")
async def test_many_clients_at_once_lose_nothing(rig: Rig) -> None:
    async with rig:

        async def one_life(number: int) -> None:
            name = f"c{number}"
            await rig.run_detached("sleep", "1000", name=name, network="bridge")
            await asyncio.gather(rig.inspect(name), rig.list(), rig.exec(name, "true"))
            if number % 2:
                await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name=name, timeout_s=0))

        await asyncio.gather(*(one_life(number) for number in range(12)))
        records = await rig.list()
        assert sorted(record.name for record in records) == sorted(f"c{number}" for number in range(12))
        assert {record.name: record.status for record in records} == {f"c{n}": "exited" if n % 2 else "running" for n in range(12)}
        addresses = [record.network.ip_address for record in records if record.status == "running"]
        assert len(set(addresses)) == len(addresses) == 6


@pytest.mark.row("R31")
async def test_one_name_wanted_by_many_goes_to_one(rig: Rig) -> None:
    async with rig:
        outcomes = await asyncio.gather(*(rig.run_detached("sleep", "1000", name="only") for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(outcome, m.Container) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 7


async def test_kill_of_the_daemon_stops_no_container(rig: Rig) -> None:
    async with rig:
        before = await rig.run_detached("sleep", "1000", name="survivor", network="bridge")
        await rig.run_detached("sh", "-c", "sleep 0.3; exit 4", name="ends")
        await rig.run("sh", "-c", "exit 6", name="over")
        await rig.kill()
        await asyncio.sleep(1)  # a container's own time, not a condition of ours: "ends" has to end while nobody looks
        await rig.start()
        after = await rig.inspect("survivor")
        assert (after.status, after.pid, after.network.ip_address) == ("running", before.pid, before.network.ip_address)
        assert after.started_at_ns == before.started_at_ns
        ended = await rig.inspect("ends")
        assert (ended.status, ended.exit_code) == ("exited", 4)
        assert (await rig.inspect("over")).exit_code == 6
        assert (await rig.exec("survivor", "echo", "still")).stdout == b"still\n"
        another = await rig.run_detached("sleep", "1000", network="bridge")
        assert another.network.ip_address != after.network.ip_address
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="survivor", timeout_s=0))
        assert stopped.exit_code == 137


@pytest.mark.row("R31")
async def test_kill_amid_twenty_starts_loses_and_leaks_nothing(rig: Rig) -> None:
    async with rig:
        acknowledged: list[str] = []

        async def start(number: int) -> None:
            record = await rig.run_detached("sleep", "1000", name=f"s{number}", network="bridge")
            acknowledged.append(record.name)

        starts = [asyncio.ensure_future(start(number)) for number in range(20)]
        while len(acknowledged) < 5:
            done = [task for task in starts if task.done()]
            assert len(done) < 20
            await asyncio.sleep(0.001)
        await rig.kill()
        await asyncio.gather(*starts, return_exceptions=True)
        await rig.start()
        records = {record.name: record for record in await rig.list()}
        assert set(acknowledged) <= set(records)
        assert all(records[name].status == "running" for name in acknowledged)
        assert {record.status for record in records.values()} <= {"running", "created"}
        running = [record for record in records.values() if record.status == "running"]
        for record in running:
            assert record.pid is not None
            assert rig.world.processes.identify(record.pid) is not None
        addresses = [record.network.ip_address for record in running]
        assert len(set(addresses)) == len(addresses)
        for record in records.values():
            if record.status == "created":  # an interrupted start can be started again
                await rig.client.call(methods.CONTAINER_START, m.StartContainer(name=record.name))
        # leaving the rig removes all and finds no mount, namespace, link, address, control group or process left


async def test_a_run_withdrawn_before_it_started_leaves_nothing(rig: Rig) -> None:
    async with rig:
        spec = m.ContainerSpec(image=IMAGE, name="regretted", command=("sleep", "1000"), network="bridge")
        call = rig.client.open(methods.CONTAINER_RUN, m.RunContainer(spec=spec))
        await call.__aenter__()
        while not await rig.list():
            pass
        await call.__aexit__(None, None, None)
        async with asyncio.timeout(40):
            while await rig.list():
                pass


async def test_auto_remove_goes_on_after_a_kill(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "0.3", name="brief", auto_remove=True)
        await rig.kill()
        await asyncio.sleep(1)  # the container's own time
        await rig.start()
        assert await rig.list() == []


async def wait_for_log(rig: Rig, name: str, text: bytes) -> None:
    """Wait until a container wrote something."""
    written = b""
    async with asyncio.timeout(40), rig.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name=name, follow=True)) as call:
        async for item in call:
            written += item.data if isinstance(item, m.Stdout) else b""
            if text in written:
                return
    raise AssertionError(f"{name} ended without writing {text!r}: {written!r}")
