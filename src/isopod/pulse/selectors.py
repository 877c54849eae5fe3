r"""Selectors: which series are wanted, in Prometheus' syntax, and the lines of fragments that are them.

    name    name{label="value",other!="x"}    {__name__=~"kata_guest_.*",item!~"a|b"}    {"name"}

A label that a series has not is the empty text. Of several selectors one is enough. One whose matchers all fit the empty text would be
everything, and is refused as Prometheus refuses it. Expressions are those of `patterns`, anchored at both ends.

What a sandbox's lines begin with is the same in all of them: matchers on it are settled once for each sandbox. What follows it is mostly
the same in all sandboxes: a family whose lines have the same names and other labels is settled once for each answer.

Source: Prometheus' querying basics (instant vector selectors) and its federation endpoint (match[]).
"""

import re
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Final, Literal, NamedTuple

from isopod.pulse.merge import NOTHING, PARTS, Block, Group, Part, Plan, Run, first_help
from isopod.pulse.model import Fragment, Kind, Labels, Row
from isopod.pulse.patterns import Pattern
from isopod.world.errors import InvalidArgument

CHARS_MAX: Final = 4096
"""Of one selector."""
SELECTORS_MAX: Final = 64
MATCHERS_MAX: Final = 64
KNOWN_MAX: Final = 2000
"""For how many families' lines the answer is kept."""
TURN_LINES: Final = 4000
"""After how many lines others may get a turn."""
TURN_SANDBOXES: Final = 200
"""After how many sandboxes others may get a turn."""
NAME: Final = "__name__"

Operator = Literal["=", "!=", "=~", "!~"]
Active = tuple[int, ...]
"""The numbers of the selectors that a sandbox's own labels do not rule out."""

_BLANK: Final = re.compile(r"\s*")
_METRIC: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OPERATOR: Final = re.compile(r"=~|!~|!=|=")
_QUOTED: Final = re.compile(r"\"((?:[^\"\\\n]|\\.)*)\"|'((?:[^'\\\n]|\\.)*)'|`([^`]*)`", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", '"': '"', "'": "'"}
_TEXT_HEADS: Final = re.compile(rb"^(?:[^\n]*\}|[^ \n]+)", re.MULTILINE)
_OPEN_HEADS: Final = re.compile(rb'^[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*\})?', re.MULTILINE)
_PAIR: Final = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_VALUE_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)


class Matcher(NamedTuple):
    """One condition on one label."""

    label: str
    operator: Operator
    value: str
    pattern: Pattern | None

    def matches(self, value: str) -> bool:
        """Return whether a label of that value fulfils it."""
        fits = self.value == value if self.pattern is None else self.pattern.matches(value)
        return fits is (self.operator in {"=", "=~"})


class Selection:
    """Several selectors, made by `parse`, and what was found out with them: for one answer.

    Args:
        selectors: The matchers of each.
    """

    def __init__(self, selectors: Sequence[Sequence[Matcher]]) -> None:
        self.selectors = selectors
        self._all: Active = tuple(range(len(selectors)))
        self._asked = frozenset([matcher.label for selector in selectors for matcher in selector])
        self._known: dict[tuple[Active, frozenset[str], tuple[bytes, ...]], Sequence[bool]] = {}

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Selection":
        """Read selectors.

        Raises:
            InvalidArgument: One is malformed; the place is told.
        """
        if len(texts) > SELECTORS_MAX:
            raise InvalidArgument("selectors", len(texts), f"more than {SELECTORS_MAX}")
        return cls([_Reader(text).read() for text in texts])

    def wants_family(self, name: str, kind: Kind) -> bool:
        """Return whether a family of that name may hold a series that is wanted."""
        names = [name, *(name + suffix for suffix in PARTS.get(kind, ()))]
        return any(all(m.matches(each) for m in selector if m.label == NAME) for selector in self.selectors for each in names)

    def active(self, labels: Labels) -> Active:
        """Return the selectors that are not ruled out by what all lines of a sandbox begin with."""
        if not self._asked.intersection([label for label, _ in labels]):
            return self._all
        known = dict(labels)
        return tuple(
            [
                number
                for number, selector in enumerate(self.selectors)
                if all(m.matches(known[m.label]) for m in selector if m.label in known)
            ]
        )

    def takes_all(self, name: str, kind: Kind, active: Active, labels: Labels) -> bool:
        """Return whether all lines of a family of a sandbox are wanted whatever else they say."""
        if kind in PARTS:
            return False
        settled = {label for label, _ in labels}
        return any(all(m.matches(name) if m.label == NAME else m.label in settled for m in self.selectors[each]) for each in active)

    def mask(self, active: Active, heads: tuple[bytes, ...], settled: Labels) -> Sequence[bool]:
        """Return which lines are wanted. The same lines, but for their figures, are mostly those of a thousand sandboxes.

        Args:
            active: The selectors in question.
            heads: The names and labels of lines, those they begin with left out.
            settled: Those.
        """
        labels = frozenset([label for label, _ in settled])
        key = (active, labels, heads)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            known = self._known[key] = [self._takes(active, head, labels) for head in heads]
        return known

    def _takes(self, active: Active, head: bytes, settled: frozenset[str]) -> bool:
        name, _, rest = head.partition(b"{")
        found = {NAME: name.decode()}
        for label, value in _PAIR.findall(rest):
            found[label.decode()] = _unescaped(value)
        return any(all(m.label in settled or m.matches(found.get(m.label, "")) for m in self.selectors[number]) for number in active)


class _Sandbox(NamedTuple):
    """What one sandbox has in a block, and what is settled of it."""

    row: Row
    active: Active
    labels: Labels
    begun: bytes
    """What stands between the brace and a line's own labels."""


def select(selection: Selection, chosen: Plan, blocks: Sequence[Block]) -> Iterator[Group | None]:
    """Iterate over the families of an answer with the wanted lines only; None after some work without one.

    Args:
        selection: What is wanted.
        chosen: The families.
        blocks: Where they are.
    """
    sandboxes: list[list[_Sandbox]] = []
    for block in blocks:
        sandboxes.append([])
        for number, row in enumerate(block.rows):
            begun = block.begun[number] if block.begun else NOTHING
            active = selection.active(begun.labels)
            if active:
                sandboxes[-1].append(_Sandbox(row, active, begun.labels, begun.block))
            if not number % TURN_SANDBOXES:
                yield None
    for name, kind in chosen.kinds.items():
        parts: list[Part] = []
        n_looked = 0
        for block, each in zip(blocks, sandboxes, strict=True):
            column = block.shape.index.get(name)
            if column is None or block.shape.pairs[column][1] != kind:
                continue
            whole: list[Row] = []
            for sandbox in each:
                fragment = sandbox.row.fragments[column]
                kept = _narrowed(selection, name, fragment, sandbox)
                if kept is fragment and block.is_kept:
                    if not whole:
                        parts.append(Run(whole, column))
                    whole.append(sandbox.row)
                elif kept is not None:
                    parts.append(kept)
                    whole = []
                n_looked += 1 + fragment.n_series
                if n_looked >= TURN_LINES:
                    n_looked = 0
                    yield None
        if parts:
            yield Group(name, kind, first_help(parts), parts)


def _narrowed(selection: Selection, name: str, fragment: Fragment, part: _Sandbox) -> Fragment | None:
    """Return a fragment with the wanted lines: itself if that is all of them, None if it is none."""
    if selection.takes_all(name, fragment.kind, part.active, part.labels):
        return fragment
    mask = selection.mask(part.active, _heads(_TEXT_HEADS, fragment.text, part.begun), part.labels)
    if all(mask):
        return fragment
    if not any(mask):
        return None
    text = _kept(fragment.text, mask)
    open_text = None
    if fragment.open_text is not None:
        open_mask = selection.mask(part.active, _heads(_OPEN_HEADS, fragment.open_text, part.begun), part.labels)
        open_text = _kept(fragment.open_text, open_mask)
    return Fragment(fragment.kind, fragment.help, text, sum(mask), open_text)


def _heads(pattern: re.Pattern[bytes], text: bytes, begun: bytes) -> tuple[bytes, ...]:
    """Return the names and labels of lines, without the labels that all lines of a sandbox begin with."""
    return tuple(pattern.findall(text.replace(b"{" + begun, b"{") if begun else text))


def _kept(text: bytes, mask: Sequence[bool]) -> bytes:
    return b"".join([line + b"\n" for line in compress(text.split(b"\n"), mask)])


def _unescaped(value: bytes) -> str:
    return _VALUE_ESCAPE.sub(lambda found: b"\n" if found[1] == b"n" else found[1], value).decode(errors="replace")


class _Reader:
    """Reads one selector."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        if len(text) > CHARS_MAX:
            raise InvalidArgument("selector", f"{text[:40]}...", f"longer than {CHARS_MAX} characters")

    def read(self) -> tuple[Matcher, ...]:
        """Return its matchers."""
        matchers: list[Matcher] = []
        name = self._found(_METRIC)
        if name:
            matchers.append(Matcher(NAME, "=", name, None))
        if self._skip("{"):
            matchers += self._matchers(has_name=bool(name))
        elif not name:
            self._fail("neither a name nor a {")
        self._found(_BLANK)
        if self._at < len(self._text):
            self._fail("something stands behind its end")
        if all(matcher.matches("") for matcher in matchers):
            raise InvalidArgument("selector", self._text, "it takes everything: one matcher must not fit the empty text")
        return tuple(matchers)

    def _matchers(self, *, has_name: bool) -> list[Matcher]:
        found: list[Matcher] = []
        while not self._skip("}"):
            if len(found) >= MATCHERS_MAX:
                self._fail(f"more than {MATCHERS_MAX} matchers")
            found.append(self._matcher(has_name=has_name))
            if not self._skip(","):
                if not self._skip("}"):
                    self._fail("a comma or } is missing")
                break
        return found

    def _matcher(self, *, has_name: bool) -> Matcher:
        self._found(_BLANK)
        if self._text[self._at : self._at + 1] in {'"', "'", "`"}:
            label = self._string()
            if self._text[self._at :].lstrip()[:1] in {",", "}"}:
                return Matcher(NAME, "=", label, None)
        else:
            label = self._found(_LABEL)
            if not label:
                self._fail("the name of a label is missing")
        operator = self._found(_OPERATOR)
        if not operator:
            self._fail("one of =, !=, =~ and !~ is missing")
        if has_name and label == NAME:
            self._fail("the name stands before the braces already")
        value = self._string()
        pattern = Pattern(value) if operator in {"=~", "!~"} else None
        return Matcher(label, _operator(operator), value, pattern)

    def _string(self) -> str:
        self._found(_BLANK)
        found = _QUOTED.match(self._text, self._at)
        if found is None:
            self._fail("a text in quotes is missing")
            return ""
        raw = found[3]
        text = raw if raw is not None else self._unquoted(found[1] if found[1] is not None else found[2])
        self._at = found.end()
        return text

    def _unquoted(self, text: str) -> str:
        def one(found: re.Match[str]) -> str:
            byte, short, long, octal, char = found.groups()
            if char is not None:
                if char not in _ESCAPES:
                    self._fail(f"\\{char} is no escape")
                return _ESCAPES[char]
            point = int(octal, 8) if octal else int(byte or short or long, 16)
            if point > 0x10FFFF or 0xD800 <= point < 0xE000 or (octal and point > 0xFF):
                self._fail("not a character's number")
            return chr(point)

        return _ESCAPE.sub(one, text)

    def _found(self, wanted: re.Pattern[str]) -> str:
        if wanted is not _BLANK:
            self._found(_BLANK)
        found = wanted.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _skip(self, char: str) -> bool:
        self._found(_BLANK)
        if not self._text.startswith(char, self._at):
            return False
        self._at += len(char)
        return True

    def _fail(self, why: str) -> None:
        raise InvalidArgument("selector", self._text, f"at character {self._at + 1}: {why}")


def _operator(text: str) -> Operator:
    match text:
        case "=" | "!=" | "=~" | "!~":
            return text
    raise InvalidArgument("operator", text, "not one of =, !=, =~ and !~")
