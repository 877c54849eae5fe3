"""The rules that watch every run: each is told a lie, and must say so; and is told the truth, and must be silent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from isopod.testing.invariants import VIOLATIONS_MAX, Invariants


@dataclass(frozen=True)
class Batch:
    """A batch as the driver makes it."""

    index: int
    term: int
    stamp_ns: int
    commands: Sequence[bytes]


class Sums:
    """A machine that adds up; `restore` may be made to forget."""

    def __init__(self, *, forgets: int = 0) -> None:
        self.total = 0
        self.forgets = forgets

    def apply(self, batch: Batch) -> list[int]:
        self.total += sum(map(int, batch.commands))
        return []

    def restore(self, data: bytes) -> None:
        self.total = int(data) - self.forgets

    def digest(self) -> str:
        return f"state {self.total:020d}"


def told(*events: Callable[[Invariants], None]) -> list[str]:
    """Return the rules that these events break."""
    rules = Invariants(lambda: 1_500_000_000)
    for event in events:
        event(rules)
    assert rules.n_violations == len(rules.violations)
    return [violation.rule for violation in rules.violations]


def append(node: int, index: int, term: int, data: bytes = b"x", before: int | None = 1) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_append(node, index, term, previous_term=before, data=data)


def commit(node: int, index: int, term: int = 1, data: bytes = b"x", kind: int = 0) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_committed(node, index, term, kind=kind, data=data)


def start(node: int, term: int, applied: int = 0) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_start(node, term, applied)


def begin(node: int, term: int, *, vote: int = 0, last_index: int | None = None) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_start(node, term, vote=vote, last_index=last_index)


def vote(node: int, term: int, candidate: int) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_vote(node, term, candidate)


def lead(node: int, term: int, n_voters: int = 3) -> Callable[[Invariants], None]:
    return lambda rules: rules.on_leader(node, term, n_voters)


TRUTHS = {
    "leaders of different terms": [lead(1, 1), lead(2, 2), lead(1, 3)],
    "a leader that is told twice": [lead(1, 1), lead(1, 1)],
    "the same log everywhere": [append(1, 2, 1), append(2, 2, 1), append(3, 2, 1, before=None)],
    "a later leader's other entry": [append(1, 2, 1, b"a"), append(2, 2, 2, b"b")],
    "the same commits everywhere": [commit(1, 1), commit(1, 2), commit(2, 1), commit(2, 2)],
    "applied again after a restart": [commit(1, 1), commit(1, 2), start(1, 1), commit(1, 1), commit(1, 2)],
    "going on after a snapshot": [
        commit(1, 1),
        commit(1, 2),
        lambda rules: rules.on_snapshot_installed(2, 2, 1),
        commit(1, 3),
        commit(2, 3),
    ],
    "a term that nobody acted in": [lambda rules: rules.on_term(1, 5, 0), start(1, 4)],
    "a lone leader's term": [lead(1, 5, 1), start(1, 4)],
    "a disk emptied by intent": [lead(1, 5), lambda rules: rules.on_wiped(1), start(1, 0)],
    "commit that is behind after a restart": [lambda rules: rules.on_term(1, 2, 9), start(1, 2), lambda rules: rules.on_term(1, 2, 4)],
    "a vote that is remembered": [vote(1, 5, 3), begin(1, 5, vote=3), begin(1, 6)],
    "a vote that is told again": [vote(1, 5, 3), vote(1, 5, 3), vote(1, 4, 2)],
    "a log that is as long as it was": [commit(1, 1), commit(1, 2), begin(1, 1, last_index=2)],
    "promises of a disk emptied by intent": [vote(1, 5, 3), commit(1, 1), lambda rules: rules.on_wiped(1), begin(1, 0, last_index=0)],
    "equal states": [
        lambda rules: rules.on_state(1, 5, "a"),
        lambda rules: rules.on_state(2, 5, "a"),
        lambda rules: rules.on_state(2, 6, "b"),
    ],
}
LIES = {
    "two leaders": ([lead(1, 4), lead(2, 4)], "one leader per term"),
    "two entries of one index and term": ([append(1, 2, 1, b"a"), append(2, 2, 1, b"b")], "log matching"),
    "two pasts of one entry": ([append(1, 3, 2, before=1), append(2, 3, 2, before=2)], "log matching"),
    "two pasts, the first unknown": ([append(3, 3, 2, before=None), append(1, 3, 2, before=1), append(2, 3, 2, before=2)], "log matching"),
    "a commit replaced": ([commit(1, 1, 1, b"a"), commit(2, 1, 2, b"b")], "committed never lost"),
    "a commit of another kind": ([commit(1, 1, kind=0), commit(2, 1, kind=1)], "committed never lost"),
    "a snapshot of another past": ([commit(1, 1, 1), lambda rules: rules.on_snapshot_installed(2, 1, 2)], "committed never lost"),
    "applied twice": ([commit(1, 1), commit(1, 1)], "applied once, in order"),
    "an index left out": ([commit(1, 1), commit(1, 3)], "applied once, in order"),
    "applied again after a restart that knew": ([start(1, 1, 2), commit(1, 2)], "applied once, in order"),
    "a snapshot of the past": ([commit(1, 1), commit(1, 2), lambda rules: rules.on_snapshot_installed(1, 1, 1)], "applied once, in order"),
    "a term forgotten by who led": ([lead(1, 5), start(1, 4)], "durable term"),
    "a term forgotten by who applied": ([commit(1, 1, 5), start(1, 4)], "durable term"),
    "a vote forgotten": ([vote(1, 5, 3), begin(1, 5)], "durable vote"),
    "a vote forgotten with its term": ([vote(1, 5, 3), begin(1, 4, vote=3)], "durable vote"),
    "a vote changed": ([vote(1, 5, 3), begin(1, 5, vote=2)], "durable vote"),
    "two votes in a term": ([vote(1, 5, 3), vote(1, 5, 2)], "one vote per term"),
    "a log that is shorter than it was": ([commit(1, 1), commit(1, 2), begin(1, 1, last_index=1)], "durable log"),
    "a term going back": ([lambda rules: rules.on_term(1, 5, 0), lambda rules: rules.on_term(1, 4, 0)], "monotonic term"),
    "a commit going back": ([lambda rules: rules.on_term(1, 5, 7), lambda rules: rules.on_term(1, 5, 6)], "monotonic commit"),
    "two states of one index": (
        [lambda rules: rules.on_state(1, 5, "a"), lambda rules: rules.on_state(2, 5, "b")],
        "equal state at equal index",
    ),
}


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", TRUTHS)
def test_what_is_right_is_not_reported(name: str) -> None:
    assert told(*TRUTHS[name]) == []


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", LIES)
def test_what_is_wrong_is_reported(name: str) -> None:
    events, rule = LIES[name]

    assert told(*events) == [rule]


def test_batches_are_kept_in_order_with_the_time_of_the_first() -> None:
    times = iter((10, 20, 30))
    rules = Invariants(lambda: next(times))
    first, second = Batch(1, 1, 0, (b"1",)), Batch(2, 1, 0, (b"2",))
    for batch in (first, second, first):
        rules.on_batch(batch)

    assert rules.batches() == [(first, 10), (second, 20)]


def record(rules: Invariants, n_batches: int) -> Sums:
    machine = Sums()
    for index in range(1, n_batches + 1):
        batch = Batch(index, 1, 0, (b"%d" % index,))
        machine.apply(batch)
        rules.on_batch(batch)
        rules.on_state(1, index, machine.digest())
        if not index % 10:
            rules.on_snapshot_made(index, b"%d" % machine.total)
    return machine


@pytest.mark.row("B15")
def test_a_snapshot_and_the_rest_make_the_whole() -> None:
    rules = Invariants(lambda: 0)
    record(rules, 45)

    rules.check_replay(Sums)
    assert rules.violations == []

    rules.check_replay(lambda: Sums(forgets=1))
    assert {violation.rule for violation in rules.violations} == {"snapshot and replay"}


def test_a_state_that_the_entries_do_not_make_is_found() -> None:
    rules = Invariants(lambda: 0)
    record(rules, 5)
    rules.on_batch(Batch(6, 1, 0, (b"6",)))
    rules.on_state(2, 6, "state of something else")

    rules.check_replay(Sums)

    assert [violation.rule for violation in rules.violations] == ["replay"]
    assert "node 2 had" in rules.violations[0].text


def test_many_violations_are_counted_and_the_first_are_kept() -> None:
    rules = Invariants(lambda: 2_000_000_000)
    for number in range(VIOLATIONS_MAX + 5):
        rules.report("rule", f"number {number}")

    assert (rules.n_violations, len(rules.violations)) == (VIOLATIONS_MAX + 5, VIOLATIONS_MAX)
    assert str(rules.violations[0]) == "rule at 2.000000 s: number 0"
