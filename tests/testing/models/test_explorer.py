"""The model checker itself: it visits everything once, finds the shortest way to what is wrong, and says when a model is too large."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.testing.models.explorer import explore
from isopod.world.errors import InvalidArgument


class Jugs:
    """Two jugs of 3 and 5 litres: is there a way to measure 4? (The states are amounts; "violation" is having them.)"""

    def __init__(self, forbidden: int) -> None:
        self.forbidden = forbidden

    def start(self) -> Iterator[tuple[int, int]]:
        yield (0, 0)

    def steps(self, state: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
        small, big = state
        yield "fill the small one", (3, big)
        yield "fill the big one", (small, 5)
        yield "empty the small one", (0, big)
        yield "empty the big one", (small, 0)
        to_big = min(small, 5 - big)
        yield "pour into the big one", (small - to_big, big + to_big)
        to_small = min(big, 3 - small)
        yield "pour into the small one", (small + to_small, big - to_small)

    def violation(self, state: tuple[int, int]) -> str:
        return f"{self.forbidden} litres" if self.forbidden in state else ""

    def canonical(self, state: tuple[int, int]) -> tuple[int, int]:
        return state


class Tokens:
    """N tokens that wander between two places; which is which does not matter."""

    def __init__(self, n: int, *, symmetric: bool) -> None:
        self.n = n
        self.symmetric = symmetric

    def start(self) -> Iterator[tuple[int, ...]]:
        yield (0,) * self.n

    def steps(self, state: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for place in range(self.n):
            yield f"token {place}", (*state[:place], 1 - state[place], *state[place + 1 :])

    def violation(self, state: tuple[int, ...]) -> str:
        return ""

    def canonical(self, state: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(state)) if self.symmetric else state


class Graph:
    """Any small graph, with some nodes forbidden."""

    def __init__(self, edges: dict[int, list[int]], forbidden: set[int]) -> None:
        self.edges = edges
        self.forbidden = forbidden

    def start(self) -> Iterator[int]:
        yield 0

    def steps(self, state: int) -> Iterator[tuple[str, int]]:
        for after in self.edges.get(state, []):
            yield f"{state}-{after}", after

    def violation(self, state: int) -> str:
        return "forbidden" if state in self.forbidden else ""

    def canonical(self, state: int) -> int:
        return state


@pytest.mark.row("B25")
def test_the_shortest_way_is_found_and_printed() -> None:
    found = explore(Jugs(4))
    assert found.why == "4 litres"
    assert [step.state for step in found.trace] == [(0, 0), (0, 5), (3, 2), (0, 2), (2, 0), (2, 5), (3, 4)]
    lines = str(found).splitlines()
    assert lines[0].startswith("4 litres after 6 steps")
    assert lines[-2:] == ["  6. pour into the small one", "     (3, 4)"]


@pytest.mark.row("B25")
def test_every_state_is_visited_when_nothing_is_wrong() -> None:
    found = explore(Jugs(7))
    assert (found.n_states, found.n_steps, found.why, found.trace) == (16, 96, "", ())
    assert str(found) == f"every promise holds: 16 states, 96 steps, depth {found.depth}"


def test_states_that_differ_in_names_only_are_one() -> None:
    assert explore(Tokens(10, symmetric=False)).n_states == 1024
    folded = explore(Tokens(10, symmetric=True))
    assert (folded.n_states, folded.depth) == (11, 10)


def test_a_start_that_is_wrong_is_found() -> None:
    found = explore(Jugs(0))
    assert [step.what for step in found.trace] == ["start"]


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="more than 1000 states") as refused:
        explore(Tokens(10, symmetric=False), n_states_max=1000)
    assert refused.value.hint


@given(st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=4)), st.sets(st.integers(0, 9), max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_graph_gives_the_shortest_path_that_relaxation_gives(edges: dict[int, list[int]], forbidden: set[int]) -> None:
    distance = {0: 0}
    for _ in range(10):
        for state, afters in edges.items():
            for after in afters:
                distance[after] = min(distance.get(after, 99), distance.get(state, 99) + 1)
    distance = {state: n for state, n in distance.items() if n < 99}
    wrong = [distance[state] for state in forbidden if state in distance]

    found = explore(Graph(edges, forbidden))

    assert bool(found.why) == bool(wrong)
    if wrong:
        assert len(found.trace) - 1 == min(wrong)
        assert all(after.state in edges[before.state] for before, after in zip(found.trace, found.trace[1:], strict=False))
    else:
        assert found.n_states == len(distance)
