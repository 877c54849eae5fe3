"""Waiting for a condition: with growing pauses, a limit, and a multiplier for slow machines."""

import asyncio
import itertools

import pytest

from isopod.testing.waiting import ConditionNotMet, timeout_multiplier, wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument
from isopod.world.sim import SimWorld
from isopod.world.world import World


@pytest.mark.row("B28", "B46")
async def test_it_ends_once_the_condition_holds(world: World) -> None:
    answers = iter([False, False, True])

    await wait_for_condition_with_backoff(lambda: next(answers))

    assert list(answers) == []


async def test_a_condition_may_be_a_coroutine(world: World) -> None:
    answers = iter([False, True])

    async def ask() -> bool:
        await asyncio.sleep(0)
        return next(answers)

    await wait_for_condition_with_backoff(ask)

    assert list(answers) == []


@pytest.mark.row("B28")
async def test_pauses_double_up_to_one_second_and_the_limit_is_kept(sim_world: SimWorld) -> None:
    asked: list[float] = []
    loop = asyncio.get_running_loop()

    def never() -> bool:
        asked.append(loop.time())
        return False

    with pytest.raises(ConditionNotMet, match="the moon did not hold within 5 s"):
        await wait_for_condition_with_backoff(never, what="the moon", timeout_s=5.0, pause_s=0.25, pause_s_max=60.0)

    pauses = [round(later - earlier, 2) for earlier, later in itertools.pairwise(asked)]
    assert pauses == [0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 0.25]


async def test_what_the_condition_raises_is_raised(sim_world: SimWorld) -> None:
    def broken() -> bool:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await wait_for_condition_with_backoff(broken)


@pytest.mark.row("B28")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1.0),
        ({"CI": "true"}, 3.0),
        ({"GITHUB_ACTIONS": "true"}, 3.0),
        ({"TEST_TIMEOUT_MULTIPLIER": "2.5", "CI": "true"}, 2.5),
        ({"TEST_TIMEOUT_MULTIPLIER": "", "CI": ""}, 1.0),
    ],
)
def test_the_limit_is_multiplied_by_the_environment(environment: dict[str, str], expected: float) -> None:
    assert timeout_multiplier(environment.get) == expected


@pytest.mark.parametrize("said", ["no", "0", "-1", "nan", "1e9"])
def test_a_multiplier_that_makes_no_sense_is_refused(said: str) -> None:
    with pytest.raises(InvalidArgument):
        timeout_multiplier({"TEST_TIMEOUT_MULTIPLIER": said}.get)
