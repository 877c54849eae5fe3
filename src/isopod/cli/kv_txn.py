"""`isopod kv txn`: reads and writes of several keys in one step, if what they depend on is still so.

    isopod kv txn --if 'version lock = 0' --then 'put lock me' --else 'get lock'

A transaction is three lists: conditions, what is done if all of them hold, what is done if not. Either as options, a text each, or as
JSON, for keys with blanks and values that are no text:

    {"if": [{"what": "version", "key": "lock", "is": "=", "than": 0}],
     "then": [{"do": "put", "key": "lock", "value": "me"}], "else": [{"do": "get", "key": "lock"}]}

A value may be given as "value_base64" instead. Unknown words are refused: what is not understood must not count as a condition that holds.
"""

from __future__ import annotations

from isopod.cli.kv import (
    DELETE,
    DELETE_PREFIX,
    GET,
    PAGE_ENTRIES,
    PUT,
    RANGE,
    VALUE_BYTES_MAX,
    as_json,
    checked,
    entry_facts,
    read_input,
    shown,
    transact,
    value_of,
)
from isopod.cli.protocol import one_line
from isopod.cli.say import invalid, open_link, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from isopod.cli.parse import Parsed

    Branch = tuple[str, list[list[Any]]]

OPS_MAX: Final = 128
INPUT_BYTES_MAX: Final = 1 << 20
NUMBER_DIGITS_MAX: Final = 18
WHATS: Final = {"value": "value", "version": "version", "mod": "mod_revision", "create": "create_revision", "lease": "lease"}
RELATIONS: Final = ("=", "!=", "<", ">")
OPERATIONS: Final = {"put": PUT, "delete": DELETE, "delete-prefix": DELETE_PREFIX, "get": GET, "list": RANGE}
REFUSED, DELETED, PAGE = 1, 2, 3
"""The first words of results, as `isopod.api.store.messages` numbers them."""
CONDITION_FORM: Final = "want WHAT KEY RELATION VALUE, for example 'version lock = 0'"
OPERATION_FORM: Final = "want 'put KEY VALUE', 'delete KEY', 'delete-prefix PREFIX', 'get KEY' or 'list PREFIX'"


def txn(parsed: Parsed) -> int:
    """Do a transaction and print which branch was done, the revision, and what was read or removed: 0 if the conditions held, else 1.

    Args:
        parsed: The command line.

    Raises:
        InvalidArgument: It is not understood.
        IsopodError: What the node answered.
    """
    conditions, then, otherwise = _asked(parsed)
    with open_link(parsed) as link:
        succeeded, revision, results = transact(link, parsed, [conditions, then, otherwise])
    ops = then if succeeded else otherwise
    if parsed.value("format") == "json":
        facts = [_facts(op, result) for op, result in zip(ops, results, strict=False)]
        say(as_json({"succeeded": succeeded, "revision": revision, "results": facts}))
    else:
        say(f"{'then' if succeeded else 'else'} {revision}\n" + "".join(map(_lines, ops, results)))
    return 0 if succeeded else 1


def _asked(parsed: Parsed) -> tuple[list[Any], list[Any], list[Any]]:
    texts = {name: parsed.values(name) for name in ("if", "then", "else")}
    if parsed.words:
        if any(texts.values()):
            raise invalid("FILE", parsed.words[0], "the transaction is in the options already")
        return _from_json(parsed.words[0])
    if not (texts["then"] or texts["else"]):
        raise invalid("transaction", "", "it does nothing", "give --then or --else, or a FILE with JSON; - for standard input")
    made = ([_condition(text) for text in texts["if"]], *([_operation(text) for text in texts[name]] for name in ("then", "else")))
    return _bounded(*made)


def _bounded(conditions: list[Any], then: list[Any], otherwise: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    for what, rows in (("conditions", conditions), ("operations", then), ("operations", otherwise)):
        if len(rows) > OPS_MAX:
            raise invalid(what, str(len(rows)), f"at most {OPS_MAX}")
    return conditions, then, otherwise


# --- as texts ---------------------------------------------------------------------------------------------------------


def _condition(text: str) -> list[Any]:
    words = text.split(None, 3)
    if len(words) == 3 and words[0] == "value":
        words.append("")
    if len(words) != 4 or words[0] not in WHATS or words[2] not in RELATIONS:
        raise invalid("--if", text, CONDITION_FORM, f"WHAT is one of {', '.join(WHATS)}; RELATION one of {' '.join(RELATIONS)}")
    what, key, relation, value = words
    if what == "value":
        return _make_condition(what, key, relation, value.encode())
    return _make_condition(what, key, relation, _number("--if", value))


def _operation(text: str) -> list[Any]:
    words = text.split(None, 2)
    n_words = 3 if words[:1] == ["put"] else 2
    if len(words) == 2 == n_words - 1:
        words.append("")
    if len(words) != n_words or words[0] not in OPERATIONS:
        raise invalid("operation", text, OPERATION_FORM)
    return _make_operation(words[0], words[1], words[2].encode() if n_words == 3 else b"")


def _make_condition(what: str, key: str, relation: str, than: int | bytes) -> list[Any]:
    """Return a condition as it travels."""
    number, value = (0, than) if isinstance(than, bytes) else (than, b"")
    return [checked(key), WHATS[what], relation, number, value]


def _make_operation(do: str, key: str, value: bytes) -> list[Any]:
    """Return an operation as it travels."""
    if len(value) > VALUE_BYTES_MAX:
        raise invalid("value", f"{len(value)} bytes", f"at most {VALUE_BYTES_MAX}")
    code = OPERATIONS[do]
    if code == RANGE:
        return [RANGE, key, PAGE_ENTRIES]
    return [code, checked(key), *([value] if code == PUT else [])]


def _number(what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= NUMBER_DIGITS_MAX):
        raise invalid(what, text, "want a whole number")
    return int(text)


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _from_json(path: str) -> tuple[list[Any], list[Any], list[Any]]:
    import json

    data = _read(path)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid("transaction", path, f"not JSON: {error}") from error
    names = ("if", "then", "else")
    if not isinstance(found, dict) or any(name not in names or not isinstance(rows, list) for name, rows in found.items()):
        raise invalid("transaction", path, 'want an object of lists: "if", "then" and "else"')
    if not (found.get("then") or found.get("else")):
        raise invalid("transaction", path, "it does nothing", 'give it "then" or "else"')
    conditions = [_condition_of(_row(row, ("what", "key", "is", "than"))) for row in found.get("if", [])]
    then, otherwise = ([_operation_of(_row(row, ("do", "key", "value"))) for row in found.get(name, [])] for name in ("then", "else"))
    return _bounded(conditions, then, otherwise)


def _read(path: str) -> bytes:
    if path == "-":
        data: bytes | None = read_input(INPUT_BYTES_MAX)
    else:
        data = console.read_small_file(console.absolute(path))
    if data is None:
        from isopod.world.errors import NotFound

        raise NotFound("file", path)
    if len(data) > INPUT_BYTES_MAX:
        raise invalid("transaction", path, f"more than {INPUT_BYTES_MAX} bytes")
    return data


def _row(row: object, names: tuple[str, ...]) -> dict[str, Any]:
    """Return an object of a list, its value in base64 made bytes, if it has no other words than these."""
    if isinstance(row, dict):
        fields = dict(row)
        for name in ("value", "than"):
            if f"{name}_base64" in fields and name not in fields:
                fields[name] = _bytes(fields.pop(f"{name}_base64"))
        if all(name in names for name in fields) and isinstance(fields.get("key"), str):
            return fields
    raise invalid("transaction", shown(repr(row).encode()), f"want an object of {', '.join(names)}")


def _condition_of(fields: dict[str, Any]) -> list[Any]:
    what, relation, than = fields.get("what"), fields.get("is"), fields.get("than")
    if isinstance(than, str):
        than = than.encode()
    if isinstance(than, bool) or not isinstance(than, (int, bytes)) or (isinstance(than, int) and not 0 <= than < 1 << 62):
        than = None
    if what not in WHATS or relation not in RELATIONS or than is None or isinstance(than, bytes) != (what == "value"):
        raise invalid("condition", shown(repr(fields).encode()), f"what is one of {', '.join(WHATS)}; is one of {' '.join(RELATIONS)}")
    return _make_condition(str(what), fields["key"], str(relation), than)


def _operation_of(fields: dict[str, Any]) -> list[Any]:
    do, value = fields.get("do"), fields.get("value", b"")
    if isinstance(value, str):
        value = value.encode()
    if do not in OPERATIONS or not isinstance(value, bytes) or (("value" in fields) != (do == "put")):
        raise invalid("operation", shown(repr(fields).encode()), f"do is one of {', '.join(OPERATIONS)}; only put has a value")
    return _make_operation(str(do), fields["key"], value)


def _bytes(text: object) -> bytes:
    from base64 import b64decode

    try:
        return b64decode(str(text), validate=True)
    except ValueError as error:
        raise invalid("value", str(text)[:40], "not base64") from error


# --- what became of it ------------------------------------------------------------------------------------------------


def _name(op: list[Any]) -> str:
    return next(name for name, code in OPERATIONS.items() if code == op[0])


def _facts(op: list[Any], result: Any) -> dict[str, Any]:  # an array with its number in front, or a number
    """Return a result as programs read it."""
    facts: dict[str, Any] = {"do": _name(op), "key": op[1]}
    if isinstance(result, list) and result:
        if result[0] == DELETED:
            return facts | {"count": result[2]}
        if result[0] == PAGE:
            return facts | {"entries": [entry_facts(entry) for entry in result[1]], "more": bool(result[2])}
        if result[0] == REFUSED:
            return facts | {"error": result[1], "message": result[2]}
    return facts


def _lines(op: list[Any], result: Any) -> str:  # the same
    """Return a result as lines."""
    head = f"{_name(op)} {one_line(op[1])}"
    facts = _facts(op, result)
    if "entries" in facts:
        rows = "".join(f"{one_line(str(entry[0]))} {shown(value_of(entry))}\n" for entry in result[1])
        return rows or f"{head}: nothing\n"
    if "count" in facts:
        return f"{head}: {facts['count']}\n"
    return f"{head}: {one_line(facts['message'])}\n" if "message" in facts else f"{head}\n"
