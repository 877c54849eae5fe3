"""An explicit-state model checker: breadth-first over every reachable state, so the counterexample it finds is a shortest one.

A model says where it begins, what can happen next and what must always hold. States are hashable values; equal ones are visited once, and
with `Model.canonical` so are those that differ only in names (symmetry). Next states are tried in the order in which the model gives them,
so a counterexample is the same in every process; the seen states are looked up, never iterated.

What it is not: it checks invariants ("never"), not liveness ("eventually"), and only within the bounds that the model sets itself. What an
implementation does beyond the model is for the simulation to show.

Source: Clarke, Grumberg and Peled, "Model Checking" (1999), chapters 2 and 14.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from isopod.world.errors import InvalidArgument

S = TypeVar("S", bound=Hashable)

N_STATES_MAX: Final = 2_000_000


class Model(Protocol[S]):
    """What is explored. Everything in it is pure."""

    def start(self) -> Iterable[S]:
        """Return the states in which it may begin."""

    def steps(self, state: S) -> Iterable[tuple[str, S]]:
        """Return what may happen next, as (what, state after it), always in the same order."""

    def violation(self, state: S) -> str:
        """Return which promise is broken in this state, "" if none is."""

    def canonical(self, state: S) -> S:
        """Return one state for all that differ only in names; the state itself if nothing is symmetric."""


class Step(NamedTuple, Generic[S]):
    """One line of a counterexample."""

    what: str
    state: S


class Exploration(NamedTuple, Generic[S]):
    """What was found: how many states there are (up to symmetry) and steps between them, how many steps the farthest is away."""

    n_states: int
    n_steps: int
    depth: int
    why: str
    """The broken promise, "" if every state keeps them all."""
    trace: tuple[Step[S], ...]
    """The shortest way to it, from a start."""

    def __str__(self) -> str:
        facts = f"{self.n_states} states, {self.n_steps} steps, depth {self.depth}"
        if not self.why:
            return f"every promise holds: {facts}"
        lines = [f"{number:3}. {step.what}\n     {step.state}" for number, step in enumerate(self.trace)]
        return "\n".join((f"{self.why} after {len(self.trace) - 1} steps ({facts} so far)", *lines))


def explore(model: Model[S], *, n_states_max: int = N_STATES_MAX) -> Exploration[S]:
    """Visit every state that a model can reach, until one breaks a promise.

    Args:
        model: The model.
        n_states_max: More states than this are not visited.

    Returns:
        The counts, and the counterexample if there is one.

    Raises:
        InvalidArgument: The model has more than `n_states_max` states: nothing can be said about it.
    """
    found: dict[S, tuple[S | None, str]] = {}
    waiting: deque[tuple[S, int]] = deque()
    n_steps = depth = 0

    def visit(what: str, state: S, before: S | None, distance: int) -> str:
        key = model.canonical(state)
        if key in found:
            return ""
        if len(found) >= n_states_max:
            raise InvalidArgument("model", type(model).__name__, f"it has more than {n_states_max} states", "make its bounds smaller")
        found[key] = (before, what)
        waiting.append((key, distance))
        return model.violation(key)

    for state in model.start():
        if why := visit("start", state, None, 0):
            return Exploration(len(found), 0, 0, why, _trace(found, model.canonical(state)))
    while waiting:
        state, depth = waiting.popleft()
        for what, after in model.steps(state):
            n_steps += 1
            if why := visit(what, after, state, depth + 1):
                return Exploration(len(found), n_steps, depth + 1, why, _trace(found, model.canonical(after)))
    return Exploration(len(found), n_steps, depth, "", ())


def _trace(found: dict[S, tuple[S | None, str]], state: S) -> tuple[Step[S], ...]:
    steps: list[Step[S]] = []
    at: S | None = state
    while at is not None:
        before, what = found[at]
        steps.append(Step(what, at))
        at = before
    return tuple(reversed(steps))
