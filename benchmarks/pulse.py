"""`make bench-pulse`: the metrics agent with a thousand sandboxes beside a peer that works as kata-monitor does, on this machine, now.

    python -m benchmarks.pulse [--quick] [--only WORD] [--kata-monitor PATH]

The shims are fake ones (`benchmarks.pulse_shims`) that answer what Kata's shims do: 429 samples each, some of them others at each time.
The scrapes are read by a program in Go (`pulse_reader`) that neither unpacks nor parses. kata-monitor itself is not to be had from Go's
module proxy, so the peer (`pulse_peer`) has its shape: it asks all shims at each scrape, and parses, labels and encodes with Prometheus'
own expfmt. A kata-monitor that was built elsewhere is one more peer: as root, for its two roots are fixed, and mounted for it alone.

Rows beside the peer: whole scrapes plain and packed, one sandbox, three families, memory after them. Rows beside a bound: what was promised
of the agent alone, "at most"; a ratio up to 1 keeps the promise. A scrape that is packed is the second of its kind: the first packs what
was never asked for in that coding.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import msgspec

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, measure, write_results

PROGRAM: Final = PROJECT / ".venv" / "bin" / "isopod"
READER: Final = PROJECT / "build" / "pulse_reader" / "pulse-reader"
PEER: Final = PROJECT / "build" / "pulse_peer" / "pulse-peer"
SHIMS: Final = (sys.executable, "-m", "benchmarks.pulse_shims")
PEER_NAME: Final = "expfmt, as kata-monitor"
MONITOR_NAME: Final = "kata-monitor"
MOUNT: Final = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/vc/sbs
mount --bind "$1" /run/vc/sbs
exec "$2" -listen-address "$3" -runtime-endpoint "$4" -log-level error
"""
BOUND_NAME: Final = "at most"
SOCKET_NAME: Final = "shim-monitor.sock"
N_SANDBOXES: Final = 1000
N_NAMESPACES: Final = 20
INTERVAL_S: Final = 10
DEADLINE_S: Final = 180.0
CHURN_PER_S: Final = 100
SELECTOR: Final = quote('kata_guest_load{item="load1"}')
THREE: Final = "kata_agent_threads,kata_guest_load,kata_guest_tasks"
TICKS: Final = os.sysconf("SC_CLK_TCK")


class Scrapes(msgspec.Struct, frozen=True):
    """What the reader tells of some scrapes."""

    first_ms: list[float]
    last_ms: list[float]
    bytes: int
    coding: str


class Process:
    """A process of the benchmark's own, ended with the block.

    Args:
        argv: Its command line.
        log: Where it writes.
        ready: A line that it writes when it is; "" if nobody waits for it.
        environment: Added to the benchmark's own.
    """

    def __init__(self, argv: Sequence[str], log: Path, *, ready: str = "", environment: dict[str, str] | None = None) -> None:
        self._argv = argv
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                argv,
                cwd=PROJECT,
                env=os.environ | {"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"} | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid
        if ready:
            self.wait_for(lambda: ready in self._text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_for(self, condition: Callable[[], bool], *, deadline_s: float = DEADLINE_S) -> None:
        """Return when something holds; a process that ends before that, or takes too long, is a CommandFailed."""
        end = time.monotonic() + deadline_s
        while not condition():
            if self._process.poll() is not None or time.monotonic() > end:
                raise CommandFailed(self._argv, self._process.poll() or 0, f"it did not get ready: {self._text()[-400:]}")
            time.sleep(0.02)

    def cpu_s(self) -> float:
        """Return the seconds of CPU it used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def pss_mb(self) -> float:
        """Return its share of memory, in MiB."""
        return self._memory("smaps_rollup", "Pss:")

    def peak_mb(self) -> float:
        """Return the most that lay in memory since `forget_peak`, in MiB."""
        return self._memory("status", "VmHWM:")

    def forget_peak(self) -> float:
        """Count the peak from now on; return what lies in memory now, in MiB."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")
        return self._memory("status", "VmRSS:")

    def _memory(self, file: str, name: str) -> float:
        for line in Path(f"/proc/{self.pid}/{file}").read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
        raise CommandFailed(self._argv, 0, f"no {name}")

    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


class Stand:
    """Shims, a runtime, the agent, and the peer.

    Args:
        folder: A short path: the shims' sockets stand below it.
        n_sandboxes: How many.
        monitor: A kata-monitor's path, "" for none.
    """

    def __init__(self, folder: Path, n_sandboxes: int, monitor: str = "") -> None:
        self.folder = folder
        self.n_sandboxes = n_sandboxes
        self.rust_root = folder / "r"
        self._go_root = folder / "g"
        self._pods = folder / "pods.json"
        self._ports: dict[str, int] = {}
        self._open = contextlib.ExitStack()
        self.agent: Process = None  # type: ignore[assignment]  # from `__enter__` on
        self.peers: dict[str, Process] = {}
        self._monitor = monitor

    def __enter__(self) -> Self:
        try:
            self._go_root.mkdir()
            self.rust_root.mkdir()
            self._shims = self.shims("-n", str(self.n_sandboxes), "--vary", "--pods", str(self._pods), base=self._go_root, stack=self._open)
            cri = [sys.executable, "-m", "benchmarks._pulse_cri", str(self.folder / "cri.sock"), str(self._pods)]
            self._open.enter_context(Process(cri, self.folder / "cri.log", ready="ready"))
            self.agent = self._open.enter_context(self.start_agent("agent", self._go_root, self.rust_root, cri=True))
            # Described as well as collected: the namespace is known.
            self.wait_lines(self.n_sandboxes, lambda lines: sum('cri_namespace="team-' in line for line in lines))
            self._start_peer(PEER_NAME, lambda address: [str(PEER), address, str(self._go_root)], lambda: True)
            if self._monitor:
                self._start_peer(MONITOR_NAME, self._monitors_argv, lambda: self._is_described(MONITOR_NAME))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def shims(self, *options: str, base: Path, stack: contextlib.ExitStack) -> Process:
        """Start more fake shims, until the stack is closed."""
        argv = [*SHIMS, "--base", str(base), "--namespaces", str(N_NAMESPACES), *options]
        return stack.enter_context(Process(argv, self.folder / f"shims-{len(options)}-{base.name}.log", ready="ready"))

    def vary_all(self) -> None:
        """Have all figures of all shims move, or end it."""
        os.kill(self._shims.pid, signal.SIGUSR1)

    def start_agent(self, name: str, go_root: Path, rust_root: Path, *, cri: bool) -> Process:
        """Start an agent and return when it answers."""
        port = self._ports[name] = free_port()
        argv = [str(PROGRAM), "pulse", "--listen-address", f"127.0.0.1:{port}", "--metrics-interval-secs", str(INTERVAL_S)]
        argv += ["--go-root", str(go_root), "--rust-root", str(rust_root), "--view", "kata", "--log-level", "warning"]
        argv += ["--runtime-endpoint", str(self.folder / "cri.sock") if cri else "none"]
        agent = Process(argv, self.folder / f"{name}.log")
        try:
            agent.wait_for(lambda: self.answers(name))
        except BaseException:
            agent.__exit__()
            raise
        return agent

    def answers(self, name: str) -> bool:
        """Return whether something listens at an agent's address."""
        try:
            socket.create_connection(("127.0.0.1", self._ports[name]), 1).close()
        except OSError:
            return False
        return True

    def scrape(self, name: str, path: str, coding: str = "identity", *, n: int = 1) -> Scrapes:
        """Scrape `n` times."""
        argv = [str(READER), f"127.0.0.1:{self._ports[name]}", path, coding, str(n), "20"]
        done = subprocess.run(argv, capture_output=True, check=False, timeout=DEADLINE_S)
        if done.returncode != 0:
            raise CommandFailed(argv, done.returncode, done.stderr.decode())
        found = msgspec.json.decode(done.stdout, type=Scrapes)
        if (found.coding or "identity") != coding:
            raise CommandFailed(argv, 0, f"the answer's coding is {found.coding or 'identity'}")
        return found

    def get(self, name: str, path: str) -> str:
        """Return an answer's text."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[name], timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def wait_lines(self, n: int, count: Callable[[list[str]], int] = len) -> None:
        """Return when the agent shows the figures of so many sandboxes."""
        self.agent.wait_for(lambda: count(self._lines("agent")) >= n)

    def one(self) -> str:
        """Return the id of a sandbox."""
        identifier: str = json.loads(self._pods.read_bytes())[0]["id"]
        return identifier

    def _lines(self, name: str) -> list[str]:
        text = self.get(name, "/metrics?filter_family=kata_agent_threads")
        return [line for line in text.splitlines() if line.startswith("kata_agent_threads{")]

    def _start_peer(self, name: str, argv: Callable[[str], list[str]], is_ready: Callable[[], bool]) -> None:
        port = self._ports[name] = free_port()
        try:
            peer = self._open.enter_context(Process(argv(f"127.0.0.1:{port}"), self.folder / f"{port}.log"))
            peer.wait_for(lambda: self.answers(name) and is_ready())
            self.peers[name] = peer
        except (CommandFailed, OSError) as error:
            print(f"{name}: not measured because {error}", file=sys.stderr)

    def _monitors_argv(self, address: str) -> list[str]:
        mounted = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT, "sh", str(self._go_root)]
        return [*mounted, self._monitor, address, str(self.folder / "cri.sock")]

    def _is_described(self, name: str) -> bool:
        """Return whether a peer knows whose the sandboxes are that it shows; on a busy machine it leaves out those it had to wait for."""
        lines = self._lines(name)
        return bool(lines) and all('cri_namespace="team-' in line for line in lines)


def rows(stand: Stand, *, quick: bool) -> Iterator[Row]:
    """Yield the measurements."""
    n_runs = 3 if quick else 7
    one = stand.one()
    n_refreshes = 1 if quick else 3
    yield Row("CPU of a round of all shims", "s", _beside(lambda: _refresh(stand), 1.0), n_refreshes)
    stand.vary_all()
    yield Row("the same, of which each figure is new", "s", [Contender(OURS, lambda: _refresh(stand))], n_refreshes)
    stand.vary_all()
    for what, path, peers_path, codings in (
        (f"all {stand.n_sandboxes} sandboxes", "/metrics", "/metrics", ("identity", "gzip", "zstd")),
        ("one sandbox", f"/metrics?sandbox={one}", f"/metrics?sandbox={one}", ("identity", "gzip")),
        ("one namespace", "/metrics?namespace=team-03", "", ("identity", "gzip")),
        ("three families", f"/metrics?filter_family={THREE}", f"/metrics?filter_family={THREE}", ("identity", "gzip")),
        ("one selector", f"/metrics?match[]={SELECTOR}", "", ("identity",)),
    ):
        for coding in codings:
            has_peer = peers_path and coding != "zstd" and (coding == "identity" or "sandbox=" not in path)
            yield _scraped(stand, f"{what}, {coding}", coding, path=path, peers_path=peers_path if has_peer else "", n_runs=n_runs)
    yield Row(
        "first byte of all, identity", "ms", _beside(lambda: statistics.median(stand.scrape("agent", "/metrics").first_ms), 20), n_runs
    )
    contenders = [Contender(OURS, stand.agent.pss_mb), *(Contender(name, peer.pss_mb) for name, peer in stand.peers.items())]
    yield Row("memory (PSS) after all of these", "MB", contenders, 1)
    yield Row("memory (PSS) after all of these", "MB", _beside(stand.agent.pss_mb, 300), 1)
    yield Row("memory added while all is streamed", "MB", _beside(lambda: _added(stand), 8), n_runs)
    yield Row("the same, packed as gzip and zstd as it comes", "s", [Contender(OURS, lambda: _refresh(stand))], n_refreshes)
    yield Row("a sandbox is seen after", "ms", _beside(lambda: _seen(stand), 500), n_runs)
    yield Row("a sandbox is gone after", "ms", _beside(lambda: _gone(stand), 500), n_runs)
    yield Row("20 hung, 20 slow shims: all of them, times", "x", _beside(lambda: _with_bad(stand, n_runs), 1.1), 1)
    yield Row("20 hung, 20 slow shims: oldest of the others", "s", _beside(lambda: _oldest(stand), INTERVAL_S * 1.1), 1)
    n_churned = 1000 if quick else 10_000
    yield Row(f"memory after {n_churned} came and went, times", "x", _beside(lambda: _churned(stand, n_churned), 1.05), 1)
    with stand.start_agent("idle", stand.folder / "none", stand.folder / "none", cri=False) as idle:
        yield Row("an agent without sandboxes: memory (PSS)", "MB", _beside(idle.pss_mb, 40), 1)
        yield Row("an agent without sandboxes: CPU per second", "ms", _beside(lambda: _idle(idle), 2), 1 if quick else 3)


def main(argv: Sequence[str]) -> int:
    """Measure everything; return 1 if something of isopod's own could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-pulse", description="isopod's metrics agent beside one of kata-monitor's shape")
    parser.add_argument("--quick", action="store_true", help="100 sandboxes and fewer runs: to see that it works")
    parser.add_argument("--only", default="", metavar="WORD", help="only rows whose name holds the word")
    parser.add_argument("--kata-monitor", default="", metavar="PATH", help="a kata-monitor, as one more peer; wants root")
    arguments = parser.parse_args(argv)
    problems = [problem for problem in (_build(READER, "pulse_reader"), _build(PEER, "pulse_peer")) if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not READER.exists():
        return 1
    folder = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))
    try:
        with Stand(folder, 100 if arguments.quick else N_SANDBOXES, arguments.kata_monitor) as stand:
            results = measure(row for row in rows(stand, quick=arguments.quick) if arguments.only in row.name)
    except (CommandFailed, OSError) as error:
        print(f"{OURS}: not measured because {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {write_results('pulse', results).relative_to(PROJECT)}")
    return 1 if not results or any(result.ours is None for result in results) else 0


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- the rows' samples --------------------------------------------------------------------------------------------------------------------


def _scraped(stand: Stand, name: str, coding: str, *, path: str, peers_path: str, n_runs: int) -> Row:
    def sample(who: str, target: str) -> float:
        return statistics.median(stand.scrape(who, target, coding).last_ms)

    def ours() -> float:
        return sample("agent", path)

    if coding != "identity":
        stand.scrape("agent", path, coding)
    contenders = [Contender(OURS, ours)]
    if peers_path:
        contenders += [Contender(name, partial(sample, name, peers_path)) for name in stand.peers]
    return Row(name, "ms", contenders, n_runs)


def _beside(sample: Callable[[], float], bound: float) -> list[Contender]:
    return [Contender(OURS, sample), Contender(BOUND_NAME, lambda: bound)]


def _added(stand: Stand) -> float:
    before = stand.agent.forget_peak()
    stand.scrape("agent", "/metrics")
    return max(0.0, stand.agent.peak_mb() - before)


def _refresh(stand: Stand) -> float:
    """Return the CPU of a round: of a whole number of intervals, in which nobody scrapes."""
    n_rounds = 2
    before = stand.agent.cpu_s()
    time.sleep(n_rounds * INTERVAL_S)
    return (stand.agent.cpu_s() - before) / n_rounds


def _seen(stand: Stand) -> float:
    took_ms, remove = _appear(stand)
    remove()
    return took_ms


def _gone(stand: Stand) -> float:
    _, remove = _appear(stand)
    return remove()


def _appear(stand: Stand) -> tuple[float, Callable[[], float]]:
    """Make a sandbox; return after how many milliseconds it was listed, and what removes it and returns the same of its end."""
    identifier = f"seen{time.monotonic_ns():x}"
    place = stand.rust_root / identifier
    listener = socket.socket(socket.AF_UNIX)
    began = time.perf_counter()
    place.mkdir()
    listener.bind(str(place / SOCKET_NAME))
    listener.listen(4)
    stand.agent.wait_for(lambda: identifier in stand.get("agent", "/sandboxes"), deadline_s=30)
    took_ms = (time.perf_counter() - began) * 1000

    def remove() -> float:
        began = time.perf_counter()
        listener.close()
        shutil.rmtree(place)
        stand.agent.wait_for(lambda: identifier not in stand.get("agent", "/sandboxes"), deadline_s=30)
        return (time.perf_counter() - began) * 1000

    return took_ms, remove


def _with_bad(stand: Stand, n_runs: int) -> float:
    """Return how many times longer a scrape takes beside shims that do not answer."""

    def sample() -> float:
        return statistics.median(
            stand.scrape("agent", "/metrics", n=8 * n_runs).last_ms
        )  # over several seconds: the machine's moods last long

    before = sample()
    with _bad(stand):
        beside = sample()
    return beside / statistics.mean((before, sample()))


def _oldest(stand: Stand) -> float:
    """Return how old the oldest figures are of the sandboxes that answer, after some rounds beside those that do not."""
    with _bad(stand):
        time.sleep(2.5 * INTERVAL_S)
        listed = json.loads(stand.get("agent", "/sandboxes?format=json"))
    rows_found = listed["sandboxes"] if isinstance(listed, dict) else listed
    return max(float(row["age_s"]) for row in rows_found if row["up"])


@contextlib.contextmanager
def _bad(stand: Stand) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stand.shims("-n", "40", "--hang", "20", "--slow", "20", "--slow-s", "10", "--seed", "bad", base=stand.rust_root, stack=stack)
        stand.agent.wait_for(lambda: stand.get("agent", "/sandboxes?format=json").count('"id"') >= stand.n_sandboxes + 40)
        time.sleep(INTERVAL_S)  # each of them was asked at least once
        yield
    stand.agent.wait_for(lambda: stand.get("agent", "/sandboxes?format=json").count('"id"') <= stand.n_sandboxes)


def _churned(stand: Stand, n: int) -> float:
    """Return how many times more memory the agent has after sandboxes came and went beside those that stay."""
    sizes = []
    with contextlib.ExitStack() as stack:
        for seed, seconds in (("warm", 10.0), ("churn", n / CHURN_PER_S)):
            with contextlib.ExitStack() as inner:
                options = ("-n", "50", "--churn", str(CHURN_PER_S), "--seed", seed)
                stand.shims(*options, base=stand.rust_root, stack=inner)
                time.sleep(seconds)
            stand.agent.wait_for(lambda: stand.get("agent", "/sandboxes?format=json").count('"id"') <= stand.n_sandboxes)
            stand.scrape("agent", "/metrics")
            stand.scrape("agent", "/metrics", "gzip")
            sizes.append(stand.agent.pss_mb())
        stack.close()
    return sizes[1] / sizes[0]


def _idle(agent: Process) -> float:
    before = agent.cpu_s()
    time.sleep(10)
    return (agent.cpu_s() - before) * 1000 / 10


def _build(program: Path, name: str) -> str:
    """Have a program in Go; return what went wrong, "" if nothing."""
    source = PROJECT / "benchmarks" / name
    try:
        if not program.exists() or program.stat().st_mtime < max(file.stat().st_mtime for file in source.iterdir()):
            shutil.copytree(source, program.parent, dirs_exist_ok=True)
            argv = [shutil.which("go") or "/usr/local/go/bin/go", "build", "-o", program.name, "."]
            subprocess.run(argv, cwd=program.parent, check=True, capture_output=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        output = getattr(error, "stderr", b"") or b""
        return f"{name}: not built because {error} {output.decode(errors='replace')[-300:]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
