"""Formats: in which form and coding an answer goes out, chosen by what the client accepts.

Known are the text format 0.0.4, OpenMetrics 1.0.0 and delimited protobuf. Of those that a client accepts equally, the one that it names
more precisely wins, then the one it names first. A client that accepts none of them gets text, as from Prometheus' own library: figures in
a form that was not asked for help more than a 406. The same holds for codings: identity always goes.

At equal weights gzip goes before zstd: what is coded is kept, and Prometheus asks for gzip, so that a browser does not cost a second copy.

Source: RFC 9110 sections 12.4.2, 12.5.1 and 12.5.3; Prometheus' documents on its exposition formats and on content negotiation.
"""

import re
from typing import Final, Literal, NamedTuple

Coding = Literal["identity", "gzip", "zstd"]
FormatName = Literal["text", "openmetrics", "protobuf"]

CODINGS: Final[tuple[Coding, ...]] = ("gzip", "zstd", "identity")
"""In the order in which they are chosen at equal weights."""
ACCEPT_CHARS_MAX: Final = 4096
"""How much of a field is read."""


class Format(NamedTuple):
    """How families are written."""

    name: FormatName
    content_type: str


TEXT: Final = Format("text", "text/plain; version=0.0.4; charset=utf-8")
OPENMETRICS: Final = Format("openmetrics", "application/openmetrics-text; version=1.0.0; charset=utf-8")
PROTOBUF: Final = Format("protobuf", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited")
FORMATS: Final = (TEXT, OPENMETRICS, PROTOBUF)

_ESCAPINGS: Final = frozenset(("allow-utf-8", "underscores", "dots", "values"))
_RANGE: Final = re.compile(r"[^,\"]*(?:\"(?:[^\"\\]|\\.)*\"[^,\"]*)*")
_WEIGHT: Final = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\Z")


class _Range(NamedTuple):
    """One element of an Accept field."""

    type: str
    parameters: dict[str, str]
    weight: float


def negotiate(accept: str, accept_encoding: str) -> tuple[Format, Coding]:
    """Return in which form and coding a client gets its answer.

    Args:
        accept: Its Accept field, "" without one.
        accept_encoding: Its Accept-Encoding field, "" without one.
    """
    return choose_format(accept), choose_coding(accept_encoding)


def choose_format(accept: str) -> Format:
    """Return the format that a client likes best. A scheme of escaping that it names is named back: all names here are plain ones."""
    best: tuple[float, int] = (0.0, 0)
    chosen, escaping = TEXT, ""
    for each in _ranges(accept):
        found = _fitting(each)
        if found is None or not each.weight:
            continue
        rank = (each.weight, _precision(each))
        if rank > best:
            best, chosen, escaping = rank, found, each.parameters.get("escaping", "")
    if escaping in _ESCAPINGS:
        return Format(chosen.name, f"{chosen.content_type}; escaping={escaping}")
    return chosen


def choose_coding(accept_encoding: str) -> Coding:
    """Return the coding that a client likes best."""
    weights: dict[str, float] = {}
    for each in _ranges(accept_encoding):
        weights.setdefault("gzip" if each.type == "x-gzip" else each.type, each.weight)
    others = weights.get("*", 0.0)
    chosen: Coding = "identity"
    best = 0.0
    for coding in CODINGS:
        # Identity is acceptable without being named, but what is named goes before it.
        weight = weights.get(coding, others) if coding != "identity" else weights.get(coding, 0.0)
        if weight > best:
            best, chosen = weight, coding
    return chosen


def _fitting(wanted: _Range) -> Format | None:
    """Return the format that is meant by an element of Accept."""
    given = wanted.parameters
    match wanted.type:
        case "application/openmetrics-text":
            return OPENMETRICS if given.get("version", "1.0.0") == "1.0.0" else None
        case "text/plain":
            return TEXT if given.get("version", "0.0.4") == "0.0.4" else None
        case "application/vnd.google.protobuf":
            is_ours = given.get("proto", "") == "io.prometheus.client.MetricFamily" and given.get("encoding", "") == "delimited"
            return PROTOBUF if is_ours else None
        case "*/*" | "text/*":
            return TEXT
        case "application/*":
            return OPENMETRICS
    return None


def _precision(wanted: _Range) -> int:
    return 0 if wanted.type == "*/*" else 1 if wanted.type.endswith("/*") else 2


def _ranges(field: str) -> list[_Range]:
    """Return the elements of a field that weigh something and nothing; those that cannot be read are left out."""
    found = []
    for element in _RANGE.findall(field[:ACCEPT_CHARS_MAX]):
        name, *rest = [word.strip() for word in element.split(";")]
        if not name:
            continue
        parameters: dict[str, str] = {}
        for word in rest:
            key, _, value = word.partition("=")
            parameters.setdefault(key.strip().lower(), value.strip().strip('"'))
        weight = parameters.pop("q", "1")
        if _WEIGHT.match(weight):
            found.append(_Range(name.lower(), parameters, float(weight)))
    return found
