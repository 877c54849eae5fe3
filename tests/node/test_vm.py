"""The life of virtual machines through the daemon's socket: the same verbs as for containers, on the simulated QEMU and on the real one.

On the host each body boots a guest, so few of them run there, one after the other.
"""

import asyncio
from collections.abc import Iterator

import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.api import usage as u
from isopod.world.errors import CommandNotRunnable, InvalidArgument, IsopodError, NotFound, Unsupported, WrongState
from isopod.world.sim import SimWorld
from tests.node.rig import HostBackend
from tests.node.vms import MIB, VM, VmRig, leftovers, missing_for_vms, sim_rig

ON_HOST = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def rig(sim_world: SimWorld, folder: str) -> VmRig:
    """A node in the simulation."""
    return sim_rig(sim_world, folder)


@pytest.fixture(params=[pytest.param("host", marks=ON_HOST), "sim"])
def both(request: pytest.FixtureRequest) -> Iterator[VmRig]:
    """A node on each World."""
    if request.param == "sim":
        yield sim_rig(request.getfixturevalue("sim_world"), request.getfixturevalue("folder"))
        return
    if missing := missing_for_vms():
        pytest.skip(missing)
    folder = request.getfixturevalue("folder")
    backend = HostBackend(request.getfixturevalue("host_world"), folder)
    backend.more_environment = {
        "ISOPOD_VM_MONITOR_ROOT": f"{folder}/sbs",
        "ISOPOD_VM_ACCELERATOR": "tcg",
        "ISOPOD_VM_TEMPLATES_MAX": "0",  # one guest at a time is enough for a small machine
    }
    yield VmRig(backend, "isopodw")


@pytest.mark.row("V3", "V4", "R1", "E10")
async def test_run_attached_shows_output_and_exit_code(both: VmRig) -> None:
    async with both as rig:
        result = await rig.run("sh", "-c", "echo hello; echo oops >&2; exit 7", name="first")
        assert result == (7, b"hello\n", b"oops\n")
        assert (await rig.logs("first"))[1:] == (b"hello\n", b"oops\n")
        record = await rig.inspect("first")
        assert (record.isolation, record.status, record.exit_code, record.error) == ("vm", "exited", 7, "")
        assert (record.origin, record.accelerator) == ("cold", "tcg")


@pytest.mark.row("V1", "V3", "V5")
async def test_a_machine_lives_through_the_daemons_death_and_is_steered_by_the_next(both: VmRig) -> None:
    async with both as rig:
        record = await rig.run_detached("sh", "-c", "echo begun; trap 'exit 3' TERM; while true; do sleep 0.1; done", name="dear")
        await until_log(rig, "dear", b"begun\n")
        assert (await rig.exec("dear", "nproc")).stdout == b"1\n"
        kernel = (await rig.exec("dear", "uname", "-r")).stdout.decode().strip()
        assert kernel != rig.world.kernel.host_facts().kernel
        await rig.kill()
        await rig.start()
        after = await rig.inspect("dear")
        assert (after.status, after.pid) == ("running", record.pid)
        assert await rig.exec("dear", "sh", "-c", "cat; exit 9", stdin=b"in\n") == (9, b"in\n", b"")
        state = await rig.status("dear")
        assert (state.machine, state.guest_kernel) == ("running", kernel)
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="dear", timeout_s=20))
        assert (stopped.status, stopped.exit_code) == ("exited", 3)


@pytest.mark.row("V3")
async def test_stdin_reaches_the_command_and_ends(rig: VmRig) -> None:
    async with rig:
        data = b"line\n" * 100_000
        result = await rig.run("cat", stdin=data)
        assert (result.exit_code, len(result.stdout), result.stderr) == (0, len(data), b"")


@pytest.mark.row("V3")
async def test_a_terminal_and_its_size(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        assert (await rig.exec("box", "stty", "size", terminal=True, rows=30, columns=100)).stdout == b"30 100\r\n"


@pytest.mark.row("V3")
async def test_commands_that_cannot_be_run_say_so(rig: VmRig) -> None:
    async with rig:
        for command, code in (("/bin/nope", 127), ("/etc/notes", 126)):
            with pytest.raises(CommandNotRunnable) as refused:
                await rig.run(command, name=f"c{code}")
            assert refused.value.exit_code == code
            assert (await rig.inspect(f"c{code}")).exit_code == code
        await rig.run_detached("sleep", "1000", name="box")
        with pytest.raises(CommandNotRunnable):
            await rig.exec("box", "nope")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        with pytest.raises(WrongState):
            await rig.exec("box", "true")


@pytest.mark.row("V1")
async def test_it_sees_what_it_was_given(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="big", vm=m.VmOptions(vcpus=3, memory_bytes=512 * MIB, disk_bytes=64 * MIB))
        assert (await rig.exec("big", "nproc")).stdout == b"3\n"
        kib = int((await rig.exec("big", "grep", "MemTotal", "/proc/meminfo")).stdout.split()[1])
        assert 0.9 * 512 * MIB < kib << 10 <= 512 * MIB


@pytest.mark.row("V1")
async def test_what_cannot_be_given_is_refused_with_the_reason(rig: VmRig) -> None:
    async with rig:
        with pytest.raises(IsopodError, match="memory"):
            await rig.run("true", name="huge", vm=m.VmOptions(memory_bytes=1 << 40))
        with pytest.raises(IsopodError, match=r"vcpu|processor"):
            await rig.run("true", vm=m.VmOptions(vcpus=100_000))
        with pytest.raises((Unsupported, InvalidArgument)):
            await rig.run("true", network="host")


@pytest.mark.row("V3")
async def test_stop_kill_remove_and_restart(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="stubborn", network="bridge")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="stubborn", timeout_s=0.2))
        assert (stopped.status, stopped.exit_code, stopped.pid) == ("exited", 143, None)
        assert (await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="stubborn"))).exit_code == 143
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="stubborn"))
        again = await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="stubborn", timeout_s=0.2))
        assert (again.status, again.restart_count) == ("running", 1)
        await rig.client.call(methods.CONTAINER_KILL, m.KillContainer(name="stubborn", signal=9))
        assert (await rig.wait("stubborn")).exit_code == 137
        await rig.run_detached("sleep", "1000", name="busy")
        with pytest.raises(WrongState):
            await rig.remove("busy")
        await rig.remove("busy", force=True)
        with pytest.raises(NotFound):
            await rig.inspect("busy")


async def test_a_machine_that_ignores_sigterm_is_killed(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "trap '' TERM; while true; do sleep 1; done", name="deaf")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="deaf", timeout_s=1.0))
        assert (stopped.status, stopped.exit_code) == ("exited", 137)


async def test_what_it_wrote_is_there_at_its_next_start(rig: VmRig) -> None:
    async with rig:
        await rig.run("sh", "-c", "cat /kept 2>/dev/null; echo more >> /kept", name="box")
        for number in (1, 2):
            assert (await rig.start_attached("box")).stdout == b"more\n" * number


@pytest.mark.row("V6")
async def test_a_paused_machine_stands_still_and_goes_on(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "while true; do echo tick; sleep 1; done", name="clock")
        await until_log(rig, "clock", b"tick\n")
        paused = await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="clock"))
        assert paused.status == "paused"
        n_before = len((await rig.logs("clock")).stdout)
        await asyncio.sleep(300)
        assert len((await rig.logs("clock")).stdout) == n_before
        assert (await rig.status("clock")).machine == "paused"
        with pytest.raises(WrongState):
            await rig.exec("clock", "true")
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("clock")).status == "paused"
        await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="clock"))
        assert (await rig.exec("clock", "echo", "awake")).stdout == b"awake\n"
        assert len((await rig.logs("clock")).stdout) > n_before


@pytest.mark.row("V3")
async def test_stats_tell_what_the_host_pays(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        (usage,) = (await rig.client.call(methods.CONTAINER_STATS, u.StatsRequest(names=("box",)))).containers
        assert usage.memory_bytes is not None
        assert usage.memory_bytes > 16 * MIB
        assert usage.cpu_ns


@pytest.mark.row("V3")
async def test_logs_have_no_gap_over_a_daemons_death(rig: VmRig) -> None:
    async with rig:
        script = "i=0; while test $i -lt 60; do i=$((i+1)); echo line $i; sleep 0.1; done"
        await rig.run_detached("sh", "-c", script, name="writer")
        for _ in range(3):
            await asyncio.sleep(1)
            await rig.kill()
            await asyncio.sleep(0.5)
            await rig.start()
        assert (await rig.wait("writer")).exit_code == 0
        assert (await rig.logs("writer")).stdout == b"".join(b"line %d\n" % i for i in range(1, 61))


@pytest.mark.row("V3")
async def test_the_console_can_be_looked_at_and_typed_on(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        async with rig.client.open(methods.VM_CONSOLE, machines.VmConsole(name="box")) as call:
            await call.send(m.Stdin(data=b"anybody?\n"))
            seen = b""
            async with asyncio.timeout(30):
                while b"anybody?\r\n" not in seen:
                    item = await call.receive()
                    assert item is not None, seen
                    seen += item.data if isinstance(item, m.Stdout) else b""
        assert b"Run /init as init process" in seen
        assert (await rig.inspect("box")).status == "running"


@pytest.mark.row("V6")
async def test_warm_starts_are_quick_and_told_apart(rig: VmRig, sim_world: SimWorld) -> None:
    async with rig:
        await rig.template()
        started = sim_world.loop.time()
        records = [await rig.run_detached("sleep", "1000", name=f"c{number}", network="bridge") for number in range(4)]
        assert (sim_world.loop.time() - started) / len(records) < 0.35
        assert {record.origin for record in records} == {"template"}
        said = {}
        for what, command in {
            "name": ("hostname",),
            "mac": ("cat", "/sys/class/net/eth0/address"),
            "hosts": ("cat", "/etc/hosts"),
            "entropy": ("head", "-c", "16", "/dev/urandom"),
        }.items():
            said[what] = [(await rig.exec(record.name, *command)).stdout for record in records]
            assert len(set(said[what])) == len(records), what
        for record, mac, hosts in zip(records, said["mac"], said["hosts"], strict=True):
            assert mac == f"{record.network.mac_address}\n".encode()
            assert record.network.ip_address is not None
            assert record.network.ip_address.encode() in hosts
        now = sim_world.world.clock.now_ns() // 10**9
        assert abs(int((await rig.exec("c0", "date", "+%s")).stdout) - now) <= 1
        cold = await rig.run_detached("sleep", "1000", name="cold", vm=m.VmOptions(memory_bytes=VM.memory_bytes, cold=True))
        assert cold.origin == "cold"


@pytest.mark.row("V6")
async def test_a_snapshot_is_gone_back_to(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sh", "-c", "sleep 100000; exit 4", name="box", network="bridge")
        await rig.exec("box", "sh", "-c", "echo before > /file")
        await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name="box", snapshot="one"))
        await rig.exec("box", "sh", "-c", "echo after > /file; sync")
        assert [each.name for each in (await rig.status("box")).snapshots] == ["one"]
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0.1))
        back = await rig.client.call(methods.VM_RESTORE, machines.VmSnapshotRequest(name="box", snapshot="one"))
        assert (back.status, back.origin) == ("running", "snapshot one")
        assert (await rig.exec("box", "cat", "/file")).stdout == b"before\n"
        assert (await rig.exec("box", "cat", "/sys/class/net/eth0/address")).stdout == f"{back.network.mac_address}\n".encode()
        await rig.client.call(methods.VM_SNAPSHOT_REMOVE, machines.VmSnapshotRequest(name="box", snapshot="one"))
        with pytest.raises(NotFound):
            await rig.client.call(methods.VM_RESTORE, machines.VmSnapshotRequest(name="box", snapshot="one"))


@pytest.mark.row("V4")
async def test_mounts_are_shared(rig: VmRig, sim_world: SimWorld) -> None:
    async with rig:
        sim_world.machine.view.make_folders("/srv/data")
        sim_world.machine.view.write("/srv/data/file", b"from the host\n")
        mounts = (m.Mount(source="/srv/data", destination="/data"), m.Mount(source="/srv/data/file", destination="/one", read_only=True))
        result = await rig.run("sh", "-c", "cat /data/file /one; echo back > /data/new; echo no > /one", name="box", mounts=mounts)
        assert result.stdout == b"from the host\nfrom the host\n"
        assert result.exit_code == 1
        assert bytes(sim_world.machine.view.open_file("/srv/data/new").data) == b"back\n"


async def test_nothing_is_left_of_machines_that_were_removed(rig: VmRig, sim_world: SimWorld) -> None:
    async with rig:
        await rig.template()
        await asyncio.gather(*(rig.run("sh", "-c", f"exit {number}", name=f"m{number}", network="bridge") for number in range(6)))
        await rig.empty()
        await asyncio.sleep(1)
        assert await leftovers(sim_world, rig) == []
    assert [each.argv for each in sim_world.machine.table.live()] == []
    assert sim_world.network.listeners() == []


async def until_log(rig: VmRig, name: str, text: bytes) -> None:
    """Return once a machine has written something."""
    async with rig.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name=name, follow=True)) as call:
        seen = b""
        async with asyncio.timeout(60):
            while text not in seen:
                item = await call.receive()
                assert item is not None, seen
                seen += item.data if isinstance(item, m.Stdout) else b""
