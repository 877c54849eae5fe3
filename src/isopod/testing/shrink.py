"""Shrinking: from a plan that fails, a small plan that fails in the same way.

Each candidate is run anew: nothing is guessed. First steps are left out by delta debugging (Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", 2002): halves, quarters, and so on down to single steps; then the cluster is made smaller, the run is
ended earlier, and faults are made shorter. What fails in another way is not taken: two defects would be mixed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.testing.plan import Plan, Step

RUNS_MAX: Final = 400
_LASTS_MS_MIN: Final = 50
_NODES_MIN: Final = 1


class Shrunk(NamedTuple):
    """The smallest plan found, and how many runs that took."""

    plan: Plan
    n_runs: int


def shrink(plan: Plan, failure: Callable[[Plan], str], *, n_runs_max: int = RUNS_MAX) -> Shrunk:
    """Make a failing plan smaller.

    Args:
        plan: A plan for which `failure` says something.
        failure: Runs a plan; returns the kind of failure, "" for none. The same kind must come again.
        n_runs_max: Bound on runs.

    Returns:
        A plan of the same failure that loses it if any one step is left out, unless the bound ended the search before.
    """
    shrinker = _Shrinker(plan, failure, n_runs_max)
    shrinker.run()
    return Shrunk(shrinker.best, shrinker.n_runs)


class _Shrinker:
    def __init__(self, plan: Plan, failure: Callable[[Plan], str], n_runs_max: int) -> None:
        self.best = plan
        self.n_runs = 0
        self._failure = failure
        self._n_runs_max = n_runs_max
        self._kind = failure(plan)
        self._tried: set[bytes] = {msgspec.json.encode(plan)}

    def run(self) -> None:
        """Repeat all reductions until none helps."""
        if not self._kind:
            return
        while self.n_runs < self._n_runs_max:
            before = self.best
            self._drop_steps()
            for candidates in (_fewer_nodes, _shorter_run, _milder_steps):
                self._take_first(candidates)
            if self.best == before:
                return

    def _drop_steps(self) -> None:
        n_parts = 2
        while self.best.steps and self.n_runs < self._n_runs_max:
            parts = _split(self.best.steps, n_parts)
            for number in range(len(parts)):
                rest = tuple(step for place, part in enumerate(parts) if place != number for step in part)
                if self._try(msgspec.structs.replace(self.best, steps=rest)):
                    n_parts = max(2, n_parts - 1)
                    break
            else:
                if n_parts >= len(self.best.steps):
                    return
                n_parts = min(2 * n_parts, len(self.best.steps))

    def _take_first(self, candidates: Callable[[Plan], Iterator[Plan]]) -> None:
        """Take candidates as long as one helps."""
        helped = True
        while helped and self.n_runs < self._n_runs_max:
            helped = any(self._try(candidate) for candidate in candidates(self.best))

    def _try(self, plan: Plan) -> bool:
        key = msgspec.json.encode(plan)
        if key in self._tried or self.n_runs >= self._n_runs_max:
            return False
        self._tried.add(key)
        self.n_runs += 1
        if self._failure(plan) != self._kind:
            return False
        self.best = plan
        return True


def _split(steps: Sequence[Step], n_parts: int) -> list[Sequence[Step]]:
    size, more = divmod(len(steps), n_parts)
    ends = [number * size + min(number, more) for number in range(n_parts + 1)]
    return [steps[start:end] for start, end in itertools.pairwise(ends) if end > start]


def _fewer_nodes(plan: Plan) -> Iterator[Plan]:
    for nodes in range(_NODES_MIN, plan.nodes):
        steps = tuple(step for step in plan.steps if step.node <= nodes and step.peer <= nodes)
        yield msgspec.structs.replace(plan, nodes=nodes, steps=steps)


def _shorter_run(plan: Plan) -> Iterator[Plan]:
    last_ms = max((step.at_ms for step in plan.steps), default=0)
    for until_ms in (last_ms, (last_ms + plan.until_ms) // 2):
        if until_ms < plan.until_ms:
            yield msgspec.structs.replace(plan, until_ms=until_ms)


def _milder_steps(plan: Plan) -> Iterator[Plan]:
    for place, step in enumerate(plan.steps):
        if step.lasts_ms > _LASTS_MS_MIN:
            milder = msgspec.structs.replace(step, lasts_ms=step.lasts_ms // 2)
            yield msgspec.structs.replace(plan, steps=(*plan.steps[:place], milder, *plan.steps[place + 1 :]))
