"""Processes, on both Worlds: what does not depend on which programs there are. Real programs: tests/world/host/test_processes.py."""

import pytest

from isopod.world.processes import ProcessIdentity
from isopod.world.world import World


async def test_a_missing_program(world: World) -> None:
    with pytest.raises(FileNotFoundError):
        await world.processes.run(["/missing/program"])
    with pytest.raises(FileNotFoundError):
        await world.processes.spawn(["/missing/program"], env={})
    assert world.processes.which("isopod-no-such-program") is None


async def test_who_is_gone_is_gone(world: World) -> None:
    nobody = ProcessIdentity(2**22 - 3, 1)
    assert world.processes.identify(nobody.pid) is None
    assert world.processes.signal(nobody, 15) is False
    await world.processes.wait_gone(nobody)


async def test_the_boot_has_a_name(world: World) -> None:
    assert len(world.processes.boot_id()) == 36
    assert world.processes.boot_id() == world.processes.boot_id()
    assert world.processes.own_pid() > 0
