"""The rig fixture: a whole node on each World."""

from collections.abc import Iterator

import pytest

from tests.node.rig import HostBackend, Rig, SimBackend

_numbers = iter(range(1, 1000))


@pytest.fixture(params=[pytest.param("host", marks=pytest.mark.host), "sim"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A node that is not started yet: `async with rig: ...`."""
    if request.param == "sim":
        sim = request.getfixturevalue("sim_world")
        yield Rig(SimBackend(sim, request.getfixturevalue("folder")), "isopodt")
        return
    world = request.getfixturevalue("host_world")
    yield _host(world, request.getfixturevalue("folder"))


@pytest.fixture
def host_rig(request: pytest.FixtureRequest) -> Rig:
    """The same on the host only."""
    return _host(request.getfixturevalue("host_world"), request.getfixturevalue("folder"))


def _host(world: object, folder: str) -> Rig:
    return Rig(HostBackend(world, folder), f"isopodt{next(_numbers) % 10}")  # type: ignore[arg-type]
