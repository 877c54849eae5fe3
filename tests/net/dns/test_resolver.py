"""The resolver: cache, single flight, negative answers, time limits, statistics."""

import asyncio

import pytest

from isopod.net.dns import DnsClient, Lookup, Resolver, ResolverLimits
from isopod.world.errors import DeadlineExceeded, Exhausted, NotFound, UnavailableError
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.dns.server import NameServer

pytestmark = pytest.mark.row("S16")


async def test_an_answer_is_kept_for_its_time(sim_world: SimWorld) -> None:
    names = sim_world.network.names
    names.set("web", ["fd00::1", "10.0.0.1"], delay_s=0.1)
    resolver = Resolver(sim_world.world)
    assert await resolver.resolve("web") == ("10.0.0.1", "fd00::1")  # IPv4 first
    names.set("web", ["10.0.0.2"])
    assert await resolver.resolve_one("WEB.") == "10.0.0.1"
    assert names.n_lookups == 1
    await asyncio.sleep(31)
    assert await resolver.resolve("web") == ("10.0.0.2",)
    assert names.n_lookups == 2
    assert resolver.statistics()[:5] == (1, 0, 0, 2, 0)
    assert await Resolver(sim_world.world, prefer_ipv4=False).resolve("localhost") == ("127.0.0.1", "::1")
    await resolver.close()


async def test_numbers_are_their_own_names(sim_world: SimWorld) -> None:
    resolver = Resolver(sim_world.world)
    assert await resolver.resolve("10.0.0.1") == ("10.0.0.1",)
    assert await resolver.resolve("FD00::0:1") == ("fd00::1",)
    assert resolver.statistics().n_misses == 0


async def test_those_who_ask_together_ask_once_and_one_who_leaves_disturbs_nobody(sim_world: SimWorld) -> None:
    sim_world.network.names.set("web", ["10.0.0.1"], delay_s=1)
    resolver = Resolver(sim_world.world)
    asking = [asyncio.ensure_future(resolver.resolve("web")) for _ in range(10)]
    await asyncio.sleep(0.5)
    asking[0].cancel()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [("10.0.0.1",)] * 9
    assert sim_world.network.names.n_lookups == 1
    assert (resolver.statistics().n_misses, resolver.statistics().n_joined) == (1, 9)


async def test_no_such_name_is_kept_briefly_a_failure_is_not(sim_world: SimWorld) -> None:
    names = sim_world.network.names
    resolver = Resolver(sim_world.world, limits=ResolverLimits(n_attempts=2))
    for _ in range(3):
        with pytest.raises(NotFound, match="host name: none"):
            await resolver.resolve("none")
    assert names.n_lookups == 1
    assert resolver.statistics().n_negative_hits == 2
    names.set("none", ["10.0.0.9"])
    await asyncio.sleep(5.1)
    assert await resolver.resolve_one("none") == "10.0.0.9"
    names.set("flaky", [], fails=True)
    for number in (1, 2):
        with pytest.raises(UnavailableError, match="cannot resolve flaky"):
            await resolver.resolve("flaky")
        assert resolver.statistics().n_errors == number
    assert names.n_lookups == 6
    names.set("flaky", ["10.0.0.8"])
    assert await resolver.resolve_one("flaky") == "10.0.0.8"


async def test_every_attempt_has_its_time(sim_world: SimWorld) -> None:
    sim_world.network.names.set("slow", ["10.0.0.1"], delay_s=60)
    resolver = Resolver(sim_world.world, limits=ResolverLimits(attempt_s=2, n_attempts=3))
    began = sim_world.loop.time()
    with pytest.raises(DeadlineExceeded):
        await resolver.resolve("slow")
    assert 5.9 < sim_world.loop.time() - began < 6.1
    assert (resolver.statistics().n_timeouts, resolver.statistics().n_errors) == (3, 1)


async def test_the_cache_and_the_questions_are_bounded(sim_world: SimWorld) -> None:
    names = sim_world.network.names
    for number in range(6):
        names.set(f"n{number}", [f"10.0.0.{number}"], delay_s=0.1)
    resolver = Resolver(sim_world.world, limits=ResolverLimits(n_entries_max=3, n_asking_max=4))
    assert await resolver.preload([f"n{number}" for number in range(4)]) == 4
    assert resolver.statistics().n_entries == 3
    await resolver.resolve("n1")  # used lately
    await resolver.resolve("n4")
    lookups = names.n_lookups
    await resolver.resolve("n1")
    assert names.n_lookups == lookups
    await resolver.resolve("n2")
    assert names.n_lookups == lookups + 1
    resolver.clear()
    found = await resolver.resolve_many([f"n{number}" for number in range(6)])
    assert sum(isinstance(each, Exhausted) for each in found.values()) == 2
    assert resolver.statistics().n_entries == 3
    await resolver.resolve("n3")
    resolver.clear("n3")
    assert resolver.statistics().n_entries == 2


async def test_closing_ends_what_is_asked(sim_world: SimWorld) -> None:
    sim_world.network.names.set("slow", ["10.0.0.1"], delay_s=60)
    resolver = Resolver(sim_world.world)
    asking = asyncio.ensure_future(resolver.resolve("slow"))
    await asyncio.sleep(0.1)
    await resolver.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_times_to_live_of_a_source_that_knows_them(sim_world: SimWorld) -> None:
    asked: list[str] = []
    ttl_s: dict[str, float] = {"short": 2, "never": 0, "long": 10**6}

    async def source(name: str) -> Lookup:
        asked.append(name)
        return Lookup(("10.0.0.1",) if name in ttl_s else (), ttl_s.get(name, 1))

    resolver = Resolver(sim_world.world, source=source, limits=ResolverLimits(ttl_s_max=100))
    for name, wait_s, n_asked in (
        ("short", 1.5, 1),
        ("short", 1.5, 1),
        ("short", 0, 2),
        ("never", 0, 1),
        ("never", 0, 2),
        ("long", 99, 1),
        ("long", 2, 1),
        ("long", 0, 2),
    ):
        await resolver.resolve(name)
        assert asked.count(name) == n_asked, name
        await asyncio.sleep(wait_s)
    with pytest.raises(NotFound):
        await resolver.resolve("none")
    await asyncio.sleep(1.1)
    with pytest.raises(NotFound):
        await resolver.resolve("none")
    assert asked.count("none") == 2


async def test_over_our_own_client(world: World) -> None:
    server = NameServer({("web.example", "A"): ["10.0.0.1"], ("web.example", "AAAA"): ["fd00::1"]})
    client = DnsClient(world, [await server.start(world)])
    resolver = Resolver(world, source=client.lookup)
    assert await resolver.resolve("web.example") == ("10.0.0.1", "fd00::1")
    assert await resolver.resolve("web.example") == ("10.0.0.1", "fd00::1")
    assert len(server.asked) == 2  # A and AAAA, once
    with pytest.raises(NotFound):
        await resolver.resolve("none.example")
    await resolver.close()
    await server.stop()


async def test_over_the_machines_resolver(host_world: World) -> None:
    resolver = Resolver(host_world)
    assert "127.0.0.1" in await resolver.resolve("localhost")
    found = await resolver.resolve_many(["no-such-host.invalid", "a" * 300])
    assert all(isinstance(each, NotFound | UnavailableError) for each in found.values())
    await resolver.close()
