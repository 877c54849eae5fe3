"""A node as a whole: who may have the folders, what survives its stop, what its errors look like."""

import os
import sys

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api.client import open_client
from isopod.node.main import describe
from isopod.node.node import Node
from isopod.node.restore import restore_into
from isopod.node.system import NodeFacts
from isopod.runtime.logger import Logger
from isopod.world.errors import AlreadyServing, Disconnected, NotFound
from isopod.world.world import World
from tests.node.rig import Rig


async def make_backup_of(rig: Rig) -> bytes:
    async with rig.client.open(methods.SYSTEM_BACKUP, m.Empty()) as call:
        return b"".join([chunk.data async for chunk in call])


async def test_the_folders_belong_to_one_node_at_a_time(rig: Rig) -> None:
    async with rig:
        lines: list[bytes] = []
        facts = NodeFacts(started_at_ns=0, event_loop="test", core="test")
        intruder = Node(rig.world, rig.config, Logger(lines.append, rig.world.clock), facts)
        with pytest.raises(AlreadyServing, match=r"\(pid [1-9][0-9]*\) owns"):
            await intruder.start()
        backup = f"{rig.folder}/backup"
        await rig.world.disk.write(backup, (await make_backup_of(rig)))
        with pytest.raises(AlreadyServing, match=r"\(pid [1-9][0-9]*\) owns"):
            await restore_into(rig.world, backup, rig.config.paths, force=True)
        assert (await rig.run("echo", "unharmed")).stdout == b"unharmed\n"


@pytest.mark.row("R1")
async def test_the_python_client_talks_to_the_same_socket(rig: Rig) -> None:
    async with rig, open_client(rig.world, socket=rig.config.paths["socket"]) as client:
        version = await client.call(methods.SYSTEM_VERSION, m.Empty())
        assert version.protocol == 1
        assert [image.names for image in (await client.call(methods.IMAGE_LIST, m.Empty())).images] == [("isopod/busybox:latest",)]


async def test_without_a_node_the_client_says_how_to_start_one(world: World, folder: str) -> None:
    with pytest.raises(Disconnected) as refused:
        async with open_client(world, socket=f"{folder}/none.sock"):
            pass
    assert "isopod node" in refused.value.hint


async def test_a_stopped_node_leaves_containers_running(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="goes-on", network="bridge")
        await rig.restart()
        after = await rig.inspect("goes-on")
        assert (after.status, after.pid, after.network) == ("running", record.pid, record.network)


async def test_names_ids_and_beginnings_of_ids_mean_the_same_container(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="thing")
        for name in ("thing", record.id, record.id[:12], record.id[:4]):
            assert (await rig.inspect(name)).id == record.id
        with pytest.raises(NotFound):
            await rig.inspect("zz")


async def test_a_change_of_boot_ends_what_ran(rig: Rig) -> None:
    """What a reboot looks like to records: no supervisor, no exit file, an empty run folder."""
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="before", network="bridge")
        await rig.kill()
        assert record.supervisor_pid is not None
        for pid in (record.supervisor_pid, record.pid):
            identity = rig.world.processes.identify(pid or 0)
            assert identity is not None
            rig.world.processes.signal(identity, 9)
            await rig.world.processes.wait_gone(identity)
        await rig.start()
        after = await rig.inspect("before")
        assert (after.status, after.exit_code, after.pid) == ("unknown", 255, None)
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="before"))
        assert (await rig.inspect("before")).status == "running"


async def test_what_belongs_to_no_container_is_removed_at_the_next_start(rig: Rig) -> None:
    async with rig:
        kept = await rig.run_detached("sleep", "1000", name="kept", network="bridge")
        await rig.kill()
        paths, disk = rig.config.paths, rig.world.disk
        stray = "e" * 64
        folders = [f"{paths['containers']}/{stray}", f"{paths['run_root']}/bundles/{stray}", f"{paths['run_root']}/runtime/{stray}"]
        for folder in folders:
            await disk.make_directory(folder)
        await disk.write(f"{paths['run_root']}/exits/{stray}", b"0")
        await rig.start()
        assert [await disk.stat(folder) for folder in folders] == [None, None, None]
        assert await disk.list(f"{paths['run_root']}/exits") == []
        assert await disk.list(paths["containers"]) == [kept.id]
        assert (await rig.inspect("kept")).status == "running"


def test_an_error_is_one_line_and_a_hint() -> None:
    assert describe(NotFound("image", "x", "`isopod images` lists them")) == "error: no such image: x\nhint: `isopod images` lists them\n"
    assert describe(NotFound("image", "x")) == "error: no such image: x\n"


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rooot", "/x"], "error: flag '--rooot': unknown"),
        (["--root", "relative"], "error: --root 'relative': want an absolute path"),
        (["--root"], "error: flag '--root': unknown, or it wants a value"),
        (["stray"], "error: argument 'stray': unexpected"),
        (["--config", "/nowhere/isopod.toml"], "error: config file '/nowhere/isopod.toml': no such file"),
        (["--pool-size", "many"], "error: --pool-size 'many': want a whole number from 0 to 256"),
    ],
)
async def test_a_wrong_flag_of_the_node_is_one_clear_line(host_world: World, arguments: list[str], line: str) -> None:
    program = "import sys; from isopod.node.main import main; sys.exit(main(sys.argv[1:]))"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src"))}
    done = await host_world.processes.run([sys.executable, "-c", program, *arguments], env=env)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[0] == line
    assert b"Traceback" not in done.stderr
