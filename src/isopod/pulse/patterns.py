r"""Patterns: regular expressions of RE2's kind, matched in time linear in the text, whatever the pattern.

Selectors come from whoever can reach the port, and one thread serves all: an expression must not be able to hold it. So this is no
backtracking matcher: a pattern becomes an automaton of at most STATES_MAX states, whose sets of states are made as texts need them, and
kept. A pattern matches a whole text or not at all; there are no groups to ask for, so greediness means nothing and is read over.

    x  .  [a-z]  [^a-z]  [[:alpha:]]  \d \D \s \S \w \W  \n \t \x41 \x{1F600}
    xy  x|y  x* x+ x? x{2,5}  (x) (?:x) (?P<n>x) (?i) (?s) ^ $ \A \z

Refused with the place: what RE2 has besides (\b, \p{..}, \Q, the flags m and U), and what it has not either (look-around, references).
`.` takes line ends too, as in Prometheus 3.

Source: RE2's syntax; R. Cox, "Regular Expression Matching Can Be Simple And Fast" (Thompson's construction, states made lazily).
"""

from typing import Final, NamedTuple

from isopod.world.errors import InvalidArgument

CHARS_MAX: Final = 1000
STATES_MAX: Final = 5000
DEPTH_MAX: Final = 50
REPEAT_MAX: Final = 1000
"""RE2's own bound."""
KNOWN_MAX: Final = 5000
"""How many steps, and how many answers, are kept."""
_LAST: Final = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]

_DIGIT: Final[Ranges] = ((48, 57),)
_SPACE: Final[Ranges] = ((9, 10), (12, 13), (32, 32))
_WORD: Final[Ranges] = ((48, 57), (65, 90), (95, 95), (97, 122))
_CLASSES: Final[dict[str, Ranges]] = {"d": _DIGIT, "s": _SPACE, "w": _WORD}
_CONTROLS: Final = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
_POSIX: Final[dict[str, Ranges]] = {
    "alnum": ((48, 57), (65, 90), (97, 122)),
    "alpha": ((65, 90), (97, 122)),
    "blank": ((9, 9), (32, 32)),
    "digit": _DIGIT,
    "lower": ((97, 122),),
    "punct": ((33, 47), (58, 64), (91, 96), (123, 126)),
    "space": ((9, 13), (32, 32)),
    "upper": ((65, 90),),
    "word": _WORD,
    "xdigit": ((48, 57), (65, 70), (97, 102)),
}


class _Set(NamedTuple):
    """One character of a set."""

    ranges: Ranges
    is_folded: bool

    def has(self, char: str) -> bool:
        for each in {char: 0, char.lower(): 0, char.upper(): 0} if self.is_folded else (char,):
            if len(each) == 1 and any(low <= ord(each) <= high for low, high in self.ranges):
                return True
        return False


class _Edge(NamedTuple):
    """The beginning or the end of the text."""

    is_end: bool


class _Row(NamedTuple):
    """One after the other."""

    parts: "tuple[_Node, ...]"


class _Either(NamedTuple):
    """One of several."""

    parts: "tuple[_Node, ...]"


class _Repeat(NamedTuple):
    """Several times; no upper bound is None."""

    part: "_Node"
    least: int
    most: int | None


_Node = _Set | _Edge | _Row | _Either | _Repeat


class Pattern:
    """A regular expression.

    Args:
        text: It.

    Raises:
        InvalidArgument: It is malformed, too large, or holds what is not known here.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        node = _Reader(text).read()
        n_states = _size(node)
        if n_states > STATES_MAX:
            raise InvalidArgument("regular expression", text, f"it needs more than {STATES_MAX} states")
        self._sets: list[_Set | None] = []  # of a state that takes a character; None for the accepting one and for edges
        self._edges: dict[int, bool] = {}
        self._next: list[list[int]] = []
        accept = self._state(None)
        start = self._build(node, accept)
        self._accept = accept
        self._begin = self._closure((start,), is_begin=True)
        self._steps: dict[tuple[tuple[int, ...], str], tuple[int, ...]] = {}
        self._answers: dict[str, bool] = {}

    def matches(self, text: str) -> bool:
        """Return whether the whole of a text fits."""
        known = self._answers.get(text)
        if known is None:
            if len(self._answers) >= KNOWN_MAX:
                self._answers.clear()
            known = self._answers[text] = self._run(text)
        return known

    def _run(self, text: str) -> bool:
        states = self._begin
        steps = self._steps
        for char in text:
            key = (states, char)
            following = steps.get(key)
            if following is None:
                if len(steps) >= KNOWN_MAX:
                    steps.clear()
                following = steps[key] = self._step(states, char)
            states = following
            if not states:
                return False
        return self._accept in self._ended(states, is_begin=not text)

    def _step(self, states: tuple[int, ...], char: str) -> tuple[int, ...]:
        taken = []
        for state in states:
            each = self._sets[state]
            if each is not None and each.has(char):
                taken += self._next[state]
        return self._closure(taken, is_begin=False)

    def _closure(self, states: "tuple[int, ...] | list[int]", *, is_begin: bool) -> tuple[int, ...]:
        """Return the states that are reached from these without a character, in order; edges at an end are looked at in `_ended`."""
        return self._reach(states, is_begin=is_begin, is_end=False)

    def _ended(self, states: tuple[int, ...], *, is_begin: bool) -> tuple[int, ...]:
        return self._reach(states, is_begin=is_begin, is_end=True)

    def _reach(self, states: "tuple[int, ...] | list[int]", *, is_begin: bool, is_end: bool) -> tuple[int, ...]:
        seen: dict[int, None] = {}
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen[state] = None
            if state == self._accept or self._sets[state] is not None:
                continue
            wants_end = self._edges.get(state)
            if wants_end is None or (is_end if wants_end else is_begin):
                waiting += self._next[state]
        return tuple(sorted(seen))

    def _state(self, wanted: _Set | None, following: "list[int] | None" = None) -> int:
        self._sets.append(wanted)
        self._next.append(following if following is not None else [])
        return len(self._sets) - 1

    def _build(self, node: _Node, following: int) -> int:
        """Make the states of a part, before a state; return the first of them."""
        match node:
            case _Set():
                return self._state(node, [following])
            case _Edge():
                state = self._state(None, [following])
                self._edges[state] = node.is_end
                return state
            case _Row():
                for part in reversed(node.parts):
                    following = self._build(part, following)
                return following
            case _Either():
                return self._state(None, [self._build(part, following) for part in node.parts])
            case _Repeat():
                return self._build_repeat(node, following)

    def _build_repeat(self, node: _Repeat, following: int) -> int:
        first = following
        if node.most is None:
            loop = self._state(None, [following])
            self._next[loop].append(self._build(node.part, loop))
            first = loop
        else:
            for _ in range(node.most - node.least):
                first = self._state(None, [following, self._build(node.part, first)])
        for _ in range(node.least):
            first = self._build(node.part, first)
        return first


def _size(node: _Node) -> int:
    """Return how many states a part needs, at least STATES_MAX + 1 if too many."""
    match node:
        case _Set() | _Edge():
            return 1
        case _Row() | _Either():
            return min(STATES_MAX + 1, 1 + sum(map(_size, node.parts)))
        case _Repeat():
            return min(STATES_MAX + 1, 1 + (_size(node.part) + 1) * max(node.least + (node.most is None), node.most or 0))


class _Reader:
    """Reads one pattern."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._is_folded = False
        if len(text) > CHARS_MAX:
            raise InvalidArgument("regular expression", f"{text[:40]}...", f"longer than {CHARS_MAX} characters")

    def read(self) -> _Node:
        """Return what the pattern says."""
        node = self._either()
        if self._at < len(self._text):
            self._fail("a ) without its (")
        return node

    def _fail(self, why: str) -> None:
        raise InvalidArgument("regular expression", self._text, f"at character {self._at + 1}: {why}")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            self._fail("it ends too soon")
        self._at += 1
        return char

    def _skip(self, word: str) -> bool:
        if self._text.startswith(word, self._at):
            self._at += len(word)
            return True
        return False

    def _either(self) -> _Node:
        rows = [self._row()]
        while self._skip("|"):
            rows.append(self._row())
        return rows[0] if len(rows) == 1 else _Either(tuple(rows))

    def _row(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in {"", "|", ")"}:
            part = self._atom()
            parts.append(self._repeated(part) if part is not None else _Row(()))
        return parts[0] if len(parts) == 1 else _Row(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return part
        self._skip("?")
        if self._bounds() is not None:
            self._fail("two repetitions in a row")
        return _Repeat(part, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, least, most in (("*", 0, None), ("+", 1, None), ("?", 0, 1)):
            if self._skip(sign):
                return least, most
        end = self._text.find("}", self._at)
        if self._peek() != "{" or end < 0:
            return None
        low, comma, high = self._text[self._at + 1 : end].partition(",")
        if not (low.isascii() and low.isdigit()) or not (high == "" or (high.isascii() and high.isdigit())):
            return None  # no repetition: the characters themselves
        least = int(low[:9])
        bound = int(high[:9]) if high else None if comma else least
        if least > REPEAT_MAX or (bound is not None and not least <= bound <= REPEAT_MAX):
            self._fail(f"a repetition of {low}{comma}{high} times")
        self._at = end + 1
        return least, bound

    def _atom(self) -> _Node | None:
        char = self._take()
        match char:
            case "(":
                return self._group()
            case "[":
                return self._set()
            case ".":
                return _Set(((0, _LAST),), is_folded=False)
            case "^" | "$":
                return _Edge(char == "$")
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                self._at -= 1
                self._fail("a repetition of nothing")
        return _Set(((ord(char), ord(char)),), self._is_folded)

    def _group(self) -> _Node | None:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            self._fail(f"more than {DEPTH_MAX} parentheses in one another")
        before = self._is_folded
        if self._skip("?"):
            if self._skip("P<") or (self._peek() == "<" and self._text[self._at + 1 : self._at + 2] not in {"=", "!"} and self._skip("<")):
                while self._take() != ">":
                    pass
            elif self._flags():
                self._depth -= 1
                return None
        node = self._either()
        if not self._skip(")"):
            self._fail("a ( without its )")
        self._is_folded = before
        self._depth -= 1
        return node

    def _flags(self) -> bool:
        """Read flags; return whether they are for what follows, and not for a group."""
        is_on = True
        while True:
            match self._take():
                case "i":
                    self._is_folded = is_on
                case "s" if is_on:
                    pass
                case "-" if is_on:
                    is_on = False
                case ":":
                    return False
                case ")":
                    return True
                case _:
                    self._at -= 1
                    self._fail("of what stands behind (? only P<name>, i, s and : are known here")

    def _escape(self) -> _Node:
        char = self._take()
        if char.lower() in _CLASSES:
            return _Set(_ranges_of(char), is_folded=False)
        if char in {"A", "z"}:
            return _Edge(char == "z")
        point = self._point(char)
        return _Set(((point, point),), self._is_folded)

    def _point(self, char: str) -> int:
        """Return the character that an escape stands for."""
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "x":
            if self._skip("{"):
                digits = ""
                while (digit := self._take()) != "}":
                    digits += digit
            else:
                digits = self._take() + self._take()
            if not 0 < len(digits) <= 6 or any(digit not in "0123456789abcdefABCDEF" for digit in digits) or int(digits, 16) > _LAST:
                self._fail("not a character's number")
            return int(digits, 16)
        if char.isascii() and char.isalnum():
            self._at -= 1
            self._fail(f"\\{char} is not known here")
        return ord(char)

    def _set(self) -> _Node:
        is_negated = self._skip("^")
        ranges: list[tuple[int, int]] = []
        is_first = True
        while is_first or self._peek() != "]":
            is_first = False
            if self._skip("[:"):
                ranges += self._posix()
                continue
            low = self._member(ranges)
            if low is None:
                continue
            high: int | None = low
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._member([])
                if high is None or high < low:
                    self._fail("a range that ends before it begins")
                    continue
            ranges.append((low, high if high is not None else low))
        self._at += 1
        if is_negated:
            if self._is_folded:
                ranges += [(ord(other), ord(other)) for other in _others(ranges)]
            return _Set(_complement(ranges), is_folded=False)
        return _Set(tuple(ranges), self._is_folded)

    def _posix(self) -> Ranges:
        end = self._text.find(":]", self._at)
        name = self._text[self._at : end] if end >= 0 else ""
        ranges = _POSIX.get(name.removeprefix("^"))
        if ranges is None:
            self._fail("not a class of characters")
            return ()
        self._at = end + 2
        return _complement(ranges) if name.startswith("^") else ranges

    def _member(self, ranges: list[tuple[int, int]]) -> int | None:
        """Read one character of a set; a class goes into `ranges` instead, and nothing is returned."""
        char = self._take()
        if char != "\\":
            return ord(char)
        char = self._take()
        if char.lower() in _CLASSES:
            ranges += _ranges_of(char)
            return None
        return self._point(char)


def _ranges_of(char: str) -> Ranges:
    found = _CLASSES[char.lower()]
    return _complement(found) if char.isupper() else found


def _complement(ranges: "Ranges | list[tuple[int, int]]") -> Ranges:
    begin = 0
    found = []
    for low, high in sorted(ranges):
        if low > begin:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    if begin <= _LAST:
        found.append((begin, _LAST))
    return tuple(found)


def _others(ranges: list[tuple[int, int]]) -> str:
    """Return the letters of ASCII that are in a set in the other case."""
    letters = [chr(point) for low, high in ranges for point in range(max(low, 65), min(high, 122) + 1)]
    return "".join([letter.swapcase() for letter in letters if letter.isalpha()])
