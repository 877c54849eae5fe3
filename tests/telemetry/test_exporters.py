"""Each format, read back by somebody else's parser where there is one; negotiation; a third party's exporter (row S37)."""

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families as prometheus_families

from isopod.runtime.metrics import Registry, Snapshot
from isopod.telemetry.exporters import (
    CSV_HEADER,
    CsvExporter,
    Exporter,
    Exporters,
    InfluxExporter,
    JsonExporter,
    OpenMetricsExporter,
    PrometheusExporter,
    chunks,
    parse_accept,
)
from tests.telemetry.kit import AWKWARD, furnished

AT_NS = 1_700_000_000_123_000_000
Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def expected(snapshot: Snapshot) -> Values:
    return {(s.name, tuple(sorted(s.labels))): s.value for s in snapshot.samples()}


def same(one: Values, two: Values) -> bool:
    return one.keys() == two.keys() and all(two[k] == v or (math.isnan(v) and math.isnan(two[k])) for k, v in one.items())


@pytest.mark.row("S24")
def test_prometheus_text_is_read_by_prometheus() -> None:
    snapshot = furnished().snapshot(AT_NS)
    text = PrometheusExporter().export(snapshot).decode()
    read = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in prometheus_families(text) for s in f.samples}
    assert same(read, expected(snapshot))
    assert 'which="nan"} NaN\n' in text
    assert 'which="inf"} -Inf\n' in text


@pytest.mark.row("S24")
def test_open_metrics_is_read_by_its_strict_parser() -> None:
    snapshot = furnished().snapshot(AT_NS)
    for exporter in (OpenMetricsExporter(), OpenMetricsExporter(created_s=12.5)):
        text = exporter.export(snapshot).decode()
        assert text.endswith("\n# EOF\n")
        families = {family.name: family for family in open_metrics_families(text)}  # type: ignore[no-untyped-call]
        read = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples}
        created = {key for key in read if key[0].endswith("_created")}
        assert len(created) == (0 if "_created" not in text else 4)
        assert same({key: value for key, value in read.items() if key not in created}, expected(snapshot))
        assert (families["memory_bytes"].unit, families["busy_seconds"].unit, families["took_seconds"].unit) == (
            "bytes",
            "seconds",
            "seconds",
        )
        assert families["memory_bytes"].documentation == 'Memory\\ "now"\nand here.'
        assert families["calls"].type == "counter"


@pytest.mark.row("S24")
def test_json_and_csv_say_the_same() -> None:
    snapshot = furnished().snapshot(AT_NS)
    document = json.loads(JsonExporter().export(snapshot))
    assert document["timestamp_ns"] == AT_NS
    families = {family["name"]: family for family in document["metrics"]}
    assert families["calls_total"]["series"][1] == {"labels": {"method": AWKWARD, "outcome": ""}, "value": 1.0}
    assert families["took_seconds"]["series"] == [
        {"labels": {"kind": "a"}, "count": 4.0, "sum": pytest.approx(2.65), "buckets": {"0.1": 2.0, "1.0": 3.0, "+Inf": 4.0}}
    ]
    assert families["oddities"]["series"][0]["value"] is None
    rows = list(csv.reader(io.StringIO(CsvExporter().export(snapshot).decode(), newline="")))
    assert tuple(rows[0]) == CSV_HEADER == ("timestamp", "metric_name", "metric_type", "labels", "value", "unit")
    read = {(row[1], tuple(sorted(json.loads(row[3]).items()))): float(row[4]) for row in rows[1:]}
    assert same(read, expected(snapshot))
    assert ["2023-11-14T22:13:20.123Z", "memory_bytes", "gauge", "{}", "1099511627776.0", "bytes"] in rows


@pytest.mark.row("S24")
def test_influx_lines() -> None:
    lines = InfluxExporter().export(furnished().snapshot(AT_NS)).decode().splitlines()
    assert lines[0] == f"calls_total,method=run,outcome=ok counter=3.0 {AT_NS}"
    assert lines[1] == f'calls_total,method=a\\ "quoted\\"\\ one\\,\\ with\\ \\=\\ and\\ {{}}\\ %s\\ % counter=1.0 {AT_NS}'
    assert lines[-1].startswith("took_seconds,kind=a count=4.0,sum=2.65,0.1=2.0,1.0=3.0 ")
    assert not any("oddities" in line for line in lines)


@given(st.text(max_size=20), st.text(max_size=20), st.floats())
def test_any_label_help_and_value_survives_in_every_format(label: str, help_text: str, value: float) -> None:
    if any("\ud800" <= c <= "\udfff" for c in label + help_text):
        return
    help_text = help_text.strip()  # the parser that judges here drops blanks at its ends
    registry = Registry()
    registry.gauge("g", help_text, a=label).set(value)
    snapshot = registry.snapshot(AT_NS)
    if "\r" not in help_text + label and not any(c in help_text + label for c in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"):
        (family,) = open_metrics_families(OpenMetricsExporter().export(snapshot).decode())  # type: ignore[no-untyped-call]
        assert (family.samples[0].labels["a"], family.documentation) == (label, help_text)
    (row,) = list(csv.reader(io.StringIO(CsvExporter().export(snapshot).decode(), newline="")))[1:]
    assert json.loads(row[3]) == {"a": label}
    (series,) = json.loads(JsonExporter().export(snapshot))["metrics"][0]["series"]
    assert series["labels"] == {"a": label}
    assert InfluxExporter().export(snapshot).count(b"\n") == math.isfinite(value)


def test_nothing_counted_is_a_sound_answer_in_every_format() -> None:
    snapshot = Registry().snapshot(AT_NS)
    assert OpenMetricsExporter().export(snapshot) == b"# EOF\n"
    assert [Exporters().get(name) is not None and exporter_of(name).export(snapshot) for name in ("prometheus", "influx")] == [b"", b""]


def exporter_of(name: str) -> Exporter:
    found = Exporters().get(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "accept,name",
    [
        ("", "prometheus"),
        ("*/*", "prometheus"),
        ("text/plain", "prometheus"),
        ("text/*", "prometheus"),
        ("text/plain;version=0.0.4", "prometheus"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "prometheus"),
        ("application/openmetrics-text; version=1.0.0", "openmetrics"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "openmetrics"),
        ("application/openmetrics-text;version=1.0.0;q=0.3,text/plain;version=0.0.4;q=0.5", "prometheus"),
        ("application/openmetrics-text;version=9.9", "prometheus"),
        ("application/json", "json"),
        ("text/csv", "csv"),
        ("application/json;q=0, text/csv;q=0.1", "csv"),
        ("image/png", "prometheus"),
        ("text/plain;format=influx", "influx"),
        ("nonsense;;;q=x,,,/", "prometheus"),
    ],
)
def test_the_accept_header_chooses(accept: str, name: str) -> None:
    assert Exporters().accepted(accept).name == name


@given(st.text(max_size=80))
def test_any_accept_header_is_read(accept: str) -> None:
    Exporters().accepted(accept)
    assert all(0 <= quality <= 1 for _, _, quality in parse_accept(accept))


class LinesExporter:
    """A third party's format, that can also be had in pieces."""

    name = "lines"
    content_type = "text/x-lines"

    def export(self, snapshot: Snapshot) -> bytes:
        return b"".join(self.export_chunks(snapshot))

    def export_chunks(self, snapshot: Snapshot) -> "list[bytes]":
        return [f"{sample.name}={sample.value:g}\n".encode() for sample in snapshot.samples()]


@pytest.mark.row("S37")
def test_a_third_party_s_exporter() -> None:
    exporters = Exporters()
    exporters.register(LinesExporter())
    registry = Registry()
    registry.counter("a_total", "A.").inc(2)
    snapshot = registry.snapshot()
    assert exporters.accepted("text/x-lines").export(snapshot) == b"a_total=2\n"
    assert exporters.names[-1] == "lines"
    assert list(chunks(LinesExporter(), snapshot)) == [b"a_total=2\n"]
    with pytest.raises(ValueError, match="lines"):
        exporters.register(LinesExporter())
    whole = PrometheusExporter().export(furnished().snapshot())
    pieces = list(chunks(PrometheusExporter(), furnished().snapshot(), 100))
    assert b"".join(pieces) == whole
    assert max(map(len, pieces)) == 100
