"""Histograms: those of all sandboxes as one for the whole machine, with the labels that are not about whose they are.

    kata_shim_rpc_durations_..._bucket{sandbox_id="a",cri_uid="...",...,action="create",le="1"} 3
    kata_shim_rpc_durations_..._bucket{sandbox_id="b",cri_uid="...",...,action="create",le="1"} 4
                                                              ..._bucket{action="create",le="1"} 7

A histogram is many series, and how long calls take is mostly asked of the machine. What is shown are real counters:

- What a sandbox counted more than when it was last looked at is added. If anything of a histogram fell (a bucket by itself, or the sum),
  the sandbox began to count anew, and all that it has now is added.
- Nothing is taken away when a sandbox goes. Of the last ones that went it is remembered what they had counted, so that one that was lost
  out of sight and comes back is not counted twice.
- Under another policy (`begin_anew`) a histogram is shown when a sandbox tells it again, or while one that told it was not read anew. What
  is not shown is kept, so that one that comes back goes on.
- Where there is no room, or other limits stand in the way, histograms go in which no sandbox that is there has a part, and those that are
  not shown. One that comes back after that begins anew.
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
_NO_PARTS: Final[Mapping[bytes, "_Part"]] = {}
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
    life: int = 0
    """Of the total that it is a part of: one that was let go of and is back is another one."""


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

    __slots__ = ("counts", "key", "life", "limits", "n_sandboxes", "n_unread", "seen", "spelled", "sum")

    def __init__(self, key: bytes, read: _Read, *, life: int, seen: int) -> None:
        self.life = life
        self.seen = seen
        """Under which policy, by number, somebody told it last."""
        self.n_unread = 0
        """Sandboxes that have a part in it and were not read since the policy changed."""
        self.n_sandboxes = 0
        """Sandboxes that are there and have a part in it."""
        self.key = key
        """Its labels. All sandboxes' parts have this one copy of them."""
        self.limits = read.limits
        self.spelled = read.spelled
        self.counts = [0] * len(read.limits)
        self.sum = _ZERO

    def is_shown(self, generation: int) -> bool:
        """Tell whether it is shown under a policy."""
        return self.seen == generation or self.n_unread > 0

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

    __slots__ = ("apart", "generation", "is_tidy", "n_buckets", "parts")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        """The policy under which it was read last."""
        self.is_tidy = False
        """Whether parts that count no more were looked for in this answer."""
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
        self._block: tuple[Families, Block] = ({}, block_of({}))
        """What was shown last, and the block of it, in which is kept what was packed."""
        self._generation = 0
        """Grows with each policy."""
        self._n_lives = 0
        self._may_make_room = False
        """Whether there may be totals that can be let go of."""

    def begin_anew(self) -> None:
        """Take in that another policy holds, for each sandbox from its next answer on."""
        self._generation += 1
        self._may_make_room = True
        for family in self._families.values():
            for total in family.totals.values():
                total.n_unread = total.n_sandboxes
            self._change(family)

    def take(self, identifier: str, families: Families, begun: bytes) -> Families:
        """Take a sandbox's histograms in, and return what is left of its families.

        Args:
            identifier: The sandbox.
            families: What it says now.
            begun: What all lines begin with behind the brace: the block of the sandbox's labels.
        """
        sandbox = self._known(identifier)
        sandbox.apart = {}
        sandbox.is_tidy = False
        unread = self._unread(sandbox)
        left: Families = {}
        for name, fragment in families.items():
            if fragment.kind != "histogram" or name.startswith(OWN):
                left[name] = fragment
                continue
            rest = self._take_family(sandbox, name, fragment, begun)
            if rest is not None:
                left[name] = rest
        sandbox.generation = self._generation
        self._have_read(unread)
        return left

    def forget(self, identifier: str) -> None:
        """Take in that a sandbox is gone. What it counted stays."""
        sandbox = self._sandboxes.pop(identifier, None)
        if sandbox is None or not sandbox.parts:
            return
        self._have_read(self._unread(sandbox))
        for name in sandbox.parts:
            self._families[name].n_sandboxes -= 1
            for total, _ in self._living(sandbox, name):
                total.n_sandboxes -= 1
            self._drop_if_empty(name)
        self._may_make_room = True
        self._gone[identifier] = sandbox
        self._n_gone += sandbox.n_buckets
        while self._n_gone > self._room.gone:
            first = next(iter(self._gone))
            self._n_gone -= self._gone.pop(first).n_buckets

    def families(self) -> Families:
        """Return the families of the whole machine, in the order of names. They stay as they are."""
        if self._shown is None:
            made = {name: _fragment(name, family, self._generation) for name, family in sorted(self._families.items())}
            self._shown = {name: fragment for name, fragment in made.items() if fragment.n_series}
        return self._shown

    def block(self) -> tuple[Block, Counts]:
        """Return the families of the whole machine as a view has them, and of how many sandboxes they are."""
        made = self.families()
        if self._block[0] is not made:
            self._block = made, block_of(made)
        return self._block[1], {name: {"histogram": max(1, self._families[name].n_sandboxes)} for name in made}

    def statistics(self) -> MergeFacts:
        """Return what was merged."""
        apart: dict[str, int] = {}
        for sandbox in self._sandboxes.values():
            for reason, n in sandbox.apart.items():
                apart[reason] = apart.get(reason, 0) + n
        totals = (total for family in self._families.values() for total in family.totals.values())
        return MergeFacts(sum(total.is_shown(self._generation) for total in totals), apart)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _known(self, identifier: str) -> _Sandbox:
        """Return what is remembered of a sandbox, also of one that went and is back."""
        sandbox = self._sandboxes.get(identifier)
        if sandbox is None:
            sandbox = self._gone.pop(identifier, None)
            if sandbox is None:
                sandbox = _Sandbox(self._generation)
            else:
                self._n_gone -= sandbox.n_buckets
                self._bring_back(sandbox)
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
        total, before = self._total(name, key), sandbox.parts.get(name, _NO_PARTS).get(key)
        if before is not None and (total is None or before.life != total.life):
            self._drop_part(sandbox, name, key)
            before = None
        if total is not None and total.limits != read.limits:
            n_others = total.n_sandboxes - (before is not None)
            if n_others and total.is_shown(self._generation):
                return "bounds"
            if before is not None:
                self._drop_part(sandbox, name, key)
            self._let_go(name, total)
            total = before = None
        if before is not None and total is not None and before.counts == part.counts and before.sum == part.sum:
            self._see(name, total)
            return ""
        if total is not None and not total.n_sandboxes and sum(part.counts) + sum(total.counts) > COUNT_MAX:
            self._let_go(name, total)
            total = None
        if not self._has_room(sandbox, name, key, part, total=total, is_new=before is None):
            return "room"
        if total is None:
            total = self._made(name, key, read, text_of_help)
        self._put(sandbox, name, total, part, before=before)
        return ""

    def _has_room(self, sandbox: _Sandbox, name: str, key: bytes, part: _Part, *, total: _Total | None, is_new: bool) -> bool:
        """Tell whether there is room for a part, and for a total if there is none; make some if there is not."""
        n_buckets = len(part.counts)
        if sum(part.counts) + (0 if total is None else sum(total.counts)) > COUNT_MAX:
            return False
        if total is None and len(name) + len(key) > NAME_BYTES_MAX:
            return False
        if is_new and sandbox.n_buckets + n_buckets > self._room.sandbox:
            self._tidy(sandbox)
            if sandbox.n_buckets + n_buckets > self._room.sandbox:
                return False
        if total is None and self._n_buckets + n_buckets > self._room.shown:
            self._make_room()
            return self._n_buckets + n_buckets <= self._room.shown
        return True

    def _put(self, sandbox: _Sandbox, name: str, total: _Total, part: _Part, *, before: _Part | None) -> None:
        """Remember a part and add what is new in it."""
        family = self._families[name]
        parts = sandbox.parts.get(name)
        if parts is None:
            parts = sandbox.parts[name] = {}
            family.n_sandboxes += 1
        if before is None:
            sandbox.n_buckets += len(part.counts)
            total.n_sandboxes += 1
        parts[total.key] = _Part(part.counts, part.sum, total.life)
        _grow(total, part, before)
        total.seen = self._generation
        self._change(family)

    def _see(self, name: str, total: _Total) -> None:
        """Take in that somebody told what was told before."""
        if total.seen != self._generation:
            total.seen = self._generation
            self._change(self._families[name])

    def _change(self, family: _Family) -> None:
        """Have a family made anew."""
        family.fragment = self._shown = None
        self.n_changes += 1

    # --- totals that come and go --------------------------------------------------------------------------------------

    def _total(self, name: str, key: bytes) -> _Total | None:
        family = self._families.get(name)
        return None if family is None else family.totals.get(key)

    def _made(self, name: str, key: bytes, read: _Read, text_of_help: bytes) -> _Total:
        """Begin a total."""
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = _Family(text_of_help)
        self._n_lives += 1
        total = family.totals[key] = _Total(key, read, life=self._n_lives, seen=self._generation)
        self._n_buckets += len(read.limits)
        return total

    def _let_go(self, name: str, total: _Total) -> None:
        """Let go of a total. Parts in it count no more: they are of another life than one that comes after it."""
        family = self._families[name]
        del family.totals[total.key]
        self._n_buckets -= len(total.limits)
        self._change(family)
        self._drop_if_empty(name)

    def _make_room(self) -> None:
        """Let go of all totals in which no sandbox that is there has a part, and of those that are not shown."""
        if not self._may_make_room:
            return
        self._may_make_room = False
        every = [(name, total) for name, family in self._families.items() for total in family.totals.values()]
        for name, total in every:
            if not total.n_sandboxes or not total.is_shown(self._generation):
                self._let_go(name, total)

    def _tidy(self, sandbox: _Sandbox) -> None:
        """Forget a sandbox's parts in totals that are gone, or not shown; once for each of its answers."""
        if sandbox.is_tidy:
            return
        sandbox.is_tidy = True
        for name, key in [(name, key) for name, parts in sandbox.parts.items() for key in parts]:
            total = self._total(name, key)
            is_part = total is not None and total.life == sandbox.parts[name][key].life
            if not is_part or total is None or not total.is_shown(self._generation):
                self._drop_part(sandbox, name, key)

    def _drop_part(self, sandbox: _Sandbox, name: str, key: bytes) -> None:
        """Forget a part of a sandbox that is there. What it counted stays."""
        parts = sandbox.parts[name]
        part = parts.pop(key)
        sandbox.n_buckets -= len(part.counts)
        total = self._total(name, key)
        if total is not None and total.life == part.life:
            total.n_sandboxes -= 1
        if not parts:
            del sandbox.parts[name]
            self._families[name].n_sandboxes -= 1
            self._drop_if_empty(name)

    def _drop_if_empty(self, name: str) -> None:
        family = self._families[name]
        if not family.totals and not family.n_sandboxes:
            del self._families[name]

    def _living(self, sandbox: _Sandbox, name: str) -> list[tuple[_Total, _Part]]:
        """Return a sandbox's parts of a family that count, and what they are parts of."""
        found = []
        for key, part in sandbox.parts[name].items():
            total = self._total(name, key)
            if total is not None and total.life == part.life:
                found.append((total, part))
        return found

    def _bring_back(self, sandbox: _Sandbox) -> None:
        """Have the parts of a sandbox that went and is back count again, those of which the totals are still there."""
        sandbox.generation = self._generation
        parts = {name: self._living(sandbox, name) for name in sandbox.parts}
        sandbox.parts = {name: {total.key: part for total, part in living} for name, living in parts.items() if living}
        sandbox.n_buckets = sum(len(part.counts) for living in parts.values() for _, part in living)
        for name in sandbox.parts:
            self._families[name].n_sandboxes += 1
            for total, _ in parts[name]:
                total.n_sandboxes += 1

    def _unread(self, sandbox: _Sandbox) -> list[tuple[str, _Total]]:
        """Return the totals that are shown, too, because a sandbox was not read since the policy changed."""
        if sandbox.generation == self._generation:
            return []
        return [(name, total) for name in sandbox.parts for total, _ in self._living(sandbox, name)]

    def _have_read(self, totals: list[tuple[str, _Total]]) -> None:
        """Take in that one of the sandboxes for which totals were shown was read, or is gone."""
        for name, total in totals:
            total.n_unread -= 1
            if not total.is_shown(self._generation):
                self._may_make_room = True
                family = self._families.get(name)
                if family is not None:
                    self._change(family)

    # --- what stays apart ---------------------------------------------------------------------------------------------

    def _rest(self, fragment: Fragment, begun: bytes, refused: Mapping[bytes, str]) -> Fragment:
        """Return the histograms that stay with their sandbox."""
        lines = _lines_of(fragment.text, begun, self._cut, refused)
        open_text = fragment.open_text
        opened = None if open_text is None else b"".join(_lines_of(open_text, begun, self._cut, refused))
        return Fragment("histogram", fragment.help, b"".join(lines), len(lines), opened)


def _fragment(name: str, family: _Family, generation: int) -> Fragment:
    """Return a family as it is shown; made anew only if it changed."""
    if family.fragment is None:
        totals = [total for _, total in sorted(family.totals.items()) if total.is_shown(generation)]
        lines = [line for total in totals for line in total.lines(name)]
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
