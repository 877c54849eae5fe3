"""Own: what the agent says of itself: kata-monitor's four families under their names, and kata_pulse_*.

Facts come from those who count: the store, and by `Facts` discovery, the collector and the runtime endpoint. Here they become `Families`,
so that the one renderer prints them in every format, and selectors and prefixes hold for them too. Nothing is asked of anybody while a
scrape waits, but the kernel about this process, at most every `PROCESS_S` seconds and not while another scrape asks already.

kata-monitor calls its counters without "_total" and measures in milliseconds; these names stay as they are. All others carry base units.
Durations are whole milliseconds, cut off, as kata-monitor observes them.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from isopod.pulse.labels import block
from isopod.pulse.merge import Told
from isopod.pulse.model import Families, Fragment, Kind
from isopod.pulse.own_sandboxes import OwnSandboxes
from isopod.pulse.rates import Row
from isopod.pulse.store import Entry, Store
from isopod.world.kernel import ProcessFigures
from isopod.world.world import World

if TYPE_CHECKING:
    from isopod.pulse.histograms import MergeFacts

SCRAPE_BOUNDS_MS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROCESS_S: Final = 10.0
"""How old the figures of this process may be: asking walks all its pages."""
_STRICT: Final = "kata_monitor_"
_NONE: Final[Mapping[str, int]] = {}


class Durations(NamedTuple):
    """A histogram in seconds.

    Args:
        bounds: Upper bounds, ascending, without the infinite one.
        counts: So many observations in each bucket (not summed up), one more than bounds.
        sum_s: Of all observations.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    sum_s: float


class PushFacts(NamedTuple):
    """What was sent by remote write. Counts go on from the agent's start.

    Args:
        n_sent: Samples that the receiver took.
        n_stale: Of these, those that say that a series ended.
        n_refused: Samples that it refused for good.
        n_dropped: Samples dropped because too many waited.
        n_retries: Requests that were sent again.
        n_bytes: Of requests that were taken, packed.
        n_queued: Requests that wait.
        queued_bytes: Their bytes.
        success_s: When one was taken last, since the Unix epoch; None before the first.
    """

    n_sent: int = 0
    n_stale: int = 0
    n_refused: int = 0
    n_dropped: int = 0
    n_retries: int = 0
    n_bytes: int = 0
    n_queued: int = 0
    queued_bytes: int = 0
    success_s: float | None = None


class Facts(NamedTuple):
    """What the other parts of the agent say of themselves at a moment. Counts go on from the agent's start.

    Args:
        roots: What is watched for sandboxes (folders, an isopod node), and whether it is there.
        rows: Makes the rows of /top; called for that page alone.
        requests: Requests to shims by outcome: "ok", or the class of failure.
        durations: Of requests to shims.
        n_in_flight: Requests under way.
        n_overflows: How often inotify lost events.
        n_refused: Folders that are no sandboxes' for their names.
        cri_calls: Calls of the runtime endpoint by outcome: "ok", "error".
        cri_stats: The same of rounds that ask what containers use.
        cri_up: Whether it answered last, None without one.
        stages_s: Processor time by stage ("read", "collect", ...).
        failures: Failures of the agent's parts, by part.
        push: What was sent by remote write, None without a receiver.
        merged: Of histograms, what was merged; None if none are.
    """

    roots: Mapping[str, bool] = {}
    rows: Callable[[], Sequence[Row]] = tuple
    requests: Mapping[str, int] = {}
    durations: Durations | None = None
    n_in_flight: int = 0
    n_overflows: int = 0
    n_refused: int = 0
    cri_calls: Mapping[str, int] = {}
    cri_stats: Mapping[str, int] = {}
    cri_up: bool | None = None
    stages_s: Mapping[str, float] = {}
    failures: Mapping[str, int] = {}
    push: PushFacts | None = None
    merged: "MergeFacts | None" = None


class Own:
    """Counts scrapes, and makes families of everything the agent knows of itself.

    Args:
        world: Its clock and its kernel.
        store: What is told about; its clock is the loop's.
        version: Of the agent.
    """

    def __init__(self, world: World, store: Store, *, version: str) -> None:
        self._world = world
        self._store = store
        self._version = version
        self._now = world.clock.monotonic_ns
        self._loop_s = asyncio.get_running_loop().time
        self._started_s = world.clock.now_ns() / 1e9
        self._process: ProcessFigures | None = None
        self._process_ns = 0
        self._is_asking = False
        self._sandboxes = OwnSandboxes(self._loop_s)
        self._dropped: dict[str, int] = {}
        self._seen: dict[str, Mapping[str, int]] = {}
        self.n_scrapes = 0
        self.n_failed = 0
        self.n_in_flight = 0
        self.n_bytes = 0
        self.stages_s: dict[str, float] = {"view": 0.0, "render": 0.0}
        self._counts = [0] * (len(SCRAPE_BOUNDS_MS) + 1)
        self._sum_ms = 0

    # --- counting -------------------------------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Count a scrape that begins; return when, for `end`."""
        self.n_scrapes += 1
        self.n_in_flight += 1
        return self._now()

    def end(self, began_ns: int, *, failed: bool, n_bytes: int = 0) -> None:
        """Count a scrape that ended.

        Args:
            began_ns: What `begin` returned.
            failed: Whether the client did not get all of it, or an error.
            n_bytes: The size of the answer's body.
        """
        took_ms = (self._now() - began_ns) // 1_000_000
        self._counts[bisect_left(SCRAPE_BOUNDS_MS, took_ms)] += 1
        self._sum_ms += took_ms
        self.n_in_flight -= 1
        self.n_failed += failed
        self.n_bytes += n_bytes

    def now_ns(self) -> int:
        """Return the time by which `spend` counts."""
        return self._now()

    def spend(self, stage: str, began_ns: int) -> None:
        """Count time that a stage of a scrape took, from `began_ns` of the monotonic clock until now."""
        self.stages_s[stage] = self.stages_s.get(stage, 0.0) + (self._now() - began_ns) / 1e9

    # --- showing --------------------------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask the kernel about this process, unless that was done lately or somebody is asking."""
        now_ns = self._now()
        if self._is_asking or (self._process_ns and now_ns - self._process_ns < PROCESS_S * 1e9):
            return
        self._is_asking = True
        try:
            self._process = await self._world.kernel.process_figures()
            self._process_ns = now_ns
        except OSError:  # no descriptor left for /proc, for one: a scrape is worth more than these figures
            self._process_ns = now_ns
        finally:
            self._is_asking = False

    def families(self, facts: Facts, *, strict: bool = False) -> Families:
        """Return everything the agent says of itself.

        Args:
            facts: What the other parts say.
            strict: Whether only what kata-monitor has too is wanted.
        """
        if strict:
            sheet = Sheet()
            self._monitor(sheet)
            return sheet.families()
        return {**self._of_agent(facts), **self.of_sandboxes(self._store.entries())}

    def told(self, facts: Facts) -> Told:
        """Return the same for an answer: what stays the same is kept from one to the next."""
        return Told(self._of_agent(facts), self._sandboxes.blocks(self._store.entries()))

    def of_sandboxes(self, entries: Sequence[Entry]) -> Families:
        """Return what the agent says of some sandboxes alone: whether they are up, how old their figures are."""
        return self._sandboxes.families(entries)

    # --- inside ---------------------------------------------------------------------------------------------------------------------

    def _of_agent(self, facts: Facts) -> Families:
        """Return all but what is said of each sandbox."""
        sheet = Sheet()
        self._monitor(sheet)
        self._store_families(sheet)
        self._facts(sheet, facts)
        if facts.push is not None:
            _push_families(sheet, facts.push)
        if facts.merged is not None:
            _merge_families(sheet, facts.merged)
        self._scrapes(sheet)
        return sheet.families()

    def _monitor(self, sheet: "Sheet") -> None:
        add = sheet.add
        add("kata_monitor_running_shim_count", "gauge", "Sandboxes that are watched.", self._n_shims())
        add("kata_monitor_scrape_count", "counter", "Scrapes of the metrics.", self.n_scrapes)
        add("kata_monitor_scrape_failed_count", "counter", "Scrapes that failed, or whose client went before their end.", self.n_failed)
        sheet.add_histogram(
            "kata_monitor_scrape_durations_histogram_milliseconds",
            "From a scrape's request to the end of its answer.",
            Durations(SCRAPE_BOUNDS_MS, self._counts, self._sum_ms),
        )
        process = self._process
        if process is None:
            return
        add(f"{_STRICT}process_cpu_seconds_total", "counter", "Processor time.", process.cpu_user_s + process.cpu_system_s)
        add(f"{_STRICT}process_max_fds", "gauge", "File descriptors that may be open.", process.n_fds_max)
        add(f"{_STRICT}process_network_receive_bytes_total", "counter", "Received over IP, by its namespace.", process.ip_received_bytes)
        add(f"{_STRICT}process_network_transmit_bytes_total", "counter", "Sent over IP, by its namespace.", process.ip_sent_bytes)
        add(f"{_STRICT}process_open_fds", "gauge", "Open file descriptors.", process.n_fds)
        add(f"{_STRICT}process_resident_memory_bytes", "gauge", "Resident memory.", process.resident_bytes)
        add(f"{_STRICT}process_start_time_seconds", "gauge", "When the agent started, since the Unix epoch.", self._started_s)
        add(f"{_STRICT}process_virtual_memory_bytes", "gauge", "Address space.", process.virtual_bytes)
        add(f"{_STRICT}process_virtual_memory_max_bytes", "gauge", "Address space that it may have.", process.virtual_bytes_max)

    def _n_shims(self) -> int:
        return sum(entry.runtime != "isopod" for entry in self._store.entries())

    def _store_families(self, sheet: "Sheet") -> None:
        add = sheet.add
        entries = self._store.entries()
        held = self._store.statistics()
        now_s = self._loop_s()
        by_runtime = {"go": 0, "isopod": 0, "rust": 0}
        for entry in entries:
            by_runtime[entry.runtime] += 1
        for runtime, n in by_runtime.items():
            add("kata_pulse_sandboxes", "gauge", "Sandboxes, by who serves their figures.", n, runtime=runtime)
        add("kata_pulse_sandboxes_up", "gauge", "Sandboxes whose last request was answered.", held.n_up)
        add("kata_pulse_series", "gauge", "Series that are kept.", held.n_series)
        add("kata_pulse_families", "gauge", "Families that are kept.", held.n_families)
        add("kata_pulse_bytes", "gauge", "Sum of the last answers of all shims.", sum(entry.n_bytes for entry in entries))
        ages = [age for age in (entry.age_s(now_s) for entry in entries) if age is not None]
        add("kata_pulse_cache_age_seconds", "gauge", "How old the oldest sandbox's figures are.", round(max(ages, default=0.0), 3))
        add("kata_pulse_rounds_total", "counter", "Answers of shims taken in.", held.n_rounds)
        add("kata_pulse_rounds_unchanged_total", "counter", "Answers that were the same as those before.", held.n_unchanged)
        add("kata_pulse_rounds_failed_total", "counter", "Requests to shims that failed.", held.n_failed)
        add("kata_pulse_sandboxes_expired_total", "counter", "Sandboxes whose figures were let go of for failing.", held.n_expired)
        add("kata_pulse_rounds_late_total", "counter", "Answers that came after their sandbox went.", held.n_late)
        for family, n in sorted(held.conflicts.items()):
            text = "Sandboxes whose family is left out for its type or a name that clashes."
            add("kata_pulse_conflicts", "gauge", text, n, family=family)
        for reason, n in self._dropped_lines(entries).items():
            add("kata_pulse_dropped_lines_total", "counter", "Lines of shims' answers that were left out.", n, reason=reason)

    def _dropped_lines(self, entries: Sequence[Entry]) -> Mapping[str, int]:
        """Return the lines dropped so far by reason; what sandboxes that are gone dropped stays counted."""
        seen = self._seen
        if len(seen) > 2 * len(entries) + 64:
            seen = self._seen = {entry.id: seen[entry.id] for entry in entries if entry.id in seen}
        for entry in entries:
            before = seen.get(entry.id, _NONE)
            if entry.dropped == before:
                continue
            for reason, n in entry.dropped.items():
                # An entry of the same id that began anew has dropped less than the one before.
                more = n - before.get(reason, 0)
                self._dropped[reason] = self._dropped.get(reason, 0) + (more if more >= 0 else n)
            seen[entry.id] = dict(entry.dropped)
        return dict(sorted(self._dropped.items()))

    def _facts(self, sheet: "Sheet", facts: Facts) -> None:
        add = sheet.add
        for path, is_there in facts.roots.items():
            add("kata_pulse_root_available", "gauge", "Whether what is watched for sandboxes is there.", int(is_there), path=path)
        for outcome, n in sorted(facts.requests.items()):
            add("kata_pulse_shim_requests_total", "counter", "Requests to shims.", n, outcome=outcome)
        if facts.durations is not None:
            sheet.add_histogram("kata_pulse_shim_request_duration_seconds", "From asking a shim to its answer's end.", facts.durations)
        add("kata_pulse_shim_requests_in_flight", "gauge", "Requests to shims under way.", facts.n_in_flight)
        add("kata_pulse_inotify_overflows_total", "counter", "How often inotify lost events.", facts.n_overflows)
        add("kata_pulse_sandboxes_refused_total", "counter", "Folders left aside for their names.", facts.n_refused)
        for outcome, n in sorted(facts.cri_calls.items()):
            add("kata_pulse_cri_calls_total", "counter", "Calls of the runtime endpoint.", n, outcome=outcome)
        for outcome, n in sorted(facts.cri_stats.items()):
            add("kata_pulse_cri_stats_rounds_total", "counter", "Rounds that asked what containers use.", n, outcome=outcome)
        if facts.cri_up is not None:
            add("kata_pulse_cri_up", "gauge", "Whether the runtime endpoint answered last.", int(facts.cri_up))
        for part, n in sorted(facts.failures.items()):
            add("kata_pulse_part_failures_total", "counter", "Failures of the agent's own parts.", n, part=part)
        for stage, seconds in sorted({**facts.stages_s, **self.stages_s}.items()):
            add("kata_pulse_stage_seconds_total", "counter", "Time spent, by stage.", seconds, stage=stage)

    def _scrapes(self, sheet: "Sheet") -> None:
        sheet.add("kata_pulse_build_info", "gauge", "The agent's version.", 1, version=self._version)
        sheet.add("kata_pulse_scrapes_in_flight", "gauge", "Scrapes under way.", self.n_in_flight)
        sheet.add("kata_pulse_scrape_bytes_total", "counter", "Bytes of scrapes' answers.", self.n_bytes)


def _push_families(sheet: "Sheet", push: PushFacts) -> None:
    add = sheet.add
    for outcome, n in (("dropped", push.n_dropped), ("refused", push.n_refused), ("sent", push.n_sent)):
        add("kata_pulse_push_samples_total", "counter", "Samples of remote write, by what came of them.", n, outcome=outcome)
    add("kata_pulse_push_stale_total", "counter", "Samples sent that say that a series ended.", push.n_stale)
    add("kata_pulse_push_retries_total", "counter", "Requests of remote write sent again.", push.n_retries)
    add("kata_pulse_push_bytes_total", "counter", "Bytes of requests of remote write that were taken.", push.n_bytes)
    add("kata_pulse_push_queued_requests", "gauge", "Requests of remote write that wait.", push.n_queued)
    add("kata_pulse_push_queued_bytes", "gauge", "Bytes of requests of remote write that wait.", push.queued_bytes)
    if push.success_s is not None:
        add("kata_pulse_push_last_success_timestamp_seconds", "gauge", "When a request of remote write was taken last.", push.success_s)


def _merge_families(sheet: "Sheet", merged: "MergeFacts") -> None:
    sheet.add("kata_pulse_merged_histograms", "gauge", "Histograms that are shown once for all sandboxes.", merged.n_merged)
    for reason, n in sorted(merged.apart.items()):
        sheet.add("kata_pulse_unmerged_histograms", "gauge", "Histograms that stay with their sandboxes.", n, reason=reason)


class Sheet:
    """Collects samples, and makes families of them."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[Kind, str]] = {}
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: Kind, text: str, value: float, **labels: str) -> None:
        """Add one sample.

        Args:
            name: Of the family.
            kind: Its type.
            text: Its help: plain ASCII without backslashes.
            value: The figure.
            **labels: Its labels.
        """
        self.add_many(name, kind, text, ((block(tuple(labels.items())).decode(), value),))

    def add_many(self, name: str, kind: Kind, text: str, samples: Iterable[tuple[str, float | None]]) -> None:
        """Add samples by their labels as they stand between braces ("" for none); None is no sample."""
        self._kinds.setdefault(name, (kind, text))
        lines = self._lines.setdefault(name, [])
        lines += [f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n" for labels, value in samples if value is not None]

    def add_histogram(self, name: str, text: str, durations: Durations) -> None:
        """Add a histogram without labels."""
        self._kinds[name] = ("histogram", text)
        lines = self._lines.setdefault(name, [])
        n = 0
        for bound, count in zip((*durations.bounds, "+Inf"), durations.counts, strict=True):
            n += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {n}\n')
        lines += [f"{name}_sum {durations.sum_s}\n", f"{name}_count {n}\n"]

    def families(self) -> Families:
        """Return what was added, by name."""
        made: Families = {}
        for name in sorted(self._lines):
            kind, text = self._kinds[name]
            lines = self._lines[name]
            if lines:
                made[name] = Fragment(kind, text.encode(), "".join(lines).encode(), len(lines))
        return made
