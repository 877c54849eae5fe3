"""Write requests: the samples of a round as bodies of Prometheus' remote write 1.0, before they are packed.

    WriteRequest { timeseries = 1 }    TimeSeries { labels = 1, samples = 2 }
    Label { name = 1, value = 2 }      Sample { value = 1 (double), timestamp = 2 (int64, milliseconds) }

The figures of a series change with each round, its labels do not. All lines of a sandbox begin with the same block of labels, and what
stands around the block (the stem) is the same for all sandboxes: so labels are read once for each stem and encoded once for each block,
and a line costs a look-up and a join. Stems are kept in two generations, so that those of yesterday go; blocks as long as they are used.

A series that was in the last round and is not in this one gets one sample more: the marker by which Prometheus knows that it ended.

Rules: labels in the order of their names, `__name__` among them; those without a value left out, as they mean the same as none; a label
given for all series never takes the place of one that a series has. Not here: packing, queues and the network (`push`).
Source: Prometheus Remote-Write 1.0 specification; prometheus/prompb's documented field numbers; the text format 0.0.4.
"""

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from isopod.pulse.model import Labels
from isopod.runtime.scheduling import maybe_yield

SAMPLES_MAX: Final = 2000
"""Of one request."""
REQUEST_BYTES_MAX: Final = 4 << 20
"""Of one request before it is packed, but for its last series: labels may be long."""
STALE_BITS: Final = 0x7FF0000000000002
"""The NaN that says that a series ended."""
STEMS_MAX: Final = 16_384
LINES_PER_TURN: Final = 256
MARK: Final = b"\x01"
"""Stands in a stem for the brace and the sandbox's labels behind it."""
_LABEL: Final = rb'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_STEM: Final = re.compile(rb"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:([{\x01]),?((?:" + _LABEL + rb")(?:," + _LABEL + rb")*)?,?\})?")
_EACH: Final = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\.)*)"')
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)
_TIMESTAMP: Final = re.compile(rb"-?[0-9]{1,19}")
_INT64: Final = (1 << 63) - 1
_SAMPLE: Final = b"\x12%b\x09"
_NAME: Final = b"__name__"

Runs = tuple[tuple[int, int], ...]
"""Which of the sandbox's labels stand between a stem's own: from, and up to but not with."""


class Row(NamedTuple):
    """Lines that begin with the same labels.

    Args:
        block: These labels, as they stand behind the brace; empty for none.
        texts: The lines, each ended by a newline.
    """

    block: bytes
    texts: Sequence[bytes]


class Request(NamedTuple):
    """One body."""

    body: bytes
    n_samples: int
    n_stale: int
    """Of the samples, those that say that a series ended."""


class Encoder:
    """Makes bodies, and remembers which series were in the last round.

    Args:
        labels: Given to all series that have no label of the name.
        stems_max: How many stems are kept of each of two generations.
    """

    def __init__(self, labels: Labels = (), *, stems_max: int = STEMS_MAX) -> None:
        self._stems_max = stems_max
        self._labels = {name.encode(): value.encode() for name, value in labels if value}
        self._groups: dict[tuple[bytes, ...], _Group] = {}
        self._blocks: dict[bytes, _Block] = {}
        self._shown: dict[bytes, tuple[_Block, tuple[_Plan, ...]]] = {}
        """By a block's labels, which stems the last round had. Sandboxes with the same stems have the same tuple."""
        self._tuples: dict[tuple[_Plan, ...], tuple[_Plan, ...]] = {}
        self._n_made = 0
        self.n_unreadable = 0
        """Lines that are no samples."""

    async def encode(self, rows: Iterable[Row], at_ms: int, emit: Callable[[Request], None]) -> None:
        """Make the bodies of one round; others get their turn all the time.

        Args:
            rows: All lines there are.
            at_ms: When that was, since the Unix epoch.
            emit: Given each body, in order.
        """
        writer = _Writer(at_ms, emit)
        blocks: dict[bytes, _Block] = {}
        shown: dict[bytes, tuple[_Block, tuple[_Plan, ...]]] = {}
        tuples: dict[tuple[_Plan, ...], tuple[_Plan, ...]] = {}
        for row in rows:
            block = blocks[row.block] = self._blocks.get(row.block) or self._block(row.block)
            plans: list[_Plan] = []
            for text in row.texts:
                lines = (text.replace(b"{" + row.block, MARK) if row.block else text).split(b"\n")
                lines.pop()
                for begin in range(0, len(lines), LINES_PER_TURN):
                    self._write(lines[begin : begin + LINES_PER_TURN], block, writer, plans)
                    if writer.is_turn_over():
                        await maybe_yield()
            if plans:
                known = shown.get(block.key)
                told = (*known[1], *plans) if known else tuple(plans)
                told = tuples.setdefault(told, self._tuples.get(told, told))
                shown[block.key] = (block, told)
        await self._end(shown, writer)
        writer.end()
        self._blocks, self._shown, self._tuples = blocks, shown, tuples

    # --- inside -------------------------------------------------------------------------------------------------------

    def _write(self, lines: Sequence[bytes], block: "_Block", writer: "_Writer", plans: list["_Plan"]) -> None:
        """Write the samples of lines. The innermost loop: it runs for every series of every round."""
        get = block.group.young.get
        for line in lines:
            stem, _, figure = line.rpartition(b" ")
            plan = get(stem)
            at_ms = None
            if plan is None:
                plan = self._plan(stem, block.group)
                get = block.group.young.get
                if plan is None:
                    plan, figure, at_ms = self._timed(stem, figure, block.group)
                    get = block.group.young.get
            try:
                value = float(figure)
            except ValueError:
                plan, value = None, 0.0
            if plan is None:
                self.n_unreadable += 1
                continue
            writer.write(block.series(plan), value, at_ms)
            plans.append(plan)

    def _timed(self, stem: bytes, timestamp: bytes, group: "_Group") -> "tuple[_Plan | None, bytes, int | None]":
        """Take a line apart that ends with a time: return how its labels are written, its figure and the time."""
        stem, _, figure = stem.rpartition(b" ")
        if not _TIMESTAMP.fullmatch(timestamp) or abs(int(timestamp)) > _INT64:
            return None, b"", None
        return group.young.get(stem) or self._plan(stem, group), figure, int(timestamp)

    def _block(self, block: bytes) -> "_Block":
        labels = {name: value for name, value in _labels(block).items() if value}
        names = tuple(sorted(labels))
        group = self._groups.get(names)
        if group is None:
            group = self._groups[names] = _Group(names)
        return _Block(group, [_label(name, labels[name]) for name in names])

    def _plan(self, stem: bytes, group: "_Group") -> "_Plan | None":
        """Return how a stem's labels are written; None if it is none."""
        plan = group.old.get(stem)
        if plan is None:
            found = _STEM.fullmatch(stem)
            if found is None:
                return None
            own = {**_labels(found[3] or b""), _NAME: found[1]}
            plan = _merged(stem, own, self._labels, group.names if found[2] == MARK else ())
        self._n_made += 1
        if self._n_made >= self._stems_max:
            self._n_made = 0
            for each in self._groups.values():
                each.old, each.young = each.young, {}
            used = {names: each for names, each in self._groups.items() if each.old or each is group}
            self._groups = used
        group.young[stem] = plan
        self._groups[group.names] = group  # a block may have outlived the group's last stem
        return plan

    async def _end(self, shown: "Mapping[bytes, _Shown]", writer: "_Writer") -> None:
        """Say of the series that the last round had and this one has not that they ended.

        What stands in another row now, or with its labels in another order, is the same series: what is sent of its labels decides. Of
        those that came anew the hashes are kept: all may have, and that would be many bytes.
        """
        gone = await _more(self._shown, shown)
        if not gone:
            return
        fresh: dict[int, None] = {}
        for block, plans in await _more(shown, self._shown):
            fresh.update(dict.fromkeys([hash(block.series(plan)) for plan in plans]))
            await maybe_yield()
        for block, plans in gone:
            for plan in plans:
                series = block.series(plan)
                if hash(series) not in fresh:
                    writer.write_stale(series)
            await maybe_yield()


class _Plan:
    """How the labels of one stem are written: its own, encoded, with gaps for runs of the sandbox's between them."""

    __slots__ = ("pieces", "runs", "stem")

    def __init__(self, stem: bytes, pieces: list[bytes], runs: Runs) -> None:
        self.stem = stem
        self.pieces = pieces
        """The gaps are the second, the fourth, and so on."""
        self.runs = runs


class _Group:
    """The stems of all blocks that have labels of the same names."""

    __slots__ = ("names", "old", "young")

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self.names = names
        self.young: dict[bytes, _Plan] = {}
        self.old: dict[bytes, _Plan] = {}


class _Block:
    """A sandbox's labels, encoded, in the order of their names."""

    __slots__ = ("_encoded", "_runs", "group", "key")

    def __init__(self, group: _Group, encoded: list[bytes]) -> None:
        self.group = group
        self.key = b"".join(encoded)
        self._encoded = encoded
        self._runs: dict[Runs, list[bytes]] = {}

    def series(self, plan: _Plan) -> bytes:
        """Return all labels of a series as they are sent."""
        runs = plan.runs
        if not runs:
            return plan.pieces[0]
        filled = self._runs.get(runs)
        if filled is None:
            filled = self._runs[runs] = [b"".join(self._encoded[begin:end]) for begin, end in runs]
        pieces = plan.pieces.copy()
        pieces[1::2] = filled
        return b"".join(pieces)


class _Writer:
    """Puts series into bodies.

    Args:
        at_ms: The time of samples that have none of their own.
        emit: Given each body.
    """

    def __init__(self, at_ms: int, emit: Callable[[Request], None]) -> None:
        self._emit = emit
        self._pieces: list[bytes] = []
        self._n_bytes = self._n_samples = self._n_stale = self._n_since = 0
        time = b"\x10" + _varint(at_ms)
        self._head = _SAMPLE % _varint(9 + len(time))
        self._time = time
        self._pack = struct.Struct(f"<3sd{len(time)}s").pack
        self._stale = self._head + struct.pack("<Q", STALE_BITS) + time

    def write(self, labels: bytes, value: float, at_ms: int | None = None) -> None:
        """Add a series of one sample.

        Args:
            labels: Encoded.
            value: The figure.
            at_ms: When it was so; None for the round's time.
        """
        if at_ms is None:
            self._add(labels, self._pack(self._head, value, self._time))
        else:
            time = b"\x10" + _varint(at_ms)
            self._add(labels, _SAMPLE % _varint(9 + len(time)) + struct.pack("<d", value) + time)

    def write_stale(self, labels: bytes) -> None:
        """Say that a series ended."""
        self._n_stale += 1
        self._add(labels, self._stale)

    def is_turn_over(self) -> bool:
        """Return whether many samples were written since this was last so."""
        if self._n_since < LINES_PER_TURN:
            return False
        self._n_since = 0
        return True

    def end(self) -> None:
        """Give away what is left."""
        if self._n_samples:
            self._emit(Request(b"".join(self._pieces), self._n_samples, self._n_stale))
        self._pieces = []
        self._n_bytes = self._n_samples = self._n_stale = 0

    def _add(self, labels: bytes, sample: bytes) -> None:
        n_bytes = len(labels) + len(sample)
        head = _LENGTHS[n_bytes] if n_bytes < _LENGTHS_MAX else b"\x0a" + _varint(n_bytes)
        self._pieces += (head, labels, sample)
        self._n_bytes += n_bytes
        self._n_samples += 1
        self._n_since += 1
        if self._n_samples >= SAMPLES_MAX or self._n_bytes >= REQUEST_BYTES_MAX:
            self.end()


_Shown = tuple[_Block, Sequence[_Plan]]


async def _more(these: Mapping[bytes, _Shown], others: Mapping[bytes, _Shown]) -> list[_Shown]:
    """Return what these rows have that the others have not."""
    found: list[_Shown] = []
    for key, (block, plans) in these.items():
        other = others.get(key)
        if other is None:
            found.append((block, plans))
        elif other[1] is not plans:
            stems = {plan.stem: None for plan in other[1]}
            more = [plan for plan in plans if plan.stem not in stems]
            if more:
                found.append((block, more))
            await maybe_yield()
    return found


def _merged(stem: bytes, own: Mapping[bytes, bytes], given: Mapping[bytes, bytes], names: tuple[bytes, ...]) -> _Plan:
    """Return a stem's plan.

    Args:
        stem: The stem.
        own: Its own labels.
        given: Those given to all series.
        names: Of the sandbox's labels, in order.
    """
    taken = dict.fromkeys(names)
    held = {name: value for name, value in own.items() if value and name not in taken}
    every = {**{name: value for name, value in given.items() if name not in taken}, **held}
    pieces, runs, end = [b""], [], 0
    for name in sorted(every):
        begin = end
        while end < len(names) and names[end] < name:
            end += 1
        if end > begin:
            runs.append((begin, end))
            pieces += (b"", b"")
        pieces[-1] += _label(name, every[name])
    if end < len(names):
        runs.append((end, len(names)))
        pieces += (b"", b"")
    return _Plan(stem, pieces, tuple(runs))


def _labels(text: bytes) -> dict[bytes, bytes]:
    """Return labels as they stand between braces, without their escapes."""
    return {name: _ESCAPE.sub(_unescaped, value) if b"\\" in value else value for name, value in _EACH.findall(text)}


def _unescaped(found: re.Match[bytes]) -> bytes:
    return b"\n" if found[1] == b"n" else found[1]


def _label(name: bytes, value: bytes) -> bytes:
    inner = b"\x0a%b%b\x12%b%b" % (_varint(len(name)), name, _varint(len(value)), value)
    return b"\x0a" + _varint(len(inner)) + inner


def _varint(number: int) -> bytes:
    number &= 0xFFFF_FFFF_FFFF_FFFF  # negative ones in two's complement, as int64 has them
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_LENGTHS_MAX: Final = 2048
_LENGTHS: Final = [b"\x0a" + _varint(n_bytes) for n_bytes in range(_LENGTHS_MAX)]
"""The tag and length of most series."""
