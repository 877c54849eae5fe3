"""Placement on made-up machines."""

import pytest

from isopod.runtime.shards.placement import n_shards_auto, place
from isopod.world.errors import InvalidArgument
from isopod.world.shards import NumaNode

ONE = [NumaNode(0, (0, 1))]
TWO = [NumaNode(0, (0, 2, 4, 6)), NumaNode(1, (1, 3, 5, 7))]
UNEVEN = [NumaNode(0, (0, 1)), NumaNode(1, (2, 3, 4, 5)), NumaNode(3, (8, 9, 10))]


@pytest.mark.row("S4")
@pytest.mark.parametrize(
    ("topology", "n_shards", "cpus"),
    [
        (ONE, 1, [0]),
        (ONE, 2, [0, 1]),
        (ONE, 3, [None, None, None]),
        (TWO, 1, [0]),
        (TWO, 4, [0, 2, 4, 6]),
        (TWO, 6, [0, 2, 4, 6, 1, 3]),
        (TWO, 8, [0, 2, 4, 6, 1, 3, 5, 7]),
        (UNEVEN, 2, [0, 1]),
        (UNEVEN, 3, [8, 9, 10]),
        (UNEVEN, 4, [2, 3, 4, 5]),
        (UNEVEN, 5, [2, 3, 4, 5, 8]),
        (UNEVEN, 9, [2, 3, 4, 5, 8, 9, 10, 0, 1]),
        ([], 1, [None]),
    ],
)
def test_shards_fill_one_node_after_the_other(topology: list[NumaNode], n_shards: int, cpus: list[int | None]) -> None:
    assert place(topology, n_shards) == cpus


@pytest.mark.parametrize("n_shards", [0, -1, 1025])
def test_numbers_out_of_range(n_shards: int) -> None:
    with pytest.raises(InvalidArgument):
        place(TWO, n_shards)


def test_as_many_as_there_are_processors() -> None:
    assert [n_shards_auto(topology) for topology in (ONE, TWO, UNEVEN, [])] == [2, 8, 9, 1]
