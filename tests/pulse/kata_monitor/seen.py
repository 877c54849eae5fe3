"""Seen: what is kept of an answer, so that two servers can be compared and nobody's sentences are copied.

Kept are the status, the header fields but for those that frame and date, and of the body what the request's `body` says:

    figures     families with type, help as a digest, and sorted series; of kata-monitor's own families types and names of labels alone
    counts      of kata-monitor's own families what they count of scrapes and sandboxes
    page        HTML's tags as they are; texts between them as a digest, but for paths and names that are ours
    lines       sorted digests of lines; of the index's lines the path and where the text begins
    bytes       one digest of everything
    none        nothing

Figures are compared as numbers, limits of buckets too. A family that stands in an answer twice is told.
"""

import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from tests.pulse import metric_family
from tests.pulse.kata_monitor.scenes import Ask

FRAMING: Final = ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")
OWN: Final = "kata_monitor_"
COUNTS: Final = ("running_shim_count", "scrape_count", "scrape_failed_count", "scrape_durations_histogram_milliseconds_count")
_INDEX_LINE: Final = re.compile(r"(/\S* *): .*")
_SAMPLE: Final = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: (-?\d+))?")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)",?')
_NUMBERED: Final = ("le", "quantile")
_PIECE: Final = re.compile(r"<[^>]*>|[^<]+")
_ID: Final = re.compile(r"[a-z]{0,7}")
"""An id of a scene's sandbox."""
_OURS: Final = re.compile(r"/[a-z/-]*|agent-url|metrics|pprof|\s*|, |: ")


class Answer(NamedTuple):
    """A whole answer. Names of fields are in small letters."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class Family(msgspec.Struct, frozen=True, omit_defaults=True):
    """A family of an answer. Series are lines with sorted labels."""

    name: str
    type: str
    help: str
    """A digest, "" without one."""
    series: tuple[str, ...]


class Seen(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of an answer."""

    status: int
    headers: dict[str, str]
    lines: tuple[str, ...] = ()
    content: str = ""
    families: dict[str, str] = {}
    """The families' digests, by name."""
    twice: tuple[str, ...] = ()
    """Names of families that stood there more than once."""
    own: dict[str, str] = {}
    """Of kata-monitor's own families: type and names of labels."""
    counts: dict[str, float] = {}
    """What it counts; scrapes since the first question of the scene."""


class Recording(msgspec.Struct, frozen=True):
    """What kata-monitor answered to a scene."""

    version: dict[str, str]
    scene: str
    seen: dict[str, Seen]
    families: dict[str, Family]


def look(ask: Ask, answer: Answer, families: dict[str, Family], before: Mapping[str, float]) -> Seen:
    """Return what is kept of an answer.

    Args:
        ask: What was asked.
        answer: What came.
        families: Gets the answer's families, by digest.
        before: What the server had counted before the scene's first request.
    """
    headers = {name: value for name, value in answer.headers if name not in FRAMING}
    body = gzip.decompress(answer.body) if headers.get("content-encoding") == "gzip" and answer.body else answer.body
    seen = Seen(answer.status, headers)
    kind = ask.body if answer.status == 200 else "lines"
    if kind == "counts":
        return msgspec.structs.replace(seen, counts=_since(counts_of(body.decode()), before))
    if kind == "figures":
        found = list(_from_protobuf(body) if "protobuf" in headers.get("content-type", "") else _from_text(body.decode()))
        names = [each.name for each in found]
        digests = {each.name: _digest(msgspec.json.encode(each)) for each in found if not each.name.startswith(OWN)}
        families.update({digests[each.name]: each for each in found if each.name in digests})
        twice = tuple(sorted({name for name in names if names.count(name) > 1}))
        own = {each.name: _outline(each) for each in found if each.name.startswith(OWN)}
        return msgspec.structs.replace(seen, families=digests, twice=twice, own=own)
    if kind == "page":
        return msgspec.structs.replace(seen, lines=tuple(_tokens(body.decode())))
    if kind == "bytes":
        return msgspec.structs.replace(seen, content=f"{len(body)} bytes, {_digest(body)}")
    return msgspec.structs.replace(seen, lines=tuple(_lines(body.decode()))) if kind == "lines" else seen


def differences(theirs: Seen, ours: Seen, their_families: Mapping[str, Family], our_families: Mapping[str, Family]) -> Iterator[str]:
    """Iterate over what is not the same in two answers, each a line that begins with what it is about."""
    if theirs.status != ours.status:
        yield f"status: {theirs.status}, ours {ours.status}"
    yield from _unequal("header", theirs.headers, ours.headers)
    if theirs.lines != ours.lines:
        yield from _unequal("line", _numbered(theirs.lines), _numbered(ours.lines))
    if theirs.content != ours.content:
        yield f"content: {theirs.content or 'none'}, ours {ours.content or 'none'}"
    if theirs.twice != ours.twice:
        yield f"twice: {theirs.twice}, ours {ours.twice}"
    for name in sorted({*theirs.families, *ours.families}):
        one, two = their_families.get(theirs.families.get(name, "")), our_families.get(ours.families.get(name, ""))
        if one != two:
            yield f"family {name}: {_apart(one, two)}"
    yield from _unequal("own", theirs.own, ours.own)
    yield from _unequal("count", theirs.counts, ours.counts)


def counts_of(text: str) -> dict[str, float]:
    """Return what a server has counted, as its own families in an answer say."""
    found = dict(re.findall(rf"^{OWN}({'|'.join(COUNTS)}) (\S+)$", text, re.MULTILINE))
    return {name: float(value) for name, value in sorted(found.items())}


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def _from_text(text: str) -> Iterator[Family]:
    """Iterate over the families of text, one for each TYPE, whether it was there before or not."""
    name, type_, help_ = "", "", ""
    series: list[str] = []
    helps: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            word, _, told = line.removeprefix("# HELP ").partition(" ")
            helps[word] = _digest(told.encode())
        elif line.startswith("# TYPE "):
            if name:
                yield Family(name, type_, help_, tuple(sorted(series)))
            name, _, type_ = line.removeprefix("# TYPE ").partition(" ")
            help_, series = helps.pop(name, ""), []
        else:
            found = _SAMPLE.fullmatch(line)
            assert found is not None and found[1].startswith(name), line
            labels = [(key, value) for key, value in _LABEL.findall(found[2] or "")]
            assert ",".join(f'{key}="{value}"' for key, value in labels) == (found[2] or "").rstrip(","), line
            series.append(_series(found[1], labels, float(found[3]), found[4] or ""))
    if name:
        yield Family(name, type_, help_, tuple(sorted(series)))


def _from_protobuf(data: bytes) -> Iterator[Family]:
    kinds, found = metric_family.series_of(data)
    helps = {message.name: message.help for message in metric_family.read(data)}
    lines: dict[str, list[str]] = {name: [] for name in kinds}
    for (name, labels), value in found.items():
        family = name if name in kinds else name.rpartition("_")[0]
        lines[family].append(_series(name, [(key, _escaped(word)) for key, word in labels], float(value), ""))
    for name, kind in kinds.items():
        yield Family(name, kind, _digest(helps[name].encode()) if helps[name] else "", tuple(sorted(lines[name])))


def _series(name: str, labels: Sequence[tuple[str, str]], value: float, at: str) -> str:
    told = ",".join(f'{key}="{float(word)!r}"' if key in _NUMBERED else f'{key}="{word}"' for key, word in sorted(labels))
    return f"{name}{{{told}}} {value!r}{' ' if at else ''}{at}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _outline(family: Family) -> str:
    """Return an own family's type and names of labels, and the limits of its buckets: its figures are another process's."""
    names = {key: None for line in family.series for key, _ in _LABEL.findall(line.partition("{")[2])}
    limits = [float(value) for line in family.series for key, value in _LABEL.findall(line) if key == "le"]
    return " ".join([family.type, *sorted(names), *(f"{limit:g}" for limit in sorted(limits))])


def _since(counts: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == COUNTS[0] else value - before.get(name, 0.0) for name, value in counts.items()}


def _lines(text: str) -> Iterator[str]:
    """Iterate over what is kept of lines, and say of the last one if it is not ended. Ids of sandboxes have no order."""
    *whole, last = text.split("\n")
    kept = [_line(line) for line in whole]
    yield from kept if any(line.startswith("/") for line in kept) else sorted(kept)
    if last:
        yield f"without an end: {_digest(last.encode())}"


def _line(line: str) -> str:
    found = _INDEX_LINE.fullmatch(line)
    return found[1] if found is not None else line if _ID.fullmatch(line) else _digest(line.encode())


def _tokens(text: str) -> Iterator[str]:
    """Iterate over a page's tags and texts; items of lists are sorted, for kata-monitor's have no order."""
    head, *items = text.split("<li>")
    end = "</ul>" if items and "</ul>" in items[-1] else ""
    for part in [head, *sorted(item.partition("</ul>")[0] for item in items), end]:
        yield "".join(piece if piece.startswith("<") or _OURS.fullmatch(piece) else _text(piece) for piece in _PIECE.findall(part))


def _text(piece: str) -> str:
    """Return what is kept of a text: a short name before a colon is a sandbox's."""
    name, colon, rest = piece.partition(": ")
    if colon and not rest and _ID.fullmatch(name):
        return piece
    return "..." if colon else _digest(piece.encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


# --- comparing --------------------------------------------------------------------------------------------------------------------------


def _unequal(what: str, theirs: Mapping[str, object], ours: Mapping[str, object]) -> Iterator[str]:
    for name in sorted({*theirs, *ours}):
        one, two = theirs.get(name), ours.get(name)
        if one != two:
            yield f"{what} {name}: {'none' if one is None else one}, ours {'none' if two is None else two}"


def _numbered(lines: Sequence[str]) -> dict[str, str]:
    return {str(number): line for number, line in enumerate(lines)}


def _apart(one: Family | None, two: Family | None) -> str:
    if one is None or two is None:
        return "missing" if two is None else "not theirs"
    if one.type != two.type:
        return f"{one.type}, ours {two.type}"
    if one.help != two.help:
        return f"help {one.help or 'none'}, ours {two.help or 'none'}"
    missing, more = [each for each in one.series if each not in two.series], [each for each in two.series if each not in one.series]
    first = (missing or more or ["the same one twice"])[0]
    return f"{len(missing)} series missing, {len(more)} not theirs: {first}"
