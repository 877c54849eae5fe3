"""What only the real kernel can show: limits that hold, confinement, terminals, full disks, dead supervisors."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.errors import DiskFull, UnavailableError
from tests.node.rig import HostBackend, Rig, starter_tar

pytestmark = pytest.mark.host
MIB = 1 << 20


def backend(rig: Rig) -> HostBackend:
    assert isinstance(rig.backend, HostBackend)
    return rig.backend


def of_zeros(n_mib: int) -> tuple[str, ...]:
    """Return the arguments of a dd that takes so much memory, and returns."""
    return ("if=/dev/zero", "of=/dev/null", f"bs={n_mib}M", "count=1")


@pytest.mark.row("R11")
async def test_anonymous_memory_over_the_limit_is_killed_and_recorded(host_rig: Rig) -> None:
    async with host_rig as rig:
        # dd fills its one block, anonymous memory, within one call of the kernel. What grows page by page would, near its limit, have its
        # own program read from the disk again for each page: minutes on a slow machine.
        ran = await rig.run("dd", *of_zeros(100), name="hog", resources=m.Resources(memory_bytes_max=32 * MIB))
        record = await rig.inspect("hog")
        assert (ran.exit_code, record.exit_code, record.oom_killed) == (137, 137, True)
        fits = await rig.run("dd", *of_zeros(8), resources=m.Resources(memory_bytes_max=32 * MIB))
        assert fits.exit_code == 0


@pytest.mark.row("R11")
async def test_the_pids_limit_refuses_one_more_process(host_rig: Rig) -> None:
    async with host_rig as rig:
        many = "for i in $(seq 30); do sleep 5 & done; wait"
        ran = await rig.run("sh", "-c", many, resources=m.Resources(pids_max=10))
        assert b"fork" in ran.stderr
        assert ran.exit_code != 0


@pytest.mark.row("R11")
async def test_the_cpu_limit_holds(host_rig: Rig) -> None:
    async with host_rig as rig:
        record = await rig.run_detached("sh", "-c", "while :; do :; done", resources=m.Resources(cpus=0.2))
        cgroup = f"/{rig.config.prefix}/{record.id}"

        def used_ns() -> int:
            used = rig.world.kernel.cgroup_usage(cgroup).cpu_usage_ns
            assert used is not None
            return used

        began_ns, started_ns = rig.world.clock.monotonic_ns(), used_ns()
        await asyncio.sleep(2)  # the measured interval, not a condition
        async with asyncio.timeout(40):
            while used_ns() - started_ns < 100_000_000:  # on a machine that gives it less than its limit
                await asyncio.sleep(0.05)
        ended_ns = used_ns()
        # Never more than the limit for as long as it took, and a period's budget at either end.
        assert ended_ns - started_ns < 0.3 * (rig.world.clock.monotonic_ns() - began_ns) + 100_000_000


@pytest.mark.row("R11")
async def test_limits_are_visible_in_the_record(host_rig: Rig) -> None:
    async with host_rig as rig:
        wanted = m.Resources(memory_bytes_max=64 * MIB, cpus=1.5, pids_max=50)
        record = await rig.run_detached("sleep", "1000", resources=wanted)
        assert record.resources == wanted
        inside = await rig.exec(record.name, "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")
        assert str(64 * MIB).encode() in inside.stdout.split()


async def test_a_container_is_confined(host_rig: Rig) -> None:
    async with host_rig as rig:
        script = "; ".join(
            (
                "grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status",
                "mount -t tmpfs t /tmp 2>&1",
                "head -c 1 /proc/kcore | wc -c",
                "echo 1 > /proc/sys/kernel/panic",
                "mknod /tmp/sda b 8 0 && head -c 1 /tmp/sda",
                "ls /proc | grep -c '^[0-9]'",
            )
        )
        ran = await rig.run("sh", "-c", script)
        lines = ran.stdout.decode().splitlines()
        facts = {line.split(":")[0]: line.split(":")[1].strip() for line in lines[:3]}
        assert facts == {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": facts["CapEff"]}
        assert int(facts["CapEff"], 16) & (1 << 21) == 0  # CAP_SYS_ADMIN
        assert "not permitted" in lines[3] or "denied" in lines[3]
        assert lines[4] == "0"  # /proc/kcore is masked
        assert b"Read-only" in ran.stderr
        assert b"sda" in ran.stderr  # the device cgroup refuses to open it
        assert int(lines[-1]) < 10  # its own pids only


async def test_a_container_sees_its_network_only(host_rig: Rig) -> None:
    async with host_rig as rig:
        ran = await rig.run("sh", "-c", "ip -4 addr show eth0; ip route; ping -c 1 -W 2 10.88.0.1", network="bridge")
        text = ran.stdout.decode()
        assert ran.exit_code == 0, text
        assert "inet 10.88.0." in text
        assert "default via 10.88.0.1" in text
        assert "1 packets received" in text
        alone = await rig.run("ip", "-o", "link")
        assert [line.split(":")[1].strip() for line in alone.stdout.decode().splitlines()] == ["lo"]
        shared = await rig.run("ip", "-o", "link", network="host")
        assert f"{rig.config.prefix}0" in shared.stdout.decode()


async def test_two_containers_reach_each_other(host_rig: Rig) -> None:
    async with host_rig as rig:
        other = await rig.run_detached("sleep", "1000", network="bridge")
        ran = await rig.run("ping", "-c", "1", "-W", "2", other.network.ip_address or "", network="bridge")
        assert ran.exit_code == 0, ran


async def test_binds_are_seen_and_read_only_ones_stay_so(host_rig: Rig) -> None:
    async with host_rig as rig:
        source = f"{rig.folder}/data"
        os.mkdir(source)
        with open(f"{source}/given", "w", encoding="utf-8") as file:
            file.write("given\n")
        mounts = (m.Mount(source=source, destination="/data"),)
        ran = await rig.run("sh", "-c", "cat /data/given; echo made > /data/made", mounts=mounts)
        assert ran == (0, b"given\n", b"")
        with open(f"{source}/made", encoding="utf-8") as file:
            assert file.read() == "made\n"
        sealed = (m.Mount(source=source, destination="/data", read_only=True),)
        ran = await rig.run("sh", "-c", "echo no > /data/made", mounts=sealed)
        assert ran.exit_code != 0
        assert b"Read-only" in ran.stderr


async def test_a_terminal_has_a_size_and_hears_of_changes(host_rig: Rig) -> None:
    async with host_rig as rig:
        spec = m.ContainerSpec(image="isopod/busybox", command=("sh",), terminal=True, stdin_open=True, network="none")
        seen = b""
        request = m.RunContainer(spec=spec, rows=33, columns=99)
        async with rig.client.open(methods.CONTAINER_RUN, request) as call, asyncio.timeout(40):
            await call.send(m.Stdin(data=b"stty size\n"))
            while b"33 99" not in seen:
                seen += getattr(await call.receive(), "data", b"")
            await call.send(m.Resize(rows=20, columns=50))
            await call.send(m.Stdin(data=b"stty size; tty\n"))
            while b"/dev/pts/" not in seen:
                seen += getattr(await call.receive(), "data", b"")
            assert b"20 50" in seen
            await call.send(m.Stdin(data=b"exit 4\n"))
            while await call.receive() is not None:
                pass
            assert (await call.reply()).exit_code == 4


async def test_a_client_that_goes_away_leaves_the_container_running(host_rig: Rig) -> None:
    async with host_rig as rig:
        spec = m.ContainerSpec(image="isopod/busybox", name="left", command=("sleep", "1000"), network="none")
        other = await rig.connect()
        async with other.open(methods.CONTAINER_RUN, m.RunContainer(spec=spec)) as call:
            assert isinstance(await call.receive(), m.Started)
        await other.close()
        assert (await rig.inspect("left")).status == "running"


async def test_large_output_arrives_whole(host_rig: Rig) -> None:
    async with host_rig as rig:
        ran = await rig.run("sh", "-c", "yes 0123456789 | head -c 20000000")
        assert len(ran.stdout) == 20_000_000
        assert ran.stdout[:22] == b"0123456789\n0123456789\n"


async def test_a_dead_supervisor_ends_the_container_as_unknown(host_rig: Rig) -> None:
    async with host_rig as rig:
        record = await rig.run_detached("sleep", "1000", name="orphan", network="bridge")
        assert record.supervisor_pid is not None
        os.kill(record.supervisor_pid, signal.SIGKILL)
        ended = await rig.wait("orphan")
        after = await rig.inspect("orphan")
        assert (ended.exit_code, after.status) == (255, "unknown")
        assert "supervisor died" in after.error
        assert record.pid is not None
        assert rig.world.processes.identify(record.pid) is None
        await rig.remove("orphan")


async def test_supervisor_and_daemon_dead_is_found_out_at_the_next_start(host_rig: Rig) -> None:
    async with host_rig as rig:
        record = await rig.run_detached("sleep", "1000", name="orphan", network="bridge")
        await rig.kill()
        assert record.supervisor_pid is not None
        os.kill(record.supervisor_pid, signal.SIGKILL)
        await rig.start()
        after = await rig.inspect("orphan")
        assert (after.status, after.exit_code, after.network.ip_address) == ("unknown", 255, None)
        assert record.pid is not None
        assert rig.world.processes.identify(record.pid) is None


async def test_a_second_daemon_on_the_same_data_is_refused(host_rig: Rig) -> None:
    async with host_rig as rig:
        paths = rig.config.paths
        program = "import sys; from isopod.node.main import main; sys.exit(main(sys.argv[1:]))"
        argv = [sys.executable, "-c", program, "--root", paths["root"], "--run-root", paths["run_root"], "--prefix", "isopodt9"]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src"))}
        done = await rig.world.processes.run(["/usr/bin/env", *(f"{k}={v}" for k, v in env.items()), *argv], timeout_s=30)
        assert done.returncode == 4
        lines = done.stderr.decode().splitlines()
        assert lines[-2].startswith(f"error: another isopod node (pid {backend(rig).pid}) owns {paths['root']}")
        assert lines[-1].startswith("hint: ")
        assert (await rig.run("echo", "alive")).stdout == b"alive\n"


async def test_a_node_that_cannot_start_leaves_nothing_mounted(host_rig: Rig) -> None:
    async with host_rig as rig:
        program = "import sys; from isopod.node.main import main; sys.exit(main(sys.argv[1:]))"
        paths = ["--root", rig.config.paths["root"], "--run-root", f"{rig.folder}/other", "--prefix", "isopodt9"]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src"))}
        done = await rig.world.processes.run([sys.executable, "-c", program, *paths], env=env)
        assert done.returncode == 4
        mounts = (await rig.world.disk.read("/proc/self/mountinfo")).decode()
        assert f"{rig.folder}/other" not in mounts


def pipe(rig: Rig) -> m.Mount:
    """Return a mount of a new named pipe that a container can wait on."""
    os.mkfifo(f"{rig.folder}/pipe")
    return m.Mount(source=f"{rig.folder}/pipe", destination="/pipe")


def release(rig: Rig) -> None:
    """Let the container that waits on the pipe go on."""
    with open(f"{rig.folder}/pipe", "w", encoding="utf-8") as file:
        file.write("go\n")


async def test_a_full_disk_is_one_clear_error_and_leaves_nothing(host_rig: Rig) -> None:
    root = f"{host_rig.folder}/small"
    os.mkdir(root)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m,mode=711", "tmpfs", root], check=True)
    try:
        host_rig.flags["--root"] = root
        async with host_rig as rig:
            before = await rig.world.disk.free_bytes(root)
            with open("/bin/busybox", "rb") as file:
                big = file.read()
            with pytest.raises(DiskFull) as full:
                await rig.import_image("big", starter_tar() + big * 8)
            assert "free some space" in full.value.hint
            assert await rig.world.disk.free_bytes(root) == before
            assert (await rig.run("true")).exit_code == 0
            await rig.empty()
            await rig.run_detached("sh", "-c", "read line < /pipe; exit 3", name="ending", mounts=(pipe(rig),))
            filler = os.open(f"{root}/filler", os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                with pytest.raises(OSError, match="No space"):
                    while True:
                        os.write(filler, bytes(4096))
            finally:
                os.close(filler)
            # Records have their space already: what needs no more of it runs on, and is remembered.
            assert (await rig.run("true", name="frugal", auto_remove=True)).exit_code == 0
            with pytest.raises(UnavailableError, match="no space left"):
                await rig.import_image("unlucky", starter_tar())
            assert [record.name for record in await rig.list()] == ["ending"]
            release(rig)
            assert (await rig.wait("ending")).exit_code == 3
            os.unlink(f"{root}/filler")
            assert (await rig.run("true")).exit_code == 0
            await rig.kill()
            await rig.start()
            assert ((await rig.inspect("ending")).status, (await rig.inspect("ending")).exit_code) == ("exited", 3)
    finally:
        subprocess.run(["umount", "-l", root], check=True)


async def test_nothing_of_a_container_stays_in_any_hierarchy(host_rig: Rig) -> None:
    async with host_rig as rig:
        assert (await rig.run("true", auto_remove=True)).exit_code == 0
        assert (await rig.world.kernel.inventory(rig.config.prefix, [])).cgroups == (f"/{rig.config.prefix}",)
        # Where the unified hierarchy is covered, crun makes plain folders; the node sees them below its own root.
        covered = f"/proc/{backend(rig).pid}/root/sys/fs/cgroup/unified/{rig.config.prefix}"
        assert await rig.world.disk.list(covered) == []


async def test_the_socket_is_for_its_group_only(host_rig: Rig) -> None:
    async with host_rig as rig:
        mode = os.stat(rig.config.paths["socket"]).st_mode
        assert mode & 0o777 == 0o660


async def test_info_says_what_was_probed_and_why(host_rig: Rig) -> None:
    async with host_rig as rig:
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.pid == backend(rig).pid
        assert info.runtime.value.endswith(("crun", "runc"))
        for probed in (info.cgroup_mode, info.runtime, info.supervisor, info.accelerator, info.storage_driver):
            assert probed.value
            assert probed.why
        rendered = await rig.client.call(
            methods.SYSTEM_RENDER, m.RenderRequest(method="system.info", body=msgspec.Raw(b"\x80"), format="json")
        )
        assert json.loads(rendered.text)["pid"] == info.pid


@pytest.mark.parametrize("runtime", ["crun", "runc"])
async def test_both_runtimes_run_containers(host_rig: Rig, runtime: str) -> None:
    host_rig.flags["--runtime"] = runtime
    async with host_rig as rig:
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.runtime.value.endswith(runtime)
        assert await rig.run("sh", "-c", "echo hi; exit 3", network="bridge") == (3, b"hi\n", b"")
        record = await rig.run_detached("sleep", "1000")
        assert (await rig.exec(record.name, "sh", "-c", "echo in; exit 5")) == (5, b"in\n", b"")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name=record.name, timeout_s=0))
        assert stopped.exit_code == 137


async def test_a_node_on_asyncios_own_loop_does_the_same(host_rig: Rig) -> None:
    host_rig.flags["--event-loop"] = "asyncio"
    async with host_rig as rig:
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.event_loop.startswith("asyncio")
        assert await rig.run("sh", "-c", "cat; exit 3", stdin=b"in\n", network="bridge") == (3, b"in\n", b"")
        record = await rig.run_detached("sleep", "1000", network="bridge")
        assert (await rig.exec(record.name, "echo", "in")).stdout == b"in\n"
        await rig.kill()
        await rig.start()
        assert (await rig.inspect(record.name)).pid == record.pid


def start_in(folder: str, run_root: str) -> tuple[int, str, str]:
    """Start a node that cannot start, in namespaces of its own with a disk of three files at `folder`/disk; return its exit code, what it
    said, and the mounts that are left below the folder."""
    program = "import sys; from isopod.node.main import main; sys.exit(main(sys.argv[1:]))"
    script = 'mount -t tmpfs -o nr_inodes=3 full "$0/disk" || exit 99; "$@"; code=$?; grep "$0" /proc/self/mounts; exit $code'
    argv = ["unshare", "--net", "--mount", "sh", "-c", script, folder, sys.executable, "-c", program]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src"))}
    argv += ["--root", f"{folder}/root", "--run-root", run_root, "--prefix", "isot9"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30, check=False)
    return done.returncode, done.stderr, done.stdout


def test_a_start_that_fails_early_is_one_line_and_leaves_no_mount(folder: str) -> None:
    os.mkdir(f"{folder}/disk")
    code, said, mounts = start_in(folder, f"{folder}/disk/run")
    assert (code, said.splitlines()[0]) == (4, f"error: no space left on the file system of {folder}/disk/run")
    assert len(mounts.splitlines()) == 1, mounts
    os.symlink("loop", f"{folder}/loop")
    code, said, mounts = start_in(folder, f"{folder}/loop/run")
    assert code == 4
    assert said.splitlines() == [
        f"error: cannot set up the mount namespace below {folder}/loop/run: Too many levels of symbolic links",
        *said.splitlines()[1:2],
    ]
