"""A lease with clocks that drift, as a model.

A granter lends a lease for `term` of its own time units; holders believe their own clocks. Clocks advance one unit at a time, each holder's
up to `drift` units before or behind the granter's. A grant is a message: it may take any time, be lost, or never be looked at. The granter
lends to another when the term has passed on its clock.

The promise: no two holders act on the lease at the same moment. It is kept if a holder counts from when it *asked*, not from when the
answer came, and stops `margin` units early, with `margin` at least twice `drift`: once for its own clock's place when it asked, once for
when it stops. Two mistakes can be switched on, and the checker finds both.

Bounds: the granter's clock ends at `horizon`; two holders, because a third adds no way for two to overlap.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

N_HOLDERS: Final = 2


class Holder(NamedTuple):
    """A holder: its clock relative to the granter's, when (on its clock) it asked and until when it acts, 0 if it does not."""

    offset: int = 0
    asked_at: int = 0
    acts_until: int = 0
    offered: int = 0
    """A grant under way to it: 1 plus the granter's time of it, 0 if there is none."""


class LeaseState(NamedTuple):
    """The granter's clock, when its last lease ends for it, and the holders."""

    now: int
    lent_until: int
    holders: tuple[Holder, ...]


class LeaseModel:
    """The model.

    Args:
        term: How long a lease is, in units.
        drift: How far a holder's clock may be from the granter's, either way.
        margin: How much earlier a holder stops.
        from_answer: The mistake: the holder counts its term from when the grant came.
        horizon: When the granter's clock ends.
    """

    def __init__(self, *, term: int = 4, drift: int = 1, margin: int = 2, from_answer: bool = False, horizon: int = 10) -> None:
        self._term = term
        self._drift = drift
        self._margin = margin
        self._from_answer = from_answer
        self._horizon = horizon

    def start(self) -> Iterator[LeaseState]:
        """Begin with no lease, and clocks as far apart as they may be."""
        offsets = range(-self._drift, self._drift + 1)
        for first in offsets:
            for second in offsets:
                # Time starts late enough for no clock to be negative or 0, which means "not".
                yield LeaseState(self._drift + 1, 0, (Holder(offset=first), Holder(offset=second)))

    def steps(self, state: LeaseState) -> Iterator[tuple[str, LeaseState]]:
        """Time passes, a clock drifts, or a message of some holder moves."""
        if state.now < self._horizon:
            yield (
                f"time: {state.now + 1}",
                state._replace(now=state.now + 1, holders=tuple(self._expire(state.now + 1, h) for h in state.holders)),
            )
        for place, holder in enumerate(state.holders):
            for what, changed, lent_until in self._holder_steps(state, holder):
                holders = (*state.holders[:place], changed, *state.holders[place + 1 :])
                yield f"holder {place} {what}", LeaseState(state.now, lent_until, holders)

    def violation(self, state: LeaseState) -> str:
        """Two holders act at once."""
        acting = [place for place, holder in enumerate(state.holders) if holder.acts_until]
        return f"holders {acting} both act on the lease" if len(acting) > 1 else ""

    def canonical(self, state: LeaseState) -> LeaseState:
        """The holders have the same rights."""
        return state._replace(holders=tuple(sorted(state.holders)))

    def _holder_steps(self, state: LeaseState, holder: Holder) -> Iterator[tuple[str, Holder, int]]:
        clock = state.now + holder.offset
        for offset in (holder.offset - 1, holder.offset + 1):
            if abs(offset) <= self._drift:
                yield f"drifts to {offset:+}", self._expire(state.now, holder._replace(offset=offset)), state.lent_until
        if not holder.asked_at and not holder.acts_until and not holder.offered:
            yield f"asks at its {clock}", holder._replace(asked_at=clock), state.lent_until
        if holder.asked_at and not holder.offered and state.now >= state.lent_until:
            yield f"is granted at {state.now}", holder._replace(offered=state.now + 1), state.now + self._term
        if holder.offered:
            yield "never hears of its grant", Holder(offset=holder.offset), state.lent_until
            begin = clock if self._from_answer else holder.asked_at
            acting = Holder(offset=holder.offset, acts_until=begin + self._term - self._margin)
            yield f"acts from its {clock} until its {acting.acts_until}", self._expire(state.now, acting), state.lent_until

    def _expire(self, now: int, holder: Holder) -> Holder:
        """It stops by its own clock."""
        return holder._replace(acts_until=0) if holder.acts_until and now + holder.offset >= holder.acts_until else holder
