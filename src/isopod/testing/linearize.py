"""Linearizability: could the answers of a concurrent history have come from one copy, used by one client at a time?

Yes if every operation can be given one instant between its call and its answer, so that in the order of those instants each answer is what
the specification says (Herlihy and Wing, "Linearizability: A Correctness Condition for Concurrent Objects", 1990). The search is Wing and
Gong's ("Testing and Verifying Concurrent Objects", 1993) with Lowe's memory of what was tried ("Testing for Linearizability", 2017): a
pair of the set of operations placed and the state reached is visited once. Keys are independent objects, and linearizability is local, so
each is checked alone.

An operation without an answer may be placed anywhere after its call, or nowhere. The search is bounded: "undecided" is neither yes nor no,
and whoever asks must not count it as a yes.
"""

from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from isopod.testing.history import UNKNOWN, Operation, by_key
from isopod.testing.specifications import Specification

STEPS_MAX: Final = 500_000
"""Placements tried per key before the search gives up."""


class Verdict(StrEnum):
    """What was found."""

    LINEARIZABLE = "linearizable"
    VIOLATED = "violated"
    UNDECIDED = "undecided"


class Finding(NamedTuple):
    """The outcome for a history.

    `key` and `operations` are those of the first key that is not linearizable, cut down to what is needed to see it; `state` is the
    state reached by the longest order that is possible, `stuck` the operations of which none can come next.
    """

    verdict: Verdict
    n_steps: int
    key: str = ""
    operations: tuple[Operation, ...] = ()
    state: Hashable = None
    stuck: tuple[Operation, ...] = ()

    def explain(self) -> str:
        """Return the violation in words, one operation a line; "" if there is none."""
        if self.verdict is Verdict.LINEARIZABLE:
            return ""
        if self.verdict is Verdict.UNDECIDED:
            return f"undecided: the operations on {self.key!r} were given up after {self.n_steps} steps"
        lines = [f"the operations on {self.key!r} have no order that one copy could have answered:"]
        lines += [f"  {operation}" for operation in self.operations]
        lines += [f"the longest order that is possible ends in {self.state}; next would have to be one of:"]
        lines += [f"  {operation}" for operation in self.stuck]
        return "\n".join(lines)


def check_linearizable(operations: Sequence[Operation], specification: Specification[Any], *, n_steps_max: int = STEPS_MAX) -> Finding:
    """Check a history, key by key.

    Args:
        operations: In any order.
        specification: Of one key.
        n_steps_max: Bound of the search, per key.

    Returns:
        The first violation, cut down; else "undecided" if some key was given up; else "linearizable".
    """
    undecided: Finding | None = None
    n_steps = 0
    for key, own in by_key(operations).items():
        search = _Search(own, specification, n_steps_max)
        verdict = search.run()
        n_steps += search.n_steps
        if verdict is Verdict.VIOLATED:
            small = _cut_down(own, specification, n_steps_max)
            again = _Search(small, specification, n_steps_max)
            again.run()
            return Finding(verdict, n_steps, key, tuple(small), again.best_state, tuple(again.stuck()))
        if verdict is Verdict.UNDECIDED:
            undecided = undecided or Finding(verdict, search.n_steps, key)
    return undecided or Finding(Verdict.LINEARIZABLE, n_steps)


class _Search:
    """The search over one key.

    Candidates for the next place are the operations not placed yet that were called before the first answer of those not placed yet.
    They are found by walking `order` (operations by the time of their call) from the first that is not placed.
    """

    def __init__(self, operations: Sequence[Operation], specification: Specification[Any], n_steps_max: int) -> None:
        self.order = sorted(operations, key=lambda operation: operation.invoked)
        self.n_steps = 0
        self.best_state: Hashable = specification.initial()
        self._best_placed = 0
        self._best_count = -1
        self._specification = specification
        self._n_steps_max = n_steps_max
        self._must = 0
        for place, operation in enumerate(self.order):
            if operation.returned is not None:
                self._must |= 1 << place

    def run(self) -> Verdict:
        """Search depth first, without recursion: a history may be longer than Python's stack."""
        start = self._specification.initial()
        seen: set[tuple[int, Hashable]] = {(0, start)}
        stack: list[tuple[int, Hashable, list[int]]] = [(0, start, self._candidates(0))]
        self._note(0, start)
        while stack:
            placed, state, candidates = stack[-1]
            if placed & self._must == self._must:
                return Verdict.LINEARIZABLE
            if not candidates:
                stack.pop()
                continue
            place = candidates.pop()
            operation = self.order[place]
            self.n_steps += 1
            if self.n_steps > self._n_steps_max:
                return Verdict.UNDECIDED
            after = self._specification.step(state, operation.call, operation.result)
            if after is None:
                continue
            grown = placed | 1 << place
            if (grown, after) not in seen:
                seen.add((grown, after))
                self._note(grown, after)
                stack.append((grown, after, self._candidates(grown)))
        return Verdict.VIOLATED

    def stuck(self) -> list[Operation]:
        """Return the operations of which one would have to come next where the search came farthest."""
        return [self.order[place] for place in reversed(self._candidates(self._best_placed))]

    def _note(self, placed: int, state: Hashable) -> None:
        count = (placed & self._must).bit_count()
        if count > self._best_count:
            self._best_count, self._best_placed, self.best_state = count, placed, state

    def _candidates(self, placed: int) -> list[int]:
        """Return places, the one to try first last: answered operations in the order of their answers, then those without an answer."""
        order = self.order
        found: list[int] = []
        limit: int | None = None
        first = ((placed + 1) & ~placed).bit_length() - 1
        for place in range(first, len(order)):
            operation = order[place]
            if limit is not None and operation.invoked > limit:
                break
            if not placed >> place & 1:
                found.append(place)
                if operation.returned is not None and (limit is None or operation.returned < limit):
                    limit = operation.returned
        return sorted(found, key=lambda each: _answered(order[each]), reverse=True)


def _answered(operation: Operation) -> tuple[bool, int]:
    return operation.returned is None, operation.invoked if operation.returned is None else operation.returned


def _cut_down(operations: Sequence[Operation], specification: Specification[Any], n_steps_max: int) -> list[Operation]:
    """Return a small part of a wrong history that is wrong too.

    First the shortest beginning (what had not been answered then is without an answer), then without operations that cannot matter. A write
    without an answer is kept: without it a read of its value would look wrong for another reason.
    """
    answers = sorted(operation.returned for operation in operations if operation.returned is not None)
    low, high = 0, len(answers) - 1
    while low < high:
        middle = (low + high) // 2
        if _is_wrong(_until(operations, answers[middle]), specification, n_steps_max):
            high = middle
        else:
            low = middle + 1
    small = _until(operations, answers[low])
    for operation in reversed(small[:]):
        rest = [each for each in small if each is not operation]
        if specification.droppable(operation, rest) and _is_wrong(rest, specification, n_steps_max):
            small = rest
    return small


def _until(operations: Sequence[Operation], time: int) -> list[Operation]:
    begun = [operation for operation in operations if operation.invoked < time]
    return [each if each.returned is not None and each.returned <= time else each._replace(returned=None, result=UNKNOWN) for each in begun]


def _is_wrong(operations: Sequence[Operation], specification: Specification[Any], n_steps_max: int) -> bool:
    return _Search(operations, specification, n_steps_max).run() is Verdict.VIOLATED
