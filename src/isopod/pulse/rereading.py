"""Rereading: of a body only the families that say something new are read.

From one round to the next most families of a shim say what they said before, to the byte. A body is cut where a family begins (at
`# HELP`); pieces whose hash is the one of the last round keep their fragments, and the figures that were asked for; the others are read
together, as one smaller body.

That is right only where a piece is a family and nothing else, and decides over no other: its `# HELP`, its `# TYPE`, and lines that bear
its name, as many as the family got, but for those that were dropped, which must be all that were. A piece of which lines were dropped is
read each time. Pieces that are read anew must be of the names and kinds they had, and as clean. Whatever else comes is read as a whole:
bodies with exemplars in what is new (whether they can be shown is decided by other families), with a family in a piece that had none, with
families that are named like parts of others, of very many pieces; OpenMetrics, whose last line speaks for all others.

Not here: bodies that are the last one again (`intake`), what a line may be (`core`).
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from isopod.pulse import core
from isopod.pulse.model import Families, Fragment, Kind, Labels, Reading, Values

SHAPES_MAX: Final = 1024
"""How many lists of families, and of labels, are kept once for all sandboxes."""
SHARED_MAX: Final = 512
"""A longer list is nobody else's."""
SHARED_CHARACTERS_MAX: Final = 1 << 14
PIECES_MAX: Final = 4096
"""A body of more pieces is read as a whole: what is done for each of them here would keep all others waiting."""
_HELP: Final = b"# HELP "
_NEXT: Final = b"\n# HELP "
_END: Final = b"# EOF\n"
_PLAIN: Final = (b"{", b" ")
_SUFFIXES: Final[Mapping[Kind, tuple[bytes, ...]]] = {
    "histogram": tuple(suffix + end for suffix in (b"_bucket", b"_sum", b"_count") for end in _PLAIN),
    "summary": tuple(suffix + end for suffix in (b"", b"_sum", b"_count") for end in _PLAIN),
}
"""What stands behind a family's name in its lines."""
_PARTS: Final = ("_bucket", "_sum", "_count", "_created")
"""A family that is named like a part of another is decided over by that one."""
_EXEMPLAR: Final = b" # {"


class _Piece(NamedTuple):
    """What a piece of a body is.

    Args:
        name: Its family's.
        is_read: Whether it is read each time.
    """

    name: str
    is_read: bool


_Pieces = tuple[_Piece, ...]


_Whose = tuple[tuple[str, ...], ...]


class _Figures(NamedTuple):
    """The figures of a family that were asked for, and the values of labels that go with each."""

    labels: _Whose
    figures: "array[float]"


class _Known(NamedTuple):
    """The last body of a sandbox: the hashes of its pieces, what these are, and what was asked for of them."""

    hashes: "array[int]"
    pieces: _Pieces
    values: dict[str, _Figures]


class Rereader:
    """Remembers of each sandbox which pieces its last body had.

    Args:
        rules: Limits and renames.
        wanted: What is asked for: see `core.read`.
    """

    def __init__(self, rules: core.Rules, wanted: Mapping[str, tuple[str, ...]]) -> None:
        self._rules = rules
        self._wanted = wanted
        self._known: dict[str, _Known] = {}
        self._shapes: dict[_Pieces, _Pieces] = {}
        self._labels: dict[_Whose, _Whose] = {}
        self._unkept: _Known | None = None
        self.n_kept = 0
        """Families that were not read again."""

    @property
    def n_shared(self) -> int:
        """Lists that are kept once for all sandboxes."""
        return len(self._shapes) + len(self._labels)

    def read(self, identifier: str, body: bytes, labels: Labels, before: Families) -> Reading:
        """Read a body.

        Args:
            identifier: The sandbox.
            body: What its shim answered.
            labels: Come first in each line.
            before: What the last body's reading gave, with the same labels; empty if there is none, or what is kept is something else.

        Returns:
            As if all of it had been read: see `core.read`. Call `keep` when it is kept.
        """
        known, self._unkept = self._known.pop(identifier, None), None
        if not (body.startswith(_HELP) and body.endswith(b"\n")) or body.endswith(_END) or body.count(_NEXT) >= PIECES_MAX:
            return core.read(body, labels, self._rules, self._wanted)
        texts = body[len(_HELP) :].split(_NEXT)
        hashes = array("q", map(hash, texts))
        if known is not None and before and len(known.hashes) == len(hashes):
            each = [(piece, text, one != other) for piece, text, one, other in zip(known.pieces, texts, hashes, known.hashes, strict=True)]
            new = [(piece, text) for piece, text, is_changed in each if is_changed or piece.is_read]
            is_alone = all(piece.name in before for piece, _, is_changed in each if is_changed)
            reading = self._read_new(new, labels, before) if is_alone and not any(_EXEMPLAR in text for _, text in new) else None
            if reading is not None:
                self.n_kept += len(texts) - len(new)
                self._unkept = _Known(hashes, known.pieces, self._noted(reading.values, known.values))
                kept = {name: tuple(zip(*each, strict=True)) for name, each in known.values.items() if name not in reading.values}
                return reading._replace(values={**kept, **reading.values})
        reading = core.read(body, labels, self._rules, self._wanted)
        found = self._pieces_of(texts, reading)
        if found is not None:
            self._unkept = _Known(hashes, found, self._noted(reading.values, {}))
        return reading

    def keep(self, identifier: str) -> None:
        """Remember the body that was read last, of which what was read is kept now: what comes next is compared with it."""
        if self._unkept is not None:
            self._known[identifier] = self._unkept

    def forget(self, identifier: str) -> None:
        """Let go of a sandbox: its next body is read as a whole."""
        self._known.pop(identifier, None)

    def clear(self) -> None:
        """Let go of all of them."""
        self._known.clear()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _read_new(self, new: Sequence[tuple[_Piece, bytes]], labels: Labels, before: Families) -> Reading | None:
        """Return the reading of a body of which only these pieces are read; None if they are not what they were."""
        if not new:
            return Reading(before, {}, sum(each.n_series for each in before.values()), {})
        body = _HELP + _NEXT.join([text for _, text in new])
        reading = core.read(body if body.endswith(b"\n") else body + b"\n", labels, self._rules, self._wanted)
        families = dict(before)
        n_dropped = n_found = 0
        for (name, is_read), text in new:
            fragment, old = reading.families.get(name), before.get(name)
            n_left = _left_out(text, fragment)
            is_another = self._renamed(_name_of(text)) != name or (fragment and fragment.kind) != (old and old.kind)
            if n_left is None or (n_left and not is_read) or is_another:
                return None
            n_dropped += n_left
            if fragment is not None:
                families[name] = fragment
                n_found += 1
        n_series = sum(each.n_series for each in families.values())
        if n_dropped != sum(reading.dropped.values()) or n_found != len(reading.families) or n_series >= self._rules.series_max:
            return None
        return Reading(families, reading.values, n_series, reading.dropped)

    def _noted(self, values: Values, before: Mapping[str, _Figures]) -> dict[str, _Figures]:
        """Return what is remembered of figures: most sandboxes have the same labels."""
        if len(self._labels) >= SHAPES_MAX:
            self._labels.clear()
        noted = dict(before)
        for name, rows in values.items():
            labels = tuple([each for each, _ in rows])
            is_small = len(labels) <= SHARED_MAX and sum(len(value) for each in labels for value in each) <= SHARED_CHARACTERS_MAX
            noted[name] = _Figures(
                self._labels.setdefault(labels, labels) if is_small else labels, array("d", [figure for _, figure in rows])
            )
        return noted

    def _pieces_of(self, texts: Sequence[bytes], reading: Reading) -> _Pieces | None:
        """Return what the pieces of a body are, None if they are not one family each."""
        n_dropped = n_found = 0
        found: list[_Piece] = []
        for text in texts:
            name = self._renamed(_name_of(text))
            fragment = reading.families.get(name)
            n_left = _left_out(text, fragment)
            if n_left is None:
                return None
            n_dropped += n_left
            n_found += fragment is not None
            found.append(_Piece(name, n_left > 0))
        are_all = n_dropped == sum(reading.dropped.values()) and n_found == len(reading.families)
        names = {piece.name for piece in found}
        if not are_all or len(names) != len(found):
            return None
        if any(piece.name.endswith(_PARTS) and piece.name.rpartition("_")[0] in names for piece in found):
            return None
        if len(found) > SHARED_MAX:
            return tuple(found)
        if len(self._shapes) >= SHAPES_MAX:
            self._shapes.clear()
        pieces = tuple(found)
        return self._shapes.setdefault(pieces, pieces)

    def _renamed(self, name: bytes) -> str:
        for old, new in self._rules.renames:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        return name.decode("utf-8", "replace")


def _left_out(text: bytes, fragment: Fragment | None) -> int | None:
    """Return how many lines of a piece its family did not get; None if there is more in it than a help, a type and the family's lines."""
    name = _name_of(text)
    begin = b"\n" + name
    suffixes = _PLAIN if fragment is None else _SUFFIXES.get(fragment.kind, _PLAIN)
    n_lines = sum(text.count(begin + suffix) for suffix in suffixes)
    if text.count(b"\n") + (not text.endswith(b"\n")) != n_lines + 2 or text.count(b"\n# TYPE ") != 1:
        return None
    if b"\n# TYPE " + name + b" " not in text:
        return None
    return n_lines if fragment is None else n_lines - fragment.n_series


def _name_of(piece: bytes) -> bytes:
    return next(iter(piece.split(None, 1)), b"")
