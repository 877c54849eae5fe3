"""What others make of a reading: it is written out as an answer would be, and read by Prometheus' Python client and by promtool."""

import subprocess
from typing import Final

from prometheus_client import Metric
from prometheus_client.openmetrics import parser as open_parser
from prometheus_client.parser import text_string_to_metric_families as parse_text

from isopod.pulse.merge import Group
from isopod.pulse.model import Families, Kind, Reading
from isopod.pulse.render import EOF, header

PROMTOOL: Final = "/usr/bin/promtool"
PROMTOOL_LINT: Final = 3
"""What promtool ends with if it could read a text, but finds names in it that it would not give."""
GROUPED: Final = ("histogram", "summary")

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def as_text(families: Families) -> str:
    """Return families in text format 0.0.4."""
    kinds = kinds_of(families)
    pieces = [header(Group(name, each.kind, each.help, [each]), "text", kinds) + each.text for name, each in families.items()]
    return b"".join(pieces).decode()


def as_open(families: Families) -> str:
    """Return families in OpenMetrics."""
    kinds = kinds_of(families)
    pieces = [
        header(Group(name, each.kind, each.help, [each]), "openmetrics", kinds) + (each.text if each.open_text is None else each.open_text)
        for name, each in families.items()
    ]
    return b"".join([*pieces, EOF]).decode()


def kinds_of(families: Families) -> dict[str, Kind]:
    return {name: each.kind for name, each in families.items()}


def series_of(text: str) -> Series:
    """Return figures by series; AssertionError if one is there twice. Without types: with them, the client renames counters."""
    found: Series = {}
    for metric in parse_text("\n".join([line for line in text.split("\n") if not line.startswith("#")])):
        for sample in metric.samples:
            key = sample.name, tuple(sorted((name, value) for name, value in sample.labels.items() if value))
            assert key not in found, key
            found[key] = float(sample.value)
    return found


def check_reading(reading: Reading) -> tuple[Series, list[Metric]]:
    """Assert that a reading is what it says it is, and that both parsers take it. Returns the series, and OpenMetrics' families."""
    assert list(reading.families) == sorted(reading.families)
    for each in reading.families.values():
        assert each.text.endswith(b"\n")
        assert each.n_series == each.text.count(b"\n") > 0
    assert reading.n_series == sum(each.n_series for each in reading.families.values())
    assert all(n > 0 for n in reading.dropped.values())
    text = as_text(reading.families)
    assert sum(len(metric.samples) for metric in parse_text(text)) == reading.n_series
    series = series_of(text)
    assert len(series) == reading.n_series
    return series, list(open_parser.text_string_to_metric_families(as_open(reading.families)))  # type: ignore[no-untyped-call] # the client's


def promtool_complaint(text: str) -> str:
    """Return why promtool cannot read a text, "" if it can."""
    run = subprocess.run([PROMTOOL, "check", "metrics"], input=text.encode(), capture_output=True, check=False, timeout=60)
    return "" if run.returncode in {0, PROMTOOL_LINT} else run.stderr.decode()[:2000]


def promtool_lint(text: str) -> str:
    """Return what promtool would name otherwise, or cannot read; "" if nothing."""
    run = subprocess.run([PROMTOOL, "check", "metrics"], input=text.encode(), capture_output=True, check=False, timeout=60)
    return run.stderr.decode()[:2000]
