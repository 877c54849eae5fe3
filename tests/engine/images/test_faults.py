"""The image store when it is killed, when the power goes, and when the disk is full: all or nothing, and nothing left behind."""

import asyncio
import dataclasses
import errno
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from isopod.api.messages import ImageConfig
from isopod.engine.images.store import ImageStore
from isopod.world.errors import DiskFull, KernelError, Unsupported
from isopod.world.world import World
from tests.engine.images.build import ImageSpec, chosen, docker_archive, layer_paths, oci_layout, open_store, sha256, source, tar, tree

if TYPE_CHECKING:
    from isopod.world.sim import SimWorld

pytestmark = pytest.mark.usefixtures("form")

BASE = tar({"etc": None, "etc/motd": b"hello\n" * 1000})
TOP = tar({"top": b"top" * 1000, "dir": None, "dir/deep": b"deep"})
OLD = ImageSpec([BASE], ["old:1", "old:2"])
APP = ImageSpec([BASE, TOP], ["app:1", "old:2"])
FILES = {
    sha256(BASE): {"etc/motd": b"hello\n" * 1000},
    sha256(TOP): {"top": b"top" * 1000, "dir/deep": b"deep"},
}
N_CALLS_MAX = 400


class Killed(BaseException):
    """The process is gone: not an Exception, so that nothing but cleaning up sees it, and that has no effect any more."""


class Mortal:
    """A disk (or an open file of it) whose process dies at its n-th call: that call and all later ones have no effect."""

    def __init__(self, inner: object, life: "list[int]") -> None:
        self._inner = inner
        self._life = life

    def _die(self, name: str) -> None:
        if self._life[0] < 0:
            raise Killed(name)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: object, **kwargs: object) -> object:
            self._life[0] -= 1
            self._die(name)
            result = await method(*args, **kwargs)
            return type(self)(result, self._life) if name.startswith("open_") else result

        return method if name in ("close", "size_bytes") else call


class Case(NamedTuple):
    """An operation on a store that holds OLD, and the names that may be there whenever it is broken off, in their order."""

    run: Callable[[ImageStore, str], Awaitable[object]]
    outcomes: tuple[tuple[str, ...], ...]


async def _commit(store: ImageStore, folder: str) -> None:
    await store.commit("new:1", store.resolve("old:1"), f"{folder}/upper", ImageConfig())


async def _remove(store: ImageStore, folder: str) -> None:
    await store.remove("old:2", used_by=lambda _: None)
    await store.remove("old:1", used_by=lambda _: None)


BEFORE = ("old:1", "old:2")
CASES = {
    "load": Case(lambda store, _: store.load(source(oci_layout([APP]))), (BEFORE, ("app:1", "old:1", "old:2"))),
    "import": Case(lambda store, _: store.import_rootfs("new:1", source(TOP)), (BEFORE, ("new:1", "old:1", "old:2"))),
    "commit": Case(_commit, (BEFORE, ("new:1", "old:1", "old:2"))),
    "remove": Case(_remove, (BEFORE, ("old:1",), ())),
}


async def prepare(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/upper", mode=0o755)
    await world.disk.write(f"{folder}/upper/changed", b"changed")
    store = await open_store(world, folder)
    await store.load(source(docker_archive([OLD])))


async def names_and_no_litter(world: World, folder: str) -> tuple[str, ...]:
    """Open the store as after a restart; what is there must be whole, and nothing else may be there. Returns the names."""
    lines: list[bytes] = []
    store = await open_store(world, folder, lines)
    assert [line for line in lines if b'"error"' in line or b'"warning"' in line] == []
    expected = {f"{folder}/images/{name}" for name in ("index.json", "layers", "records", "tmp")}
    for image in store.list():
        expected.add(f"{folder}/images/records/{image.id[7:]}.json")
        for path, layer in zip(await store.layer_folders(image), reversed(image.layers), strict=True):
            base, own = layer_paths(folder, layer.diff_id, "directory")[0], layer_paths(folder, layer.diff_id)
            expected |= {f"{base}.json", *own, *(await tree(world.disk, base) if base in own else [])}
            for name, content in FILES.get(layer.diff_id, {"changed": b"changed"}).items():
                assert await world.disk.read(f"{path}/{name}") == content
    await store.unmount()
    assert set(await tree(world.disk, f"{folder}/images")) == expected
    return tuple(sorted(name for image in store.list() for name in image.names))


async def run_mortal(world: World, folder: str, case: Case, n_calls: int) -> bool:
    """Run an operation in a process that dies at the n-th call of the disk; returns whether it died."""
    life = [1 << 30]
    mortal = dataclasses.replace(world, disk=Mortal(world.disk, life))
    store = await open_store(mortal, folder)
    life[0] = n_calls
    try:
        await case.run(store, folder)
    except Killed:
        return True
    return False


async def outcomes_by_step(world: World, folder: str, case: Case, crash: Callable[[], None]) -> list[tuple[str, ...]]:
    """Break an operation off at its first call of the disk, its second, and so on; return what was there after each restart."""
    outcomes = []
    for n_calls in range(N_CALLS_MAX):
        where = f"{folder}/{n_calls}"
        await prepare(world, where)
        died = await run_mortal(world, where, case, n_calls)
        crash()
        outcomes.append(await names_and_no_litter(world, where))
        if not died:
            return outcomes
    pytest.fail(f"more than {N_CALLS_MAX} calls")


def check_outcomes(case: Case, outcomes: list[tuple[str, ...]]) -> None:
    """Each step of an operation is as before or as after, and what once took effect stays."""
    assert [each for each in outcomes if each not in case.outcomes] == []
    steps = [case.outcomes.index(each) for each in outcomes]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, len(case.outcomes) - 1)
    assert len(steps) > 5


@pytest.mark.row("R32", "R38")
@pytest.mark.parametrize("what", CASES)
async def test_killed_at_every_step(world: World, folder: str, what: str) -> None:
    check_outcomes(CASES[what], await outcomes_by_step(world, folder, CASES[what], lambda: None))


@pytest.mark.parametrize("what", CASES)
async def test_power_lost_at_every_step(sim_world: "SimWorld", folder: str, what: str) -> None:
    check_outcomes(CASES[what], await outcomes_by_step(sim_world.world, folder, CASES[what], sim_world.disk.crash))


async def test_killed_while_it_opens(world: World, folder: str) -> None:
    case = CASES["load"]
    for n_calls in range(N_CALLS_MAX):
        where = f"{folder}/{n_calls}"
        await prepare(world, where)
        await run_mortal(world, where, case, 14)  # in the middle
        life = [n_calls]
        try:
            await open_store(dataclasses.replace(world, disk=Mortal(world.disk, life)), where)
        except Killed:
            assert await names_and_no_litter(world, where) == BEFORE
            continue
        assert n_calls > 5
        return


# --- a disk that fails ------------------------------------------------------------------------------------------------


class Failing(Mortal):
    """A disk of which one call, the n-th, fails with EIO and has no effect."""

    def _die(self, name: str) -> None:
        if self._life[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)


@pytest.mark.parametrize("what", CASES)
async def test_a_failing_disk_at_every_step(world: World, folder: str, what: str) -> None:
    case = CASES[what]
    outcomes = []
    for n_calls in range(N_CALLS_MAX):
        where, life = f"{folder}/{n_calls}", [1 << 30]
        await prepare(world, where)
        store = await open_store(dataclasses.replace(world, disk=Failing(world.disk, life)), where)
        life[0] = n_calls
        try:
            await case.run(store, where)
        except KernelError as error:
            assert error.errno == errno.EIO
        outcomes.append(tuple(sorted(name for image in store.list() for name in image.names)))
        if life[0] >= 0:
            break
        life[0] = -2
        assert await names_and_no_litter(world, where) == outcomes[-1]  # what it says is what is there
    assert [each for each in outcomes if each not in case.outcomes] == []
    assert (outcomes[0], outcomes[-1]) == (case.outcomes[0], case.outcomes[-1])
    assert len(outcomes) > 5


class FullFor(Mortal):
    """A disk that is full for the records whose path holds a text."""

    text = ""

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__(name)

        async def write_atomic(path: str, data: bytes) -> None:
            if self.text in path:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            await method(path, data)

        return write_atomic if name == "write_atomic" else method


@pytest.mark.parametrize("text", ["/index.json", "/records/", "/layers/"])
@pytest.mark.parametrize("what", CASES)
async def test_a_record_that_cannot_be_written_leaves_all_as_it_was(world: World, folder: str, what: str, text: str) -> None:
    if what == "remove" and text != "/index.json":
        return  # it writes no other record
    await prepare(world, folder)
    disk = FullFor(world.disk, [1 << 30])
    store = await open_store(dataclasses.replace(world, disk=disk), folder)
    disk.text = text

    await check_full(store, world, folder, lambda: CASES[what].run(store, folder))

    disk.text = "nothing"
    await CASES[what].run(store, folder)
    assert await names_and_no_litter(world, folder) == CASES[what].outcomes[-1]


# --- a caller that withdraws ------------------------------------------------------------------------------------------


class Withdrawing(Mortal):
    """A disk whose n-th call finds that the caller has just withdrawn."""

    task: "asyncio.Task[None] | None" = None

    def _die(self, name: str) -> None:
        if self._life[0] == -1 and Withdrawing.task is not None:
            Withdrawing.task.cancel()


@pytest.mark.parametrize("what", CASES)
async def test_cancelled_at_every_step(world: World, folder: str, what: str) -> None:
    case = CASES[what]
    outcomes = []
    for n_calls in range(N_CALLS_MAX):
        where, life = f"{folder}/{n_calls}", [1 << 30]
        await prepare(world, where)
        store = await open_store(dataclasses.replace(world, disk=Withdrawing(world.disk, life)), where)
        before = await tree(world.disk, where)
        life[0] = n_calls
        Withdrawing.task = asyncio.get_running_loop().create_task(_run(case, store, where))
        (outcome,) = await asyncio.gather(Withdrawing.task, return_exceptions=True)
        assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        outcomes.append(tuple(sorted(name for image in store.list() for name in image.names)))
        if outcomes[-1] == case.outcomes[0]:
            assert await tree(world.disk, where) == before
        after = await tree(world.disk, where)
        assert await names_and_no_litter(world, where) == outcomes[-1]
        assert await tree(world.disk, where) == after  # nothing was left for the next start
        if life[0] >= 0:
            break
    assert [each for each in outcomes if each not in case.outcomes] == []
    assert outcomes[-1] == case.outcomes[-1]
    assert len(outcomes) > 5


async def _run(case: Case, store: ImageStore, folder: str) -> None:
    await case.run(store, folder)


# --- a full disk ------------------------------------------------------------------------------------------------------

BIG = tar({f"f{number}": bytes([number]) * 40_000 for number in range(5)})


async def check_full(store: ImageStore, world: World, folder: str, attempt: Callable[[], Awaitable[object]]) -> None:
    before, images = await tree(world.disk, folder), store.list()
    with pytest.raises(DiskFull, match="no space left"):
        await attempt()
    assert await tree(world.disk, folder) == before
    assert store.list() == images


@pytest.mark.parametrize("what", ["load", "import", "commit"])
async def test_a_full_disk_leaves_nothing_in_the_simulation(sim_world: "SimWorld", folder: str, what: str) -> None:
    world = sim_world.world
    await prepare(world, folder)
    await world.disk.write(f"{folder}/upper/big", b"b" * 200_000)
    store = await open_store(world, folder)
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "load": lambda: store.load(source(docker_archive([ImageSpec([BASE, BIG], ["big:1"])]))),
        "import": lambda: store.import_rootfs("big:1", source(BIG)),
        "commit": lambda: _commit(store, folder),
    }
    used = sim_world.disk.used_bytes
    n_refused = 0
    for spare in range(0, 1_000_000, 4000):
        sim_world.disk.capacity_bytes = used + spare
        try:
            await check_full(store, world, folder, attempts[what])
            n_refused += 1
        except pytest.fail.Exception:  # it fitted
            break
    assert n_refused > 10
    assert len(store.list()) == 2
    assert await world.disk.list(f"{folder}/images/tmp") == []


@pytest.mark.host
@pytest.mark.parametrize("what", ["load", "import", "commit"])
async def test_a_full_disk_leaves_nothing_on_the_host(host_world: World, folder: str, what: str) -> None:
    world, small = host_world, f"{folder}/small"
    await world.disk.make_directory(small)
    await world.kernel.mount_tmpfs(small, n_bytes=512 << 10)
    try:
        if chosen.form == "erofs":  # a memory file system has no files that the kernel mounts
            with pytest.raises(Unsupported, match="mounts no layers from files here"):
                await open_store(world, small)
            return
        await prepare(world, small)
        await world.disk.write(f"{small}/upper/big", b"b" * 240_000)
        store = await open_store(world, small)
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "load": lambda: store.load(source(docker_archive([ImageSpec([BASE, BIG], ["big:1"])]))),
            "import": lambda: store.import_rootfs("big:1", source(BIG)),
            "commit": lambda: _commit(store, small),
        }
        await check_full(store, world, small, attempts[what])
        await world.disk.remove(f"{small}/upper/big")
        await store.import_rootfs("small:1", source(TOP))  # it goes on
        assert len(store.list()) == 2
    finally:
        await world.kernel.unmount(small)
