"""What can be changed of a container that exists, and who is told of it, through the daemon's socket on both Worlds."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api import usage as u
from isopod.world.errors import (
    AlreadyExists,
    Disconnected,
    InUse,
    InvalidArgument,
    IsopodError,
    NotFound,
    PeerError,
    RuntimeFailed,
    WrongState,
)
from isopod.world.sim import SimWorld
from tests.node.rig import IMAGE, Rig, SimBackend


async def update(rig: Rig, name: str, **changes: Any) -> m.UpdatedContainer:
    return await rig.client.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name=name, **changes))


async def listed(rig: Rig, **request: Any) -> list[str]:
    reply = await rig.client.call(methods.CONTAINER_LIST, m.ListContainers(**request))
    return [record.name for record in reply.containers]


async def collect(rig: Rig, **request: Any) -> tuple[Sequence[m.Event], int]:
    """Read a stream of events that ends; return them and where it began."""
    begin, events = 0, list[m.Event]()
    async with rig.client.open(methods.CONTAINER_EVENTS, m.EventsRequest(**request)) as call:
        async for item in call:
            if isinstance(item, m.Cursor):
                begin = item.position
            else:
                events.append(item)
        await call.reply()
    return events, begin


async def take(rig: Rig, number: int, **request: Any) -> Sequence[m.Event]:
    """Read so many events of a stream that does not end."""
    events = list[m.Event]()
    async with rig.client.open(methods.CONTAINER_EVENTS, m.EventsRequest(**request)) as call:
        async for item in call:
            if isinstance(item, m.Event):
                events.append(item)
                if len(events) == number:
                    break
    return events


@pytest.mark.row("R15")
async def test_pause_and_unpause(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        paused = await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        assert paused.status == "paused"
        with pytest.raises(WrongState, match="box is paused"):
            await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        with pytest.raises(WrongState, match="box is paused") as refused:
            await rig.exec("box", "echo", "hi")
        assert "isopod unpause" in refused.value.hint
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).status == "paused", "it was no commit that froze it"
        assert (await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="box"))).status == "running"
        assert (await rig.exec("box", "echo", "hi")).stdout == b"hi\n"
        with pytest.raises(WrongState, match="box is running"):
            await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="box"))
        await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        assert stopped.status == "exited"
        with pytest.raises(WrongState, match="box is exited"):
            await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))


@pytest.mark.row("R15")
async def test_restart_passes_through_restarting(rig: Rig) -> None:
    async with rig:
        before = await rig.run_detached("sleep", "1000", name="box", auto_remove=True, network="bridge")
        since_ns = rig.world.clock.now_ns() + 1
        watching = asyncio.ensure_future(take(rig, 3, containers=("box",), kinds=("status",), since_ns=since_ns))
        after = await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="box", timeout_s=0.1))
        assert (after.status, after.id, after.restart_count) == ("running", before.id, 1)
        assert after.pid != before.pid
        assert [event.status for event in await watching] == ["restarting", "starting", "running"]
        await rig.run("true", name="done")
        again = await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="done"))
        assert again.restart_count == 0, "it did not run: it was started"


@pytest.mark.row("R16", "R11")
async def test_limits_change_at_once_and_stay(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box", resources=m.Resources(memory_bytes_max=64 << 20))
        done = await update(rig, "box", memory_bytes_max=128 << 20, cpus=0.5, pids_max=20)
        wanted = m.Resources(memory_bytes_max=128 << 20, cpus=0.5, pids_max=20)
        assert (done.container.resources, done.notes) == (wanted, ())
        done = await update(rig, "box", cpus=-1)
        wanted = m.Resources(memory_bytes_max=128 << 20, pids_max=20)
        assert done.container.resources == wanted
        for bad in ({"memory_bytes_max": 1}, {"cpus": -2.0}, {"pids_max": 0}):
            with pytest.raises(InvalidArgument):
                await update(rig, "box", **bad)
        with pytest.raises(InvalidArgument, match="nothing to change"):
            await update(rig, "box")
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).resources == wanted
        with pytest.raises(NotFound):
            await update(rig, "nobody", cpus=1.0)


@pytest.mark.row("R35")
async def test_labels_and_variables_change_and_stay(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box", labels={"a": "1", "b": "2"}, env={"OLD": "x"})
        done = await update(rig, "box", labels={"b": "3", "c": "4"}, labels_remove=("a",), env={"NEW": "y"}, env_remove=("OLD",))
        assert done.container.labels == {"b": "3", "c": "4"}
        assert "OLD" not in done.container.env
        assert "next start" in done.notes[0]
        assert (await rig.exec("box", "sh", "-c", "echo $NEW")).stdout == b"y\n"
        with pytest.raises(NotFound, match="label"):
            await update(rig, "box", labels_remove=("a",), env={"LATER": "z"})
        assert "LATER" not in (await rig.inspect("box")).env, "all of a request or nothing"
        await rig.kill()
        await rig.start()
        after = await rig.inspect("box")
        assert (after.labels, after.env["NEW"]) == ({"b": "3", "c": "4"}, "y")
        await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="box", timeout_s=0.1))
        events, _ = await collect(rig, since_ns=0, until_ns=rig.world.clock.now_ns(), kinds=("labels", "environment"))
        assert [(event.kind, event.labels) for event in events] == [("labels", {"b": "3", "c": "4"}), ("environment", None)]
        assert events[1].env is not None
        assert events[1].env["NEW"] == "y"


@pytest.mark.row("R18")
async def test_mounts_change_while_it_does_not_run(rig: Rig) -> None:
    async with rig:
        data = f"{rig.folder}/data"
        await rig.world.disk.make_directory(data)
        await rig.world.disk.write(f"{data}/file", b"seen\n")
        await rig.run_detached("sleep", "1000", name="box")
        add = m.Mount(source=data, destination="/data", read_only=True)
        with pytest.raises(WrongState, match="box is running"):
            await update(rig, "box", mounts=(add,))
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        for bad, error in (
            (m.Mount(source="data", destination="/data"), InvalidArgument),
            (m.Mount(source=f"{data}/nothing", destination="/data"), InvalidArgument),
            (m.Mount(source=data, destination="/x/../y"), InvalidArgument),
        ):
            with pytest.raises(error):
                await update(rig, "box", mounts=(bad,))
        await update(rig, "box", mounts=(add,))
        with pytest.raises(AlreadyExists):
            await update(rig, "box", mounts=(add,))
        await rig.restart()
        async with rig.client.open(methods.CONTAINER_START, m.StartContainer(name="box")) as call:
            await call.reply()
        assert (await rig.exec("box", "cat", "/data/file")).stdout == b"seen\n"
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        assert (await update(rig, "box", mounts_remove=("/data/",))).container.mounts == ()
        with pytest.raises(NotFound):
            await update(rig, "box", mounts_remove=("/data",))


async def has_link(rig: Rig, name: str) -> bool:
    """Return whether a running container has a link beside its loopback."""
    if not isinstance(rig.backend, SimBackend):
        return b"eth0" in (await rig.exec(name, "ls", "/sys/class/net")).stdout
    process = rig.backend.sim.machine.table.get((await rig.inspect(name)).pid or 0)
    assert process is not None
    assert process.network is not None
    return "eth0" in process.network.links


@pytest.mark.row("R17")
async def test_networks_are_left_and_joined_at_once_and_over_restarts(rig: Rig) -> None:
    async with rig:
        await rig.client.call(methods.NETWORK_CREATE, m.NetworkSpec(name="backend", subnet="10.99.1.0/24"))
        record = await rig.run_detached("sleep", "1000", name="box", network="bridge")
        assert await has_link(rig, "box")
        first = record.network.ip_address or ""

        async def place(method: Any, network: str) -> m.UpdatedContainer:
            found: m.UpdatedContainer = await rig.client.call(method, m.ConnectNetwork(network=network, name="box"))
            return found

        async def hosts() -> str:
            return (await rig.exec("box", "cat", "/etc/hosts")).stdout.decode()

        with pytest.raises(InUse, match="network bridge"):
            await place(methods.NETWORK_CONNECT, "backend")
        with pytest.raises(NotFound):
            await place(methods.NETWORK_DISCONNECT, "backend")
        left = await place(methods.NETWORK_DISCONNECT, "bridge")
        assert left.container.network == m.Endpoint(network="none")
        assert not await has_link(rig, "box")
        assert first not in await hosts()
        with pytest.raises(NotFound):
            await place(methods.NETWORK_CONNECT, "nowhere")
        joined = await place(methods.NETWORK_CONNECT, "backend")
        address = joined.container.network.ip_address or ""
        assert address.startswith("10.99.1.")
        assert joined.notes == ()
        assert await has_link(rig, "box")
        assert address in await hosts()
        with pytest.raises(AlreadyExists):
            await place(methods.NETWORK_CONNECT, "backend")
        with pytest.raises(InUse):
            await rig.client.call(methods.NETWORK_REMOVE, m.NetworkNameRequest(name="backend"))
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).network == joined.container.network
        assert await has_link(rig, "box")
        after = await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="box", timeout_s=0.1))
        assert (after.network.ip_address or "").startswith("10.99.1.")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        await place(methods.NETWORK_DISCONNECT, "backend")
        await rig.client.call(methods.NETWORK_REMOVE, m.NetworkNameRequest(name="backend"))


@pytest.mark.row("R17")
async def test_one_that_has_no_network_joins_one_and_the_hosts_at_its_next_start(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box", network="none")
        request = m.ConnectNetwork(network="bridge", name="box")
        joined = await rig.client.call(methods.NETWORK_CONNECT, request)
        assert (joined.container.network.ip_address or "").startswith("10.88.0.")
        await rig.client.call(methods.NETWORK_DISCONNECT, request)
        later = await rig.client.call(methods.NETWORK_CONNECT, m.ConnectNetwork(network="host", name="box"))
        assert "next start" in later.notes[0]
        assert later.container.network == m.Endpoint(network="host")


@pytest.mark.row("R28", "R29")
async def test_lists_and_sums_through_the_socket(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="web1", labels={"tier": "web"}, resources=m.Resources(memory_bytes_max=64 << 20))
        await rig.run_detached(
            "sleep", "1000", name="db1", labels={"tier": "db"}, resources=m.Resources(memory_bytes_max=32 << 20, cpus=0.5)
        )
        await rig.run("true", name="web0", labels={"tier": "web"})
        assert await listed(rig, status=("exited",)) == ["web0"]
        assert await listed(rig, labels=("tier=web",)) == ["web1"]
        assert await listed(rig, all=True, name="web*", sort="name") == ["web0", "web1"]
        assert await listed(rig, all=True, limit=1) == ["web0"]
        assert await listed(rig, memory_bytes_min=1, sort="name") == ["db1", "web1"]
        assert await listed(rig, memory_bytes_min=1 << 40) == []
        total = await rig.client.call(methods.SYSTEM_USAGE, m.Empty())
        assert (total.containers, total.by_status) == (3, {"running": 2, "exited": 1})
        assert (total.limits_running.memory_bytes, total.limits_running.cpus_unlimited) == (96 << 20, 1)
        assert total.limits_all.memory_unlimited == 1
        assert total.measured.memory_bytes > 0
        assert total.measured.pids >= 2
        assert total.storage.images_bytes > 0
        assert total.storage.metadata_bytes > 0
        stats = await rig.client.call(methods.CONTAINER_STATS, u.StatsRequest(names=("db1", "web0")))
        assert [(use.name, use.memory_bytes_max, use.n_pids is None) for use in stats.containers] == [
            ("db1", 32 << 20, False),
            ("web0", None, True),
        ]


@pytest.mark.row("R30")
async def test_events_tell_a_life_in_order_and_go_on_after_a_restart(rig: Rig) -> None:
    async with rig:
        await rig.run("true", name="box", auto_remove=True)
        until = rig.world.clock.now_ns()
        events, _ = await collect(rig, since_ns=0, until_ns=until)
        assert [(event.kind, event.status) for event in events] == [
            ("created", "created"),
            ("status", "starting"),
            ("status", "running"),
            ("status", "exited"),
            ("deleted", None),
        ]
        assert events[3].exit_code == 0
        assert [event.cursor for event in events] == sorted(event.cursor for event in events)
        assert len({event.cursor for event in events}) == 5
        cursor = events[1].cursor
        await rig.kill()
        await rig.start()
        await rig.client.call(methods.CONTAINER_CREATE, m.ContainerSpec(image=IMAGE, name="next", command=("true",), network="none"))
        newest, begin = await collect(rig, cursor=events[-1].cursor, until_ns=rig.world.clock.now_ns())
        assert ([event.name for event in newest], begin) == (["next"], events[-1].cursor)
        assert await take(rig, 4, cursor=cursor) == [*events[2:], *newest]
        now_ns = rig.world.clock.now_ns()
        assert (await collect(rig, since_ns=0, until_ns=now_ns, containers=("next",)))[0] == newest
        with pytest.raises(InvalidArgument, match="cursor"):
            await collect(rig, cursor=10_000)


@pytest.mark.row("R30")
async def test_a_stream_loses_and_doubles_nothing_over_kills_of_the_node(rig: Rig) -> None:
    async with rig:
        seen: list[m.Event] = []
        cursor = 0
        for life in range(3):
            reading = asyncio.ensure_future(_read_until_cut(rig, cursor, seen))
            for number in range(5):
                spec = m.ContainerSpec(image=IMAGE, name=f"l{life}n{number}", command=("true",), network="none")
                await rig.client.call(methods.CONTAINER_CREATE, spec)
            await rig.kill()
            await reading
            cursor = seen[-1].cursor if seen else 0
            await rig.start()
        rest, _ = await collect(rig, cursor=cursor, until_ns=rig.world.clock.now_ns())
        assert [event.name for event in [*seen, *rest]] == [f"l{life}n{number}" for life in range(3) for number in range(5)]


async def _read_until_cut(rig: Rig, cursor: int, seen: list[m.Event]) -> None:
    client = await rig.connect()
    try:
        async with client.open(methods.CONTAINER_EVENTS, m.EventsRequest(cursor=cursor)) as call:
            async for item in call:
                if isinstance(item, m.Event):
                    seen.append(item)
            await call.reply()
    except (Disconnected, IsopodError):
        return
    finally:
        await client.close()


@pytest.mark.row("R9")
async def test_a_command_that_meets_a_commit_waits_for_the_thaw(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        for number in range(6):
            starting = [asyncio.ensure_future(rig.exec("box", "echo", "ok")) for _ in range(3)]
            await asyncio.sleep(number * 0.004)  # at several moments of their starts
            await rig.client.call(methods.CONTAINER_COMMIT, m.CommitContainer(name="box", image=f"made:{number}"))
            assert [result.stdout for result in await asyncio.gather(*starting)] == [b"ok\n"] * 3
        for number in range(6):
            await rig.client.call(methods.IMAGE_REMOVE, m.RemoveImage(name=f"made:{number}"))


@pytest.mark.host
@pytest.mark.row("R16")
async def test_a_limit_below_what_is_in_use_is_refused_and_changes_nothing(host_rig: Rig) -> None:
    async with host_rig as rig:
        script = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2>/dev/null; echo full; sleep 1000"
        await rig.run_detached("sh", "-c", script, name="box", resources=m.Resources(memory_bytes_max=128 << 20))
        async with asyncio.timeout(40), rig.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name="box", follow=True)) as call:
            async for item in call:
                if isinstance(item, m.Stdout) and b"full" in item.data:
                    break
        with pytest.raises((RuntimeFailed, WrongState)):
            await update(rig, "box", memory_bytes_max=8 << 20)
        assert (await rig.inspect("box")).resources.memory_bytes_max == 128 << 20


@pytest.mark.row("R22", "R24", "R26")
async def test_snapshots_and_archive_follow_the_settings(sim_world: SimWorld, folder: str) -> None:
    rig = Rig(SimBackend(sim_world, folder), "isopodt")
    small = {"ISOPOD_RECORDS_SEGMENT_BYTES": str(1 << 20), "ISOPOD_RECORDS_SNAPSHOT_RECORDS": "20", "ISOPOD_RECORDS_SNAPSHOTS_KEPT": "2"}
    rig.environment = {**small, "ISOPOD_RECORDS_ARCHIVE_N_MAX": "3", "ISOPOD_RECORDS_COMPRESS": "true"}
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        for number in range(150):
            text = sim_world.world.random.token_hex(30_000)  # nothing that compresses away
            await update(rig, "box", labels={"n": str(number), "fill": text})
        await asyncio.sleep(5)
        metadata = rig.config.paths["metadata"]
        snapshots = await rig.world.disk.list(rig.config.paths["snapshots"])
        archive = await rig.world.disk.list(rig.config.paths["archive"])
        assert len(snapshots) == 2
        assert archive[0] != "wal-00000000000000000001.log.zst", "the oldest went"
        assert 1 <= len(archive) <= 3 + 6, "three beside those that a recovery from the older snapshot needs"
        assert all(name.startswith("wal-") and name.endswith((".log", ".log.zst")) for name in archive)
        assert "current.wal" in await rig.world.disk.list(metadata)
        before = await rig.inspect("box")
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).labels == before.labels


@pytest.mark.row("R19", "R31")
async def test_no_acknowledged_update_of_many_clients_is_lost_by_a_kill(rig: Rig) -> None:
    async with rig:
        for name in ("a1", "b2", "c3"):
            spec = m.ContainerSpec(image=IMAGE, name=name, command=("true",), network="none")
            await rig.client.call(methods.CONTAINER_CREATE, spec)
        acknowledged: list[tuple[str, str]] = []
        enough = asyncio.Event()

        async def client(number: int) -> None:
            connection = await rig.connect()
            try:
                for turn in range(1000):
                    name, key = ("a1", "b2", "c3")[turn % 3], f"{number}.{turn}"
                    await connection.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name=name, labels={key: ""}))
                    acknowledged.append((name, key))
                    if len(acknowledged) >= 150:
                        enough.set()
            except PeerError:
                return
            finally:
                await connection.close()

        clients = [asyncio.ensure_future(client(number)) for number in range(8)]
        async with asyncio.timeout(40):
            await enough.wait()
            await rig.kill()
            await asyncio.gather(*clients)
        await rig.start()
        records = {record.name: record for record in await rig.list()}
        missing = [(name, key) for name, key in acknowledged if key not in records[name].labels]
        assert missing == []
        assert len(acknowledged) >= 150
