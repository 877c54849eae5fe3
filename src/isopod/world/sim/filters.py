"""Filters: the nftables tables of the simulated kernel, kept as text, with the elements of their sets and maps.

A script is applied as one transaction: statements `add table`, `create table`, `delete table`, `flush table` and `table ... { ... }` are
understood as far as which table they touch; of the text inside a table only `elements = { ... }` is interpreted. Errors as nft's: a table
or an element that is not there is ENOENT, an element of a map that leads elsewhere already EEXIST, unbalanced braces or an unknown
statement EINVAL, and nothing of the script is applied then. `add element` and `delete element` change elements; other statements about a
table (`add rule inet NAME ...`) are appended to its text.
"""

import copy
import errno
import re
from collections.abc import Iterator
from typing import Final

from isopod.world.sim.view import fail

_BLOCK: Final = re.compile(r"\b(?:set|map)\s+(\S+)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_ELEMENTS: Final = re.compile(r"elements\s*=\s*\{([^{}]*)\}")
_PARTS: Final = ("element", "rule", "chain", "map", "set", "limit")

Elements = dict[str, str]
"""Key to value, "" in a set."""


class Filters:
    """All tables, by "family name"."""

    def __init__(self) -> None:
        self.tables: dict[str, str] = {}
        self._elements: dict[tuple[str, str], Elements] = {}

    def apply(self, ruleset: str) -> None:
        """Apply a script, all of it or nothing."""
        draft = copy.deepcopy(self)
        for statement in _statements(ruleset):
            draft._apply(statement)
        self.tables, self._elements = draft.tables, draft._elements

    def delete(self, name: str) -> None:
        """Remove the inet and the bridge table of that name; nothing there is fine."""
        for family in ("inet", "bridge"):
            if f"{family} {name}" in self.tables:
                self.apply(f"delete table {family} {name}")

    def names(self, prefix: str) -> tuple[str, ...]:
        """Return the tables whose name begins so, sorted: those of family inet by their name alone."""
        found = [key.removeprefix("inet ") for key in self.tables if key.split()[1].startswith(prefix)]
        return tuple(sorted(found))

    def elements(self, table: str, name: str) -> Elements:
        """Return the elements of a set or map of a table ("inet NAME")."""
        return dict(self._elements.get((table, name), {}))

    def _apply(self, statement: str) -> None:
        head, brace, body = statement.partition("{")
        words = head.split()
        if brace and words[:1] == ["table"]:
            words = ["add", *words]
        if len(words) >= 4 and words[1] in _PARTS:
            self._change(words, statement, body.rpartition("}")[0])
            return
        if len(words) != 4 or words[1] != "table":
            fail(errno.EINVAL, statement[:80])
        verb, key = words[0], " ".join(words[2:4])
        if verb in ("add", "create"):
            if verb == "create" and key in self.tables:
                fail(errno.EEXIST, key)
            self.tables[key] = self.tables.get(key, "") + body.rpartition("}")[0]
            for name, inner in _BLOCK.findall(body):
                for elements in _ELEMENTS.findall(inner):
                    self._add(key, name, elements)
        elif verb in ("delete", "flush"):
            self._must_exist(key)
            self.tables[key] = ""
            if verb == "delete":
                del self.tables[key]
                self._elements = {at: found for at, found in self._elements.items() if at[0] != key}
        else:
            fail(errno.EINVAL, statement[:80])

    def _change(self, words: list[str], statement: str, body: str) -> None:
        """Do a statement about a part of a table."""
        key = " ".join(words[2:4])
        self._must_exist(key)
        if words[1] != "element":
            self.tables[key] += "\n" + statement
        elif len(words) != 5 or words[0] not in ("add", "delete"):
            fail(errno.EINVAL, statement[:80])
        elif words[0] == "add":
            self._add(key, words[4], body)
        else:
            here = self._elements.get((key, words[4]), {})
            for element, _ in _pairs(body):
                if here.pop(element, None) is None:
                    fail(errno.ENOENT, element)

    def _add(self, key: str, name: str, body: str) -> None:
        here = self._elements.setdefault((key, name), {})
        for element, value in _pairs(body):
            if here.setdefault(element, value) != value:
                fail(errno.EEXIST, element)

    def _must_exist(self, key: str) -> None:
        if key not in self.tables:
            fail(errno.ENOENT, key)


def _pairs(body: str) -> Iterator[tuple[str, str]]:
    """Split `a . b : c, d : e`; MAC addresses have colons without spaces around them."""
    for element in filter(None, (part.strip() for part in body.split(","))):
        key, _, value = element.partition(" : ")
        yield " ".join(key.split()), " ".join(value.split())


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
