"""Clients of a simulated cluster: what they write down, and revisions against real time."""

import pytest

from isopod.testing.clients import Glance, revision_violations


@pytest.mark.row("B20")
@pytest.mark.parametrize(
    ("glances", "n_wrong"),
    [
        ([], 0),
        ([Glance(1, 2, 5, wrote=True), Glance(3, 4, 5, wrote=False)], 0),
        ([Glance(1, 2, 5, wrote=True), Glance(3, 4, 6, wrote=True)], 0),
        ([Glance(1, 4, 5, wrote=True), Glance(2, 3, 4, wrote=False)], 0),
        ([Glance(1, 2, 5, wrote=True), Glance(3, 4, 4, wrote=False)], 1),
        ([Glance(1, 2, 5, wrote=True), Glance(3, 4, 5, wrote=True)], 1),
        ([Glance(1, 2, 5, wrote=False), Glance(3, 4, 5, wrote=True)], 0),
    ],
)
def test_revisions_follow_real_time(glances: list[Glance], n_wrong: int) -> None:
    assert len(revision_violations(glances)) == n_wrong
    assert len(revision_violations(glances[::-1])) == n_wrong
