"""StoreMeters: what the store counts, on one node."""

from isopod.api.store.messages import ConsistencyReport
from isopod.cluster.store.machine import StoreMachine
from isopod.runtime.metrics import Registry


class StoreMeters:
    """Counters and gauges.

    Args:
        machine: Whose size is shown.
        metrics: Where.
    """

    def __init__(self, machine: StoreMachine, metrics: Registry) -> None:
        self._machine = machine
        self.forwards = metrics.counter("isopod_store_forwards_total", "Commands handed to the leader.")
        self.forward_failures = metrics.counter(
            "isopod_store_forward_failures_total", "Commands that could not be handed on, and were not begun."
        )
        name, text = "isopod_store_reads_total", "Requests to read that were answered here."
        self.linearizable_reads = metrics.counter(name, text, consistency="linearizable")
        self.stale_reads = metrics.counter(name, text, consistency="stale")
        name, text = "isopod_store_cache_lookups_total", "Reads that a cache was asked for."
        self.cache_hits = metrics.counter(name, text, place="node", outcome="hit")
        self.cache_misses = metrics.counter(name, text, place="node", outcome="miss")
        self._hit_ratio = metrics.gauge(
            "isopod_store_cache_hit_ratio", "Of all look-ups since the start, those that were hits.", place="node"
        )
        self._revision = metrics.gauge("isopod_store_revision", "Of the last change.")
        self._keys = metrics.gauge("isopod_store_keys", "Keys.")
        self._bytes = metrics.gauge("isopod_store_bytes", "Of keys and values, with 160 bytes for each.")
        self._leases = metrics.gauge("isopod_store_leases", "Leases.")
        self._sessions = metrics.gauge("isopod_store_sessions", "Sessions.")
        self._consistent = metrics.gauge(
            "isopod_store_consistent", "1 if all members held the same state when they were last compared, 0 if not."
        )
        self._consistent.set(1)
        self._remove_hook = metrics.before_snapshot(self._publish)

    def close(self) -> None:
        """Stop following the machine."""
        self._remove_hook()

    def on_report(self, report: ConsistencyReport) -> None:
        """All members were compared."""
        if report.consistent is not None:
            self._consistent.set(1 if report.consistent else 0)

    def _publish(self) -> None:
        """Somebody is about to look."""
        machine = self._machine
        hits, misses = self.cache_hits.value, self.cache_misses.value
        self._hit_ratio.set(hits / (hits + misses) if hits else 0.0)
        self._revision.set(machine.keys.revision)
        self._keys.set(len(machine.keys.entries))
        self._bytes.set(machine.keys.n_bytes)
        self._leases.set(len(machine.leases))
        self._sessions.set(len(machine.sessions))
