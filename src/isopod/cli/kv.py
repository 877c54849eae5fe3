"""The commands about the replicated store, asked of the local node, which hands to the leader what only the leader can do.

They have no session: a write whose answer was lost may have been done, and says so. Programs use `isopod.api.store`, which does better.
Values are bytes and are printed as they are; where a line must stay a line (`list`, `watch`), what is not printable is shown escaped.
"""

from __future__ import annotations

from isopod.cli.follow import serve_bridged
from isopod.cli.lean import Link, answer, number_of, rows_of
from isopod.cli.options import timeout_s
from isopod.cli.protocol import ERROR, ITEM, REPLY, one_line
from isopod.cli.say import invalid, note, open_link, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

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
    key = checked(parsed.words[0])
    with open_link(parsed) as link:
        pages = _read(link, parsed, [GET, key])
    entries = rows_of({"entries": pages[0]}, "entries")
    if not entries:
        note(f"error: no such key: {one_line(key)}\n")
        return 1
    if parsed.value("format") == "json":
        say(as_json(entry_facts(entries[0])))
    else:
        console.write_all(console.STDOUT, value_of(entries[0]) + b"\n")
    return 0


def put(parsed: Parsed) -> int:
    """`isopod kv put`: prints the revision; 1 if the condition did not hold."""
    key, text = checked(parsed.words[0]), parsed.words[1]
    value = read_input(VALUE_BYTES_MAX) if text == "-" else text.encode()
    if len(value) > VALUE_BYTES_MAX:
        raise invalid("value", f"{len(value)} bytes", f"at most {VALUE_BYTES_MAX}")
    return _write(parsed, key, [PUT, key, value])


def delete(parsed: Parsed) -> int:
    """`isopod kv delete`: prints how many went; 1 if none did."""
    key = checked(parsed.words[0])
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
    printer = _ChangePrinter(prefix, _number(parsed, "from"), form=parsed.value("format", "table"))
    serve_bridged(parsed, printer.serve, lambda _: None)
    return 0


class _ChangePrinter:
    """What is watched, and how far printing is."""

    def __init__(self, prefix: str, from_revision: int, *, form: str) -> None:
        self._prefix = prefix
        self._from_revision = from_revision
        self._form = form
        self._held: list[object] = []

    def serve(self, link: Link) -> None:
        """Print what comes, until the node ends it."""
        self._held = []  # of a cut stream: it comes again
        call = link.begin("kv.watch", {"prefix": self._prefix, "from_revision": self._from_revision}, None)
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
        self._from_revision = max(self._from_revision, (number_of(body, "revision") or 0) + 1)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _write(parsed: Parsed, key: str, op: list[Any]) -> int:  # of what an operation is made of
    """Do one operation, if its key is at the revision that was asked for."""
    revision = parsed.value("if-revision")
    conditions = [[key, "mod_revision", "=", _number(parsed, "if-revision")]] if revision else []
    with open_link(parsed) as link:
        succeeded, done_at, results = transact(link, parsed, [conditions, [op], []])
    if not succeeded:
        note(f"error: {one_line(key)} is not at revision {revision}\nhint: see: isopod kv get --format json KEY\n")
        return 1
    if op[0] == PUT:
        say(f"{done_at}\n")
        return 0
    count = results[0][2] if results and isinstance(results[0], list) else 0
    say(f"{count}\n")
    return 0 if count else 1


def transact(link: Link, parsed: Parsed, lists: list[list[Any]]) -> tuple[bool, int, list[Any]]:
    """Have a transaction done.

    Args:
        link: The node.
        parsed: The command line, for how long to wait.
        lists: Conditions, and the operations of either branch, as they travel.

    Returns:
        Whether the conditions held, the store's revision, and the results of the branch that was done.

    Raises:
        IsopodError: What the node answered; without an answer the hint says that it may have been done.
    """
    from isopod.world.errors import PeerError, ProtocolViolation

    try:
        result = link.call("kv.txn", {"txn": [TXN, *lists]}, timeout_s(parsed)).get("result")
    except PeerError as error:
        error.hint = "it may have been done all the same: look before you repeat it; `isopod cluster status` says who leads"
        raise
    if isinstance(result, list) and len(result) >= 4 and result[0] == TXN and isinstance(result[3], list):
        return bool(result[1]), int(result[2]), result[3]
    raise ProtocolViolation("the node", "no transaction's result")


def _read(link: Link, parsed: Parsed, read: list[Any]) -> tuple[list[Any], bool]:
    """Ask for one page; return its entries, and whether there are more."""
    body: Body = {"reads": [read], "consistency": parsed.value("consistency", "linearizable")}
    pages = rows_of(_call_read(link, parsed, body), "pages")
    page = pages[0] if pages else None
    if not isinstance(page, list) or len(page) < 3 or not isinstance(page[1], list):
        from isopod.world.errors import ProtocolViolation

        raise ProtocolViolation("the node", "no page")
    return page[1], bool(page[2])


def _call_read(link: Link, parsed: Parsed, body: Body) -> Body:
    try:
        return link.call("kv.read", body, timeout_s(parsed))
    except Exception as error:
        from isopod.world.errors import DeadlineExceeded

        if isinstance(error, DeadlineExceeded):
            error.hint = "`isopod cluster status` says who leads; --consistency stale asks this node alone"
        raise


def checked(key: str) -> str:
    """Return a key that can be one. Raises InvalidArgument."""
    if not 0 < len(key) <= KEY_CHARS_MAX:
        raise invalid("key", key[:SHOWN_CHARS_MAX], f"want 1 to {KEY_CHARS_MAX} characters")
    return key


def _number(parsed: Parsed, name: str) -> int:
    text = parsed.value(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(f"--{name}", text, "want a revision: a whole number")
    return int(text)


def read_input(n_bytes_max: int) -> bytes:
    """Return all of the standard input, as far as it may be long (and one byte more, to see that it is not)."""
    data = bytearray()
    while len(data) <= n_bytes_max:
        piece = console.read(console.STDIN, n_bytes_max + 1 - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def _key(entry: Any) -> str:  # an entry is an array: key, value, created, changed, version, lease
    return str(entry[0])


def value_of(entry: Any) -> bytes:  # the same
    """Return the value of an entry."""
    return bytes(entry[1])


def shown(value: bytes) -> str:
    """Return a value as part of a line."""
    text = one_line(value.decode("utf-8", "backslashreplace"))
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "..."


def _listed(entry: Any, form: str, *, is_quiet: bool) -> str:  # an entry
    if form == "json":
        return as_json(entry_facts(entry))
    if is_quiet:
        return one_line(_key(entry)) + "\n"
    return f"{entry[3]:>10} {entry[4]:>8} {len(value_of(entry)):>8}  {one_line(_key(entry))}\n"


def _changed(entry: Any, form: str) -> str:  # an entry, of version 0 if it was deleted
    if form == "json":
        return as_json({"type": "put" if entry[4] else "delete", **entry_facts(entry)})
    if not entry[4]:
        return f"{entry[3]} delete {one_line(_key(entry))}\n"
    return f"{entry[3]} put {one_line(_key(entry))} {shown(value_of(entry))}\n"


def entry_facts(entry: Any) -> dict[str, Any]:  # an entry
    """Return an entry as programs read it: a value that is no text in base64."""
    names = ("create_revision", "mod_revision", "version", "lease")
    facts: dict[str, Any] = {"key": _key(entry)}
    try:
        facts["value"] = value_of(entry).decode()
    except UnicodeDecodeError:
        from base64 import b64encode

        facts["value_base64"] = b64encode(value_of(entry)).decode()
    return facts | dict(zip(names, entry[2:6], strict=False))


def as_json(facts: dict[str, Any]) -> str:
    """Return a line of JSON."""
    import json

    return json.dumps(facts, ensure_ascii=False) + "\n"


def _txn(parsed: Parsed) -> int:
    """`isopod kv txn`, in a room of its own."""
    from isopod.cli.kv_txn import txn

    return txn(parsed)


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "kv get": get,
    "kv put": put,
    "kv delete": delete,
    "kv list": list_keys,
    "kv watch": watch,
    "kv txn": _txn,
}
"""What carries out the commands, by their name."""
