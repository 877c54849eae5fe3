"""Kernel, on both Worlds: the bodies of kernel_bodies.py, in the simulation and, enclosed in namespaces of its own, on the host."""

from typing import TYPE_CHECKING

import pytest

from tests.world.host.enclosed import run_enclosed
from tests.world.kernel_bodies import BODIES

if TYPE_CHECKING:
    from isopod.world.sim import SimWorld


@pytest.mark.parametrize("name", sorted(BODIES))
async def test_in_the_simulation(name: str, sim_world: "SimWorld", folder: str) -> None:
    await BODIES[name](sim_world.world, folder)


@pytest.mark.host
@pytest.mark.parametrize("loop_kind", ["uvloop", "asyncio"])
@pytest.mark.parametrize("name", sorted(BODIES))
def test_on_the_host(name: str, loop_kind: str, folder: str) -> None:
    run_enclosed("tests.world.host.enclosed", loop_kind, name, folder)
