"""Exporters: snapshots of metrics in the formats others read. The interface is public: whoever has another format registers it.

Formats: Prometheus text 0.0.4, OpenMetrics 1.0, JSON, CSV, InfluxDB line protocol. What a format cannot say (NaN in JSON is null, in the
line protocol left out) is said in the exporter's docstring.
Sources: the Prometheus exposition formats, the OpenMetrics specification 1.0.0, RFC 4180, the InfluxDB line protocol's reference.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Final, Protocol

import msgspec

from isopod.runtime.metrics import CONTENT_TYPE, Family, HistogramReading, Labels, PrometheusText, Snapshot, number

CHUNK_BYTES: Final = 64 << 10
CSV_HEADER: Final = ("timestamp", "metric_name", "metric_type", "labels", "value", "unit")


class Exporter(Protocol):
    """Turns snapshots into bytes of one format. An exporter may keep what it prepared for a layout; it is used by one thread."""

    @property
    def name(self) -> str:
        """What `?format=` calls it: one word."""

    @property
    def content_type(self) -> str:
        """The media type, with its parameters."""

    def export(self, snapshot: Snapshot) -> bytes:
        """Return a whole snapshot."""


def chunks(exporter: Exporter, snapshot: Snapshot, n_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield what an exporter makes of a snapshot in bounded pieces; by the exporter itself if it has a method `export_chunks`."""
    own: Callable[[Snapshot], Iterator[bytes]] | None = getattr(exporter, "export_chunks", None)
    if own is not None:
        yield from own(snapshot)
        return
    whole = memoryview(exporter.export(snapshot))
    for at in range(0, len(whole), n_bytes):
        yield bytes(whole[at : at + n_bytes])


class PrometheusExporter:
    """Prometheus text 0.0.4."""

    name: Final = "prometheus"
    content_type: Final = CONTENT_TYPE

    def __init__(self) -> None:
        self._text = PrometheusText()

    def export(self, snapshot: Snapshot) -> bytes:
        """See `Exporter.export`."""
        return self._text.render(snapshot).encode()


class OpenMetricsExporter:
    """OpenMetrics 1.0.

    Args:
        created_s: When counting began, seconds since the Unix epoch: then each counter and histogram says so (`_created`).
    """

    name: Final = "openmetrics"
    content_type: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

    def __init__(self, created_s: float | None = None) -> None:
        self._created_s = created_s

    def export(self, snapshot: Snapshot) -> bytes:
        """See `Exporter.export`."""
        lines: list[str] = []
        for family in snapshot.layout.families:
            base = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            lines.append(f"# TYPE {base} {family.kind}")
            if family.unit and base.endswith("_" + family.unit):
                lines.append(f"# UNIT {base} {family.unit}")
            lines.append(f"# HELP {base} {_quoted(family.help)}")
            for series in family.series:
                lines += _open_metrics(family, base, series.labels, snapshot.reading(family, series))
                if self._created_s is not None and family.kind != "gauge":
                    lines.append(f"{base}_created{_labels(series.labels)} {number(self._created_s)}")
        return ("".join(line + "\n" for line in lines) + "# EOF\n").encode()


def _open_metrics(family: Family, base: str, labels: Labels, value: float | HistogramReading) -> list[str]:
    if not isinstance(value, HistogramReading):
        suffix = "_total" if family.kind == "counter" else ""
        return [f"{base}{suffix}{_labels(labels)} {number(value)}"]
    lines = [f"{base}_bucket{_labels((*labels, ('le', number(bound))))} {number(count)}" for bound, count in value.buckets]
    own = _labels(labels)
    return [*lines, f"{base}_count{own} {number(value.count)}", f"{base}_sum{own} {number(value.sum)}"]


def _labels(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_quoted(value)}"' for name, value in labels) + "}" if labels else ""


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class JsonExporter:
    """JSON: {"timestamp_ns", "metrics": [{"name", "kind", "help", "unit", "series": [...]}]}. NaN and infinities are null."""

    name: Final = "json"
    content_type: Final = "application/json"

    def export(self, snapshot: Snapshot) -> bytes:
        """See `Exporter.export`."""
        return msgspec.json.encode({"timestamp_ns": snapshot.at_ns, "metrics": tables(snapshot)})


def tables(snapshot: Snapshot, names: frozenset[str] = frozenset()) -> list[dict[str, object]]:
    """Return a snapshot as plain tables, ready for JSON; only the families of these names, if there are any."""
    return [
        {
            "name": family.name,
            "kind": family.kind,
            "help": family.help,
            "unit": family.unit,
            "series": [_table(series.labels, snapshot.reading(family, series)) for series in family.series],
        }
        for family in snapshot.layout.families
        if not names or family.name in names
    ]


def _table(labels: Labels, value: float | HistogramReading) -> dict[str, object]:
    table: dict[str, object] = {"labels": dict(labels)}
    if isinstance(value, HistogramReading):
        return table | {"count": value.count, "sum": value.sum, "buckets": {number(bound): count for bound, count in value.buckets}}
    return table | {"value": value}


class CsvExporter:
    """CSV with the columns timestamp (RFC 3339, UTC), metric_name, metric_type, labels (a JSON object), value, unit. A histogram gives a
    row for each of its samples."""

    name: Final = "csv"
    content_type: Final = "text/csv; charset=utf-8; header=present"

    def export(self, snapshot: Snapshot) -> bytes:
        """See `Exporter.export`."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(CSV_HEADER)
        writer.writerows(self.rows(snapshot))
        return text.getvalue().encode()

    def rows(self, snapshot: Snapshot) -> Iterator[tuple[str, ...]]:
        """Yield the rows without the header."""
        seconds, rest_ns = divmod(snapshot.at_ns, 1_000_000_000)
        at = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1_000_000:03d}Z"
        for family in snapshot.layout.families:
            for series in family.series:
                for sample in snapshot.samples_of(family, series):
                    labels = msgspec.json.encode(dict(sample.labels)).decode()
                    yield at, sample.name, family.kind, labels, number(sample.value), family.unit


class InfluxExporter:
    """InfluxDB line protocol: one line for each series, labels as tags, the fields `counter`, `gauge`, or a histogram's `count`, `sum` and
    bounds. NaN and infinities, which the protocol does not know, are left out; so are tags without a value."""

    name: Final = "influx"
    content_type: Final = "text/plain; charset=utf-8; format=influx"

    def export(self, snapshot: Snapshot) -> bytes:
        """See `Exporter.export`."""
        lines = []
        for reading in snapshot.readings():
            value = reading.value
            fields: dict[str, float] = {reading.family.kind: value} if not isinstance(value, HistogramReading) else _fields(value)
            shown = ",".join(f"{_influx_key(name)}={number_}" for name, number_ in fields.items() if isfinite(number_))
            if not shown:
                continue
            tags = "".join(f",{_influx_key(name)}={_influx_key(tag)}" for name, tag in reading.labels if tag)
            lines.append(f"{_influx_key(reading.family.name, equals=False)}{tags} {shown} {snapshot.at_ns}\n")
        return "".join(lines).encode()


def _fields(value: HistogramReading) -> dict[str, float]:
    return {"count": value.count, "sum": value.sum} | {number(bound): count for bound, count in value.buckets if bound != inf}


def _influx_key(text: str, *, equals: bool = True) -> str:
    """Return a measurement, tag or field key with the protocol's own characters escaped; a line break cannot be said in it."""
    text = text.replace("\n", " ").replace("\r", " ").replace(",", "\\,").replace(" ", "\\ ")
    text = text.replace("=", "\\=") if equals else text
    return text.removesuffix("\\") if text.endswith("\\") else text


def standard_exporters() -> tuple[Exporter, ...]:
    """Return new exporters of all formats, the default first."""
    return (PrometheusExporter(), OpenMetricsExporter(), JsonExporter(), CsvExporter(), InfluxExporter())


class Exporters:
    """The formats that can be had, by name and by what a client accepts.

    Args:
        exporters: The first is the default.
    """

    def __init__(self, exporters: tuple[Exporter, ...] | None = None) -> None:
        self._by_name: dict[str, Exporter] = {}
        for exporter in standard_exporters() if exporters is None else exporters:
            self.register(exporter)

    def register(self, exporter: Exporter) -> None:
        """Add a format. ValueError if its name is taken."""
        if exporter.name in self._by_name:
            raise ValueError(f"there is an exporter called {exporter.name}")
        self._by_name[exporter.name] = exporter

    @property
    def names(self) -> tuple[str, ...]:
        """The formats' names."""
        return tuple(self._by_name)

    def get(self, name: str) -> Exporter | None:
        """Return the exporter of a name."""
        return self._by_name.get(name)

    def accepted(self, accept: str) -> Exporter:
        """Return the exporter that suits an Accept header best; the default where none does, as scrapers expect.

        Args:
            accept: The header's value, "" if there was none.
        """
        best, best_rank = next(iter(self._by_name.values())), (0.0, 0)
        for exporter in self._by_name.values():
            for media, parameters, quality in parse_accept(accept):
                specificity = _matches(exporter.content_type, media, parameters)
                if specificity and quality > 0 and (quality, specificity) > best_rank:
                    best, best_rank = exporter, (quality, specificity)
        return best


def parse_accept(value: str) -> list[tuple[str, Mapping[str, str], float]]:
    """Return the media ranges of an Accept header: (type, parameters, quality). What is malformed is left out."""
    found: list[tuple[str, Mapping[str, str], float]] = []
    for part in value.split(",")[:64]:
        media, *words = [word.strip() for word in part.split(";")]
        pairs = {name.strip().lower(): text.strip().strip('"') for name, _, text in (word.partition("=") for word in words)}
        try:
            quality = float(pairs.pop("q", "1"))
        except ValueError:
            continue
        if "/" in media and 0 <= quality <= 1:
            found.append((media.lower(), pairs, quality))
    return found


def _matches(content_type: str, media: str, parameters: Mapping[str, str]) -> int:
    """Return how exactly a media range names a content type: 0 not at all, more for a closer match."""
    own, *words = [word.strip() for word in content_type.split(";")]
    pairs = {name.strip(): text.strip() for name, _, text in (word.partition("=") for word in words)}
    if media == "*/*":
        return 1
    if media.endswith("/*"):
        return 2 if own.startswith(media[:-1]) else 0
    wanted = {name: text for name, text in parameters.items() if name in ("version", "format")}
    if media != own or any(pairs.get(name) != text for name, text in wanted.items()):
        return 0
    # A plain "text/plain" means the exposition text, not every format that is text as well.
    return 3 if "format" in pairs and "format" not in wanted else 4 + len(wanted)
