"""Discovery in both Worlds: sandboxes that come and go, roots that do, and what is put in their way (T11, K8, K9)."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from isopod.pulse.discovery import LOOK_S, REFUSED_MAX, SOCKET_WAIT_S, Discovery, is_identifier
from isopod.pulse.model import ID_BYTES_MAX, SOCKET_NAME, Root, Target
from isopod.runtime.logger import Logger
from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.shims import FakeShims

SEEN_S = 0.5
"""By then a change is told (T11)."""
GRACE_S = LOOK_S / 2
"""What a busy host may take: less than until the roots are looked at anyway, so that only a change that was told can be in time."""


class Told:
    """What a discovery told, and when."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.now: dict[str, Target] = {}
        self.events: list[tuple[str, str]] = []
        self.fails = False
        self.log: list[dict[str, Any]] = []

    def found(self, target: Target) -> None:
        self.now[target.id] = target
        self.events.append(("found", target.id))
        if self.fails:
            raise RuntimeError("a fault of the listener")

    def gone(self, identifier: str) -> None:
        del self.now[identifier]
        self.events.append(("gone", identifier))

    async def until(self, is_so: Callable[[], bool], within_s: float = SEEN_S) -> None:
        """Wait for a condition. In the simulation it must be so in time; what a busy host does is not held against it."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while not is_so():
            assert loop.time() - began_s <= (within_s if self.world.name == "sim" else GRACE_S), self.events
            await asyncio.sleep(0.005)


class Rig:
    """Two roots below a folder, and a discovery over them."""

    def __init__(self, world: World, folder: str, *, sandboxes_max: int = 1000) -> None:
        self.world = world
        self.go, self.rust = f"{folder}/run/vc/sbs", f"{folder}/run/kata"
        self.told = Told(world)
        logger = Logger(lambda line: self.told.log.append(msgspec.json.decode(line)), world.clock)
        self.discovery = Discovery(
            world,
            (Root(self.go, "go"), Root(self.rust + "/", "rust")),
            on_found=self.told.found,
            on_gone=self.told.gone,
            logger=logger,
            sandboxes_max=sandboxes_max,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        """Run it, and see that it is still running in the end."""
        task = asyncio.ensure_future(self.discovery.run())
        try:
            yield self
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def both(world: World, folder: str, *, sandboxes_max: int = 1000) -> AsyncIterator[tuple[Rig, FakeShims, FakeShims]]:
    """Yield a running discovery and the shims of both roots."""
    rig = Rig(world, folder, sandboxes_max=sandboxes_max)
    async with FakeShims(world, rig.go) as go, FakeShims(world, rig.rust) as rust, rig.running():
        await rig.told.until(lambda: all(rig.discovery.available().values()))
        yield rig, go, rust


@pytest.mark.row("K8")
@pytest.mark.row("T11")
async def test_a_sandbox_is_found_and_gone_at_once(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, _):
        shim = await go.add("a" * 64)
        await rig.told.until(lambda: bool(rig.told.now))
        assert rig.told.now == {"a" * 64: Target("a" * 64, "go", shim.socket)}
        await go.remove("a" * 64)
        await rig.told.until(lambda: not rig.told.now)
        assert rig.told.events == [("found", "a" * 64), ("gone", "a" * 64)]


@pytest.mark.row("K8")
async def test_those_that_are_there_already_are_found_first(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    async with FakeShims(world, rig.go) as go, FakeShims(world, rig.rust) as rust:
        for name in ("c", "a", "b"):
            await go.add(name)
        await rust.add("d")
        async with rig.running():
            await rig.told.until(lambda: len(rig.told.now) == 4)
        assert [name for _, name in rig.told.events] == ["a", "b", "c", "d"]


@pytest.mark.row("K9")
async def test_the_second_root_is_watched_too_and_the_first_wins(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, rust):
        told = rig.told
        of_rust = await rust.add("x")
        await told.until(lambda: bool(told.now))
        assert told.now["x"] == Target("x", "rust", of_rust.socket)
        of_go = await go.add("x", late=True)  # a folder alone wins nothing
        await rust.add("later")
        await told.until(lambda: "later" in told.now)
        assert told.now["x"].runtime == "rust"
        await go.listen(of_go)
        await told.until(lambda: told.now.get("x") == Target("x", "go", of_go.socket))
        await go.remove("x")
        await told.until(lambda: told.now.get("x") == Target("x", "rust", of_rust.socket))
        await rust.remove("x")
        await told.until(lambda: "x" not in told.now)
        assert [event for event in told.events if event[1] == "x"] == [("found", "x"), ("gone", "x")] * 3


@pytest.mark.row("T11")
async def test_a_socket_that_appears_after_its_folder(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, _):
        shim = await go.add("slow", late=True)
        await go.add("other")
        await rig.told.until(lambda: "other" in rig.told.now)
        assert "slow" not in rig.told.now
        assert rig.discovery.statistics().n_waiting == 1
        await go.listen(shim)
        await rig.told.until(lambda: "slow" in rig.told.now)
        assert rig.discovery.statistics().n_waiting == 0
        assert ("found", "slow") in rig.told.events


@pytest.mark.row("K8")
@pytest.mark.row("T11")
@pytest.mark.virtual_time
async def test_a_sandbox_without_a_socket_is_found_all_the_same_and_again_when_it_comes(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, _):
        told = rig.told
        shim = await go.add("dead", late=True)
        await told.until(lambda: "dead" in told.now, SOCKET_WAIT_S + SEEN_S)
        await asyncio.sleep(100.0)
        assert told.events == [("found", "dead")]
        await go.listen(shim)
        await told.until(lambda: len(told.events) == 2)
        assert told.events == [("found", "dead")] * 2
        await go.remove("dead")
        await told.until(lambda: not told.now)
        second = await go.add("brief", late=True)
        await asyncio.sleep(SOCKET_WAIT_S / 2)
        await go.remove("brief")
        await asyncio.sleep(SOCKET_WAIT_S * 2)
        assert told.events[2:] == [("gone", "dead")]
        assert second.listener is None
        assert rig.discovery.statistics().n_waiting == 0


@pytest.mark.row("T11")
async def test_roots_that_appear_late(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    async with rig.running():
        await world.disk.write(f"{folder}/unrelated", b"")
        assert rig.discovery.available() == {rig.go: False, rig.rust: False}
        async with FakeShims(world, rig.go) as go:
            await go.add("a")
            await rig.told.until(lambda: "a" in rig.told.now)
            assert rig.discovery.available() == {rig.go: True, rig.rust: False}
        async with FakeShims(world, rig.rust) as rust:
            await rust.add("b")
            await rig.told.until(lambda: "b" in rig.told.now)
            assert rig.discovery.available() == {rig.go: True, rig.rust: True}


@pytest.mark.row("T11")
@pytest.mark.parametrize("removed", ["run", "run/vc", "run/vc/sbs"])
@pytest.mark.parametrize("way", ["removed", "renamed"])
async def test_roots_that_vanish_and_come_again(world: World, folder: str, removed: str, way: str) -> None:
    rig = Rig(world, folder)
    async with rig.running():
        for number in range(3):
            async with FakeShims(world, rig.go) as go:
                await go.add(f"a{number}")
                await rig.told.until(lambda: bool(rig.told.now))
                assert list(rig.told.now) == [f"a{number}"]
                if way == "renamed":
                    await world.disk.rename(f"{folder}/{removed}", f"{folder}/old{number}")
                    await rig.told.until(lambda: not rig.told.now)
                    assert not rig.discovery.available()[rig.go]
            if way == "removed":
                await world.disk.remove_tree(f"{folder}/{removed}")
                await rig.told.until(lambda: not any(rig.discovery.available().values()))
                assert not rig.told.now


@pytest.mark.row("T11")
async def test_a_root_that_is_a_file(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    await world.disk.make_directory(f"{folder}/run/vc")
    await world.disk.write(rig.go, b"no folder")
    async with rig.running():
        async with FakeShims(world, rig.rust) as rust:
            await rust.add("b")
            await rig.told.until(lambda: "b" in rig.told.now)
            assert rig.discovery.available() == {rig.go: False, rig.rust: True}
        await world.disk.remove(rig.go)
        async with FakeShims(world, rig.go) as go:
            await go.add("a")
            await rig.told.until(lambda: "a" in rig.told.now)


@pytest.mark.row("T11")
async def test_hostile_names_are_refused(world: World, folder: str) -> None:
    bad = ["new\nline", "bell\a", "tab\t", "x" * (ID_BYTES_MAX + 1), "\u202egnirts", "\x7f"]
    good = ["a" * ID_BYTES_MAX, 'quote"', "back\\slash", "<script>", "ünïcode", "..a", "a b"]
    async with both(world, folder) as (rig, _, _):
        for name in (*bad, *good):
            await world.disk.make_directory(f"{rig.go}/{name}")
            await world.disk.write(f"{rig.go}/{name}/{SOCKET_NAME}", b"")
        await rig.told.until(lambda: len(rig.told.now) == len(good))
        assert sorted(rig.told.now) == sorted(good)
        assert rig.discovery.statistics().n_refused == len(bad)
        refused = [line for line in rig.told.log if line["event"] == "pulse.refused"]
        assert len(refused) == len(bad)
        assert all(line["name"].isprintable() for line in refused)


def test_ids() -> None:
    assert all(is_identifier(name) for name in ("a", "a" * ID_BYTES_MAX, "a.b_c-d", "..."))
    assert not any(is_identifier(name) for name in ("", ".", "..", "a/b", "../a", "a\0", "\udcff", "a\n", "é" * ID_BYTES_MAX))


async def test_names_that_are_no_text_are_refused(host_world: World, folder: str) -> None:
    async with both(host_world, folder) as (rig, go, _):
        os.mkdir(os.fsencode(rig.go) + b"/\xff\xfe")
        await go.add("a")
        await rig.told.until(lambda: "a" in rig.told.now)
        assert list(rig.told.now) == ["a"]
        assert rig.discovery.statistics().n_refused == 1


@pytest.mark.row("T11")
async def test_symlinks_are_refused(host_world: World, folder: str) -> None:
    async with both(host_world, folder) as (rig, go, rust):
        shim = await rust.add("real")
        os.symlink(shim.folder, f"{rig.go}/link")
        os.symlink("/nowhere", f"{rig.go}/dangling")
        os.mkdir(f"{rig.go}/inner")
        os.symlink(shim.socket, f"{rig.go}/inner/{SOCKET_NAME}")
        os.mkdir(f"{rig.go}/folder")
        os.mkdir(f"{rig.go}/folder/{SOCKET_NAME}")
        await go.add("last")
        await rig.told.until(lambda: "last" in rig.told.now and "real" in rig.told.now)
        assert sorted(rig.told.now) == ["last", "real"]
        assert rig.discovery.statistics().n_refused == 2
        os.unlink(f"{rig.go}/link")
        await go.add("link")  # a true folder of that name is welcome
        await rig.told.until(lambda: "link" in rig.told.now)
        os.rename(f"{rig.go}/link", f"{folder}/away")
        os.symlink(f"{folder}/away", f"{rig.go}/link")
        await rig.told.until(lambda: "link" not in rig.told.now)
        os.unlink(f"{rig.go}/link")
        os.rename(f"{folder}/away", f"{rig.go}/link")


async def test_a_root_may_be_a_symlink(host_world: World, folder: str) -> None:
    rig = Rig(host_world, folder)
    os.makedirs(f"{folder}/real")
    os.makedirs(f"{folder}/run/vc")
    os.symlink(f"{folder}/real", rig.go)
    async with FakeShims(host_world, f"{folder}/real") as shims, rig.running():
        await shims.add("a")
        await rig.told.until(lambda: "a" in rig.told.now)
        assert rig.told.now["a"].socket == f"{rig.go}/a/{SOCKET_NAME}"


@pytest.mark.row("T11")
async def test_after_lost_changes_everything_is_looked_at(sim_world: SimWorld, folder: str) -> None:
    async with both(sim_world.world, folder) as (rig, go, _):
        await go.add("stays")
        await go.add("goes")
        await rig.told.until(lambda: len(rig.told.now) == 2)
        for _ in range(20):
            # Changes behind the kernel's back: the view's own calls let no time pass, so that nothing is read before it is lost.
            sim_world.machine.view.remove_tree(f"{rig.go}/goes")
            sim_world.machine.view.make_folders(f"{rig.go}/new", 0o755)
            sim_world.machine.view.write(f"{rig.go}/new/{SOCKET_NAME}", b"")
            sim_world.disk.lose_changes()
            await rig.told.until(lambda: sorted(rig.told.now) == ["new", "stays"])
            sim_world.machine.view.rename(f"{rig.go}/new", f"{rig.go}/goes")
            sim_world.disk.lose_changes()
            await rig.told.until(lambda: sorted(rig.told.now) == ["goes", "stays"])
        assert rig.discovery.statistics().n_overflows == 40


@pytest.mark.row("T11")
async def test_a_flood_of_changes_on_the_host(host_world: World, folder: str) -> None:
    with open("/proc/sys/fs/inotify/max_queued_events", encoding="ascii") as file:
        queued_max = int(file.read())
    if queued_max > 100_000:
        pytest.skip(f"the kernel queues {queued_max} changes: too many to make them overflow")
    async with both(host_world, folder) as (rig, go, _):
        await go.add("stays")
        await go.add("goes")
        await rig.told.until(lambda: len(rig.told.now) == 2)
        for _ in range(queued_max // 2 + 1):  # the loop gets no turn between these
            os.mkdir(f"{rig.go}/flood")
            os.rmdir(f"{rig.go}/flood")
        os.rename(f"{rig.go}/goes", f"{rig.go}/came")
        await rig.told.until(lambda: sorted(rig.told.now) == ["came", "stays"])
        assert rig.discovery.statistics().n_overflows == 1
        os.rename(f"{rig.go}/came", f"{rig.go}/goes")
        await rig.told.until(lambda: sorted(rig.told.now) == ["goes", "stays"])


@pytest.mark.row("T11")
async def test_more_entries_than_the_bound(sim_world: SimWorld, folder: str) -> None:
    view = sim_world.machine.view
    rig = Rig(sim_world.world, folder, sandboxes_max=1000)
    async with FakeShims(sim_world.world, rig.go), FakeShims(sim_world.world, rig.rust):
        for number in range(20_000):
            view.make_folders(f"{rig.go}/{number:05}", 0o755)
            view.write(f"{rig.go}/{number:05}/{SOCKET_NAME}", b"")
        async with rig.running():
            await rig.told.until(lambda: len(rig.told.now) == 1000, 10.0)
            await asyncio.sleep(10.0)
            statistics = rig.discovery.statistics()
            assert (statistics.n_sandboxes, statistics.n_left_out, len(rig.told.now)) == (1000, 19_000, 1000)
            assert sum(line["event"] == "pulse.too_many_sandboxes" for line in rig.told.log) == 1
            view.remove_tree(f"{rig.go}/{7:05}")
            await rig.told.until(lambda: f"{1000:05}" in rig.told.now, 5.0)
            assert rig.discovery.statistics().n_left_out == 18_999


async def test_folders_without_sockets_are_bounded_too(sim_world: SimWorld, folder: str) -> None:
    view = sim_world.machine.view
    async with both(sim_world.world, folder, sandboxes_max=50) as (rig, go, _):
        before = sim_world.disk.n_watches
        for number in range(200):
            view.make_folders(f"{rig.go}/{number:03}", 0o755)
        await asyncio.sleep(SOCKET_WAIT_S + 1.0)
        assert len(rig.told.now) == 50
        assert sim_world.disk.n_watches == before + 50
        for number in range(200):
            view.remove_tree(f"{rig.go}/{number:03}")
        await rig.told.until(lambda: not rig.told.now)
        await go.add("a")
        await rig.told.until(lambda: "a" in rig.told.now)
        assert sim_world.disk.n_watches == before


async def test_without_watches_the_roots_are_listed(sim_world: SimWorld, folder: str) -> None:
    sim_world.disk.watches_max = 1
    rig = Rig(sim_world.world, folder)
    async with rig.running():
        async with FakeShims(sim_world.world, rig.go) as go:
            await go.add("a")
            await rig.told.until(lambda: "a" in rig.told.now)
            late = await go.add("late", late=True)
            await asyncio.sleep(SOCKET_WAIT_S + 1.0)
            await go.listen(late)
            await rig.told.until(lambda: rig.told.events.count(("found", "late")) == 2)
            assert rig.discovery.statistics().is_polling
            assert rig.discovery.available() == {rig.go: True, rig.rust: False}
            await go.remove("a")
            await rig.told.until(lambda: "a" not in rig.told.now)
        sim_world.disk.watches_max = 1000
        await asyncio.sleep(100.0)
        assert not rig.discovery.statistics().is_polling
        assert sum(line["event"] == "pulse.not_watched" for line in rig.told.log) in (1, 2)


async def test_what_no_watch_tells_is_found_in_the_next_round(sim_world: SimWorld, folder: str) -> None:
    async with both(sim_world.world, folder) as (rig, _, _):
        folder_of_root = sim_world.machine.view.folder(rig.go).inode
        watchers, folder_of_root.watchers = folder_of_root.watchers, []
        sim_world.machine.view.make_folders(f"{rig.go}/unseen", 0o755)
        sim_world.machine.view.write(f"{rig.go}/unseen/{SOCKET_NAME}", b"")
        await rig.told.until(lambda: "unseen" in rig.told.now, LOOK_S + SEEN_S)
        folder_of_root.watchers = watchers
        assert rig.discovery.statistics().n_overflows == 0


@pytest.mark.row("K17")
async def test_a_listener_that_fails_ends_nothing(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, _):
        rig.told.fails = True
        await go.add("a")
        await rig.told.until(lambda: "a" in rig.told.now)
        rig.told.fails = False
        await go.add("b")
        await rig.told.until(lambda: "b" in rig.told.now)
        assert [line["sandbox"] for line in rig.told.log if line["event"] == "pulse.listener_failed"] == ["a"]


@pytest.mark.row("K17")
async def test_a_disk_that_fails_ends_nothing(sim_world: SimWorld, folder: str) -> None:
    async with both(sim_world.world, folder) as (rig, go, _):
        await go.add("a")
        await rig.told.until(lambda: "a" in rig.told.now)
        disk = rig.discovery._disk = _Failing(sim_world.world.disk)  # type: ignore[assignment]  # the ports it uses
        await go.add("b")
        await asyncio.sleep(LOOK_S * 2)
        assert disk.n_failed > 1
        disk.fails = False
        await rig.told.until(lambda: sorted(rig.told.now) == ["a", "b"], LOOK_S + SEEN_S)


class _Failing:
    """A disk whose looks fail, as those of one with bad blocks or missing rights do."""

    def __init__(self, disk: Any) -> None:
        self._disk = disk
        self.fails = True
        self.n_failed = 0

    async def stat(self, path: str) -> Any:
        return await (self._fail(path) if self.fails else self._disk.stat(path))

    async def list(self, path: str) -> Any:
        return await (self._fail(path) if self.fails else self._disk.list(path))

    async def _fail(self, path: str) -> None:
        self.n_failed += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)


@pytest.mark.row("T3")
@pytest.mark.slow
async def test_thousands_that_come_and_go_leave_nothing(sim_world: SimWorld, folder: str) -> None:
    async with both(sim_world.world, folder) as (rig, go, _):
        before = sim_world.disk.n_watches
        for number in range(5000):
            shim = await go.add(f"{number}", late=number % 3 == 0)
            if number % 6 == 0:
                await go.listen(shim)
            await asyncio.sleep(0.002)
            if number >= 20:
                await go.remove(f"{number - 20}")
        for number in range(4980, 5000):
            await go.remove(f"{number}")
        await rig.told.until(lambda: not rig.told.now and rig.discovery.statistics().n_waiting == 0)
        statistics = rig.discovery.statistics()
        assert statistics.n_found == statistics.n_gone > 3000
        assert sim_world.disk.n_watches == before
        state = rig.discovery.__dict__
        assert [name for name in ("_known", "_bare", "_lacking", "_timers", "_changes", "_overdue") if state[name]] == []


async def test_refused_names_are_remembered_within_bounds(sim_world: SimWorld, folder: str) -> None:
    async with both(sim_world.world, folder) as (rig, _, _):
        for number in range(REFUSED_MAX * 2):
            sim_world.machine.view.make_folders(f"{rig.go}/\x01{number}", 0o755)
        await rig.told.until(lambda: rig.discovery.statistics().n_refused >= REFUSED_MAX * 2, 10.0)
        assert len(rig.discovery._refused) == REFUSED_MAX


async def test_a_second_run_goes_on_from_the_first(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    async with FakeShims(world, rig.go) as go:
        await go.add("a")
        await go.add("b")
        async with rig.running():
            await rig.told.until(lambda: len(rig.told.now) == 2)
        await go.remove("a")
        async with rig.running():
            await rig.told.until(lambda: list(rig.told.now) == ["b"])
        assert rig.told.events == [("found", "a"), ("found", "b"), ("gone", "a")]


async def test_a_listener_on_another_name_is_no_socket_of_a_shim(world: World, folder: str) -> None:
    async with both(world, folder) as (rig, go, _):
        shim = await go.add("a", late=True)
        other = await world.network.listen(UnixAddress(f"{shim.folder}/shim.sock"), asyncio.Protocol)
        await go.add("b")
        await rig.told.until(lambda: "b" in rig.told.now)
        assert "a" not in rig.told.now
        await other.close()
