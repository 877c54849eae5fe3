"""Files into sandboxes and out of them, through a whole node: the same bodies for containers and for virtual machines, on both Worlds."""

import asyncio
import io
import os
import signal
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.world.errors import InvalidArgument, IsopodError, NotFound, RuntimeFailed, WrongState
from isopod.world.sim import SimWorld
from tests.node.rig import Rig
from tests.node.vms import HOST_GUEST, VM, missing_for_vms, sim_rig

ON_HOST = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(400)]


class Box:
    """A sandbox of one kind, whose files are copied."""

    def __init__(self, rig: Rig, spec: dict[str, Any]) -> None:
        self.rig = rig
        self.spec = spec

    async def start(self, **spec: Any) -> m.Container:
        """Start it; it sleeps."""
        return await Rig.run_detached(self.rig, "sleep", "1000", name="box", **self.spec, **spec)

    async def sh(self, script: str) -> bytes:
        """Run a script in it."""
        ran = await self.rig.exec("box", "sh", "-c", script)
        assert ran.exit_code == 0, ran
        return ran.stdout

    async def look(self, path: str, *, follow: bool = True) -> machines.PathFacts:
        """Ask what is at a path."""
        return await self.rig.client.call(methods.CONTAINER_STAT_PATH, machines.StatPath(name="box", path=path, follow=follow))

    async def read(self, path: str) -> dict[str, tarfile.TarInfo]:
        """Copy out; return the entries by name, the bytes of a file as its `pax_headers["data"]`."""
        async with self.rig.client.open(methods.CONTAINER_COPY_FROM, machines.CopyFrom(name="box", path=path)) as call:
            data = b"".join([chunk.data async for chunk in call])
            await call.reply()
        found = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                member.pax_headers = {"data": content.read().decode() if content is not None else ""}
                found[member.name] = member
        return found

    async def write(self, path: str, data: bytes) -> None:
        """Copy in."""
        async with self.rig.client.open(methods.CONTAINER_COPY_TO, machines.CopyTo(name="box", path=path)) as call:
            for start in range(0, len(data), 1 << 18):
                await call.send(m.Chunk(data=data[start : start + (1 << 18)]))
            call.end()
            await call.reply()


@pytest.fixture(
    params=[
        pytest.param("container host", marks=pytest.mark.host),
        "container sim",
        pytest.param("vm host", marks=ON_HOST),
        "vm sim",
    ]
)
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A sandbox of each kind on each World: `async with box.rig`."""
    kind, where = request.param.split()
    if kind == "vm" and where == "host" and (missing := missing_for_vms()):
        pytest.skip(missing)
    if where == "sim":
        sim: SimWorld = request.getfixturevalue("sim_world")
        yield Box(sim_rig(sim, request.getfixturevalue("folder")), _spec(kind))
        return
    rig: Rig = request.getfixturevalue("host_rig")
    rig.backend.more_environment["ISOPOD_VM_GUEST"] = HOST_GUEST  # type: ignore[attr-defined] # the host's backend has it
    yield Box(rig, _spec(kind))


@pytest.fixture(params=[pytest.param("host", marks=pytest.mark.host), "sim"])
def container(request: pytest.FixtureRequest) -> Box:
    """A container on each World."""
    if request.param == "sim":
        return Box(sim_rig(request.getfixturevalue("sim_world"), request.getfixturevalue("folder")), {})
    return Box(request.getfixturevalue("host_rig"), {})


def _spec(kind: str) -> dict[str, Any]:
    return {"isolation": "vm", "vm": VM} if kind == "vm" else {}


def entry(name: str, data: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return an entry of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.row("V3")
async def test_files_go_in_with_owner_and_mode_and_come_out_again(box: Box) -> None:
    async with box.rig:
        await box.start()
        big = b"0123456789abcdef" * 40_000
        tree = archive(
            entry("site", type=tarfile.DIRTYPE, mode=0o750),
            entry("site/index", b"hello\n", mode=0o640, uid=1000, gid=2000),
            entry("site/big", big, mode=0o600),
            entry("site/link", type=tarfile.SYMTYPE, linkname="index"),
        )
        await box.write("/home", tree)
        assert await box.sh("cat /home/site/link; wc -c </home/site/big") == b"hello\n640000\n"
        assert (await box.look("/home/site/index")).mode == 0o640
        found = await box.read("/home/site")
        assert sorted(found) == ["site", "site/big", "site/index", "site/link"]
        assert (found["site/index"].uid, found["site/index"].gid, found["site/index"].mode) == (1000, 2000, 0o640)
        assert found["site/link"].linkname == "index"
        assert found["site/big"].pax_headers["data"].encode() == big
        assert list(await box.read("/home/site/index")) == ["index"]


@pytest.mark.row("V3")
async def test_what_is_where_and_what_is_missing(box: Box) -> None:
    async with box.rig:
        await box.start()
        await box.write("/home", archive(entry("file", b"four"), entry("link", type=tarfile.SYMTYPE, linkname="/home/file")))
        await box.write("/home", archive(entry("dead", type=tarfile.SYMTYPE, linkname="nothing")))
        assert ((await box.look("/home")).kind, (await box.look("/home/new")).kind) == ("folder", "nothing")
        found = await box.look("/home/link")
        assert (found.kind, found.path, found.n_bytes) == ("file", "/home/file", 4)
        assert (await box.look("/home/link", follow=False)).kind == "link"
        assert (await box.look("/home/dead")).kind == "nothing"
        for path in ("/nowhere/file", "/home/file/below"):
            with pytest.raises(NotFound):
                await box.look(path)
        for path in ("/home/new", "/nowhere/file"):
            with pytest.raises(NotFound):
                await box.read(path)
            with pytest.raises((NotFound, InvalidArgument)):
                await box.write(path, archive(entry("x", b"x")))
        with pytest.raises(InvalidArgument, match="absolute"):
            await box.look("home")


@pytest.mark.row("V3")
async def test_no_name_and_no_link_leads_out_of_the_sandbox(box: Box) -> None:
    async with box.rig:
        await box.start()
        outside = f"{box.rig.folder}/outside"
        await box.rig.world.disk.make_directory(outside)
        await box.rig.world.disk.write(f"{outside}/secret", b"secret")
        above = "../" * 12
        links = (entry(f"link{number}", type=tarfile.SYMTYPE, linkname=target) for number, target in enumerate((outside, above + outside)))
        await box.write("/home", archive(*links))
        for number in range(2):
            # A link that leads to a place of the host leads to the same name inside, where nothing is.
            with pytest.raises(NotFound):
                await box.read(f"/home/link{number}/secret")
            with pytest.raises(IsopodError):
                await box.write(f"/home/link{number}", archive(entry("made", b"x")))
        for name in ("../../made", f"{above}{outside}/made"):
            with pytest.raises(InvalidArgument):
                await box.write("/home", archive(entry(name, b"x")))
        assert await box.rig.world.disk.list(outside) == ["secret"]


@pytest.mark.row("V3")
async def test_what_is_no_archive_is_refused(box: Box) -> None:
    async with box.rig:
        await box.start()
        with pytest.raises((InvalidArgument, RuntimeFailed)):
            await box.write("/home", b"this is no archive at all" * 100)
        await box.write("/home", archive(entry("still", b"works")))
        assert await box.sh("cat /home/still") == b"works"


@pytest.mark.row("V3")
async def test_a_container_that_does_not_run_is_copied_to_and_from(container: Box) -> None:
    async with container.rig as rig:
        data = f"{rig.folder}/data"
        await rig.world.disk.make_directory(data)
        await rig.world.disk.write(f"{data}/given", b"given")
        sealed = m.Mount(source=data, destination="/sealed", read_only=True)
        await container.start(mounts=(m.Mount(source=data, destination="/data"), sealed))
        await container.sh("echo before >/home/kept")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0))
        assert (await container.read("/home/kept"))["kept"].pax_headers["data"] == "before\n"
        await container.write("/home", archive(entry("kept", b"after\n"), entry("new", b"new\n")))
        assert (await container.read("/data/given"))["given"].pax_headers["data"] == "given"
        await container.write("/data", archive(entry("made", b"made")))
        with pytest.raises(IsopodError, match="(?i)read-only"):
            await container.write("/sealed", archive(entry("never", b"x")))
        assert await rig.world.disk.list(data) == ["given", "made"]
        assert await rig.world.disk.read(f"{data}/made") == b"made"
        async with rig.client.open(methods.CONTAINER_START, m.StartContainer(name="box")) as call:
            await call.reply()
        assert await container.sh("cat /home/kept /home/new") == b"after\nnew\n"


async def test_a_container_that_is_only_created_is_copied_to(container: Box) -> None:
    async with container.rig as rig:
        await rig.client.call(methods.CONTAINER_CREATE, m.ContainerSpec(image="isopod/busybox", command=("cat", "/home/in"), name="box"))
        await container.write("/home", archive(entry("in", b"brought\n")))
        async with rig.client.open(methods.CONTAINER_START, m.StartContainer(name="box", attach=True)) as call:
            out = b"".join([item.data async for item in call if isinstance(item, m.Stdout)])
        assert out == b"brought\n"


async def test_a_paused_container_shows_its_files(container: Box) -> None:
    async with container.rig as rig:
        await container.start()
        await container.sh("echo still >/home/still")
        await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        assert (await container.read("/home/still"))["still"].pax_headers["data"] == "still\n"
        await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="box"))


async def test_a_copy_ends_with_its_container(container: Box) -> None:
    async with container.rig as rig:
        await container.start()
        await container.sh("mkdir /home/many; for i in $(seq 40); do head -c 100000 /dev/zero >/home/many/$i; done")
        async with rig.client.open(methods.CONTAINER_COPY_FROM, machines.CopyFrom(name="box", path="/home/many")) as call:
            first = await anext(aiter(call))
            assert first.data
            await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0))
            with pytest.raises(RuntimeFailed, match="box"):
                async with asyncio.timeout(30):
                    _ = [chunk async for chunk in call]
        await rig.remove("box")


async def test_a_client_that_leaves_leaves_no_helper_and_no_mount(container: Box) -> None:
    async with container.rig as rig:
        await container.start()
        await container.sh("mkdir /home/many; for i in $(seq 40); do head -c 100000 /dev/zero >/home/many/$i; done")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=0))
        other = await rig.connect()
        async with other.open(methods.CONTAINER_COPY_FROM, machines.CopyFrom(name="box", path="/home/many")) as call:
            await anext(aiter(call))
        await other.close()
        # The lock is free again, or this would wait.
        async with asyncio.timeout(30):
            await rig.remove("box")


async def test_a_machine_that_does_not_run_says_why_not(sim_world: SimWorld, folder: str) -> None:
    machine = Box(sim_rig(sim_world, folder), _spec("vm"))
    async with machine.rig as rig:
        await machine.start()
        with pytest.raises(InvalidArgument, match="compressed") as packed:
            await machine.write("/home", b"\x1f\x8b\x08" + bytes(100))
        assert "gzip -dc" in packed.value.hint
        await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        with pytest.raises(WrongState) as refused:
            await machine.read("/etc/passwd")
        assert "isopod vm resume box" in refused.value.hint
        await rig.client.call(methods.CONTAINER_KILL, m.KillContainer(name="box", signal=signal.SIGKILL))
        await rig.wait("box")
        with pytest.raises(WrongState) as refused:
            await machine.look("/etc/passwd")
        assert "isopod vm start box" in refused.value.hint


@pytest.mark.host
async def test_volumes_memory_and_mounted_files_of_a_container_that_runs(host_rig: Rig) -> None:
    container = Box(host_rig, {})
    async with host_rig as rig:
        source = f"{rig.folder}/data"
        os.mkdir(source)
        await container.start(
            mounts=(m.Mount(source=source, destination="/data"), m.Mount(source=source, destination="/ro", read_only=True))
        )
        await container.write("/data", archive(entry("there", b"x", uid=5)))
        assert os.stat(f"{source}/there").st_uid == 5
        with pytest.raises(RuntimeFailed, match="Read-only"):
            await container.write("/ro", archive(entry("never", b"x")))
        await container.sh("echo in memory >/dev/shm/note")
        assert (await container.read("/dev/shm/note"))["note"].pax_headers["data"] == "in memory\n"
        # /etc/hosts is a mount: it cannot be replaced, so it is written over.
        await container.write("/etc", archive(entry("hosts", b"127.0.0.1 mine\n")))
        assert await container.sh("cat /etc/hosts") == b"127.0.0.1 mine\n"
        found = await container.read("/dev")
        assert found["dev/null"].ischr()


@pytest.mark.host
async def test_packed_archives_of_a_container(host_rig: Rig) -> None:
    container = Box(host_rig, {})
    async with host_rig:
        await container.start()
        for mode in ("w:gz", "w:bz2", "w:xz"):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode=mode) as tar:
                info, data = entry(mode[2:], mode.encode())
                tar.addfile(info, io.BytesIO(data))
            await container.write("/home", out.getvalue())
        assert await container.sh("cat /home/gz /home/bz2 /home/xz") == b"w:gzw:bz2w:xz"
