"""`events`: prints what happens to containers, and bridges a restart of the node.

Every event carries the number of its journal record. After a lost connection the next request begins after the last one that was
printed (or after the place where the stream began, which the node tells first), so nothing is lost and nothing comes twice.
"""

from __future__ import annotations

from isopod.cli.follow import serve_bridged
from isopod.cli.lean import Link, answer, number_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import invalid, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body, Event


def print_events(parsed: Parsed) -> int:
    """Print events until they end, or for ever.

    Args:
        parsed: The command line.

    Raises:
        IsopodError: The node went away and stayed away, or cannot go back so far.
    """
    printer = _Printer(_request(parsed), form=parsed.value("format", "table"))
    serve_bridged(parsed, printer.serve, lambda _: None)
    return 0


class _Printer:
    """What was asked, and where printing is."""

    def __init__(self, body: Body, *, form: str) -> None:
        self._body = body
        self._form = form
        self._cursor: int | None = None

    def serve(self, link: Link) -> None:
        """Print until the end."""
        call = link.begin("container.events", self._request(), None)
        while True:
            events, _, _ = link.turn(None)
            for event in events:
                if event[1] == call and self._take(link, event):
                    return

    def _request(self) -> Body:
        return self._body if self._cursor is None else {**self._body, "cursor": self._cursor}

    def _take(self, link: Link, event: Event) -> bool:
        """Act on an event of the protocol; tell whether it was the last one."""
        kind, call, body, n_bytes = event
        if kind in (REPLY, ERROR):
            answer(event)
            return True
        if kind == ITEM:
            what = text_of(body, "type")
            if what == "cursor":
                self._cursor = number_of(body, "position")
            elif what == "event":
                say(_as_json(body) if self._form == "json" else _as_line(body))
                self._cursor = number_of(body, "cursor")
            link.protocol.consumed(call, n_bytes)
        return False


def _request(parsed: Parsed) -> Body:
    """Return the EventsRequest of a command line."""
    from isopod.cli.options import moment_ns

    body: Body = {"containers": _values(parsed, "container"), "kinds": _values(parsed, "event")}
    now_ns = console.unix_time_ns()
    for name in ("since", "until"):
        text = parsed.value(name)
        if text:
            body[f"{name}_ns"] = moment_ns(text, now_ns)
    cursor = parsed.value("cursor")
    if cursor:
        if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
            raise invalid("cursor", cursor, "want the number of an event")
        body["cursor"] = int(cursor)
    return body


def _values(parsed: Parsed, wanted: str) -> list[str]:
    found = []
    for text in parsed.values("filter"):
        key, _, value = text.partition("=")
        if key not in ("container", "event") or not value:
            raise invalid("filter", text, "want container=NAME or event=KIND")
        if key == wanted:
            found.append(value)
    return found


def _as_json(body: object) -> str:
    import json

    fields = {key: value for key, value in body.items() if key != "type"} if isinstance(body, dict) else {}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def _as_line(body: object) -> str:
    """Return one line: time, number, container, what happened."""
    from datetime import UTC, datetime

    from isopod.cli.protocol import one_line

    second, rest_ns = divmod(number_of(body, "at_ns") or 0, 1_000_000_000)
    when = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1_000_000:03d}Z"
    return one_line(f"{when} {number_of(body, 'cursor')} {text_of(body, 'name')} {_what(body)}") + "\n"


def _what(body: object) -> str:
    kind = text_of(body, "kind")
    if kind in ("status", "health", "network"):
        after, before = text_of(body, kind), text_of(body, f"{kind}_before")
        code = number_of(body, "exit_code")
        oom = ", out of memory" if isinstance(body, dict) and body.get("oom_killed") is True else ""
        ended = f" ({code}{oom})" if kind == "status" and code is not None else ""
        return f"{kind} {before} -> {after}{ended}"
    if kind == "created":
        return f"created from {text_of(body, 'image')}"
    if kind == "mounts":
        added = body.get("mount_added") if isinstance(body, dict) else None
        return f"mounts + {text_of(added, 'destination')}" if added else f"mounts - {text_of(body, 'mount_removed')}"
    return kind
