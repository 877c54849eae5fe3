"""Filters: the nftables tables of the simulated kernel, kept as text.

A script is applied as one transaction: statements `add table`, `create table`, `delete table`, `flush table` and `table ... { ... }` are
understood as far as which table they touch; the text inside a table is kept, not interpreted. Errors as nft's: a table that is not there
is ENOENT, unbalanced braces or an unknown statement EINVAL, and nothing of the script is applied then.
Other statements about a table (`add element inet NAME ...`) are appended to it.
"""

import errno
from collections.abc import Iterator

from isopod.world.sim.view import fail


class Filters:
    """All tables, by "family name"."""

    def __init__(self) -> None:
        self.tables: dict[str, str] = {}

    def apply(self, ruleset: str) -> None:
        """Apply a script, all of it or nothing."""
        tables = dict(self.tables)
        for statement in _statements(ruleset):
            _apply(tables, statement)
        self.tables = tables

    def delete(self, name: str) -> None:
        """Remove the inet table of that name; nothing there is fine."""
        self.tables.pop(f"inet {name}", None)


def _apply(tables: dict[str, str], statement: str) -> None:
    head, brace, body = statement.partition("{")
    words = head.split()
    if brace and words[:1] == ["table"]:
        words = ["add", *words]
    if len(words) >= 2 and words[1] in ("element", "rule", "chain", "map", "set"):
        key = " ".join(words[2:4])
        _must_exist(tables, key)
        tables[key] += "\n" + statement
        return
    if len(words) != 4 or words[1] != "table":
        fail(errno.EINVAL, statement[:80])
    verb, key = words[0], " ".join(words[2:4])
    if verb in ("add", "create"):
        if verb == "create" and key in tables:
            fail(errno.EEXIST, key)
        tables[key] = tables.get(key, "") + body.rpartition("}")[0]
    elif verb in ("delete", "flush"):
        _must_exist(tables, key)
        tables[key] = ""
        if verb == "delete":
            del tables[key]
    else:
        fail(errno.EINVAL, statement[:80])


def _must_exist(tables: dict[str, str], key: str) -> None:
    if key not in tables:
        fail(errno.ENOENT, key)


def _statements(script: str) -> Iterator[str]:
    """Split at line ends and semicolons outside braces."""
    depth, start = 0, 0
    for position, character in enumerate(script):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                fail(errno.EINVAL, "unexpected }")
        if depth == 0 and character in "\n;":
            yield from _stripped(script[start:position])
            start = position + 1
    if depth:
        fail(errno.EINVAL, "missing }")
    yield from _stripped(script[start:])


def _stripped(statement: str) -> Iterator[str]:
    text = statement.strip()
    if text and not text.startswith("#"):
        yield text
