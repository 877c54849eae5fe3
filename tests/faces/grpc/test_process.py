"""The face as a process of the node's: started, refused, started again, stopped, and killed if it does not stop. On both Worlds."""

import asyncio
from typing import Any

import pytest

from isopod.faces.grpc.process import GrpcFace
from isopod.faces.grpc.settings import FaceSettings
from isopod.runtime.companion import START_S, STOP_S
from isopod.runtime.logger import Logger
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument, UnavailableError
from isopod.world.world import World

pytestmark = pytest.mark.row("B14")
SIGKILL = 9


def face(world: World, entry: str, lines: list[bytes], **told: Any) -> GrpcFace:
    settings = FaceSettings(socket="/run/isopod.sock", **{"listen": "127.0.0.1:7001", **told})
    return GrpcFace(world, settings, Logger(lines.append, world.clock), entry=f"tests.faces.grpc.entries:{entry}")


async def test_it_says_where_it_serves_and_stops_when_told(world: World) -> None:
    lines: list[bytes] = []
    served = face(world, "obeys", lines)
    await served.start()
    assert served.address == "127.0.0.1:7001"
    identity = world.processes.identify(served.pid)
    assert identity is not None
    await served.stop()
    assert world.processes.identify(identity.pid) != identity
    assert not [line for line in lines if b'"level":"warning"' in line or b'"level":"error"' in line]
    await served.stop()


async def test_why_it_does_not_serve_is_what_starting_it_raises(world: World) -> None:
    refused = face(world, "refuses", [])
    with pytest.raises(UnavailableError, match="Address A already in use") as caught:
        await refused.start()
    assert caught.value.hint == "another one"
    assert refused.pid == 0
    with pytest.raises(UnavailableError, match="ended when it was started"):
        await face(world, "dies", []).start()
    with pytest.raises(InvalidArgument, match="mutual TLS"):
        await face(world, "obeys", [], listen="192.0.2.1:7001").start()


async def test_one_that_dies_is_started_again(world: World) -> None:
    lines: list[bytes] = []
    served = face(world, "obeys", lines)
    await served.start()
    for n in (1, 2):
        identity = world.processes.identify(served.pid)
        assert identity is not None
        world.processes.signal(identity, SIGKILL)
        await wait_for_condition_with_backoff(lambda n=n: served.n_restarts == n and served.pid > 0, timeout_s=30.0)  # type: ignore[misc]
    await served.stop()
    assert served.pid == 0
    assert sum(b"grpc.died" in line for line in lines) == 2


@pytest.mark.virtual_time
async def test_one_that_does_not_stop_is_killed(world: World) -> None:
    lines: list[bytes] = []
    served = face(world, "hangs", lines)
    await served.start()
    began_s = asyncio.get_running_loop().time()
    await served.stop()
    assert STOP_S <= asyncio.get_running_loop().time() - began_s < STOP_S + 1
    assert any(b"grpc.killed" in line for line in lines)


@pytest.mark.virtual_time
async def test_one_that_says_nothing_is_given_up(world: World) -> None:
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(UnavailableError, match="did not start within"):
        await face(world, "says_nothing", []).start()
    assert asyncio.get_running_loop().time() - began_s < START_S + 1


async def test_stopping_between_death_and_the_next_start(world: World) -> None:
    served = face(world, "obeys", [])
    await served.start()
    identity = world.processes.identify(served.pid)
    assert identity is not None
    world.processes.signal(identity, SIGKILL)
    await world.processes.wait_gone(identity)
    await served.stop()
    assert served.pid == 0
