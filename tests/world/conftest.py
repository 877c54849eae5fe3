"""What the tests of the ports share: the disk with each of its back ends."""

from collections.abc import Iterator

import pytest

from isopod.world.disk import Disk
from isopod.world.host.disk import FileIoChoice, HostDisk
from isopod.world.host.workers import Workers
from isopod.world.world import World

CHOICES = ["threads", "io_uring"]


@pytest.fixture(params=CHOICES)
def disk(request: pytest.FixtureRequest, world: World) -> Iterator[Disk]:
    """The World's disk; the host's once with each back end."""
    choice: FileIoChoice = request.param
    if world.name == "sim":
        if choice != CHOICES[0]:
            pytest.skip("the simulation has one back end")
        yield world.disk
        return
    workers = Workers()
    host = HostDisk(workers, choice)
    try:
        assert host.io_facts().backend == choice, host.io_facts().why
        yield host
    finally:
        host.close()
        workers.close()
