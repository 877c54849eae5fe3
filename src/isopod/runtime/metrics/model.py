"""What metrics look like from outside: families of series, and snapshots of their values.

A snapshot is two parts: the layout (names, labels, kinds), which changes only when a series is added, and the values, one flat tuple of
numbers. So whoever exports can prepare its text once per layout and pour in the numbers; everybody else walks `snapshot.readings()`.

Values of one series stand at `series.at`: one number for a counter or gauge; for a histogram with n bounds n + 1 cumulative counts (the
last is +Inf's), the sum, and the count.
"""

from collections.abc import Iterator
from math import inf
from typing import Final, Literal, NamedTuple

import msgspec

Kind = Literal["counter", "gauge", "histogram"]
Aggregation = Literal["sum", "max", "min", "last", "shard"]
"""How the shards' values of one series become one: "last" takes the highest shard's; "shard" keeps all, with the label `shard`."""
Labels = tuple[tuple[str, str], ...]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Default bounds of a duration histogram, in seconds."""
SERIES_MAX: Final = 100_000
SHARD_LABEL: Final = "shard"
UNITS: Final = ("seconds", "bytes", "ratio", "celsius", "joules", "grams", "meters", "volts", "amperes")
"""Base units a name may end with (before `_total`); a family's unit is taken from there."""


class Sample(NamedTuple):
    """One value of a snapshot. `labels` are (name, value) pairs in the order they were given."""

    name: str
    labels: Labels
    value: float


class Series(msgspec.Struct, frozen=True):
    """One series: its labels, and where its values stand in a snapshot."""

    labels: Labels
    at: int


class Family(msgspec.Struct, frozen=True):
    """All series of one name. `bounds` are a histogram's upper bounds, without +Inf."""

    name: str
    kind: Kind
    help: str
    unit: str
    bounds: tuple[float, ...]
    series: tuple[Series, ...]


class Layout(msgspec.Struct, frozen=True):
    """The families of a snapshot, in the order they were first asked for. Compare by identity: one layout, one object."""

    families: tuple[Family, ...]
    n_values: int


class HistogramReading(msgspec.Struct, frozen=True):
    """A histogram's value: cumulative counts by upper bound (the last bound is +Inf), their sum and number."""

    buckets: tuple[tuple[float, float], ...]
    sum: float
    count: float


class Reading(msgspec.Struct, frozen=True):
    """One series with its value: a number, or a histogram."""

    family: Family
    labels: Labels
    value: float | HistogramReading


class Snapshot(msgspec.Struct, frozen=True):
    """All values at one moment."""

    at_ns: int
    """Wall time in nanoseconds since the Unix epoch, 0 if nobody said."""
    layout: Layout
    values: tuple[float, ...]
    n_damaged: int = 0
    """Pages that could not be read, or not to their end."""

    def readings(self) -> Iterator[Reading]:
        """Walk all series."""
        for family in self.layout.families:
            for series in family.series:
                yield Reading(family, series.labels, self.reading(family, series))

    def samples(self) -> Iterator[Sample]:
        """Walk all numbers, named as the text formats name them (`_bucket`, `_sum`, `_count`)."""
        for family in self.layout.families:
            for series in family.series:
                yield from self.samples_of(family, series)

    def value(self, name: str, /, **labels: str) -> float:
        """Return a counter's or gauge's value, or the number of a histogram's observations; of all series whose labels include `labels`
        the sum. KeyError if there is none."""
        found = [
            self.values[series.at + (len(family.bounds) + 2 if family.kind == "histogram" else 0)]
            for family in self.layout.families
            if family.name == name
            for series in family.series
            if labels.items() <= dict(series.labels).items()
        ]
        if not found:
            raise KeyError(name)
        return sum(found)

    def reading(self, family: Family, series: Series) -> float | HistogramReading:
        """Return the value of one series of this snapshot's layout."""
        at = series.at
        if family.kind != "histogram":
            return self.values[at]
        end = at + len(family.bounds) + 1
        buckets = tuple(zip((*family.bounds, inf), self.values[at:end], strict=True))
        return HistogramReading(buckets, self.values[end], self.values[end + 1])

    def samples_of(self, family: Family, series: Series) -> Iterator[Sample]:
        """Walk the numbers of one series of this snapshot's layout."""
        value = self.reading(family, series)
        if not isinstance(value, HistogramReading):
            yield Sample(family.name, series.labels, value)
            return
        for bound, count in value.buckets:
            yield Sample(f"{family.name}_bucket", (*series.labels, ("le", number(bound))), count)
        yield Sample(f"{family.name}_sum", series.labels, value.sum)
        yield Sample(f"{family.name}_count", series.labels, value.count)


def number(value: float) -> str:
    """Return a number as the text formats spell it."""
    text = repr(float(value))
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(text, text)


def unit_of(name: str) -> str:
    """Return the base unit at the end of a family's name, "" if there is none."""
    last = name.removesuffix("_total").rpartition("_")[2]
    return last if last in UNITS else ""
