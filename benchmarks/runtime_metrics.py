"""`make bench-runtime`: metrics and logs: CPU per increment, per exposition, per line, beside prometheus_client and the stdlib's logging.

All in this process, by its own CPU time; isopod's registry keeps its values on mapped pages, as a node's does. The folder of the pages is
removed at the end.
"""

import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as PeerCounter
from prometheus_client import Histogram as PeerHistogram

from benchmarks._harness import OURS, Contender, Row
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Home, Registry, ShardMetrics
from isopod.runtime.metrics.text import PrometheusText
from isopod.world.host.clock import HostClock
from isopod.world.host.pages import HostPages

N_SERIES: Final = 500
N_SHARDS: Final = 4
PEER: Final = "prometheus_client"


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows.

    Args:
        quick: A tenth of the work: to see that it runs.
    """
    scale = 10 if quick else 1
    n_runs = 3 if quick else 11
    with tempfile.TemporaryDirectory(prefix="isopod-bench-") as folder:
        registry = Registry(Home(HostPages(), f"{folder}/one"))
        theirs = CollectorRegistry()
        counter = registry.counter("calls_total", "Calls.", kind="a")
        peer_counter = PeerCounter("calls", "Calls.", ["kind"], registry=theirs).labels(kind="a")
        yield Row("metrics: counter increment", "ns", _pair(counter.inc, peer_counter.inc, 300_000 // scale), n_runs)
        safe = registry.threadsafe_counter("safe_total", "Calls.")
        yield Row("metrics: thread-safe increment", "ns", _pair(safe.inc, peer_counter.inc, 200_000 // scale), n_runs)
        observe = registry.histogram("took_seconds", "Time.").observe
        peer_observe = PeerHistogram("took_seconds", "Time.", registry=theirs).observe
        histograms = _pair(lambda: observe(0.03), lambda: peer_observe(0.03), 200_000 // scale)
        yield Row("metrics: histogram observation", "ns", histograms, n_runs)
        yield _rendering(f"{folder}/many", n_runs, 200 // scale)
        yield _scraping(f"{folder}/shards", n_runs, 200 // scale)
        registry.close()
    yield from _logging(n_runs, 20_000 // scale)


def _pair(ours: Callable[[], object], theirs: Callable[[], object], n_times: int) -> list[Contender]:
    return [Contender(OURS, _cpu(ours, n_times, 1e9)), Contender(PEER, _cpu(theirs, n_times, 1e9))]


def _rendering(folder: str, n_runs: int, n_times: int) -> Row:
    """All values change between two expositions, as in a busy process."""
    registry = Registry(Home(HostPages(), folder))
    theirs = CollectorRegistry()
    peer = PeerCounter("calls", "Calls.", ["method", "status"], registry=theirs)
    counters = [registry.counter("calls_total", "Calls.", method=f"m{i // 5}", status=str(200 + i % 5)) for i in range(N_SERIES)]
    peers = [peer.labels(method=f"m{i // 5}", status=str(200 + i % 5)) for i in range(N_SERIES)]
    for number, (one, other) in enumerate(zip(counters, peers, strict=True)):
        one.inc(number * 1.37)
        other.inc(number * 1.37)
    return Row(
        f"metrics: {N_SERIES} series rendered",
        "us",
        [
            Contender(OURS, _cpu(registry.render, n_times, 1e6)),
            Contender(PEER, _cpu(lambda: generate_latest(theirs), n_times // 5 + 1, 1e6)),
        ],
        n_runs,
    )


def _scraping(folder: str, n_runs: int, n_times: int) -> Row:
    for shard in range(N_SHARDS):
        registry = Registry(Home(HostPages(), folder, shard=shard))
        for number in range(N_SERIES):
            registry.counter("calls_total", "Calls.", method=f"m{number}").inc(number)
        registry.close()
    scrape, text = ShardMetrics(HostPages(), folder), PrometheusText()
    work = _cpu(lambda: text.render(scrape.snapshot()), n_times, 1e6)
    return Row(f"metrics: scrape of {N_SHARDS} shards, summed", "us", [Contender(OURS, work)], n_runs)


def _logging(n_runs: int, n_times: int) -> Iterator[Row]:
    clock = HostClock()
    json_lines, text_lines = (Logger(lambda _: None, clock, form=form) for form in ("json", "text"))
    peer = logging.getLogger("isopod.benchmark")
    handler = logging.StreamHandler(_Nowhere())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    peer.handlers, peer.propagate = [handler], False
    peer.setLevel(logging.INFO)
    theirs = _cpu(lambda: peer.info("container.started name=%s pid=%d took_s=%s id=%s", "web", 1234, 0.25, "abcdef012345"), n_times, 1e6)
    for name, logger in (("JSON", json_lines), ("text", text_lines)):
        bound = logger.bind(shard=0)

        def work(bound: Logger = bound) -> None:
            bound.info("container.started", name="web", pid=1234, took_s=0.25, id="abcdef012345")

        yield Row(f"log line, {name}", "us", [Contender(OURS, _cpu(work, n_times, 1e6)), Contender("logging", theirs)], n_runs)


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


def _cpu(work: Callable[[], object], n_times: int, per_s: float) -> Callable[[], float]:
    """Return what measures the CPU time of one call: of many in a row, the loop's own cost included."""

    def sample() -> float:
        began = time.process_time_ns()
        for _ in range(n_times):
            work()
        return (time.process_time_ns() - began) / 1e9 / n_times * per_s

    return sample
