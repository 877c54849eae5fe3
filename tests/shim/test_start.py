"""How a shim and its machine begin: the two pipes, descriptors, taps, networks, cgroups, and what is said when it fails."""

import json
import os
import select
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.shim.bench import Bench, is_alive, kill, wait_until

pytestmark = pytest.mark.host


def run_shell(bench: Bench, script: str, **changes: Any) -> None:
    """Let the machine be a shell script."""
    bench.config |= {"argv": ["/bin/sh", "-c", script], "agent": "none", "console": "stdio", "files": [], **changes}


def test_it_waits_for_the_word_and_tells_the_machines_pid(bench: Bench) -> None:
    start, sync = bench.use_fake().spawn()
    assert not select.select([sync], [], [], 0.2)[0]
    assert not os.path.exists(bench.config["socket"])
    os.write(start, b"\0")
    os.close(start)
    with os.fdopen(sync, "rb") as pipe:
        bench.pid = json.loads(pipe.read())["data"]
    assert Path(f"/proc/{bench.pid}/cmdline").read_bytes().split(b"\0")[0].decode() == bench.config["argv"][0]
    assert Path(f"/proc/{bench.pid}/stat").read_text().rpartition(")")[2].split()[1] == str(bench.shim_pid)


def test_a_start_pipe_that_closes_without_a_word_lets_it_go_on(bench: Bench) -> None:
    start, sync = bench.use_fake().spawn()
    os.close(start)
    with os.fdopen(sync, "rb") as pipe:
        bench.pid = json.loads(pipe.read())["data"]
    assert bench.pid > 0


def test_only_the_owner_may_open_its_sockets(bench: Bench) -> None:
    bench.config["monitor_socket"] = f"{bench.folder}/sbs/shim-monitor.sock"
    bench.use_fake(files=[{"kind": "listen", "path": f"{bench.folder}/qmp.sock"}]).start()
    for name in ("shim.sock", "qmp.sock", "sbs/shim-monitor.sock"):
        assert stat.S_IMODE(os.stat(bench.folder / name).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(bench.folder / "sbs").st_mode) == 0o700
    with bench.ready() as client:
        client.call("stop", timeout_s=10)
    bench.end()
    assert {path.name for path in bench.folder.iterdir()} == {"shim.json", "container.log", "console.log", "vmm.log", "exit", "end.json"}


def test_paths_longer_than_a_socket_address_work(bench: Bench) -> None:
    folder = bench.folder / ("x" * 120)
    folder.mkdir()
    bench.config["socket"] = f"{folder}/shim.sock"
    bench.use_fake().start()
    here = os.open(folder, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"/proc/self/fd/{here}/shim.sock")
    finally:
        os.close(here)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"argv": ["/no/such/program"]}, "start /no/such/program: No such file"),
        ({"argv": ["/etc/passwd"]}, "start /etc/passwd: Permission denied"),
        ({"version": 2}, "version 2"),
        ({"log": "/no/such/folder/log"}, "open /no/such/folder/log"),
        ({"socket": "/no/such/folder/shim.sock"}, "listen at /no/such/folder/shim.sock"),
        ({"cgroup_procs": ["/no/such/cgroup.procs"]}, "open /no/such/cgroup.procs"),
        ({"files": [{"kind": "tap", "name": "isono0"}, {"kind": "console"}, {"kind": "agent"}]}, "tap isono0: there is no such interface"),
        ({"boot_timeout_s": "soon"}, "the configuration makes no sense"),
    ],
)
def test_what_cannot_begin_says_why(bench: Bench, changes: dict[str, Any], why: str) -> None:
    bench.use_fake()
    bench.config |= changes
    message = bench.begin()
    assert (message["data"], why in message["message"]) == (-1, True), message
    assert bench.wait() == 1
    assert not os.path.exists(f"{bench.folder}/shim.sock")
    assert not os.path.exists(bench.config["exit_file"])
    if "version" not in changes and "boot_timeout_s" not in changes:
        end = json.loads(Path(bench.config["end_file"]).read_bytes())
        assert (end["kind"], end["code"], why in end["why"]) == ("vmm_failed", None, True)


def test_a_missing_configuration_is_named(bench: Bench) -> None:
    done = subprocess.run([bench.shim, "/no/such/file"], capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"read /no/such/file" in done.stderr) == (1, True)
    assert subprocess.run([bench.shim], capture_output=True, check=False, timeout=60).returncode == 2


def test_the_machine_gets_its_descriptors_and_no_others(bench: Bench) -> None:
    bench.use_fake(files=[{"kind": "listen", "path": f"{bench.folder}/qmp.sock"}]).start()
    bench.ready().close()
    found = {int(name): os.readlink(f"/proc/{bench.pid}/fd/{name}") for name in os.listdir(f"/proc/{bench.pid}/fd")}
    assert found[0] == "/dev/null"
    assert all(found[number].startswith("pipe:") for number in (1, 2))
    assert all(found[number].startswith("socket:") for number in (3, 4, 5))
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{bench.folder}/qmp.sock")


def test_the_machine_gets_what_it_was_promised(bench: Bench) -> None:
    run_shell(
        bench,
        "pwd; env; kill -0 $PPID; cat /proc/self/oom_score_adj; sed -n s/^SigBlk:.//p /proc/self/status",
        cwd="/usr",
        env={"A": "b c"},
    )
    bench.start().wait()
    said = [line.split(" ", 3)[3] for line in bench.log().splitlines()]
    assert said[0] == "/usr"
    assert "A=b c" in said
    assert not any(line.startswith("_OCI") for line in said)
    assert said[-2:] == [Path("/proc/self/oom_score_adj").read_text().strip(), "0" * 16]


def test_kill_of_the_shim_kills_the_machine_and_leaves_no_exit_file(bench: Bench) -> None:
    bench.use_fake().start()
    bench.ready().close()
    kill(bench.shim_pid)
    bench.wait()
    wait_until(lambda: not is_alive(bench.pid), "the machine's end")
    assert not os.path.exists(bench.config["exit_file"])


def test_what_the_machine_left_behind_ends_with_it(bench: Bench) -> None:
    """They have left the session, the process group and their parent: only their keeper can still find them, one after another."""
    leave = f"setsid sh -c 'sleep 1000 & echo $! >{bench.folder}/pid; wait' &"
    run_shell(bench, f"{leave} while [ ! -s {bench.folder}/pid ]; do sleep 0.01; done")
    bench.start().wait()
    pid = int(Path(bench.folder, "pid").read_text())
    wait_until(lambda: not is_alive(pid), "the grandchild's end")


@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("ip") is None, reason="unshare or ip is not installed")
def test_a_tap_is_handed_over_and_the_machine_has_an_empty_network(bench: Bench) -> None:
    """All of it runs in a network namespace of its own, where the tap is made."""
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    looking = "import fcntl, struct; r = fcntl.ioctl(3, 0x800454d2, bytes(40)); "
    looking += "print(r[:16].rstrip(bytes(1)).decode(), struct.unpack('H', r[16:18])[0]); "
    looking += "print(sorted(l.split(':')[0].strip() for l in open('/proc/net/dev').readlines()[2:]))"
    files = [{"kind": "tap", "name": "isotap0"}]
    bench.config |= {"argv": ["/usr/bin/python3", "-c", looking], "agent": "none", "console": "stdio", "files": files, "own_network": True}
    Path(bench.folder, "shim.json").write_text(json.dumps(bench.config))
    script = f"ip tuntap add isotap0 mode tap && ip link set isotap0 up && exec {bench.shim} {bench.folder}/shim.json"
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    name_and_flags, interfaces = (line.split(" ", 3)[3] for line in bench.log().splitlines())
    name, flags = name_and_flags.split()
    assert name == "isotap0"
    assert int(flags) & 0x5002 == 0x5002  # IFF_VNET_HDR, IFF_NO_PI, IFF_TAP
    assert interfaces == "['lo']"


def test_the_machine_is_in_its_cgroup_before_it_begins(bench: Bench) -> None:
    places = ("/sys/fs/cgroup", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified")
    groups = [place for place in places if os.path.exists(f"{place}/cgroup.procs")]
    if not groups or not os.access(groups[0], os.W_OK):
        pytest.skip("no cgroup can be made")
    group = Path(groups[0], f"isopod-shim-{os.getpid()}")
    group.mkdir()
    try:
        run_shell(bench, "cat /proc/self/cgroup", cgroup_procs=[f"{group}/cgroup.procs"])
        bench.start().wait()
        assert f"/isopod-shim-{os.getpid()}" in bench.log()
    finally:
        group.rmdir()
