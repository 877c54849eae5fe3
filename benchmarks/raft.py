"""`make bench-raft`: three nodes of isopod beside three of etcd, on loopback and one disk, now.

What a user would start, measured as a user would see it: isopod's nodes with mutual TLS between them and its Python client, etcd from
Debian with its Go client, values of 256 bytes. Every node makes its log durable on the file system that holds build/, whose rate of
bare fdatasyncs is printed; never on tmpfs. Both clusters are up at the same time and are measured in turns. Rates and latencies are the
client's; what the clients and the nodes cost in CPU stands beside them. p50, p99 and CPU are of the very runs whose rate is shown.

Fail-over is the longest silence that one writer sees when the leader gets a kill -9; hand-over the same when it is asked to hand over.
The simulation's speed is of one process: virtual seconds for each second of CPU.

    python -m benchmarks.raft [--quick] [write read failover handover memory idle sim]
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks._harness import PROJECT, CommandFailed, Contender, Row, measure, write_results
from benchmarks._raft_clusters import Cluster, Etcd, Isopod, fsync_rate, install_etcd
from benchmarks._raft_load import Outcome

PARTS: Final = ("idle", "write", "read", "handover", "memory", "failover", "sim")
AT_ONCE: Final = (1, 16, 256)
TUNED: Final = ("--heartbeat-interval", "50", "--election-timeout", "250", "--pre-vote")
SIM_DEADLINE_S: Final = 300.0
Measured = tuple[Outcome, float]


class Loads:
    """Runs a load once for each round, and lets several rows tell of the same run.

    Args:
        what: "write" or "read".
        n_at_once: How many at a time.
        for_s: How long.
    """

    def __init__(self, what: str, n_at_once: int, for_s: float) -> None:
        self._arguments = (what, n_at_once, for_s)
        self._found: dict[str, list[Measured]] = {}

    def measure(self, cluster: Cluster) -> float:
        """Run it, and return the rate."""
        found = cluster.load(*self._arguments)
        self._found.setdefault(cluster.name, []).append(found)
        return found[0].n / found[0].seconds

    def tell(self, cluster: Cluster, read: Callable[[Measured], float]) -> Callable[[], float]:
        """Return what reads one figure of each run, in the order in which they were made."""
        place = iter(range(1 << 30))
        return lambda: read(self._found[cluster.name][next(place)])

    def rows(self, clusters: Sequence[Cluster], n_runs: int) -> Iterator[Row]:
        """Yield the rate, and what else is known of the same runs."""
        what, n_at_once, _ = self._arguments
        name = f"{what}s, {n_at_once} at once"
        yield Row(name, "1/s", [Contender(each.name, lambda each=each: self.measure(each)) for each in clusters], n_runs)  # type: ignore[misc]
        # A contender that could not be measured has nothing more to tell.
        alive = [each for each in clusters if len(self._found.get(each.name, [])) == n_runs]
        for label, unit, read in _FIGURES:
            yield Row(f"  {label}", unit, [Contender(each.name, self.tell(each, read)) for each in alive], n_runs)


_FIGURES: Final[tuple[tuple[str, str, Callable[[Measured], float]], ...]] = (
    ("p50", "ms", lambda found: found[0].p50_ms),
    ("p99", "ms", lambda found: found[0].p99_ms),
    ("CPU of the client per operation", "us", lambda found: found[0].client_s * 1e6 / max(1, found[0].n)),
    ("CPU of all nodes per operation", "us", lambda found: found[1] * 1e6 / max(1, found[0].n)),
)


def main(argv: Sequence[str]) -> int:
    """Measure all parts, or those named; return 1 if something of isopod's own could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-raft", description="isopod's replicated store beside etcd")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: to see that it works")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of: {', '.join(PARTS)}")
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part: {', '.join(unknown)}; known are: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with ExitStack() as stack:
        (PROJECT / "build").mkdir(exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-raft-", dir=PROJECT / "build")))
        print(f"bare fdatasync of 4 KiB: {fsync_rate(folder):.0f} /s", flush=True)
        results = measure(_rows(arguments.parts or PARTS, folder, stack, quick=arguments.quick))
    target = "raft" if not arguments.parts else f"raft-{'-'.join(arguments.parts)}"
    print(f"wrote {write_results(target, results).relative_to(PROJECT)}")
    return 1 if not results or any(result.ours is None for result in results) else 0


def _rows(parts: Sequence[str], folder: Path, stack: ExitStack, *, quick: bool) -> Iterator[Row]:
    for_s, n_runs, n_trials = (1.0, 1, 1) if quick else (4.0, 5, 10)
    clusters: list[Cluster] = [Isopod(folder / "isopod")]
    problem = install_etcd()
    if problem:
        print(f"etcd not measured because it could not be had: {problem}", file=sys.stderr)
    else:
        clusters.append(Etcd(folder / "etcd"))
    if set(parts) - {"sim"}:
        for cluster in clusters:
            stack.callback(cluster.stop)
            cluster.start()
    for part in PARTS:
        if part not in parts:
            continue
        if part in {"write", "read"}:
            for n_at_once in AT_ONCE:
                yield from Loads(part, n_at_once, for_s).rows(clusters, n_runs)
        elif part == "sim":
            yield from _sim_rows(quick=quick)
        elif part == "failover":
            tuned = [] if problem else [Etcd(folder / "tuned", options=TUNED, name="etcd 3.4, tuned")]
            for cluster in tuned:
                stack.callback(cluster.stop)
                cluster.start()
            yield Row(
                "fail-over after kill -9 of the leader", "ms", _contenders([*clusters, *tuned], lambda each: each.fail_over()), n_trials
            )
        else:
            yield _simple_row(part, clusters, n_runs, quick=quick)


def _simple_row(part: str, clusters: Sequence[Cluster], n_runs: int, *, quick: bool) -> Row:
    if part == "handover":
        return Row("hand-over of leadership", "ms", _contenders(clusters, lambda each: each.transfer()), n_runs)
    if part == "memory":
        return Row("memory of the largest node (PSS)", "MB", _contenders(clusters, lambda each: each.pss_mb()), 1)
    for_s = 2.0 if quick else 20.0
    return Row("CPU of the busiest node while idle", "%", _contenders(clusters, lambda each: each.idle_percent(for_s)), 1)


def _contenders(clusters: Sequence[Cluster], sample: Callable[[Cluster], float]) -> list[Contender]:
    return [Contender(each.name, lambda each=each: sample(each)) for each in clusters]  # type: ignore[misc]


def _sim_rows(*, quick: bool) -> Iterator[Row]:
    for what, label, for_s in (("idle", "an idle cluster", 60.0), ("load", "100 operations a second", 10.0)):

        def sample(what: str = what, for_s: float = for_s) -> float:
            argv = [sys.executable, "-m", "benchmarks._raft_sim", what, str(for_s / 10 if quick else for_s)]
            done = subprocess.run(argv, cwd=PROJECT, capture_output=True, timeout=SIM_DEADLINE_S, check=False)
            if done.returncode != 0:
                raise CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
            return float(done.stdout)

        yield Row(f"simulated seconds a second, {label}", "1/s", [Contender("isopod", sample)], 1 if quick else 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
