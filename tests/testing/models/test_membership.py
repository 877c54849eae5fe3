"""Changes of members: safe one server at a time, after an own entry; each rule left out loses a term or a commit."""

from typing import Any, Final

import pytest

from isopod.testing.models.explorer import explore
from isopod.testing.models.membership import MembershipModel

SMALL: Final[dict[str, Any]] = {"n_terms": 2, "n_entries": 2, "n_changes": 1}
N_STATES: Final = {False: 13003, True: 16913}


@pytest.mark.row("B25")
@pytest.mark.parametrize("at_apply", [False, True], ids=["in the log", "applied"])
def test_one_server_at_a_time_is_safe(at_apply: bool) -> None:
    found = explore(MembershipModel(**SMALL, at_apply=at_apply))
    assert found.why == ""
    assert found.n_states == N_STATES[at_apply], "another number means another model: look at what became reachable, or no longer is"


@pytest.mark.slow
@pytest.mark.row("B25")
@pytest.mark.parametrize("at_apply", [False, True], ids=["in the log", "applied"])
@pytest.mark.parametrize(("n_terms", "n_entries", "n_changes"), [(2, 3, 2), (3, 2, 1)])
def test_one_server_at_a_time_is_safe_in_larger_bounds(n_terms: int, n_entries: int, n_changes: int, at_apply: bool) -> None:
    found = explore(MembershipModel(n_terms=n_terms, n_entries=n_entries, n_changes=n_changes, at_apply=at_apply))
    assert found.why == ""
    expected = {(2, 3, False): 93300, (3, 2, False): 145280, (2, 3, True): 125775, (3, 2, True): 180449}
    assert found.n_states == expected[n_terms, n_entries, at_apply]


@pytest.mark.row("B25")
@pytest.mark.parametrize("at_apply", [False, True], ids=["in the log", "applied"])
def test_two_changes_at_once_are_found_out(at_apply: bool) -> None:
    found = explore(MembershipModel(n_terms=2, n_entries=3, one_at_a_time=False, at_apply=at_apply))
    assert found.why == "term 2 has two leaders"
    assert sum("changes the voters" in step.what for step in found.trace) == 2


@pytest.mark.row("B25")
@pytest.mark.parametrize("at_apply", [False, True], ids=["in the log", "applied"])
def test_two_servers_in_one_change_are_found_out(at_apply: bool) -> None:
    found = explore(MembershipModel(**SMALL, step=2, at_apply=at_apply))
    assert found.why == "term 2 has two leaders"
    assert sum("changes the voters" in step.what for step in found.trace) == 1


@pytest.mark.row("B25")
def test_a_change_before_an_own_entry_is_committed_is_found_out() -> None:
    """The mistake in the first publication of this algorithm: it takes four voters to show."""
    found = explore(MembershipModel(n_servers=5, n_voters=4, n_terms=3, n_entries=1, own_term_first=False, commands=False))
    assert found.why == "term 3 has two leaders"


def test_a_command_is_committed_and_survives() -> None:
    """A model in which nothing is ever committed would keep every promise."""

    class Useful(MembershipModel):
        def violation(self, state: Any) -> str:
            """A later leader has what was committed."""
            later = [i for term, i in enumerate(state.leaders) if i >= 0 and state.committed and term > state.committed[-1].term]
            return "it survives" if any(state.servers[i].log for i in later) else ""

    assert explore(Useful(**SMALL)).why == "it survives"
