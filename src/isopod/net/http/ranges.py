"""Conditions and ranges: whether a client has it already, and which parts it wants. Pure. Source: RFC 9110 sections 13 and 14."""

import re
from typing import Final, Literal, NamedTuple

from isopod.net.http.encode import http_date, parse_http_date
from isopod.net.http.headers import Headers

RANGES_MAX: Final = 16
"""More ranges in one request are not worth their frames: it gets the whole."""
_SPEC: Final = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)
_TAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')

Verdict = Literal["send", "not_modified", "failed"]


class Validators(NamedTuple):
    """What tells one version of a thing from another."""

    etag: str
    """Strong, with its quotes."""
    modified_s: int
    """Since the Unix epoch."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The fields that tell a client."""
        return (("etag", self.etag), ("last-modified", http_date(self.modified_s)))


class Span(NamedTuple):
    """A range of bytes, `start` to before `end`."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    def content_range(self, size: int) -> str:
        """Return the Content-Range field's value."""
        return f"bytes {self.start}-{self.end - 1}/{size}"


def judge(headers: Headers, now: Validators) -> Verdict:
    """Weigh a GET's or HEAD's conditions in the order of RFC 9110 section 13.2.2."""
    if "if-match" in headers:
        wanted = headers.combined("if-match")
        if wanted.strip() != "*" and now.etag not in _TAG.findall(wanted):
            return "failed"
    else:
        since = _date(headers, "if-unmodified-since")
        if since is not None and now.modified_s > since:
            return "failed"
    if "if-none-match" in headers:
        known = headers.combined("if-none-match")
        tags = [tag.removeprefix("W/") for tag in _TAG.findall(known)]
        return "not_modified" if known.strip() == "*" or now.etag in tags else "send"
    since = _date(headers, "if-modified-since")
    return "not_modified" if since is not None and now.modified_s <= since else "send"


def choose_ranges(headers: Headers, now: Validators, size: int) -> list[Span] | None:
    """Return the parts of a thing that a GET asks for.

    Args:
        headers: Its fields.
        now: The thing's validators.
        size: Its length in bytes.

    Returns:
        Spans in the order they were asked for, overlapping ones joined; [] if none of them exists (416); None for the whole.
    """
    wanted = headers.get("range")
    if wanted is None or len(headers.get_all("range")) > 1 or not _is_current(headers.get("if-range"), now):
        return None
    unit, _, specs = wanted.partition("=")
    items = [spec.strip() for spec in specs.split(",")]
    if unit.strip().lower() != "bytes" or len(items) > RANGES_MAX:
        return None
    spans: list[Span] = []
    for item in items:
        found = _SPEC.fullmatch(item)
        if found is None or not (found[1] or found[2]):
            return None
        if found[1]:
            start, end = int(found[1]), int(found[2] or size) + 1
            if found[2] and end <= start:
                return None
        else:
            start, end = max(0, size - int(found[2])), size
        if start < min(end, size):
            spans.append(Span(start, min(end, size)))
    return _join(spans)


def _join(spans: list[Span]) -> list[Span]:
    """Join overlapping spans, so that no byte is sent twice."""
    joined: list[Span] = []
    for span in spans:
        merged = span
        apart: list[Span] = []
        for other in joined:
            if merged.start <= other.end and other.start <= merged.end:
                merged = Span(min(merged.start, other.start), max(merged.end, other.end))
            else:
                apart.append(other)
        joined = [*apart, merged]
    return joined


def _is_current(condition: str | None, now: Validators) -> bool:
    """Return whether an If-Range holds: a strong tag, or the very date."""
    if condition is None:
        return True
    condition = condition.strip()
    return condition == (now.etag if condition.startswith('"') else http_date(now.modified_s))


def _date(headers: Headers, name: str) -> int | None:
    value = headers.get(name)
    return None if value is None else parse_http_date(value.strip())
