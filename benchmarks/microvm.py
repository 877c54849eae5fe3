"""`make bench-microvm`: virtual machines beside bare QEMU with the same kernel, first file system and devices, on this machine, now.

The peer is what is left if everything of ours is taken away: the very command line that our machine was started with, run by hand, with
this program holding the other end of its console and of its agent's channel. So a ratio says what the engine, the node and the command
line cost. The accelerator is printed: under TCG all of these are seconds and tenths of seconds, under KVM far less.

Rows: a cold start to the agent's answer; a command in a machine restored from a template, to its first byte of output; stop; exec.
Facts: the CPU that node and shim spend on a start; memory beside the guest's; ten machines of one template.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from benchmarks import _arena
from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, measure, timed_ms, write_results
from benchmarks._peers import IMAGE, isopod
from isopod.wire.agent import Decoder, Kind, encode_json

FOLDER: Final = PROJECT / "build" / "bench" / "work"
MODULE: Final = "benchmarks.microvm"
PROGRAM: Final = str(PROJECT / ".venv/bin/isopod")
PEER: Final = "bare QEMU"
DEADLINE_S: Final = 60.0
N_TOGETHER: Final = 10
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return 1 if isopod could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-microvm", description="isopod's virtual machines beside bare QEMU")
    parser.add_argument("--quick", action="store_true", help="three runs instead of ten: to see that it works")
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("not root: virtual machines need root here", file=sys.stderr)
        return 1
    if _arena.INSIDE not in os.environ:
        return _arena.run_inside(MODULE, argv, FOLDER)
    return _inside(Path(os.environ[_arena.INSIDE]), n_runs=3 if arguments.quick else 10)


def _inside(folder: Path, *, n_runs: int) -> int:
    _arena.prepare()
    settings = {"ISOPOD_VM_MONITOR_ROOT": str(folder / "sbs"), "PATH": os.environ["PATH"]}
    engine = isopod(folder / "isopod", settings)
    rootfs = folder / "rootfs"
    rootfs.mkdir(parents=True)
    subprocess.run([str(PROJECT / "scripts/starter_image.sh"), str(rootfs)], check=True)
    try:
        engine.start(rootfs, rootfs)
    except (CommandFailed, OSError) as error:
        print(f"{engine.name}: not measured because {error}", file=sys.stderr)
        return 1
    bench = Bench(engine.environment, folder)
    results = measure(bench.rows(n_runs))
    bench.print_facts()
    print(f"wrote {write_results('microvm', results).relative_to(PROJECT)}")
    return 0


class Machine(NamedTuple):
    """A machine of ours that runs, as seen from outside."""

    name: str
    bundle: Path
    monitor_pid: int
    shim_pid: int


class Bench:
    """The measurements, on one node.

    Args:
        environment: Of every command.
        folder: For what bare machines need.
    """

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment = environment
        self._folder = folder
        self._n_names = 0
        self._facts: list[str] = []

    def rows(self, n_runs: int) -> Iterator[Row]:
        """Yield the rows, preparing what each needs."""
        model = self._start("--cold")
        info = self._isopod("info", "--format", "json")
        accelerator = json.loads(info)["accelerator"]
        self._facts.append(f"accelerator: {accelerator['value']} ({accelerator['why']})")
        self._memory_of_one(model)
        bare = Bare(model, self._folder / "bare")
        cold = [Contender(OURS, self._cold), Contender(PEER, bare.boot_ms)]
        yield Row("cold start to the agent's answer", "ms", cold, n_runs)

        yield Row("cold run -d, to the running command", "ms", [Contender(OURS, self._running)], n_runs)
        self._wait_template()
        bare.write_snapshot()
        warm = [Contender(OURS, self._first_byte), Contender(PEER, bare.restore_ms)]
        yield Row("from a template to the first byte of output", "ms", warm, n_runs)
        yield Row("exec true", "ms", [Contender(OURS, lambda: self._timed("exec", model.name, "/bin/true"))], n_runs)
        yield Row("stop", "ms", [Contender(OURS, self._stop)], n_runs)
        self._isopod("rm", "-f", model.name)
        self._cpu_of_starts(n_runs)
        self._together()

    def print_facts(self) -> None:
        """Print what is no row of the table."""
        for line in self._facts:
            print(line)

    def _cold(self) -> float:
        """Return the milliseconds from `start` to the agent's answer, asked of the shim."""
        name = self._name()
        options = ["--isolation", "vm", "--cold", "-m", "128m", IMAGE, "/bin/sleep", "3600"]
        identifier = self._isopod("create", "--name", name, *options).strip()
        path = Path(self._environment["ISOPOD_RUN_ROOT"]) / "bundles" / identifier / "shim.sock"
        began = time.perf_counter()
        with subprocess.Popen([PROGRAM, "start", name], stdout=subprocess.DEVNULL, env=self._environment) as command:
            _wait_ready(path)
            taken = (time.perf_counter() - began) * 1000
            status = command.wait(DEADLINE_S)
        self._isopod("rm", "-f", name)
        if status:
            raise CommandFailed([PROGRAM, "start", name], status)
        return taken

    def _running(self) -> float:
        """Return the milliseconds of a whole cold `run -d`: its command runs."""
        name = self._name()
        taken = self._timed("run", "-d", "--name", name, "--isolation", "vm", "--cold", "-m", "128m", IMAGE, "/bin/sleep", "3600")
        self._isopod("rm", "-f", name)
        return taken

    def _first_byte(self) -> float:
        argv = [PROGRAM, "run", "--rm", "--isolation", "vm", "-m", "128m", IMAGE, "/bin/echo", "x"]
        began = time.perf_counter()
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=self._environment) as command:
            assert command.stdout is not None, "it was asked for"
            found = command.stdout.read(1)
            taken = (time.perf_counter() - began) * 1000
            status = command.wait(DEADLINE_S)
        if found != b"x" or status:
            raise CommandFailed(argv, status)
        return taken

    def _stop(self) -> float:
        machine = self._start()
        taken = self._timed("stop", machine.name)
        self._isopod("rm", machine.name)
        return taken

    def _memory_of_one(self, machine: Machine) -> None:
        monitor, shim = _memory_kb(machine.monitor_pid), _memory_kb(machine.shim_pid)
        guest_kb = 128 << 10
        beside = monitor["Anonymous"] - min(monitor["Anonymous"], guest_kb) + shim["Anonymous"]
        self._facts.append(
            f"memory of one machine of 128 MiB: anonymous {monitor['Anonymous'] >> 10} MiB (beside the guest's {beside >> 10} MiB), "
            f"PSS {monitor['Pss'] >> 10} MiB; its shim PSS {shim['Pss']} kB"
        )

    def _cpu_of_starts(self, n_runs: int) -> None:
        node = int(json.loads(self._isopod("info", "--format", "json"))["pid"])
        spent = []
        for _ in range(n_runs):
            before = _cpu_s(node)
            machine = self._start()
            spent.append((_cpu_s(node) - before + _cpu_s(machine.shim_pid)) * 1000)
            self._isopod("rm", "-f", machine.name)
        self._facts.append(
            f"CPU of node and shim for a start from a template: {statistics.median(spent):.0f} ms (ticks of {1000 // _TICKS} ms)"
        )

    def _together(self) -> None:
        machines = [self._start() for _ in range(N_TOGETHER)]
        sizes = [_memory_kb(machine.monitor_pid) for machine in machines]
        pss, rss = (sum(size[key] for size in sizes) >> 10 for key in ("Pss", "Rss"))
        self._facts.append(f"{N_TOGETHER} machines of one template: PSS {pss} MiB in all, RSS {rss} MiB, {pss // N_TOGETHER} MiB each")
        self._isopod("rm", "-f", *(machine.name for machine in machines))

    def _start(self, *options: str) -> Machine:
        name = self._name()
        self._isopod("run", "-d", "--name", name, "--isolation", "vm", "-m", "128m", *options, IMAGE, "/bin/sleep", "3600")
        record = json.loads(self._isopod("inspect", name))
        bundle = Path(self._environment["ISOPOD_RUN_ROOT"]) / "bundles" / record["id"]
        return Machine(name, bundle, record["pid"], record["supervisor_pid"])

    def _wait_template(self) -> None:
        """Start machines until one comes from a template: it is made in the background after a cold start."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            machine = self._start()
            record = json.loads(self._isopod("inspect", machine.name))
            self._isopod("rm", "-f", machine.name)
            if record["origin"] == "template":
                return
        raise CommandFailed(["a template"], 1, "none was made")

    def _name(self) -> str:
        self._n_names += 1
        return f"m{self._n_names}"

    def _timed(self, *words: str) -> float:
        return timed_ms([PROGRAM, *words], self._environment)

    def _isopod(self, *words: str) -> str:
        done = subprocess.run([PROGRAM, *words], env=self._environment, capture_output=True, timeout=DEADLINE_S * 4, check=False)
        if done.returncode:
            raise CommandFailed([PROGRAM, *words], done.returncode, done.stderr.decode())
        return done.stdout.decode()


class Bare:
    """The same machine without us: its command line with descriptors of our own.

    Args:
        model: A machine of ours that runs.
        folder: For its sockets and its snapshot.
    """

    def __init__(self, model: Machine, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._told = json.loads((model.bundle / "shim.json").read_bytes())
        self._told["argv"] = [self._with_own_disk(word) for word in self._told["argv"]]
        self._snapshot = folder / "memory"

    def _with_own_disk(self, word: str) -> str:
        """Return an argument that names a disk of its own in place of the model's, which is locked while that runs."""
        found = re.search(r"file=(/[^,]*/upper\.img)", word)
        if found is None:
            return word
        disk = self._folder / "upper.img"
        subprocess.run(["cp", "--sparse=always", found[1], str(disk)], check=True)
        return word.replace(found[1], str(disk))

    def boot_ms(self) -> float:
        """Return the milliseconds to the agent's answer of a boot."""
        began = time.perf_counter()
        with Running(self._told, self._folder) as running:
            running.hello()
            return (time.perf_counter() - began) * 1000

    def write_snapshot(self) -> None:
        """Boot once and write the machine down."""
        with Running(self._told, self._folder) as running:
            running.hello()
            running.command("stop")
            running.command("migrate", uri=f"exec:cat >{self._snapshot}")
            deadline = time.monotonic() + DEADLINE_S
            while running.command("query-migrate").get("status") != "completed":
                if time.monotonic() > deadline:
                    raise CommandFailed(["migrate"], 1, "no end")

    def restore_ms(self) -> float:
        """Return the milliseconds to the agent's answer of a machine that goes on from the snapshot."""
        began = time.perf_counter()
        with Running(self._told, self._folder, ["-incoming", f"exec:cat {self._snapshot}"]) as running:
            deadline = time.monotonic() + DEADLINE_S
            while running.command("query-status")["status"] == "inmigrate":
                if time.monotonic() > deadline:
                    raise CommandFailed(["-incoming"], 1, "no end")
            running.command("cont")
            running.hello()
            return (time.perf_counter() - began) * 1000


class Running:
    """A bare machine while it runs: ended on the way out."""

    def __init__(self, told: dict[str, Any], folder: Path, more: Sequence[str] = ()) -> None:
        self._told = told
        self._folder = folder
        self._more = list(more)
        self._sockets: list[socket.socket] = []
        self._answers = b""

    def __enter__(self) -> Self:
        argv = _without_snapshot(self._told["argv"])
        theirs = [self._descriptor(planned) for planned in self._told["files"]]
        # A copy far above is made first, so that no number is overwritten before it was moved.
        high = [os.dup2(fd, 200 + place) for place, fd in enumerate(theirs)]
        actions: list[Any] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, 3 + place) for place, fd in enumerate(high)]
        environment = {**self._told["env"], "PATH": os.environ["PATH"]}
        self._pid = os.posix_spawnp(argv[0], [*argv, *self._more], environment, file_actions=actions)
        for fd in (*theirs, *high):
            os.close(fd)
        return self

    def __exit__(self, *_ended: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for each in self._sockets:
            each.close()
        if shutil.which("ip"):
            subprocess.run(["ip", "link", "delete", "barebench"], capture_output=True, check=False)

    def hello(self) -> None:
        """Return when the agent has answered."""
        self._agent.settimeout(DEADLINE_S)
        self._agent.sendall(encode_json(Kind.HELLO, 0, {"version": 1}))
        decoder = Decoder()
        while True:
            data = self._agent.recv(1 << 16)
            if not data:
                raise CommandFailed(["qemu"], 1, "it ended")
            if any(frame.kind is Kind.HELLO for frame in decoder.feed(data)):
                return

    def command(self, name: str, **arguments: object) -> dict[str, Any]:
        """Run a QMP command and return its answer."""
        if not hasattr(self, "_qmp"):
            self._qmp = socket.socket(socket.AF_UNIX)
            self._sockets.append(self._qmp)
            self._qmp.settimeout(DEADLINE_S)
            self._qmp.connect(str(self._folder / "qmp"))
            self._answer("QMP")
            self.command("qmp_capabilities")
        self._qmp.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        return self._answer("return")

    def _answer(self, key: str) -> dict[str, Any]:
        while True:
            while b"\n" not in self._answers:
                data = self._qmp.recv(1 << 16)
                if not data:
                    raise CommandFailed(["qmp"], 1, "it ended")
                self._answers += data
            line, _, self._answers = self._answers.partition(b"\n")
            found: dict[str, Any] = json.loads(line)
            if "error" in found:
                raise CommandFailed(["qmp"], 1, str(found["error"]))
            if key in found:
                value: dict[str, Any] = found[key]
                return value

    def _descriptor(self, planned: dict[str, str]) -> int:
        kind = planned["kind"]
        if kind == "listen":
            listener = socket.socket(socket.AF_UNIX)
            path = self._folder / "qmp"
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(1)
            return listener.detach()
        if kind == "tap":
            return _tap("barebench")
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        if kind == "agent":
            self._agent = ours
        else:
            ours.setblocking(False)
        return theirs.detach()


def _connect(link: socket.socket, path: Path) -> None:
    """Connect to a socket whose whole path may be too long for an address."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        link.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _wait_ready(path: Path) -> None:
    """Return when a shim says that its guest's agent has answered."""
    deadline = time.monotonic() + DEADLINE_S
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(DEADLINE_S)
        while True:
            try:
                _connect(link, path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        link.sendall(encode_json(Kind.REQUEST, 1, {"op": "ready"}))
        decoder = Decoder()
        while not any(frame.kind is Kind.RESPONSE for frame in decoder.feed(link.recv(1 << 16))):
            if time.monotonic() > deadline:
                raise CommandFailed(["ready"], 1, "no answer")


def _tap(name: str) -> int:
    """Return a descriptor of a tap that leads nowhere: a bare machine needs a card, not a network."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
    return fd


def _without_snapshot(argv: Sequence[str]) -> list[str]:
    kept = list(argv)
    if "-incoming" in kept:
        place = kept.index("-incoming")
        del kept[place : place + 2]
    return kept


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _memory_kb(pid: int) -> dict[str, int]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
