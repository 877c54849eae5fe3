"""The circuit breaker: its table, its window, its single probe."""

import asyncio

import pytest

from isopod.net.breaker import TRANSITIONS, BreakerEvent, BreakerLimits, BreakerState, CircuitBreaker
from isopod.world.errors import Disconnected, InvalidArgument, NotFound, UnavailableError
from isopod.world.sim import SimWorld

LIMITS = BreakerLimits(window_s=10, n_calls_min=4, failure_rate=0.5, open_s=5, n_successes=2)
pytestmark = pytest.mark.row("S11")


def made(sim: SimWorld) -> CircuitBreaker:
    return CircuitBreaker(sim.world, "billing", limits=LIMITS)


def state(breaker: CircuitBreaker) -> BreakerState:
    """Ask anew: the type checker remembers what a property said."""
    return breaker.state


def good(breaker: CircuitBreaker) -> None:
    with breaker.guard():
        pass


def bad(breaker: CircuitBreaker, error: BaseException | None = None) -> None:
    with pytest.raises(type(error) if error else Disconnected), breaker.guard():
        raise error or Disconnected("billing")


def test_the_table_is_the_one_in_the_header() -> None:
    import isopod.net.breaker as module

    assert module.__doc__ is not None
    written = {tuple(line.split()[:3]) for line in module.__doc__.splitlines() if line.split()[2:3] and line.split()[0].isupper()}
    assert {(state.name, event.name.lower(), after.name) for (state, event), after in TRANSITIONS.items()} == written
    assert set(BreakerState) == {state for state, _ in TRANSITIONS}
    assert set(BreakerEvent) == {event for _, event in TRANSITIONS}


async def test_the_whole_circle(sim_world: SimWorld) -> None:
    breaker = made(sim_world)
    bad(breaker)
    bad(breaker)
    bad(breaker)
    assert state(breaker) is BreakerState.CLOSED  # too few calls to say
    good(breaker)
    bad(breaker)
    assert state(breaker) is BreakerState.OPEN
    with pytest.raises(UnavailableError, match="billing fails at present"):
        good(breaker)
    await asyncio.sleep(4.9)
    with pytest.raises(UnavailableError):
        good(breaker)
    await asyncio.sleep(0.2)
    assert state(breaker) is BreakerState.HALF_OPEN
    bad(breaker)
    assert state(breaker) is BreakerState.OPEN
    await asyncio.sleep(5.1)
    good(breaker)
    assert state(breaker) is BreakerState.HALF_OPEN
    good(breaker)
    assert state(breaker) is BreakerState.CLOSED
    assert breaker.statistics() == (BreakerState.CLOSED, 0, 0, 2, 2)


async def test_one_probe_at_a_time(sim_world: SimWorld) -> None:
    breaker = made(sim_world)
    for _ in range(4):
        bad(breaker)
    await asyncio.sleep(5.1)
    with breaker.guard(), pytest.raises(UnavailableError):
        good(breaker)
    # A cancelled probe tells nothing, and lets the next one through.
    with pytest.raises(asyncio.CancelledError), breaker.guard():
        raise asyncio.CancelledError
    assert state(breaker) is BreakerState.HALF_OPEN
    good(breaker)
    assert state(breaker) is BreakerState.CLOSED


async def test_old_failures_are_forgotten(sim_world: SimWorld) -> None:
    breaker = made(sim_world)
    for _ in range(3):
        bad(breaker)
    await asyncio.sleep(11)
    assert breaker.statistics().n_calls == 0
    for _ in range(3):
        good(breaker)
    bad(breaker)
    assert state(breaker) is BreakerState.CLOSED


async def test_a_call_from_before_counts_for_nothing(sim_world: SimWorld) -> None:
    breaker = made(sim_world)
    late = breaker.guard()
    late.__enter__()
    for _ in range(4):
        bad(breaker)
    await asyncio.sleep(5.1)
    assert state(breaker) is BreakerState.HALF_OPEN
    late.__exit__(None, None, None)
    assert state(breaker) is BreakerState.HALF_OPEN
    good(breaker)
    assert state(breaker) is BreakerState.HALF_OPEN


async def test_what_counts_as_a_failure(sim_world: SimWorld) -> None:
    breaker = made(sim_world)
    for _ in range(10):
        bad(breaker, NotFound("invoice", "7"))
        bad(breaker, asyncio.CancelledError())
    assert breaker.statistics()[:3] == (BreakerState.CLOSED, 10, 0)

    async def fails() -> None:
        raise OSError

    for _ in range(10):
        with pytest.raises(OSError):
            await breaker.call(fails)
    assert state(breaker) is BreakerState.OPEN
    with pytest.raises(InvalidArgument):
        CircuitBreaker(sim_world.world, "x", limits=BreakerLimits(failure_rate=0))
