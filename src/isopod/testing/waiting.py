"""Waiting for a condition, with growing pauses and a limit; never for a fixed time.

The limit is multiplied on slow machines: by `TEST_TIMEOUT_MULTIPLIER`, else by 3 where `CI` or `GITHUB_ACTIONS` is set. In the simulation
it is not: virtual time does not depend on the machine, and a run must not depend on the environment.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Final

from isopod.world.errors import InvalidArgument
from isopod.world.host import console
from isopod.world.sim.loop import SimLoop

TIMEOUT_S: Final = 10.0
PAUSE_S_MIN: Final = 0.005
PAUSE_S_MAX: Final = 1.0
"""No pause is longer, so a condition that came true is seen within a second."""
CI_MULTIPLIER: Final = 3.0


class ConditionNotMet(AssertionError):
    """A condition did not come true in time."""


def timeout_multiplier(environment: Callable[[str], str | None] = console.environment) -> float:
    """Return by how much limits are stretched on this machine.

    Args:
        environment: Reads one variable.

    Raises:
        InvalidArgument: `TEST_TIMEOUT_MULTIPLIER` is not a positive number.
    """
    said = environment("TEST_TIMEOUT_MULTIPLIER")
    if said:
        try:
            found = float(said)
        except ValueError:
            found = 0.0
        if not 0.0 < found <= 1000.0:
            raise InvalidArgument("TEST_TIMEOUT_MULTIPLIER", said, "want a number above 0 and at most 1000")
        return found
    return CI_MULTIPLIER if environment("CI") or environment("GITHUB_ACTIONS") else 1.0


async def wait_for_condition_with_backoff(
    condition: Callable[[], bool | Awaitable[bool]],
    *,
    what: str = "the condition",
    timeout_s: float = TIMEOUT_S,
    pause_s: float = PAUSE_S_MIN,
    pause_s_max: float = PAUSE_S_MAX,
) -> None:
    """Ask until the condition holds; the pauses between two questions double, from `pause_s` to `pause_s_max`.

    Args:
        condition: A function or coroutine function. What it raises is raised here.
        what: For the message.
        timeout_s: Limit in seconds of the loop's time, multiplied as the header says. The last question is asked at the limit.
        pause_s: The first pause in seconds.
        pause_s_max: The longest pause in seconds; never above one second.

    Raises:
        ConditionNotMet: It did not hold in time.
    """
    loop = asyncio.get_running_loop()
    limit_s = timeout_s if isinstance(loop, SimLoop) else timeout_s * timeout_multiplier()
    until_s = loop.time() + limit_s
    pause_s_max = min(pause_s_max, PAUSE_S_MAX)
    n_asked = 0
    while True:
        answer = condition()
        n_asked += 1
        if await answer if inspect.isawaitable(answer) else answer:
            return
        left_s = until_s - loop.time()
        if left_s <= 0:
            raise ConditionNotMet(f"{what} did not hold within {limit_s:g} s (asked {n_asked} times)")
        await asyncio.sleep(min(pause_s, pause_s_max, left_s))
        pause_s *= 2
