"""Prometheus text exposition format 0.0.4, from snapshots.

Everything but the numbers is the same at every scrape: it is made once per layout, as a template, and the numbers are poured in by one
call. Source: the format's page of the Prometheus documentation.
"""

from math import inf, isfinite
from typing import Final

from isopod.runtime.metrics.model import Family, Labels, Layout, Series, Snapshot, number

_HOLE: Final = "%r"


class PrometheusText:
    """Renders snapshots; keeps the template of the last layout."""

    __slots__ = ("_layout", "_template")

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._template = ""

    def render(self, snapshot: Snapshot) -> str:
        """Return the exposition's text."""
        if snapshot.layout is not self._layout:
            self._template = "".join(_family(family) for family in snapshot.layout.families)
            self._layout = snapshot.layout
        if isfinite(sum(snapshot.values)):  # a sum that is finite has no infinity and no NaN in it
            return self._template % snapshot.values
        return self._template % tuple(_Spelled(value) for value in snapshot.values)


class _Spelled:
    """A number whose repr is how the format spells it, for those that Python spells differently."""

    __slots__ = ("_value",)

    def __init__(self, value: float) -> None:
        self._value = value

    def __repr__(self) -> str:
        return number(self._value)


def _family(family: Family) -> str:
    head = f"# HELP {family.name} {escape_help(family.help)}\n# TYPE {family.name} {family.kind}\n"
    return head.replace("%", "%%") + "".join(_series(family, series) for series in family.series)


def _series(family: Family, series: Series) -> str:
    if family.kind != "histogram":
        return _line(family.name, series.labels)
    buckets = [_line(f"{family.name}_bucket", (*series.labels, ("le", number(bound)))) for bound in (*family.bounds, inf)]
    return "".join([*buckets, _line(f"{family.name}_sum", series.labels), _line(f"{family.name}_count", series.labels)])


def _line(name: str, labels: Labels) -> str:
    return f"{name}{label_text(labels)} ".replace("%", "%%") + f"{_HOLE}\n"


def label_text(labels: Labels) -> str:
    """Return labels in braces, "" for none."""
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels) + "}" if labels else ""


def escape(value: str) -> str:
    """Return a label's value as it stands between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def escape_help(value: str) -> str:
    """Return a help text as it stands on its line."""
    return value.replace("\\", "\\\\").replace("\n", "\\n")
