"""Stale and cached reads, and watches, against what the store held: what is right is not reported, and each lie is."""

import pytest

from isopod.api.store.messages import Entry
from isopod.testing.reads import Acknowledged, Listed, Read, Watched, read_violations, watch_violations
from isopod.testing.truth import NEVER
from tests.testing.histories import A_FIRST, A_LAST, ALL, B_FIRST, B_GONE, LOCK, LOCK_GONE, S, history

ACKNOWLEDGED = [Acknowledged(1 * S, 1), Acknowledged(2 * S, 2), Acknowledged(3 * S, 3)]


def read(
    entry: Entry | None, revision: int, *, at_s: float = 5.0, age_s: float | None = None, age_s_max: float = 0.0, replica: str = ""
) -> Read:
    consistency = "cached" if age_s_max else "stale"
    return Read(1, "a", consistency, round(at_s * S), round(at_s * S) + 1000, entry, revision, age_s, age_s_max, replica)  # type: ignore[arg-type]  # one of the two


TRUE_READS = {
    "the present": [read(A_LAST, 4)],
    "the past, of no stated age": [read(A_FIRST, 2)],
    "before there was anything": [read(None, 0)],
    "old, and says so": [read(A_FIRST, 2, age_s=2.5)],
    "another key changed since": [read(A_LAST, 3, age_s=0.0)],
    "old enough for what was allowed": [read(A_FIRST, 2, age_s=2.5, age_s_max=3.0)],
    "forward on one node": [read(A_FIRST, 1, at_s=2.0, replica="1.1"), read(A_LAST, 3, at_s=4.0, replica="1.1")],
    "back after a restart": [read(A_LAST, 3, at_s=4.0, replica="1.1"), read(A_FIRST, 1, at_s=5.0, replica="1.2")],
    "back on another node": [read(A_LAST, 3, at_s=4.0, replica="1.1"), read(A_FIRST, 1, at_s=5.0, replica="2.1")],
}
FALSE_READS = {
    "a revision of the future": ([read(A_LAST, 3, at_s=2.5)], "nobody had applied"),
    "a revision that never came": ([read(A_LAST, 9)], "nobody had applied"),
    "a value that was not there": ([read(Entry("a", b"w", 1, 3, 2), 3)], "there was a = b'z'"),
    "a value that is older than its revision": ([read(A_FIRST, 3)], "there was a = b'z'"),
    "nothing where something was": ([read(None, 3)], "shows nothing"),
    "younger than it is": ([read(A_FIRST, 2, age_s=1.5)], "revision 3 was acknowledged before"),
    "older than allowed": ([read(A_FIRST, 2, age_s=2.5, age_s_max=2.0)], "may be 2 s"),
    "cached without an age": ([read(A_LAST, 3, age_s_max=2.0)], "is None s old"),
    "back on one node": (
        [read(A_LAST, 3, at_s=4.0, replica="1.1"), read(A_FIRST, 1, at_s=5.0, replica="1.1")],
        "went back from revision 3",
    ),
}


@pytest.mark.row("B20", "B45")
@pytest.mark.parametrize("name", TRUE_READS)
def test_a_read_that_can_be_true_is_not_reported(name: str) -> None:
    assert read_violations(TRUE_READS[name], history(), ACKNOWLEDGED) == []


@pytest.mark.row("B20", "B45")
@pytest.mark.parametrize("name", FALSE_READS)
def test_a_read_that_cannot_be_true_is_reported(name: str) -> None:
    reads, why = FALSE_READS[name]

    (found,) = read_violations(reads, history(), ACKNOWLEDGED)

    assert why in found


@pytest.mark.row("B45")
def test_a_clock_that_ran_too_slow_makes_ages_too_small_by_as_much_and_no_more() -> None:
    late = [read(A_FIRST, 2, age_s=1.7)]  # 2 s by a true clock

    assert read_violations(late, history(), ACKNOWLEDGED, drift=0.2) == []
    assert len(read_violations(late, history(), ACKNOWLEDGED, drift=0.1)) == 1


def watch(*items: tuple[int, int, list[Entry]], from_revision: int = 1, prefix: str = "", forgotten_s: int = 0) -> Watched:
    return Watched(1, prefix, from_revision, [(at_s * S, revision, entries) for at_s, revision, entries in items], forgotten_s * S)


TRUE_WATCHES = {
    "all": watch(*((index, index, [entry]) for index, entry in enumerate(ALL[:4], 1)), (6, 5, [LOCK_GONE]), (7, 6, [B_GONE])),
    "all at once": watch((9, 6, ALL)),
    "a part, and how far it is": watch((3, 2, [A_FIRST, B_FIRST]), (9, 4, [A_LAST, LOCK])),
    "one prefix": watch((9, 6, [A_FIRST, A_LAST]), prefix="a"),
    "from the middle": watch((9, 6, [LOCK, LOCK_GONE, B_GONE]), from_revision=4),
    "nothing yet": watch(from_revision=4),
    "forgotten": watch(from_revision=2, forgotten_s=8),
}
FALSE_WATCHES = {
    "a gap": (watch((9, 6, [A_FIRST, B_FIRST, LOCK, LOCK_GONE, B_GONE])), "lock = b'mine' (version 1) of revision 4 where a"),
    "a gap at the end": (watch((9, 6, ALL[:-1])), "nothing of b = its end"),
    "told again": (watch((3, 2, ALL[:2]), (9, 6, ALL[1:])), "where a = b'z'"),
    "told again, the same part": (watch((3, 2, ALL[:2]), (9, 2, ALL[:2])), "which comes from nowhere"),
    "out of order": (watch((9, 6, [B_FIRST, A_FIRST, *ALL[2:]])), "b = b'y' (version 1) of revision 2 where a"),
    "another value": (watch((9, 1, [Entry("a", b"w", 1, 1, 1)])), "a = b'w'"),
    "of another prefix": (watch((9, 2, [A_FIRST, B_FIRST]), prefix="a"), "comes from nowhere"),
    "before anybody knew": (watch((1, 2, [A_FIRST, B_FIRST])), "before anybody had applied it"),
    "forgotten, and it is not": (watch(from_revision=3, forgotten_s=8), "and it was not"),
    "forgotten too early": (watch(from_revision=2, forgotten_s=6), "and it was not"),
}


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", TRUE_WATCHES)
def test_a_watch_that_tells_everything_once_in_order_is_not_reported(name: str) -> None:
    assert watch_violations([TRUE_WATCHES[name]], [], history()) == []


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", FALSE_WATCHES)
def test_a_watch_that_does_not_is_reported(name: str) -> None:
    watched, why = FALSE_WATCHES[name]

    found = watch_violations([watched], [], history())

    assert any(why in text for text in found), found


def test_a_revision_that_is_told_in_two_parts_is_reported() -> None:
    again = Watched(1, "", 1, [(9 * S, 2, [A_FIRST, B_FIRST]), (9 * S, 3, []), (9 * S, 3, [A_LAST])])

    (found,) = watch_violations([again], [], history())

    assert "told revision 3 in two parts" in found


def test_a_list_is_what_was_there_at_its_revision() -> None:
    true, false = Listed(1, "", 4, (A_LAST, B_FIRST, LOCK)), Listed(2, "", 5, (A_LAST, B_FIRST, LOCK))

    assert watch_violations([], [true], history()) == []
    (found,) = watch_violations([], [false], history())
    assert "client 2's list of '' is not what was there at revision 5" in found


def test_the_truth_is_what_was_applied() -> None:
    truth = history()

    assert truth.changes == ALL
    assert truth.revision == 6
    assert (truth.at("a", 0), truth.at("a", 2), truth.at("b", 6)) == (None, A_FIRST, None)
    assert truth.compactions == [(7 * S, 2)]
    assert (truth.known_ns(0), truth.known_ns(5), truth.known_ns(9)) == (0, 6 * S, NEVER)
