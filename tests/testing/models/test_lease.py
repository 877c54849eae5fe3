"""The lease: safe with a margin of twice the drift, counted from the question; unsafe with less, or counted from the answer."""

import pytest

from isopod.testing.models.explorer import explore
from isopod.testing.models.lease import LeaseModel


@pytest.mark.row("B25")
def test_two_holders_never_overlap() -> None:
    found = explore(LeaseModel())
    assert found.why == ""
    assert found.n_states == 66393, "another number means another model: look at what became reachable, or no longer is"


@pytest.mark.row("B25")
@pytest.mark.parametrize("margin", [0, 1])
def test_a_margin_below_twice_the_drift_is_found_out(margin: int) -> None:
    found = explore(LeaseModel(margin=margin))
    assert found.why == "holders [0, 1] both act on the lease"
    assert "acts from its" in found.trace[-1].what


@pytest.mark.row("B25")
def test_a_holder_that_counts_from_the_answer_is_found_out_whatever_its_margin() -> None:
    for margin in (0, 1, 2):
        found = explore(LeaseModel(from_answer=True, margin=margin))
        assert found.why == "holders [0, 1] both act on the lease"


def test_clocks_that_do_not_drift_need_no_margin() -> None:
    assert explore(LeaseModel(drift=0, margin=0)).why == ""


@pytest.mark.slow
def test_more_drift_needs_more_margin() -> None:
    assert explore(LeaseModel(term=6, drift=2, margin=3, horizon=11)).why != ""


def test_the_lease_is_of_use() -> None:
    """A model in which nobody ever acts would keep every promise."""
    model = LeaseModel()
    seen = {holder.acts_until > 0 for state in model.start() for _, after in model.steps(state) for holder in after.holders}
    assert seen == {False}
    trace = explore(_Useful()).trace
    assert trace[-1].what.startswith("holder 0 acts") or trace[-1].what.startswith("holder 1 acts")
    assert len(trace) == 4


class _Useful(LeaseModel):
    def violation(self, state: object) -> str:
        """Somebody acts at all."""
        return "somebody acts" if any(holder.acts_until for holder in state.holders) else ""  # type: ignore[attr-defined]
