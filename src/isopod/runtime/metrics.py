"""Metrics: counters, gauges and histograms, and their Prometheus text.

Metrics stand beside the code that counts: it asks the registry once, at construction, for a series with its label values, and
then pays one attribute addition per event. Not thread-safe by design: a registry belongs to its loop's thread.

Rules: names carry base units, counters end in `_total`; a family has one kind, one help text and one set of label names.
Source: Prometheus text exposition format 0.0.4.
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import isnan
from typing import Final, Literal, NamedTuple, TypeVar

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Default bounds of a duration histogram, in seconds."""
SERIES_MAX: Final = 100_000

Kind = Literal["counter", "gauge", "histogram"]
_FIRST: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_REST: Final = _FIRST | frozenset("0123456789")


class Sample(NamedTuple):
    """One value of a snapshot. `labels` are (name, value) pairs in the order they were given."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)
    kind: Final[Kind] = "counter"

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which is not negative."""
        if amount < 0:
            raise ValueError("a counter never falls")
        self.value += amount


class Gauge:
    """A number that rises and falls."""

    __slots__ = ("value",)
    kind: Final[Kind] = "gauge"

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """Make it `value`."""
        self.value = value

    def inc(self, amount: float = 1) -> None:
        """Add `amount`."""
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        """Subtract `amount`."""
        self.value -= amount


class Histogram:
    """Counts of observations by upper bound, their number and sum.

    Args:
        bounds: Rising upper bounds, without +Inf.
    """

    __slots__ = ("bounds", "counts", "sum")
    kind: Final[Kind] = "histogram"

    def __init__(self, bounds: Sequence[float] = BUCKETS_S) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation (a bound holds values less than or equal to it)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)


Metric = Counter | Gauge | Histogram
M = TypeVar("M", Counter, Gauge, Histogram)


class _Family:
    """All series of one name."""

    __slots__ = ("bounds", "help", "kind", "label_names", "name", "series")

    def __init__(self, name: str, help_text: str, kind: Kind, *, label_names: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self.name = name
        self.help = help_text
        self.kind = kind
        self.label_names = label_names
        self.bounds = bounds
        self.series: dict[tuple[str, ...], Metric] = {}


class Registry:
    """The metrics of one node, in the order they were asked for."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        self._n_series = 0

    def counter(self, name: str, help_text: str, /, **labels: str) -> Counter:
        """Return the counter of that name and labels, made on first sight.

        Args:
            name: Ends in `_total`.
            help_text: One line.
            **labels: Fixed for this series.

        Raises:
            ValueError: A malformed name, one known with another kind, help or label names, or too many series.
        """
        if not name.endswith("_total"):
            raise ValueError(f"counter {name} does not end in _total")
        return self._series(Counter(), name, help_text, labels)

    def gauge(self, name: str, help_text: str, /, **labels: str) -> Gauge:
        """Return the gauge of that name and labels, made on first sight. Raises as `counter`."""
        return self._series(Gauge(), name, help_text, labels)

    def histogram(self, name: str, help_text: str, /, bounds: Sequence[float] = BUCKETS_S, **labels: str) -> Histogram:
        """Return the histogram of that name and labels, made on first sight. Raises as `counter`.

        Args:
            name: Ends in its unit (`_seconds`).
            help_text: One line.
            bounds: Rising upper bounds, equal for the whole family.
            **labels: Fixed for this series.
        """
        if list(bounds) != sorted(set(bounds)) or not bounds or "le" in labels:
            raise ValueError(f"histogram {name}: bounds must rise, and no label may be called le")
        return self._series(Histogram(bounds), name, help_text, labels)

    def statistics(self) -> tuple[Sample, ...]:
        """Return all values now, as the exposition would show them."""
        return tuple(
            Sample(family.name + suffix, (*zip(family.label_names, values, strict=True), *extra), value)
            for family in self._families.values()
            for values, metric in family.series.items()
            for suffix, extra, value in _values(metric)
        )

    def render(self) -> str:
        """Return the exposition text (format 0.0.4)."""
        lines: list[str] = []
        for family in self._families.values():
            lines.append(f"# HELP {family.name} {_escape_help(family.help)}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            for values, metric in family.series.items():
                prefix = ",".join(f'{n}="{_escape(v)}"' for n, v in zip(family.label_names, values, strict=True))
                lines.extend(_lines(family.name, prefix, metric))
        return "\n".join(lines) + "\n" if lines else ""

    def _series(self, fresh: M, name: str, help_text: str, labels: dict[str, str]) -> M:
        family = self._family(fresh, name, help_text, tuple(labels))
        found = family.series.setdefault(tuple(labels.values()), fresh)
        if found is fresh:
            self._n_series += 1
            if self._n_series > SERIES_MAX:
                raise ValueError(f"more than {SERIES_MAX} series: {name} has a label with too many values")
        if not isinstance(found, type(fresh)):
            raise ValueError(f"metric {name} is a {family.kind}")
        return found

    def _family(self, fresh: Metric, name: str, help_text: str, label_names: tuple[str, ...]) -> _Family:
        bounds = fresh.bounds if isinstance(fresh, Histogram) else ()
        family = self._families.get(name)
        if family is None:
            for word in (name, *label_names):
                if not word or word[0] not in _FIRST or any(c not in _REST for c in word):
                    raise ValueError(f"metric {name}: {word!r} is not a name")
            family = _Family(name, help_text, fresh.kind, label_names=label_names, bounds=bounds)
            self._families[name] = family
        if (family.kind, family.help, family.label_names, family.bounds) != (fresh.kind, help_text, label_names, bounds):
            raise ValueError(f"metric {name} is known with another kind, help text, label names or bounds")
        return family


def _values(metric: Metric) -> list[tuple[str, tuple[tuple[str, str], ...], float]]:
    """Return (name suffix, extra labels, value) of every sample of a series."""
    if not isinstance(metric, Histogram):
        return [("", (), metric.value)]
    samples: list[tuple[str, tuple[tuple[str, str], ...], float]] = []
    total = 0
    for bound, count in zip((*metric.bounds, float("inf")), metric.counts, strict=True):
        total += count
        samples.append(("_bucket", (("le", _number(bound)),), total))
    samples.append(("_sum", (), metric.sum))
    samples.append(("_count", (), total))
    return samples


def _lines(name: str, prefix: str, metric: Metric) -> list[str]:
    lines = []
    for suffix, extra, value in _values(metric):
        labels = ",".join((*((prefix,) if prefix else ()), *(f'{n}="{v}"' for n, v in extra)))
        lines.append(f"{name}{suffix}{{{labels}}} {_number(value)}" if labels else f"{name}{suffix} {_number(value)}")
    return lines


def _number(value: float) -> str:
    if isnan(value):
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n")
