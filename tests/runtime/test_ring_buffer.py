"""The ring buffer, against a deque that does the same."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.ring_buffer import CAPACITY_MAX, RingBuffer
from isopod.world.errors import Exhausted, InvalidArgument


@pytest.mark.row("S29")
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(st.one_of(st.integers(), st.just("pop"), st.just("clear")), max_size=200))
def test_it_is_the_last_items_in_order(capacity: int, steps: list[int | str]) -> None:
    ring: RingBuffer[int] = RingBuffer(capacity)
    model: deque[int] = deque(maxlen=capacity)
    n_dropped = 0
    for step in steps:
        if isinstance(step, int):
            n_dropped += len(model) == capacity
            model.append(step)
            ring.push(step)
        elif step == "clear":
            model.clear()
            ring.clear()
        elif model:
            assert ring.pop() == model.popleft()
        else:
            with pytest.raises(IndexError):
                ring.pop()
        assert list(ring) == list(model)
        assert (len(ring), ring.is_full, ring.n_dropped) == (len(model), len(model) == capacity, n_dropped)
        if model:
            assert (ring[0], ring[-1]) == (model[0], model[-1])


@pytest.mark.row("S29")
def test_a_million_pushes_keep_the_last_thousand() -> None:
    ring: RingBuffer[int] = RingBuffer(1000)
    for number in range(1_000_000):
        ring.push(number)
    assert list(ring) == list(range(999_000, 1_000_000))
    assert ring.n_dropped == 999_000


def test_one_that_refuses_keeps_what_it_has() -> None:
    ring: RingBuffer[str] = RingBuffer(2, "refuse")
    ring.push("a")
    ring.push("b")
    with pytest.raises(Exhausted):
        ring.push("c")
    assert (list(ring), ring.n_dropped, ring.capacity) == (["a", "b"], 0, 2)
    for index in (2, -3):
        with pytest.raises(IndexError):
            ring[index]
    for capacity in (0, CAPACITY_MAX + 1):
        with pytest.raises(InvalidArgument):
            RingBuffer(capacity)
