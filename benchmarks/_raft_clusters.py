"""Three nodes each of isopod and of etcd on loopback, as a user would start them, for the benchmark of replication.

isopod: `isopod node --role control` (a replica without the engine), mutual TLS between the nodes, the client on the nodes' sockets.
etcd: the Debian package, without TLS, as it comes; "tuned" has a faster heartbeat and pre-vote. Everything lies in one folder on the
data folder's real file system and is gone afterwards; only processes that were started here are ended, by their pid.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from benchmarks._harness import PROJECT, CommandFailed
from benchmarks._peers import _apt_install, _no_services
from benchmarks._raft_load import Outcome, Seen

N_NODES: Final = 3
READY_S: Final = 30.0
STOP_S: Final = 10.0
GRACE_S: Final = 60.0
TICKS: Final = os.sysconf("SC_CLK_TCK")
TOKEN: Final = "a-secret-of-the-benchmark-0123456789"
Act = Callable[[int], None]
"""What is done to the leader, by its number, while somebody writes."""
ETCD_LOAD: Final = PROJECT / "build" / "etcd_load" / "etcd-load"


class Cluster(ABC):
    """Three nodes.

    Args:
        folder: Where they live; an own one.
    """

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ports = free_ports(2 * N_NODES)

    @abstractmethod
    def argv(self, number: int) -> list[str]:
        """Return how a node is started."""

    @abstractmethod
    def load_argv(self, what: str, n_at_once: int, for_s: float) -> list[str]:
        """Return how the load is started."""

    @abstractmethod
    def leader(self) -> int:
        """Return the number of the node that leads if all agree and are up to date, 0 otherwise."""

    @abstractmethod
    def hand_over(self, leader: int, to: int) -> None:
        """Have the leader hand over."""

    def start(self) -> None:
        """Start all nodes, and return when they serve."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for number in range(1, N_NODES + 1):
            self.start_node(number)
        self.wait_ready()

    def start_node(self, number: int) -> None:
        """Start one node, for the first time or again."""
        with (self.folder / f"log{number}").open("ab") as log:
            process = subprocess.Popen(self.argv(number), cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[number] = process

    def wait_ready(self) -> int:
        """Wait until all nodes agree on a leader; return its number.

        Raises:
            CommandFailed: Not in time.
        """
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            leader = self.leader()
            if leader:
                return leader
            for number, process in self.processes.items():
                if process.poll() is not None:
                    raise CommandFailed(self.argv(number), process.returncode, self._last_words(number))
            time.sleep(0.1)
        raise CommandFailed([self.name], -1, "the nodes did not agree on a leader: " + self._last_words(1))

    def stop(self) -> None:
        """End all nodes and remove what they left."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
        self.processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, what: str, n_at_once: int, for_s: float) -> tuple[Outcome, float]:
        """Run a load; return what it found, and the CPU seconds of all nodes."""
        argv = self.load_argv(what, n_at_once, for_s)
        before = self.cpu_s()
        done = subprocess.run(argv, cwd=PROJECT, capture_output=True, timeout=for_s + GRACE_S, check=False)
        if done.returncode != 0:
            raise CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
        # The warm-up is the load's own; its share is taken off by time.
        found = msgspec.json.decode(done.stdout, type=Outcome)
        return found, (self.cpu_s() - before) * found.seconds / (found.seconds + 0.5)

    def fail_over(self) -> float:
        """Kill the leader under writes; return the longest silence in milliseconds, and have the node back afterwards."""

        def kill(leader: int) -> None:
            self.processes[leader].send_signal(signal.SIGKILL)
            self.processes[leader].wait(STOP_S)

        leader = self.wait_ready()
        gap_ms = self._under_writes(leader, kill)
        self.start_node(leader)
        self.wait_ready()
        return gap_ms

    def transfer(self) -> float:
        """Have the leader hand over under writes; return the longest silence in milliseconds."""
        leader = self.wait_ready()
        return self._under_writes(leader, lambda old: self.hand_over(old, old % N_NODES + 1))

    def _under_writes(self, leader: int, act: Act) -> float:
        argv = self.load_argv("pulse", 1, 4.0)
        load = subprocess.Popen(argv, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert load.stdout is not None
            if load.stdout.readline().strip() != b"ready":
                raise CommandFailed(argv, load.wait(STOP_S), "it did not begin")
            time.sleep(1.0)
            act(leader)
            out, error = load.communicate(timeout=GRACE_S)
        finally:
            if load.poll() is None:
                load.kill()
                load.communicate()
        if load.returncode != 0:
            raise CommandFailed(argv, load.returncode, error.decode(errors="replace"))
        return msgspec.json.decode(out, type=Outcome).gap_ms

    def cpu_s(self) -> float:
        """Return the CPU time that all nodes have used."""
        return sum(_cpu_s(process.pid) for process in self.processes.values())

    def idle_percent(self, for_s: float) -> float:
        """Return the CPU use of the busiest node while nothing is asked of it, in percent of one processor."""
        before = {number: _cpu_s(process.pid) for number, process in self.processes.items()}
        time.sleep(for_s)
        return max((_cpu_s(process.pid) - before[number]) / for_s * 100 for number, process in self.processes.items())

    def pss_mb(self) -> float:
        """Return the memory of the largest node, its fair share of what is shared included."""
        return max(_pss_mb(process.pid) for process in self.processes.values())

    def _last_words(self, number: int) -> str:
        return (self.folder / f"log{number}").read_text(errors="replace")[-400:]


class Isopod(Cluster):
    """Three `isopod node`."""

    name = "isopod"

    def argv(self, number: int) -> list[str]:
        """Return how a node is started."""
        home = self.folder / f"n{number}"
        argv = [str(Path(sys.executable).parent / "isopod"), "node", "--role", "control", "--id", str(number)]
        argv += ["--bind", f"127.0.0.1:{self.ports[number - 1]}", "--data-dir", str(home), "--run-root", str(self.folder / f"run{number}")]
        argv += ["--socket", self._socket(number), "--token", TOKEN]
        for peer in range(1, N_NODES + 1):
            argv += ["--peer", f"{peer}:127.0.0.1:{self.ports[peer - 1]}"]
        return argv

    def load_argv(self, what: str, n_at_once: int, for_s: float) -> list[str]:
        """Return how the load is started."""
        addresses = ",".join(f"unix:{self._socket(number)}" for number in range(1, N_NODES + 1))
        return [sys.executable, "-m", "benchmarks._raft_load", addresses, what, str(n_at_once), str(for_s)]

    def leader(self) -> int:
        """Return the number of the node that leads if all agree and are up to date, 0 otherwise."""
        done = subprocess.run(self.load_argv("status", 1, 0), cwd=PROJECT, capture_output=True, timeout=GRACE_S, check=False)
        if done.returncode != 0:
            return 0
        return agreed(msgspec.json.decode(done.stdout, type=list[Seen]))

    def hand_over(self, leader: int, to: int) -> None:
        """Have the leader hand over."""
        _run([str(Path(sys.executable).parent / "isopod"), "-H", self._socket(leader), "cluster", "transfer", str(to)])

    def _socket(self, number: int) -> str:
        return str(self.folder / f"n{number}.sock")


class Etcd(Cluster):
    """Three etcd.

    Args:
        folder: Where they live.
        options: More of its flags.
        name: What to call it in the table.
    """

    def __init__(self, folder: Path, *, options: Sequence[str] = (), name: str = "etcd 3.4") -> None:
        super().__init__(folder)
        self.name = name
        self._options = options

    def argv(self, number: int) -> list[str]:
        """Return how a node is started."""
        client, peer = self._client(number), self._peer(number)
        cluster = ",".join(f"m{each}={self._peer(each)}" for each in range(1, N_NODES + 1))
        argv = ["/usr/bin/etcd", "--name", f"m{number}", "--data-dir", str(self.folder / f"m{number}"), "--log-level", "error"]
        argv += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
        argv += ["--initial-advertise-peer-urls", peer, "--initial-cluster", cluster, "--logger", "zap", *self._options]
        return argv

    def load_argv(self, what: str, n_at_once: int, for_s: float) -> list[str]:
        """Return how the load is started."""
        return [str(ETCD_LOAD), self._endpoints(), what, str(n_at_once), str(for_s)]

    def leader(self) -> int:
        """Return the number of the node that leads if all agree and are up to date, 0 otherwise."""
        try:
            statuses = self._statuses()
        except CommandFailed:
            return 0
        return agreed([Seen(status["node"], status["leader"], status["applied"]) for status in statuses])

    def hand_over(self, leader: int, to: int) -> None:
        """Have the leader hand over."""
        member = next(status["id"] for status in self._statuses() if status["node"] == to)
        _run(["/usr/bin/etcdctl", "--endpoints", self._client(leader), "move-leader", f"{member:x}"])

    def _statuses(self) -> list[dict[str, int]]:
        out = _run(["/usr/bin/etcdctl", "--endpoints", self._endpoints(), "endpoint", "status", "-w", "json"])
        found = msgspec.json.decode(out)
        numbers = {status["Status"]["header"]["member_id"]: self._number(status["Endpoint"]) for status in found}
        return [
            {
                "id": status["Status"]["header"]["member_id"],
                "node": self._number(status["Endpoint"]),
                "leader": numbers.get(status["Status"].get("leader", 0), 0),
                "applied": status["Status"]["raftAppliedIndex"],
            }
            for status in found
        ]

    def _number(self, endpoint: str) -> int:
        return next(number for number in range(1, N_NODES + 1) if self._client(number) == endpoint)

    def _endpoints(self) -> str:
        return ",".join(self._client(number) for number in range(1, N_NODES + 1))

    def _client(self, number: int) -> str:
        return f"http://127.0.0.1:{self.ports[number - 1]}"

    def _peer(self, number: int) -> str:
        return f"http://127.0.0.1:{self.ports[N_NODES + number - 1]}"


def agreed(seen: Sequence[Seen]) -> int:
    """Return the leader all nodes agree on, if all answer and none is far behind; else 0."""
    leaders = {each.leader for each in seen if each.node}
    applied = [each.applied for each in seen]
    if len(seen) != N_NODES or any(not each.node for each in seen) or len(leaders) != 1 or max(applied) - min(applied) > 50:
        return 0
    return leaders.pop()


def install_etcd() -> str:
    """Have etcd and the load for it; return what went wrong, "" if nothing."""
    try:
        if not Path("/usr/bin/etcd").exists() or not Path("/usr/bin/etcdctl").exists():
            with _no_services():
                _apt_install(["etcd-server", "etcd-client"])
        source = PROJECT / "benchmarks" / "etcd_load"
        if not ETCD_LOAD.exists() or ETCD_LOAD.stat().st_mtime < max(file.stat().st_mtime for file in source.iterdir()):
            shutil.copytree(source, ETCD_LOAD.parent, dirs_exist_ok=True)
            argv = [shutil.which("go") or "/usr/local/go/bin/go", "build", "-o", ETCD_LOAD.name, "."]
            subprocess.run(argv, cwd=ETCD_LOAD.parent, check=True, capture_output=True, timeout=900)
    except (CommandFailed, subprocess.SubprocessError, OSError) as error:
        output = getattr(error, "stderr", b"") or b""
        return f"{error} {output.decode(errors='replace')[-300:]}"
    return ""


def fsync_rate(folder: Path) -> float:
    """Return how many writes of 4 KiB a second the file system of a folder makes durable, one after the other."""
    path = folder / "fsync-probe"
    file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.pwrite(file, bytes(4 << 20), 0)  # as a journal's segment is: written before, so that no extent has to be made
        os.fsync(file)
        began = time.perf_counter()
        n_done = 0
        while time.perf_counter() - began < 1.0:
            os.pwrite(file, bytes(4096), (n_done % 1024) * 4096)
            os.fdatasync(file)
            n_done += 1
        return n_done / (time.perf_counter() - began)
    finally:
        os.close(file)
        path.unlink()


def free_ports(n: int) -> list[int]:
    """Return ports of the loopback that were free a moment ago."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _run(argv: Sequence[str]) -> bytes:
    done = subprocess.run(argv, cwd=PROJECT, env=os.environ | {"ETCDCTL_API": "3"}, capture_output=True, timeout=GRACE_S, check=False)
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0
