"""Health checks: a command inside tells how a container is; its states are stored, shown, and told as events. On both Worlds."""

import asyncio
from typing import Any

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api.render import container_status
from isopod.world.errors import InvalidArgument
from tests.node.rig import IMAGE, Rig

WAIT_S = 30.0


async def start(rig: Rig, script: str, **check: Any) -> m.Container:
    settings = {"interval_s": 0.1, "timeout_s": 10.0, "retries": 2, **check}
    return await rig.run_detached("sleep", "1000", name="box", health_check=m.HealthCheck(command=("sh", "-c", script), **settings))


async def healths(rig: Rig, n_wanted: int, name: str = "box") -> list[str]:
    """Return the first states of health that events tell of."""
    found: list[str] = []
    request = m.EventsRequest(containers=(name,), kinds=("health",), since_ns=0)
    async with asyncio.timeout(WAIT_S), rig.client.open(methods.CONTAINER_EVENTS, request) as call:
        async for item in call:
            if isinstance(item, m.Event):
                found.append(str(item.health))
                if len(found) == n_wanted:
                    break
    return found


@pytest.mark.row("R14", "R30")
async def test_health_follows_the_command_and_is_told(rig: Rig) -> None:
    async with rig:
        await start(rig, "test -e /tmp/ready", start_period_s=600.0)
        await rig.exec("box", "touch", "/tmp/ready")
        assert await healths(rig, 2) == ["starting", "healthy"]
        assert container_status(await rig.inspect("box"), rig.world.clock.now_ns() / 1e9).endswith("(healthy)")
        await rig.exec("box", "rm", "/tmp/ready")
        assert await healths(rig, 3) == ["starting", "healthy", "unhealthy"], "the start period ends with the first success"
        await rig.exec("box", "touch", "/tmp/ready")
        assert await healths(rig, 4) == ["starting", "healthy", "unhealthy", "healthy"]


@pytest.mark.row("R14", "R30")
async def test_health_goes_on_after_a_kill_of_the_node_and_begins_anew_with_a_start(rig: Rig) -> None:
    async with rig:
        record = await start(rig, "test -e /ready", retries=1)
        assert record.health_check is not None
        assert await healths(rig, 2) == ["starting", "unhealthy"]
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).health == "unhealthy"
        await rig.exec("box", "touch", "/ready")
        assert await healths(rig, 3) == ["starting", "unhealthy", "healthy"]
        await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="box", timeout_s=0.1))
        assert await healths(rig, 5) == ["starting", "unhealthy", "healthy", "starting", "healthy"]


@pytest.mark.row("R14")
async def test_a_command_that_hangs_or_cannot_be_run_is_a_failure(rig: Rig) -> None:
    async with rig:
        await start(rig, "exec sleep 777", timeout_s=0.3, retries=1)
        assert await healths(rig, 2) == ["starting", "unhealthy"]
        check = m.HealthCheck(command=("/nowhere",), interval_s=0.1, retries=1)
        await rig.run_detached("sleep", "1000", name="other", health_check=check)
        assert await healths(rig, 2, "other") == ["starting", "unhealthy"]


async def test_one_that_is_paused_is_not_asked(rig: Rig) -> None:
    async with rig:
        await start(rig, "true")
        assert await healths(rig, 2) == ["starting", "healthy"]
        await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        await asyncio.sleep(0.5)  # some intervals: what is waited for is that nothing happens
        assert (await rig.inspect("box")).health == "healthy"
        await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="box"))
        assert (await rig.inspect("box")).health == "healthy"


@pytest.mark.parametrize(
    "check",
    [
        m.HealthCheck(command=()),
        m.HealthCheck(command=("",)),
        m.HealthCheck(command=("a\0b",)),
        m.HealthCheck(command=("true",), interval_s=0.0),
        m.HealthCheck(command=("true",), timeout_s=float("inf")),
        m.HealthCheck(command=("true",), start_period_s=-1.0),
        m.HealthCheck(command=("true",), retries=0),
    ],
)
async def test_a_check_that_makes_no_sense_is_refused(rig: Rig, check: m.HealthCheck) -> None:
    async with rig:
        spec = m.ContainerSpec(image=IMAGE, command=("true",), name="box", health_check=check)
        with pytest.raises(InvalidArgument):
            await rig.client.call(methods.CONTAINER_CREATE, spec)
        assert await rig.list() == []
