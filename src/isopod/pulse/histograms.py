"""Histograms: those of all sandboxes as one for the whole machine, with the labels that are not about whose they are.

    kata_shim_rpc_durations_..._bucket{sandbox_id="a",cri_uid="...",...,action="create",le="1"} 3
    kata_shim_rpc_durations_..._bucket{sandbox_id="b",cri_uid="...",...,action="create",le="1"} 4
                                                              ..._bucket{action="create",le="1"} 7

A histogram is many series, and how long calls take is mostly asked of the machine. What is shown are real counters:

- What a sandbox counted more than when it was last looked at is added. If anything of a histogram fell (a bucket by itself, or the sum),
  the sandbox began to count anew, and all that it has now is added.
- Nothing is taken away when a sandbox goes. Of the last ones that went it is remembered what they had counted, so that one that was lost
  out of sight and comes back is not counted twice.
- A histogram is added as a whole or not at all. One that cannot be added stays among the sandbox's own families, with its labels, and is
  counted by why: its limits are others than those that were added under the same labels first ("bounds"), it contradicts itself or lacks
  its last bucket, sum or count, or counts what may be below zero ("form"), or there is no more room ("room").

Exact: counts are whole numbers, sums are added as decimals. Exemplars and times of single sandboxes go. Memory is bounded: by the number of
buckets of what is shown, of one sandbox, and of those that went, and by the length of names. What is shown is as honest as the least honest
sandbox: who must tell them apart leaves them apart.

Not here: a histogram's unit (`base_units`), and rules (`policy`): both come before.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Context, Decimal
from itertools import pairwise
from typing import Final, NamedTuple

from isopod.pulse.merge import Block, Counts, block_of
from isopod.pulse.model import Families, Fragment

OWN: Final = ("kata_monitor_", "kata_pulse_")
"""Beginnings of names that are the agent's: what sandboxes call so is left with them."""
DIGITS_MAX: Final = 32
"""Of a limit; and of a sum, of which longer ones are first rounded to floats."""
NAME_BYTES_MAX: Final = 1024
"""Of a family's name and a histogram's labels together; also of a help."""
COUNT_MAX: Final = 1 << 53
"""So far every reader counts exactly."""
CUTS_MAX: Final = 20_000
CUT_BYTES_MAX: Final = 512
_EXACT: Final = Context(prec=80)
_ZERO: Final = Decimal(0)
_LABEL: Final = re.compile(rb',([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', re.DOTALL)


class Room(NamedTuple):
    """How many buckets are kept: of what is shown, of one sandbox, of all those that went."""

    shown: int = 50_000
    sandbox: int = 5_000
    gone: int = 200_000


class MergeFacts(NamedTuple):
    """What was merged.

    Args:
        n_merged: Histograms that are shown for the whole machine.
        apart: Histograms of sandboxes that are there now which are shown with these, by why.
    """

    n_merged: int
    apart: Mapping[str, int]


class _Cut(NamedTuple):
    """The labels of a line behind the sandbox's block, taken apart."""

    key: bytes
    """Those that are not the limit, in the order of their names; without those that have no value, which mean nothing."""
    spelled: bytes
    """The limit, b"" in a line that is no bucket."""
    limit: float


class _Part(NamedTuple):
    """What a sandbox had counted when it was last looked at: by bucket, not summed up."""

    counts: tuple[int, ...]
    sum: Decimal


class _Read:
    """A histogram of one answer, as far as its lines were read."""

    __slots__ = ("limits", "n", "rising", "spelled", "sum")

    def __init__(self) -> None:
        self.limits: list[float] = []
        self.spelled: list[bytes] = []
        self.rising: list[int] = []
        self.n = -1
        self.sum: Decimal | None = None

    def part(self) -> _Part | None:
        """Return its figures, None if it cannot be added."""
        limits, rising = self.limits, self.rising
        if not limits or limits[-1] != math.inf or limits[0] < 0.0 or self.sum is None or self.n != rising[-1]:
            return None
        if any(one >= later for one, later in pairwise(limits)) or any(len(each) > DIGITS_MAX for each in self.spelled):
            return None
        counts = (rising[0], *[later - one for one, later in pairwise(rising)])
        return _Part(counts, self.sum) if min(counts) >= 0 and self.sum >= _ZERO else None


class _Total:
    """A histogram of the whole machine."""

    __slots__ = ("counts", "key", "limits", "spelled", "sum")

    def __init__(self, key: bytes, read: _Read) -> None:
        self.key = key
        """Its labels. All sandboxes' parts have this one copy of them."""
        self.limits = read.limits
        self.spelled = read.spelled
        self.counts = [0] * len(read.limits)
        self.sum = _ZERO

    def lines(self, name: str) -> Iterator[bytes]:
        """Iterate over its lines."""
        begin, labels = name.encode(), self.key[1:]
        n = 0
        for spelled, count in zip(self.spelled, self.counts, strict=True):
            n += count
            yield b'%b_bucket{%b%ble="%b"} %d\n' % (begin, labels, b"," if labels else b"", spelled, n)
        shown = b"{%b}" % labels if labels else b""
        yield b"%b_sum%b %b\n" % (begin, shown, _written(self.sum))
        yield b"%b_count%b %d\n" % (begin, shown, n)


class _Family:
    """The histograms of one name."""

    __slots__ = ("fragment", "help", "n_sandboxes", "totals")

    def __init__(self, text_of_help: bytes) -> None:
        self.help = text_of_help if len(text_of_help) <= NAME_BYTES_MAX else b""
        self.totals: dict[bytes, _Total] = {}
        self.n_sandboxes = 0
        self.fragment: Fragment | None = None
        """As it is shown, None if that is to be made anew."""


class _Sandbox:
    """What is remembered of a sandbox."""

    __slots__ = ("apart", "n_buckets", "parts")

    def __init__(self) -> None:
        self.parts: dict[str, dict[bytes, _Part]] = {}
        self.n_buckets = 0
        self.apart: dict[str, int] = {}


class Histograms:
    """The histograms of the whole machine.

    Args:
        room: How much is kept.
    """

    def __init__(self, room: Room = Room()) -> None:  # noqa: B008 - immutable
        self.n_changes = 0
        """Grows with what is shown."""
        self._room = room
        self._families: dict[str, _Family] = {}
        self._sandboxes: dict[str, _Sandbox] = {}
        self._gone: dict[str, _Sandbox] = {}
        """Those that went, the first that went first."""
        self._n_buckets = 0
        self._n_gone = 0
        self._cuts: dict[bytes, _Cut] = {}
        self._shown: Families | None = None

    def take(self, identifier: str, families: Families, begun: bytes) -> Families:
        """Take a sandbox's histograms in, and return what is left of its families.

        Args:
            identifier: The sandbox.
            families: What it says now.
            begun: What all lines begin with behind the brace: the block of the sandbox's labels.
        """
        sandbox = self._known(identifier)
        sandbox.apart = {}
        left: Families = {}
        for name, fragment in families.items():
            if fragment.kind != "histogram" or name.startswith(OWN):
                left[name] = fragment
                continue
            rest = self._take_family(sandbox, name, fragment, begun)
            if rest is not None:
                left[name] = rest
        return left

    def forget(self, identifier: str) -> None:
        """Take in that a sandbox is gone. What it counted stays."""
        sandbox = self._sandboxes.pop(identifier, None)
        if sandbox is None or not sandbox.parts:
            return
        for name in sandbox.parts:
            self._families[name].n_sandboxes -= 1
        self._gone[identifier] = sandbox
        self._n_gone += sandbox.n_buckets
        while self._n_gone > self._room.gone:
            first = next(iter(self._gone))
            self._n_gone -= self._gone.pop(first).n_buckets

    def families(self) -> Families:
        """Return the families of the whole machine, in the order of names. They stay as they are."""
        if self._shown is None:
            self._shown = {name: _fragment(name, family) for name, family in sorted(self._families.items())}
        return self._shown

    def block(self) -> tuple[Block, Counts]:
        """Return the families of the whole machine as a view has them, and of how many sandboxes they are."""
        made = self.families()
        return block_of(made), {name: {"histogram": max(1, self._families[name].n_sandboxes)} for name in made}

    def statistics(self) -> MergeFacts:
        """Return what was merged."""
        apart: dict[str, int] = {}
        for sandbox in self._sandboxes.values():
            for reason, n in sandbox.apart.items():
                apart[reason] = apart.get(reason, 0) + n
        return MergeFacts(sum(len(family.totals) for family in self._families.values()), apart)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _known(self, identifier: str) -> _Sandbox:
        """Return what is remembered of a sandbox, also of one that went and is back."""
        sandbox = self._sandboxes.get(identifier)
        if sandbox is None:
            sandbox = self._gone.pop(identifier, None)
            if sandbox is None:
                sandbox = _Sandbox()
            else:
                self._n_gone -= sandbox.n_buckets
                for name in sandbox.parts:
                    self._families[name].n_sandboxes += 1
            self._sandboxes[identifier] = sandbox
        return sandbox

    def _take_family(self, sandbox: _Sandbox, name: str, fragment: Fragment, begun: bytes) -> Fragment | None:
        """Add a family; return what of it cannot be added."""
        refused: dict[bytes, str] = {}
        for key, read in self._read(name, fragment.text, begun).items():
            part = read.part()
            why = "form" if part is None else self._add(sandbox, name, key, read, part=part, text_of_help=fragment.help)
            if why:
                refused[key] = why
                sandbox.apart[why] = sandbox.apart.get(why, 0) + 1
        return self._rest(fragment, begun, refused) if refused else None

    def _read(self, name: str, text: bytes, begun: bytes) -> dict[bytes, _Read]:
        """Return the histograms of a family by their labels."""
        begin = b"{" + begun
        a_bucket, a_sum = f"{name}_bucket".encode(), f"{name}_sum".encode()
        found: dict[bytes, _Read] = {}
        cuts = self._cuts
        for line in text[:-1].split(b"\n"):
            part, _, rest = line.partition(begin)
            labels, _, figure = rest.rpartition(b"} ")
            cut = cuts.get(labels) or self._cut(labels)
            read = found.get(cut.key)
            if read is None:
                read = found[cut.key] = _Read()
            if b" " in figure:
                figure = figure.partition(b" ")[0]
            if part == a_bucket:
                read.limits.append(cut.limit)
                read.spelled.append(cut.spelled)
                read.rising.append(_whole(figure))
            elif part == a_sum:
                read.sum = _decimal(figure)
            else:
                read.n = _whole(figure)
        return found

    def _cut(self, labels: bytes) -> _Cut:
        spelled = b""
        pairs = []
        for label in _LABEL.finditer(labels):
            if label[1] == b"le":
                spelled = label[2]
            elif label[2]:
                pairs.append(label[0])
        cut = _Cut(b"".join(sorted(pairs)), spelled, float(spelled) if spelled else math.nan)
        if len(labels) <= CUT_BYTES_MAX:
            if len(self._cuts) >= CUTS_MAX:
                self._cuts.clear()
            self._cuts[labels] = cut
        return cut

    def _add(self, sandbox: _Sandbox, name: str, key: bytes, read: _Read, *, part: _Part, text_of_help: bytes) -> str:
        """Add what a sandbox counted more; return why it cannot be, "" if it was."""
        family = self._families.get(name)
        total = None if family is None else family.totals.get(key)
        if total is not None and total.limits != read.limits:
            return "bounds"
        parts = sandbox.parts.get(name)
        before = None if parts is None else parts.get(key)
        if before == part:
            return ""
        n_buckets = len(part.counts)
        if sum(part.counts) + (0 if total is None else sum(total.counts)) > COUNT_MAX:
            return "room"
        if total is None and len(name) + len(key) > NAME_BYTES_MAX:
            return "room"
        if before is None and sandbox.n_buckets + n_buckets > self._room.sandbox:
            return "room"
        if total is None and self._n_buckets + n_buckets > self._room.shown:
            return "room"
        if family is None:
            family = self._families[name] = _Family(text_of_help)
        if total is None:
            total = family.totals[key] = _Total(key, read)
            self._n_buckets += n_buckets
        if parts is None:
            parts = sandbox.parts[name] = {}
            family.n_sandboxes += 1
        if before is None:
            sandbox.n_buckets += n_buckets
        parts[total.key] = part
        _grow(total, part, before)
        family.fragment = self._shown = None
        self.n_changes += 1
        return ""

    def _rest(self, fragment: Fragment, begun: bytes, refused: Mapping[bytes, str]) -> Fragment:
        """Return the histograms that stay with their sandbox."""
        lines = _lines_of(fragment.text, begun, self._cut, refused)
        open_text = fragment.open_text
        opened = None if open_text is None else b"".join(_lines_of(open_text, begun, self._cut, refused))
        return Fragment("histogram", fragment.help, b"".join(lines), len(lines), opened)


def _fragment(name: str, family: _Family) -> Fragment:
    """Return a family as it is shown; made anew only if it changed."""
    if family.fragment is None:
        lines = [line for _, total in sorted(family.totals.items()) for line in total.lines(name)]
        family.fragment = Fragment("histogram", family.help, b"".join(lines), len(lines))
    return family.fragment


def _grow(total: _Total, part: _Part, before: _Part | None) -> None:
    """Add what is new in a part."""
    is_anew = before is None or part.sum < before.sum or any(now < then for now, then in zip(part.counts, before.counts, strict=True))
    if before is None or is_anew:
        total.counts = [one + more for one, more in zip(total.counts, part.counts, strict=True)]
        total.sum = _EXACT.add(total.sum, part.sum)
        return
    total.counts = [one + now - then for one, now, then in zip(total.counts, part.counts, before.counts, strict=True)]
    total.sum = _EXACT.add(total.sum, _EXACT.subtract(part.sum, before.sum))


def _lines_of(text: bytes, begun: bytes, cut: Callable[[bytes], _Cut], wanted: Mapping[bytes, str]) -> list[bytes]:
    begin = b"{" + begun
    lines = text[:-1].split(b"\n") if text else []
    return [line + b"\n" for line in lines if cut(_labels_of(line.partition(begin)[2])).key in wanted]


def _labels_of(text: bytes) -> bytes:
    """Return the labels that a line goes on with; behind its value there may be an exemplar, which has labels, too."""
    end = 0
    while (label := _LABEL.match(text, end)) is not None:
        end = label.end()
    return text[:end]


def _whole(text: bytes) -> int:
    return int(text) if text.isdigit() else int(float(text))


def _decimal(text: bytes) -> Decimal | None:
    figure = float(text)
    if not math.isfinite(figure):
        return None
    return Decimal(text.decode() if len(text) <= DIGITS_MAX else repr(figure))


def _written(figure: Decimal) -> bytes:
    value = float(figure)
    return b"%d" % value if value.is_integer() and value < 1e15 else repr(value).encode()
