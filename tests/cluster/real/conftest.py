"""The clusters under test: one for the tests of a file, since forming it takes seconds, whole again before each of them."""

import asyncio
from collections.abc import Iterator

import pytest

from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from tests.cluster.real.rig import Rig


@pytest.fixture(scope="module")
def forming(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Three nodes; a file says by `RIG` what is special about its own."""
    rig = Rig(**getattr(request.module, "RIG", {}))
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig(forming: Rig) -> Iterator[Rig]:
    """The same, with no fault in it and all nodes ready."""
    forming.undo()
    world = make_host_world()
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(forming.wait_ready(world))
    finally:
        world.close()
    try:
        yield forming
    finally:
        forming.undo()
