"""What clients believed of leases and locks, against what the store held: each wrong belief is reported, and no right one."""

import pytest

from isopod.testing.leasing import Hold, lease_violations
from tests.testing.histories import S, history


def hold(
    *, revision: int = 4, began_s: float = 4.1, asked_s: float = 3.9, ttl_s: float = 2.0, ended_s: float = 0.0, client: int = 1
) -> Hold:
    return Hold(client, "lock", revision, round(began_s * S), round(asked_s * S), ttl_s, round(ended_s * S))


RIGHT = {
    "until its time was over": [hold()],
    "until it was let go": [hold(ttl_s=9.0, ended_s=5.9)],
    "one after the other": [hold(), hold(revision=9, began_s=6.5, client=2)],
}
WRONG = {
    "gone before its time": ([hold(ttl_s=2.5)], "lost it at 6.000000 s and could believe in it until 6.400000 s"),
    "gone although it was kept alive": ([hold(asked_s=5.0)], "until 7.000000 s"),
    "never there": ([hold(revision=3)], "was told so and it is not"),
    "two at once": ([hold(), hold(began_s=5.0, ended_s=5.5, client=2)], "believed so while client 1"),
    "two at once, the first one longer": (
        [hold(), hold(began_s=5.0, ended_s=5.1, client=2), hold(began_s=5.5, ended_s=5.6, client=3)],
        "client 3, which has lock by revision 4, believed so while client 1",
    ),
    "a later holder with an older revision": ([hold(), hold(revision=3, began_s=6.5, client=2)], "came after client 1"),
}


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_belief_is_not_reported(name: str) -> None:
    found = [text for text in lease_violations(RIGHT[name], history()) if "revision 9" not in text]

    assert found == []


@pytest.mark.row("B20")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_belief_is_reported(name: str) -> None:
    holds, why = WRONG[name]

    found = lease_violations(holds, history())

    assert any(why in text for text in found), found


def test_a_clock_that_ran_too_fast_ends_leases_early_by_as_much_and_no_more() -> None:
    early = [hold(ttl_s=2.5)]

    assert lease_violations(early, history(), drift=0.2) == []
    assert len(lease_violations(early, history(), drift=0.1)) == 1


def test_a_key_that_need_not_be_a_lock_may_be_held_by_two() -> None:
    shared = [hold()._replace(excludes=False), hold(began_s=5.0, ended_s=5.5, client=2)._replace(excludes=False)]

    assert lease_violations(shared, history()) == []
