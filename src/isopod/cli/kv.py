"""The commands about the replicated store, asked of the local node, which hands to the leader what only the leader can do.

They have no session: a write whose answer was lost may have been done, and says so. Programs use `isopod.api.store`, which does better.
Values are bytes and are printed as they are; where a line must stay a line (`list`, `watch`), what is not printable is shown escaped.
"""

from __future__ import annotations

from isopod.cli.follow import reopened
from isopod.cli.lean import Link, answer, number_of, rows_of
from isopod.cli.protocol import ERROR, ITEM, REPLY, one_line
from isopod.cli.say import invalid, note, open_link, say
from isopod.world.host import console
from isopod.world.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

TIMEOUT_S: Final = "5"
KEY_CHARS_MAX: Final = 1024
VALUE_BYTES_MAX: Final = 256 << 10
SHOWN_CHARS_MAX: Final = 60
# The first words of operations and results, as `isopod.api.store.messages` numbers them.
PUT, DELETE, DELETE_PREFIX, GET, RANGE, TXN = 1, 2, 3, 4, 5, 6
PAGE_ENTRIES: Final = 1000


def main(parsed: Parsed) -> int:
    """Run a command about the store."""
    assert parsed.command is not None
    return VERBS[parsed.command.name](parsed)


def get(parsed: Parsed) -> int:
    """`isopod kv get`: 0 if the key is there, 1 if not."""
    key = _checked(parsed.words[0])
    with open_link(parsed) as link:
        pages = _read(link, parsed, [GET, key])
    entries = rows_of({"entries": pages[0]}, "entries")
    if not entries:
        note(f"error: no such key: {one_line(key)}\n")
        return 1
    if parsed.value("format") == "json":
        say(_json(_facts(entries[0])))
    else:
        console.write_all(console.STDOUT, _value(entries[0]) + b"\n")
    return 0


def put(parsed: Parsed) -> int:
    """`isopod kv put`: prints the revision; 1 if the condition did not hold."""
    key, text = _checked(parsed.words[0]), parsed.words[1]
    value = _standard_input() if text == "-" else text.encode()
    if len(value) > VALUE_BYTES_MAX:
        raise invalid("value", f"{len(value)} bytes", f"at most {VALUE_BYTES_MAX}")
    return _write(parsed, key, [PUT, key, value])


def delete(parsed: Parsed) -> int:
    """`isopod kv delete`: prints how many went; 1 if none did."""
    key = _checked(parsed.words[0])
    if not parsed.flag("prefix"):
        return _write(parsed, key, [DELETE, key])
    if parsed.value("if-revision"):
        raise invalid("--if-revision", parsed.value("if-revision"), "a prefix has no revision")
    return _write(parsed, key, [DELETE_PREFIX, key])


def list_keys(parsed: Parsed) -> int:
    """`isopod kv list`: keys in order, from one page after the other."""
    prefix = parsed.words[0] if parsed.words else ""
    form, is_quiet = parsed.value("format", "table"), parsed.flag("quiet")
    if form == "table" and not is_quiet:
        say(f"{'REVISION':>10} {'VERSION':>8} {'BYTES':>8}  KEY\n")
    after = ""
    with open_link(parsed) as link:
        while True:
            entries, more = _read(link, parsed, [RANGE, prefix, PAGE_ENTRIES, after, is_quiet])
            for entry in entries:
                say(_listed(entry, form, is_quiet=is_quiet))
            if not more:
                return 0
            after = _key(entries[-1])


def watch(parsed: Parsed) -> int:
    """`isopod kv watch`: prints changes until it is interrupted, and bridges a restart of the node."""
    prefix = parsed.words[0] if parsed.words else ""
    from_revision = _number(parsed, "from")
    link = open_link(parsed)
    while True:
        told = _Told(parsed.value("format", "table"))
        try:
            with link:
                told.serve(link, {"prefix": prefix, "from_revision": from_revision})
        except OSError:
            raise
        except Exception as error:
            from isopod.world.errors import Cancelled, Disconnected

            if not isinstance(error, (Cancelled, Disconnected)):
                raise
            if told.revision:
                from_revision = told.revision + 1
            note("note: the node went away; waiting for it, 60 s at most\n")
            link = reopened(parsed, error)


class _Told:
    """How far a watch is."""

    def __init__(self, form: str) -> None:
        self.revision = 0
        self._form = form
        self._held: list[object] = []

    def serve(self, link: Link, body: Body) -> None:
        """Print what comes, until the node ends it."""
        call = link.begin("kv.watch", body, None)
        while True:
            events, _, _ = link.turn(None)
            for event in events:
                if event[1] != call:
                    continue
                if event[0] in (REPLY, ERROR):
                    answer(event)
                    return
                if event[0] == ITEM:
                    self._take(event[2])
                    link.protocol.consumed(call, event[3])

    def _take(self, body: object) -> None:
        self._held += rows_of(body, "entries")
        if isinstance(body, dict) and body.get("more"):
            return
        for entry in self._held:
            say(_changed(entry, self._form))
        self._held = []
        self.revision = max(self.revision, number_of(body, "revision") or 0)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _write(parsed: Parsed, key: str, op: list[Any]) -> int:  # of what an operation is made of
    """Do one operation, if its key is at the revision that was asked for."""
    revision = parsed.value("if-revision")
    conditions = [[key, "mod_revision", "=", _number(parsed, "if-revision")]] if revision else []
    with open_link(parsed) as link:
        done = link.call("kv.txn", {"txn": [TXN, conditions, [op], []]}, _timeout_s(parsed))
    succeeded, done_at, results = _txn_result(done.get("result"))
    if not succeeded:
        note(f"error: {one_line(key)} is not at revision {revision}\nhint: see: isopod kv get --format json KEY\n")
        return 1
    if op[0] == PUT:
        say(f"{done_at}\n")
        return 0
    count = results[0][2] if results and isinstance(results[0], list) else 0
    say(f"{count}\n")
    return 0 if count else 1


def _txn_result(result: object) -> tuple[bool, int, list[Any]]:
    """Return what became of a transaction: an array with its number in front, or what is no answer at all."""
    if isinstance(result, list) and len(result) >= 4 and result[0] == TXN and isinstance(result[3], list):
        return bool(result[1]), int(result[2]), result[3]
    from isopod.world.errors import ProtocolViolation

    raise ProtocolViolation("the node", "no transaction's result")


def _read(link: Link, parsed: Parsed, read: list[Any]) -> tuple[list[Any], bool]:
    """Ask for one page; return its entries, and whether there are more."""
    timeout_s = _timeout_s(parsed)
    body: Body = {"reads": [read], "consistency": parsed.value("consistency", "linearizable")}
    pages = rows_of(link.call("kv.read", body, timeout_s), "pages")
    page = pages[0] if pages else None
    if not isinstance(page, list) or len(page) < 3 or not isinstance(page[1], list):
        from isopod.world.errors import ProtocolViolation

        raise ProtocolViolation("the node", "no page")
    return page[1], bool(page[2])


def _checked(key: str) -> str:
    if not 0 < len(key) <= KEY_CHARS_MAX:
        raise invalid("key", key[:SHOWN_CHARS_MAX], f"want 1 to {KEY_CHARS_MAX} characters")
    return key


def _timeout_s(parsed: Parsed) -> float:
    text = parsed.value("timeout", TIMEOUT_S)
    seconds = parse_duration(text)
    if not 0 < seconds <= 3600:
        raise invalid("--timeout", text, "want more than 0, at most an hour")
    return seconds


def _number(parsed: Parsed, name: str) -> int:
    text = parsed.value(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(f"--{name}", text, "want a revision: a whole number")
    return int(text)


def _standard_input() -> bytes:
    """Return all of the standard input, as far as a value may be long (and one byte more, to see that it is not)."""
    data = bytearray()
    while len(data) <= VALUE_BYTES_MAX:
        piece = console.read(console.STDIN, VALUE_BYTES_MAX + 1 - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def _key(entry: Any) -> str:  # an entry is an array: key, value, created, changed, version, lease
    return str(entry[0])


def _value(entry: Any) -> bytes:  # the same
    return bytes(entry[1])


def _shown(value: bytes) -> str:
    """Return a value as part of a line."""
    text = one_line(value.decode("utf-8", "backslashreplace"))
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "..."


def _listed(entry: Any, form: str, *, is_quiet: bool) -> str:  # an entry
    if form == "json":
        return _json(_facts(entry))
    if is_quiet:
        return one_line(_key(entry)) + "\n"
    return f"{entry[3]:>10} {entry[4]:>8} {len(_value(entry)):>8}  {one_line(_key(entry))}\n"


def _changed(entry: Any, form: str) -> str:  # an entry, of version 0 if it was deleted
    if form == "json":
        return _json({"type": "put" if entry[4] else "delete", **_facts(entry)})
    if not entry[4]:
        return f"{entry[3]} delete {one_line(_key(entry))}\n"
    return f"{entry[3]} put {one_line(_key(entry))} {_shown(_value(entry))}\n"


def _facts(entry: Any) -> dict[str, Any]:  # an entry
    """Return an entry as programs read it: a value that is no text in base64."""
    names = ("create_revision", "mod_revision", "version", "lease")
    facts: dict[str, Any] = {"key": _key(entry)}
    try:
        facts["value"] = _value(entry).decode()
    except UnicodeDecodeError:
        from base64 import b64encode

        facts["value_base64"] = b64encode(_value(entry)).decode()
    return facts | dict(zip(names, entry[2:6], strict=False))


def _json(facts: dict[str, Any]) -> str:
    import json

    return json.dumps(facts, ensure_ascii=False) + "\n"


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "kv get": get,
    "kv put": put,
    "kv delete": delete,
    "kv list": list_keys,
    "kv watch": watch,
}
"""What carries out the commands, by their name."""
