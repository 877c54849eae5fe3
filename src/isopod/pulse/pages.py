"""Pages: what people and programs read besides figures: the index, sandboxes, targets and top, as text, HTML or JSON.

Which of the three is chosen by ?format=, else by Accept; text wins where all are equal, so that curl shows text and a browser HTML. The
rows are made once, as they stand in the JSON, and the other two are drawn from them.

What stands in a row was written by others (names of pods, errors of shims): in HTML every text is escaped, and no script may run whatever
the text is (Content-Security-Policy); in text no line is broken and no terminal is repainted by it.
"""

import base64
import hashlib
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec

from isopod.net.http.messages import HeaderPairs, HttpError, Response
from isopod.pulse.model import Runtime
from isopod.pulse.rates import Row
from isopod.pulse.security import HEADERS
from isopod.pulse.store import Entry

PageKind = Literal["text", "html", "json"]
T = TypeVar("T")

KINDS: Final[Mapping[str, PageKind]] = {
    "text/plain": "text",
    "text/html": "html",
    "application/json": "json",
    "*/*": "text",
    "text/*": "text",
    "application/*": "json",
}
ACCEPT_CHARS_MAX: Final = 4096
UNKNOWN: Final = "<unknown>"
NO_SANDBOXES: Final = "No sandboxes running"
STYLE: Final = """
:root { color-scheme: light dark; }
body { margin: 1.5rem; font: 14px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bad { color: #c62828; }
nav a { margin-right: 1rem; }
"""
POLICY: Final = (
    "default-src 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES: Final[Mapping[PageKind, str]] = {
    "text": "text/plain; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "json": "application/json",
}
_TEXT: Final[HeaderPairs] = (("content-type", _TYPES["text"]), ("cache-control", "no-store"), *HEADERS)
_LINKED: Final = ("/", "/metrics", "/metrics/cadvisor", "/metrics/resource", "/sandboxes", "/targets", "/top", "/config", "/readyz")


class SandboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox in /sandboxes. Texts are "" and figures None where they are not known."""

    id: str
    uid: str
    name: str
    namespace: str
    runtime: Runtime
    up: bool
    error: str
    """The class of the last failure."""
    age_s: float | None
    """Of its figures."""
    took_s: float
    """The last request to its shim."""
    bytes: int
    """Of the shim's last answer."""
    series: int
    failures: int
    """In a row."""
    dropped: dict[str, int]
    """Lines of the shim's answers that were left out, by reason."""


class TargetRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox in /targets."""

    id: str
    runtime: Runtime
    socket: str
    state: Literal["up", "down", "pending"]
    """Pending until it was asked once."""
    error: str
    failures: int
    rounds: int
    """Answers taken in."""
    age_s: float | None
    took_s: float


class Column(NamedTuple):
    """A column of a table. `field` is the row's; numbers stand right."""

    title: str
    field: str
    is_number: bool = False


class Table(NamedTuple):
    """How rows are shown. `key` is what they are called in JSON."""

    title: str
    key: str
    columns: Sequence[Column]


_TARGETS: Final = Table(
    "Targets",
    "targets",
    (
        Column("STATE", "state"),
        Column("SANDBOX", "id"),
        Column("RUNTIME", "runtime"),
        Column("AGE", "age_s", is_number=True),
        Column("TOOK", "took_s", is_number=True),
        Column("ROUNDS", "rounds", is_number=True),
        Column("FAILURES", "failures", is_number=True),
        Column("ERROR", "error"),
        Column("SOCKET", "socket"),
    ),
)
_TOP: Final = Table(
    "Top",
    "sandboxes",
    (
        Column("SANDBOX", "id"),
        Column("NAMESPACE", "namespace"),
        Column("NAME", "name"),
        Column("CPU", "cpu_cores", is_number=True),
        Column("MEMORY", "memory_bytes", is_number=True),
        Column("RX/S", "received_bytes_per_s", is_number=True),
        Column("TX/S", "sent_bytes_per_s", is_number=True),
        Column("READ/S", "read_bytes_per_s", is_number=True),
        Column("WRITE/S", "written_bytes_per_s", is_number=True),
        Column("AGE", "age_s", is_number=True),
    ),
)
_SANDBOXES: Final = (
    Column("ID", "id"),
    Column("UID", "uid"),
    Column("Name", "name"),
    Column("Namespace", "namespace"),
    Column("Runtime", "runtime"),
    Column("Up", "up"),
    Column("Error", "error"),
    Column("Age", "age_s", is_number=True),
    Column("Took", "took_s", is_number=True),
    Column("Bytes", "bytes", is_number=True),
    Column("Series", "series", is_number=True),
)


# --- rows ---------------------------------------------------------------------------------------------------------------------------


def sandbox_row(entry: Entry, now_s: float) -> SandboxRow:
    """Return what /sandboxes says of a sandbox.

    Args:
        entry: Its entry.
        now_s: By the store's clock.
    """
    pod = entry.pod
    return SandboxRow(
        id=entry.id,
        uid=pod.uid if pod is not None else "",
        name=pod.name if pod is not None else "",
        namespace=pod.namespace if pod is not None else "",
        runtime=entry.runtime,
        up=entry.up,
        error=entry.error,
        age_s=_rounded(entry.age_s(now_s)),
        took_s=round(entry.took_s, 6),
        bytes=entry.n_bytes,
        series=entry.n_series,
        failures=entry.n_failures,
        dropped=dict(entry.dropped),
    )


def target_row(entry: Entry, now_s: float) -> TargetRow:
    """Return what /targets says of a sandbox. Args as `sandbox_row`."""
    return TargetRow(
        id=entry.id,
        runtime=entry.runtime,
        socket=entry.socket,
        state="up" if entry.up else "down" if entry.error else "pending",
        error=entry.error,
        failures=entry.n_failures,
        rounds=entry.n_rounds,
        age_s=_rounded(entry.age_s(now_s)),
        took_s=round(entry.took_s, 6),
    )


# --- pages --------------------------------------------------------------------------------------------------------------------------


def choose(wanted: str, accept: str) -> PageKind:
    """Return in which of the three forms a page is wanted.

    Args:
        wanted: The value of ?format=, "" without one.
        accept: The Accept field, "" without one.

    Raises:
        HttpError: 400: `wanted` is none of them.
    """
    if wanted:
        found = next((kind for kind in _TYPES if kind == wanted), None)
        if found is None:
            raise HttpError(400, f"no such format: {printable(wanted[:64])}", "choose one of: text, html, json")
        return found
    best: tuple[float, int] = (0.0, 0)
    chosen: PageKind = "text"
    for element in accept[:ACCEPT_CHARS_MAX].split(","):
        name, *parameters = [word.strip().lower() for word in element.split(";")]
        kind = KINDS.get(name)
        rank = (_weight(parameters), 0 if name == "*/*" else 1 if name.endswith("/*") else 2)
        if kind is not None and rank[0] > 0 and rank > best:
            best, chosen = rank, kind
    return chosen


def index(kind: PageKind, routes: Mapping[str, str]) -> Response:
    """Return the list of what there is.

    Args:
        kind: In which form.
        routes: Descriptions by path.
    """
    if kind == "json":
        return as_json({"endpoints": [{"path": path, "description": told} for path, told in routes.items()]})
    if kind == "html":
        items = "".join(
            f"<li><b>{_link(path) if path in _LINKED else escaped(path)}</b>: {escaped(told)}</li>\n" for path, told in routes.items()
        )
        return page("isopod pulse", f"<h1>Available HTTP endpoints:</h1>\n<ul>\n{items}</ul>\n")
    return plain("Available HTTP endpoints:\n" + endpoint_lines(routes))


def endpoint_lines(routes: Mapping[str, str]) -> str:
    """Return paths and descriptions, one a line, in two columns."""
    width = max(map(len, routes), default=0) + 3
    return "".join(f"{path:<{width}}: {told}\n" for path, told in routes.items())


def sandboxes(kind: PageKind, rows: Sequence[SandboxRow]) -> Response:
    """Return the sandboxes there are."""
    if kind == "json":
        return as_json({"sandboxes": rows})
    if kind == "html":
        body = drawn(_SANDBOXES, rows, _actions) if rows else f"<p>{NO_SANDBOXES}</p>\n"
        return page("Sandboxes", f"<h1>Sandboxes</h1>\n{body}")
    return plain("".join(_block(row) for row in rows) if rows else f"{NO_SANDBOXES}\n")


def targets(kind: PageKind, rows: Sequence[TargetRow]) -> Response:
    """Return how asking each sandbox goes."""
    return _tabular(kind, _TARGETS, rows)


def top(kind: PageKind, rows: Sequence[Row]) -> Response:
    """Return what each sandbox uses."""
    return _tabular(kind, _TOP, rows)


def page(title: str, body: str) -> Response:
    """Return a page of HTML around a body whose texts are escaped already."""
    links = "".join(_link(path) for path in ("/", "/metrics", "/sandboxes", "/targets", "/top", "/config"))
    content = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )
    return Response(200, _headers("html"), content.encode("utf-8", "backslashreplace"))


def text(content: str, status: int = 200, headers: HeaderPairs = ()) -> Response:
    """Return plain text that there is no other form of."""
    return Response(status, _TEXT + headers, content.encode("utf-8", "backslashreplace"))


def error_text(status: int, message: str, hint: str = "", headers: HeaderPairs = ()) -> Response:
    """Return what went wrong, and what to do, as text."""
    return text(printable(message) + "\n" + (f"hint: {printable(hint)}\n" if hint else ""), status, headers)


def printable(content: str) -> str:
    """Return a text in which nothing breaks a line or moves a terminal's cursor: such characters stand as their escapes."""
    if content.isprintable():
        return content
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in content)


def escaped(content: str) -> str:
    """Return a text as it may stand in HTML, between tags and in quoted attributes."""
    return html.escape(printable(content), quote=True)


# --- drawing ------------------------------------------------------------------------------------------------------------------------


def _tabular(kind: PageKind, table: Table, rows: Sequence[msgspec.Struct]) -> Response:
    columns = table.columns
    if kind == "json":
        return as_json({table.key: rows})
    if kind == "html":
        body = drawn(columns, rows) if rows else f"<p>{NO_SANDBOXES}</p>\n"
        return page(table.title, f"<h1>{escaped(table.title)}</h1>\n{body}")
    if not rows:
        return plain(f"{NO_SANDBOXES}\n")
    cells = [[column.title for column in columns], *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    lines = []
    for line in cells:
        words = [
            word.rjust(width) if column.is_number else word.ljust(width) for word, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(words).rstrip() + "\n")
    return plain("".join(lines))


def drawn(columns: Sequence[Column], rows: Sequence[msgspec.Struct], actions: Callable[[T], str] | None = None) -> str:
    """Return rows as a table of HTML.

    Args:
        columns: What is shown of each.
        rows: They.
        actions: Makes the links of a row, as HTML.
    """
    heads = "".join(f'<th class="number">{column.title}</th>' if column.is_number else f"<th>{column.title}</th>" for column in columns)
    lines = [f"<table>\n<tr>{heads}{'<th>Actions</th>' if actions else ''}</tr>\n"]
    for row in rows:
        cells = "".join(_html_cell(row, column) for column in columns)
        lines.append(f"<tr>{cells}{f'<td>{actions(row)}</td>' if actions else ''}</tr>\n")  # type: ignore[arg-type]  # the caller's own rows
    return "".join(lines) + "</table>\n"


def _html_cell(row: msgspec.Struct, column: Column) -> str:
    kind = ' class="number"' if column.is_number else ' class="bad"' if column.field == "error" else ""
    return f"<td{kind}>{escaped(_cell(row, column))}</td>"


def _cell(row: msgspec.Struct, column: Column) -> str:
    value = getattr(row, column.field)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" + ("s" if column.field in {"age_s", "took_s"} else "")
    if column.field in {"uid", "name", "namespace"}:
        return printable(value) or UNKNOWN
    return printable(str(value)) or "-"


def _block(row: SandboxRow) -> str:
    """Return a sandbox as text."""
    lines = [f"{'' if column.field == 'id' else '  '}{column.title}: {_cell(row, column)}\n" for column in _SANDBOXES]
    return "".join(lines)


def _actions(row: SandboxRow) -> str:
    word = quote(row.id, safe="")
    return f'<a href="/metrics?sandbox={word}">metrics</a> <a href="/agent-url?sandbox={word}">agent URL</a>'


def _link(path: str) -> str:
    return f'<a href="{escaped(path)}">{escaped(path)}</a>'


def plain(content: str) -> Response:
    """Return a page as text, which can be had in other forms too."""
    return Response(200, _headers("text"), content.encode("utf-8", "backslashreplace"))


def as_json(value: object) -> Response:
    """Return a page as JSON."""
    return Response(200, _headers("json"), msgspec.json.encode(value) + b"\n")


def _headers(kind: PageKind) -> HeaderPairs:
    """Return the fields of a page that can be had in other forms too."""
    policy: HeaderPairs = (("content-security-policy", POLICY),) if kind == "html" else ()
    return (("content-type", _TYPES[kind]), ("cache-control", "no-store"), ("vary", "accept"), *policy, *HEADERS)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _weight(parameters: Sequence[str]) -> float:
    """Return the q of an element of Accept; 0 for one that is none."""
    told = next((word[2:] for word in parameters if word.startswith("q=")), "1")
    try:
        weight = float(told) if len(told) <= 5 and "_" not in told else 0.0
    except ValueError:
        return 0.0
    return weight if 0.0 <= weight <= 1.0 else 0.0
