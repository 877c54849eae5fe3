"""Files that are followed: through links, with one word about each trouble, and never back to what was read before."""

import asyncio
import os
from collections.abc import Callable
from typing import cast

import pytest

from isopod.pulse.followed import READ_HINT, REREAD_S, Followed
from isopod.world.disk import Disk
from isopod.world.errors import UnavailableError
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.telemetry.kit import Memo

pytestmark = pytest.mark.row("T21")
WAIT_S = 30.0


def following(disk: Disk, path: str, memo: Memo) -> Followed[bytes]:
    return Followed(disk, path, bytes, logger=memo.logger)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


async def follows_a_link(world: World, folder: str, link: Callable[[str, str], object]) -> None:
    """What is written is in another folder than the link, whose own folder sees nothing of it."""
    await world.disk.make_directory(f"{folder}/real")
    await world.disk.make_directory(f"{folder}/shown")
    await world.disk.write(f"{folder}/real/token", b"one")
    link(f"{folder}/real/token", f"{folder}/shown/token")
    file = following(world.disk, f"{folder}/shown/token", Memo(world.clock))
    await file.open()
    assert file.value == b"one"
    for content in (b"two", b"three"):  # the first may be seen where the watch begins
        await world.disk.write_atomic(f"{folder}/real/token", content)
        await until(lambda content=content: file.value == content)  # type: ignore[misc]  # mypy cannot infer it
    await file.close()


async def test_a_file_behind_a_link_is_followed(sim_world: SimWorld, folder: str) -> None:
    await follows_a_link(sim_world.world, folder, sim_world.machine.view.symlink)


async def test_a_file_behind_a_link_is_followed_on_the_host(host_world: World, folder: str) -> None:
    await follows_a_link(host_world, folder, os.symlink)


async def test_each_trouble_is_told_once_and_again_when_it_came_back(sim_world: SimWorld, folder: str) -> None:
    disk, inner = sim_world.world.disk, f"{folder}/inner"
    memo = Memo(sim_world.world.clock)
    await disk.make_directory(inner)
    await disk.write(f"{inner}/token", b"one")
    file = following(disk, f"{inner}/token", memo)
    await file.open()
    for n_times in (1, 2):
        await disk.remove_tree(inner)
        await asyncio.sleep(10 * REREAD_S)
        assert [memo.events().count(event) for event in ("pulse.secret_not_read", "pulse.secret_not_watched")] == [n_times, n_times]
        assert file.value is not None, "what held before holds"
        await disk.make_directory(inner)
        await disk.write(f"{inner}/token", b"again %d" % n_times)
        await asyncio.sleep(3 * REREAD_S)
        assert file.value == b"again %d" % n_times
    assert all(b"again" not in line for line in memo.lines)
    await file.close()


class Held:
    """A disk of which the second read is held up with what it found, until `release`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.n_reads = 0
        self.release = asyncio.Event()

    async def read(self, path: str, *, n_bytes_max: int) -> bytes:
        self.n_reads += 1
        is_held = self.n_reads == 2
        content = await self._disk.read(path, n_bytes_max=n_bytes_max)
        if is_held:
            await self.release.wait()
        return bytes(content)


async def test_of_two_reads_the_older_does_not_win(sim_world: SimWorld, folder: str) -> None:
    disk = sim_world.world.disk
    await disk.write(f"{folder}/token", b"one")
    held = Held(disk)
    file = following(cast("Disk", held), f"{folder}/token", Memo(sim_world.world.clock))
    await file.reload()
    first = asyncio.ensure_future(file.reload())
    while held.n_reads < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    await disk.write(f"{folder}/token", b"two")
    second = asyncio.ensure_future(file.reload())
    await asyncio.sleep(0.1)
    held.release.set()
    await asyncio.gather(first, second)
    assert file.value == b"two"


async def test_a_file_that_is_not_there_is_told_with_a_hint(world: World, folder: str) -> None:
    with pytest.raises(UnavailableError, match="cannot read") as caught:
        await following(world.disk, f"{folder}/none", Memo(world.clock)).open()
    assert caught.value.hint == READ_HINT
