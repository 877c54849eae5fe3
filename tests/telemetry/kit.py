"""What the tests of telemetry share: a registry with one of everything, and a logger that remembers."""

import json

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.clock import Clock

AWKWARD = 'a "quoted\\" one,\nwith = and {} %s %'


def furnished() -> Registry:
    """Return a registry with counters, gauges and a histogram, labels and values of every kind."""
    registry = Registry()
    registry.counter("calls_total", "Calls.", method="run", outcome="ok").inc(3)
    registry.counter("calls_total", "Calls.", method=AWKWARD, outcome="").inc()
    registry.counter("busy_seconds_total", "Time.").inc(0.25)
    registry.gauge("memory_bytes", 'Memory\\ "now"\nand here.').set(1 << 40)
    registry.gauge("oddities", "Numbers.", which="nan").set(float("nan"))
    registry.gauge("oddities", "Numbers.", which="inf").set(float("-inf"))
    histogram = registry.histogram("took_seconds", "Time.", (0.1, 1.0), kind="a")
    for value in (0.05, 0.1, 0.5, 2.0):
        histogram.observe(value)
    return registry


class Memo:
    """A logger that keeps its lines."""

    def __init__(self, clock: Clock) -> None:
        self.lines: list[bytes] = []
        self.logger = Logger(self.lines.append, clock, level="debug")

    def events(self) -> list[str]:
        """Return the names of what was logged."""
        return [json.loads(line)["event"] for line in self.lines]
