"""Shards on the real kernel: processors, hostile peers, and a starter that is killed."""

import asyncio
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isopod.world.errors import Disconnected, InvalidArgument, ProtocolViolation
from isopod.world.host.shards_channels import RingChannel, SocketpairChannel
from isopod.world.host.shards_link import HostLink, HostPart
from isopod.world.host.shards_topology import parse_cpu_list, read_topology
from isopod.world.shards import ChannelSettings, NumaNode, Part
from isopod.world.world import World
from tests.world.test_shards import End, open_pair

SMALL = 4096
PROJECT = Path(__file__).parents[3]


# --- processors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8,10-11\n", [0, 1, 2, 3, 8, 10, 11]), ("5\n", [5]), ("\n", []), ("0-1,4-5\n", [0, 1, 4, 5])]
)
def test_kernel_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "1-b", "-"])
def test_no_kernel_list(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cpu_list(text)


def test_nodes_are_read_with_the_processors_we_may_use(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    text = ",".join(map(str, allowed))
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text(f"{text},4000-4003\n")
    (tmp_path / "node2").mkdir()
    (tmp_path / "node2" / "cpulist").write_text("5000\n")
    (tmp_path / "possible").write_text("0-2\n")
    assert read_topology(str(tmp_path)) == [NumaNode(0, tuple(allowed))]


@pytest.mark.parametrize("content", ["4000\n", "rubbish\n", ""])
def test_half_a_picture_is_no_picture(tmp_path: Path, content: str) -> None:
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text(content)
    whole = [NumaNode(0, tuple(sorted(os.sched_getaffinity(0))))]
    assert read_topology(str(tmp_path)) == whole
    assert read_topology(str(tmp_path / "missing")) == whole


@pytest.mark.host
async def test_a_shard_runs_on_its_processor(host_world: World) -> None:
    cpu = host_world.shards.topology()[-1].cpus[-1]
    process = await host_world.shards.start("tests.world.test_shards:echo", name="shard-pinned", cpu=cpu)
    try:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        process.link.start(lambda message, _: answer.set_result(message), lambda: None)
        process.link.send(b"x")
        await answer
        assert os.sched_getaffinity(process.identity.pid) == {cpu}
        assert Path(f"/proc/{process.identity.pid}/comm").read_text().strip() == "shard-pinned"
    finally:
        await process.end()


async def test_pinning_is_taken_back(host_world: World) -> None:
    before = os.sched_getaffinity(0)
    host_world.shards.pin(min(before))
    assert os.sched_getaffinity(0) == {min(before)}
    host_world.shards.pin(max(before))
    host_world.shards.unpin()
    host_world.shards.unpin()
    assert os.sched_getaffinity(0) == before


# --- peers that break the rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 8192, 8196], ids=["tail", "length", "check"])
async def test_a_damaged_ring_ends_in_an_error(host_world: World, offset: int) -> None:
    """A peer that writes nonsense where only the two channels write. Side 1 reads the first ring, whose bytes begin in the second page."""
    channel = ChannelSettings(kind="ring", ring_bytes=SMALL)
    left, right = host_world.shards.pair(channel)
    assert isinstance(right, HostPart)
    with mmap.mmap(right.fds[0], 0) as memory:
        sender = host_world.shards.open_channel(left, channel, "right")
        reader = host_world.shards.open_channel(right, channel, "shard 3")
        sender.send(b"good")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        place = offset if offset == 0 else offset - 4096
        memory[place : place + 4] = b"\xff\xff\xff\x7f"
        end = End(reader)
        error = await end.until_closed()
    assert isinstance(error, ProtocolViolation)
    assert "shard 3" in error.message
    assert end.messages == []
    sender.close()
    reader.close()


async def test_a_damaged_stream_ends_in_an_error(host_world: World) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    end = End(SocketpairChannel(ours, ChannelSettings(message_bytes_max=1000), "shard 3"))
    theirs.send(b"\x02\0\0\0ok\xff\xff\xff\xff")
    error = await end.until_closed()
    assert isinstance(error, ProtocolViolation)
    theirs.close()


async def test_a_stream_cut_anywhere(host_world: World) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    end = End(SocketpairChannel(ours, ChannelSettings(), "shard 3"))
    data = b"\x02\0\0\0ok\0\0\0\0\x05\0\0\0whole"
    for at in range(len(data)):
        theirs.send(data[at : at + 1])
        await asyncio.sleep(0.001)
    assert await end.until(3) == [b"ok", b"", b"whole"]
    theirs.send(b"\x05\0\0\0ha")
    theirs.close()
    assert isinstance(await end.until_closed(), Disconnected)


async def test_a_ring_needs_its_own_memory(host_world: World) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    events = (os.eventfd(0), os.eventfd(0))
    memory = os.memfd_create("test")
    with pytest.raises(OSError, match="Invalid argument"):
        RingChannel(ours, memory, events, side=0, settings=ChannelSettings(), peer="x")
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before, "all was closed"


async def test_a_pair_takes_all_its_descriptors_or_none(host_world: World) -> None:
    """Shards are also started again while there are no descriptors: what each attempt kept would make that last for ever."""
    for part in host_world.shards.pair(ChannelSettings(ring_bytes=SMALL)):  # what is opened once
        part.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_before = len(os.listdir("/proc/self/fd"))
    lowest_free = os.dup(0)
    os.close(lowest_free)
    n_failed = 0
    for n_free in range(30):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + n_free, hard))
        try:
            left, right = host_world.shards.pair(ChannelSettings(ring_bytes=SMALL))
        except OSError:
            n_failed += 1
        else:
            left.close()
            right.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) == n_before, n_free
    assert 8 <= n_failed < 30


async def test_a_spinning_reader_sleeps_in_the_end(host_world: World) -> None:
    left, right = open_pair(host_world, "ring", spin_s=1000)
    end = End(right)
    left.send(b"a")
    await end.until(1)
    left.send(b"b")
    await end.until(2)
    assert left.statistics().n_wakeups <= 1, "it was still looking"
    left.close()
    right.close()
    left, right = open_pair(host_world, "ring", spin_s=0.02)  # type: ignore[arg-type]
    end = End(right)
    async with asyncio.timeout(40):
        while left.statistics().n_wakeups < 3:  # woken again after it slept
            left.send(b"c")
            await asyncio.sleep(0.05)
    left.close()
    right.close()


async def test_links_carry_parts_and_refuse_too_many(host_world: World) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left, right = HostLink(ours), HostLink(theirs)
    got: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
    ended = asyncio.Event()
    right.start(lambda message, parts: got.put_nowait((message, parts)), ended.set)
    left.start(lambda *_: None, lambda: None)
    # More than the socket's buffer holds: they queue, and arrive all the same.
    for number in range(2000):
        left.send(b"%d" % number + b"." * 500)
    a, b = host_world.shards.pair(ChannelSettings(kind="ring", ring_bytes=SMALL))
    left.send(b"parts", [a, b])
    for number in range(2000):
        assert (await got.get())[0] == b"%d" % number + b"." * 500
    message, parts = await got.get()
    assert message == b"parts"
    assert [part.letter for part in parts] == ["r", "R"]
    with pytest.raises(InvalidArgument):
        left.send(b"x" * (65 << 10))
    with pytest.raises(InvalidArgument):
        left.send(b"x", [parts[0]] * 17)
    for part in parts:
        part.close()
    left.close()
    left.send(b"dropped", list(host_world.shards.pair(ChannelSettings(kind="socketpair"))))
    async with asyncio.timeout(40):
        await ended.wait()
    right.close()


@pytest.mark.parametrize("packet", [b"\x01", b"\x01z", b"\x01r", b"\xff"])
async def test_a_link_that_talks_nonsense_is_closed(host_world: World, packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = HostLink(ours)
    ended = asyncio.Event()
    got: list[bytes] = []
    link.start(lambda message, _: got.append(message), ended.set)
    with open("/dev/null") as file:
        socket.send_fds(theirs, [packet], [file.fileno()])
    async with asyncio.timeout(40):
        await ended.wait()
    assert got == []
    theirs.close()


async def test_accepting_rests_when_there_are_no_descriptors(host_world: World, folder: str) -> None:
    import resource

    from isopod.world.network import UnixAddress

    parts: list[Part] = []
    listener = await host_world.shards.accept(UnixAddress(f"{folder}/socket"), parts.append)
    clients = []
    for _ in range(3):
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{folder}/socket")
        clients.append(client)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        await asyncio.sleep(0.05)
        assert parts == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with asyncio.timeout(40):
        while len(parts) < 3:
            await asyncio.sleep(0.01)
    for part in parts:
        part.close()
    for client in clients:
        client.close()
    await listener.close()


# --- the starter dies -------------------------------------------------------------------------------------------------

_STARTER = """
import asyncio, sys
sys.path[:0] = {path!r}
from isopod.runtime.logger import Logger
from isopod.runtime.shards import SmpConfig, SmpService, submit_to
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from tests.runtime.shards import program as p

async def main():
    world = make_host_world()
    async with SmpService(world, SmpConfig(n_shards=3), logger=Logger(lambda _: None, world.clock), services=[p.serve]):
        pids = [(await submit_to(shard, p.WHO, p.Text())).values[2] for shard in range(3)]
        busy = asyncio.ensure_future(submit_to(2, p.BUSY, p.Text("50")))
        await asyncio.sleep(0.1)
        print(*pids, flush=True)
        await busy

new_loop().run_until_complete(main())
"""


@pytest.mark.row("S4")
@pytest.mark.host
def test_killing_shard_zero_leaves_no_process() -> None:
    """Also not the one that is too busy to notice that its link is closed."""
    code = _STARTER.format(path=[str(PROJECT / "src"), str(PROJECT)])
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    pids = [int(word) for word in starter.stdout.readline().split()]
    assert len(set(pids)) == 3
    fds = [os.pidfd_open(pid) for pid in pids[1:]]
    try:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        for fd in fds:
            _wait_gone(fd)
    finally:
        starter.stdout.close()
        for fd in fds:
            os.close(fd)


def _wait_gone(pidfd: int) -> None:
    import select

    readable, _, _ = select.select([pidfd], [], [], 10)
    assert readable, "the shard still runs"


@pytest.mark.host
async def test_signals_for_the_whole_program_do_not_end_a_shard(host_world: World) -> None:
    process = await host_world.shards.start("tests.world.test_shards:echo", name="shard-test")
    try:
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        process.link.start(lambda message, _: answers.put_nowait(message), lambda: None)
        process.link.send(b"1")
        assert await answers.get() == b"1"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(process.identity.pid, number)
        process.link.send(b"2")
        assert await answers.get() == b"2"
    finally:
        await process.end()
