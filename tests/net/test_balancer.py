"""Balancing: what each strategy promises, and who leaves and returns."""

import asyncio
import itertools
from collections import Counter

import pytest

from isopod.net.balancer import (
    Backend,
    BackendState,
    Balancer,
    HealthLimits,
    IpHash,
    LeastConnections,
    RandomChoice,
    RandomOfTwo,
    ResponseTime,
    RoundRobin,
    Strategy,
    Weighted,
)
from isopod.world.errors import AlreadyExists, Disconnected, InvalidArgument, NotFound, UnavailableError
from isopod.world.sim import SimWorld

pytestmark = pytest.mark.row("S11")


def balancer(sim: SimWorld, strategy: Strategy, **weights: int) -> Balancer[str]:
    made: Balancer[str] = Balancer(sim.world, strategy)
    for name, weight in weights.items():
        made.add(name, name, weight=weight)
    return made


def state(backend: Backend[str]) -> BackendState:
    """Ask anew: the type checker remembers what an attribute was."""
    return backend.state


def picked(made: Balancer[str], n: int) -> list[str]:
    return [made.pick().name for _ in range(n)]


def test_round_robin(sim_world: SimWorld) -> None:
    made = balancer(sim_world, RoundRobin(), a=1, b=1, c=1)
    assert picked(made, 7) == list("abcabca")


def test_least_connections_by_weight(sim_world: SimWorld) -> None:
    made = balancer(sim_world, LeastConnections(), a=1, b=1, c=2)
    names = []
    for _ in range(8):
        backend = made.pick()
        backend.n_active += 1
        names.append(backend.name)
    assert Counter(names) == {"a": 2, "b": 2, "c": 4}
    next(backend for backend in made.backends() if backend.name == "b").n_active = 0
    assert made.pick().name == "b"


def test_equals_take_turns(sim_world: SimWorld) -> None:
    assert Counter(picked(balancer(sim_world, LeastConnections(), a=1, b=1), 10)) == {"a": 5, "b": 5}


def test_a_key_keeps_its_backend_and_only_the_keys_of_one_that_leaves_move(sim_world: SimWorld) -> None:
    made = balancer(sim_world, IpHash(), a=1, b=1, c=1, d=1)
    keys = [f"10.0.{high}.{low}".encode() for high, low in itertools.product(range(20), range(50))]
    before = {key: made.pick(key).name for key in keys}
    assert {key: made.pick(key).name for key in keys} == before
    shares = Counter(before.values())
    assert all(200 < shares[name] < 300 for name in "abcd"), shares
    made.remove("b")
    after = {key: made.pick(key).name for key in keys}
    assert [key for key in keys if before[key] != "b" and after[key] != before[key]] == []
    assert len(Counter(after[key] for key in keys if before[key] == "b")) == 3
    made.add("b", "b")
    assert {key: made.pick(key).name for key in keys} == before


def test_hashing_follows_weights(sim_world: SimWorld) -> None:
    made = balancer(sim_world, IpHash(), a=1, b=3)
    shares = Counter(made.pick(b"%d" % number).name for number in range(4000))
    assert 2800 < shares["b"] < 3200


def test_the_fastest_gets_more_until_it_is_busy(sim_world: SimWorld) -> None:
    made = balancer(sim_world, ResponseTime(), slow=1, quick=1, new=1)
    slow, quick, new = made.backends()
    made.report(slow, ok=True, response_s=0.100)
    made.report(quick, ok=True, response_s=0.010)
    assert made.pick() is new
    made.report(new, ok=True, response_s=0.050)
    assert made.pick() is quick
    quick.n_active = 4
    assert made.pick() is new or made.pick() is quick
    quick.n_active = 20
    assert made.pick() is new
    for _ in range(50):
        made.report(quick, ok=True, response_s=1.0)
    quick.n_active = 0
    assert made.pick() is new
    assert quick.response_s == pytest.approx(1.0, rel=0.01)


def test_weights_are_spread_evenly(sim_world: SimWorld) -> None:
    made = balancer(sim_world, Weighted(), a=5, b=1, c=1)
    assert "".join(picked(made, 14)) == "aabacaa" * 2


def test_chance_follows_weights(sim_world: SimWorld) -> None:
    shares = Counter(picked(balancer(sim_world, RandomChoice(sim_world.world), a=1, b=3), 4000))
    assert 2800 < shares["b"] < 3200


def test_the_less_busy_of_two(sim_world: SimWorld) -> None:
    made = balancer(sim_world, RandomOfTwo(sim_world.world), **{f"b{number}": 1 for number in range(20)})
    for _ in range(2000):
        made.pick().n_active += 1
        for backend in made.backends():
            backend.n_active = min(backend.n_active, 99)
    loads = [backend.n_active for backend in made.backends()]
    assert max(loads) - min(loads) <= 5
    alone = balancer(sim_world, RandomOfTwo(sim_world.world), only=1)
    assert picked(alone, 2) == ["only", "only"]


async def test_a_backend_leaves_after_three_failures_and_returns_after_two_good_probes(sim_world: SimWorld) -> None:
    well = {"a": True, "b": False}
    asked: list[str] = []

    async def probe(target: str) -> bool:
        asked.append(target)
        if target == "b" and not well["b"]:
            raise Disconnected("b")
        return well[target]

    made: Balancer[str] = Balancer(sim_world.world, RoundRobin(), probe=probe, limits=HealthLimits(probe_interval_s=1.0))
    a, b = made.add("a", "a"), made.add("b", "b")
    states = []
    for _ in range(3):
        made.report(b, ok=False)
        states.append(b.state)
    assert states[-1] is BackendState.UNHEALTHY
    assert set(picked(made, 10)) == {"a"}
    made.report(b, ok=True)  # one that was under way
    assert state(b) is BackendState.UNHEALTHY
    made.start()
    made.start()
    await asyncio.sleep(2.5)
    assert state(b) is BackendState.UNHEALTHY
    well["b"] = True
    await asyncio.sleep(1.0)
    assert state(b) is BackendState.UNHEALTHY  # one good probe is not enough
    await asyncio.sleep(1.0)
    assert state(b) is BackendState.HEALTHY
    assert set(picked(made, 10)) == {"a", "b"}
    assert asked.count("a") == asked.count("b") == 4
    await made.close()
    assert state(a) is BackendState.HEALTHY


def test_the_states_one_by_one(sim_world: SimWorld) -> None:
    made = balancer(sim_world, RoundRobin(), a=1)
    (a,) = made.backends()
    for ok, state in (
        (False, BackendState.DEGRADED),
        (False, BackendState.DEGRADED),
        (True, BackendState.HEALTHY),
        (False, BackendState.DEGRADED),
        (False, BackendState.DEGRADED),
        (False, BackendState.UNHEALTHY),
        (True, BackendState.UNHEALTHY),
    ):
        made.report(a, ok=ok)
        assert a.state is state
    with pytest.raises(UnavailableError, match="none of 1 backends"):
        made.pick()


async def test_a_probe_that_hangs_is_a_failure(sim_world: SimWorld) -> None:
    async def probe(target: str) -> bool:
        await asyncio.sleep(100)
        return True

    made: Balancer[str] = Balancer(sim_world.world, RoundRobin(), probe=probe, limits=HealthLimits(n_failures=1))
    backend = made.add("a", "a")
    await made.probe_all()
    assert backend.state is BackendState.UNHEALTHY
    assert sim_world.loop.time() < 3


async def test_requests_are_counted_while_they_run(sim_world: SimWorld) -> None:
    made: Balancer[str] = Balancer(sim_world.world, LeastConnections(), limits=HealthLimits(n_active_max=1))
    made.add("a", "a")
    with made.request() as backend:
        assert backend.n_active == 1
        with pytest.raises(UnavailableError):
            made.pick()
        await asyncio.sleep(0.5)
    facts = made.statistics()[0]
    assert (facts.n_active, facts.n_requests, facts.n_failures) == (0, 1, 0)
    assert facts.response_s == pytest.approx(0.5, rel=0.01)
    for error, failures in ((InvalidArgument("x", 1, "y"), 0), (ZeroDivisionError(), 1), (asyncio.CancelledError(), 1)):
        with pytest.raises(type(error)), made.request():
            raise error
        assert made.statistics()[0].n_failures == failures
        assert backend.n_active == 0


def test_backends_come_and_go(sim_world: SimWorld) -> None:
    made = balancer(sim_world, RoundRobin(), a=1)
    with pytest.raises(AlreadyExists):
        made.add("a", "again")
    with pytest.raises(InvalidArgument):
        made.add("b", "b", weight=0)
    with made.request() as backend:
        made.remove("a")
    assert backend.n_requests == 1
    with pytest.raises(NotFound):
        made.remove("a")
    with pytest.raises(UnavailableError):
        made.pick()


async def test_a_probe_with_a_bug_is_a_failure_and_the_others_go_on_being_probed(sim_world: SimWorld) -> None:
    is_broken = True

    async def probe(target: str) -> bool:
        if is_broken:
            raise KeyError(target)
        return True

    limits = HealthLimits(n_failures=1, n_successes=1, probe_interval_s=1.0)
    made: Balancer[str] = Balancer(sim_world.world, RoundRobin(), probe=probe, limits=limits)
    backend = made.add("a", "a")
    made.start()
    await asyncio.sleep(3.5)
    assert state(backend) is BackendState.UNHEALTHY
    is_broken = False
    await asyncio.sleep(3.5)
    assert state(backend) is BackendState.HEALTHY
    await made.close()
