"""Health with reasons: ok, degraded, failing; deadlines; not ready first when going down."""

import asyncio

import pytest

from isopod.telemetry.health import CHECKS_MAX, HealthRegistry
from isopod.world.world import World


@pytest.mark.row("S24")
async def test_checks_make_a_report_with_reasons(world: World) -> None:
    health = HealthRegistry(world.clock, kept_s=0)
    report = await health.report()
    assert (report.status, report.ready, report.reasons) == ("ok", True, ())
    full: list[str | None] = [None]
    health.register("disk", lambda: full[0], critical=False)

    async def database() -> str | None:
        await asyncio.sleep(0)
        return answer[0]

    answer: list[str | None] = [None]
    remove = health.register("database", database)
    assert (await health.report()).status == "ok"
    full[0] = "97 % full"
    report = await health.report()
    assert (report.status, report.ready, report.reasons) == ("degraded", True, ("disk: 97 % full",))
    answer[0] = "no connection"
    report = await health.report()
    assert (report.status, report.ready, report.reasons) == ("failing", False, ("disk: 97 % full", "database: no connection"))
    assert [(check.name, check.status, check.critical) for check in report.checks] == [
        ("disk", "degraded", False),
        ("database", "failing", True),
    ]
    remove()
    assert (await health.report()).status == "degraded"


async def test_a_check_that_hangs_or_fails_is_a_reason(world: World) -> None:
    health = HealthRegistry(world.clock)

    async def hang() -> str | None:
        await asyncio.Event().wait()
        return None

    def fail() -> str | None:
        raise OSError("gone")

    health.register("slow", hang, timeout_s=0.02)
    health.register("broken", fail, critical=False)
    report = await health.report()
    assert report.reasons == ("slow: no answer in 0.02 s", "broken: OSError: gone")
    assert report.checks[0].duration_s >= 0.015  # timers may fire a little early


async def test_a_shutdown_ends_readiness_first(world: World) -> None:
    health = HealthRegistry(world.clock)
    assert (await health.report()).ready
    assert not health.is_shut
    health.shut("SIGTERM")
    report = await health.report()
    assert (report.status, report.ready, report.reasons, health.is_shut) == ("ok", False, ("SIGTERM",), True)


async def test_many_askers_cost_no_more_than_one(world: World) -> None:
    health = HealthRegistry(world.clock, kept_s=0.05)
    asked: list[int] = []

    async def check() -> str | None:
        asked.append(1)
        await asyncio.sleep(0.01)
        return None

    health.register("one", check)
    await asyncio.gather(*(health.report() for _ in range(20)))
    assert len(asked) == 1
    await asyncio.sleep(0.06)
    await health.report()
    assert len(asked) == 2


async def test_names_are_unique_and_bounded(world: World) -> None:
    health = HealthRegistry(world.clock)
    for number in range(CHECKS_MAX):
        health.register(f"c{number}", lambda: None)
    for name in ("c0", "another"):
        with pytest.raises(ValueError, match=name):
            health.register(name, lambda: None)
