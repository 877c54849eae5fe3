"""The Shards port on both Worlds: processes, links, channels, accepted connections."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod.world.errors import Disconnected, InvalidArgument, IsopodError
from isopod.world.network import UnixAddress
from isopod.world.shards import Channel, ChannelKind, ChannelSettings, Link, Part, ShardProcess
from isopod.world.world import World
from tests.world.recorder import Recorder

ENTRY: Final = "tests.world.test_shards:echo"
KINDS: Final[list[ChannelKind]] = ["ring", "socketpair"]
SMALL: Final = 4096


class End:
    """One end of a channel, and what came out of it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.messages: list[bytes] = []
        self.error: IsopodError | None = None
        self.changed = asyncio.Event()
        channel.start(self._on_messages, self._on_closed)

    def _on_messages(self, messages: list[bytes]) -> None:
        assert messages
        self.messages += messages
        self.changed.set()

    def _on_closed(self, error: IsopodError) -> None:
        assert self.error is None
        self.error = error
        self.changed.set()

    async def until(self, n_messages: int) -> list[bytes]:
        async with asyncio.timeout(40):
            while len(self.messages) < n_messages and self.error is None:
                self.changed.clear()
                await self.changed.wait()
        return self.messages

    async def until_closed(self) -> IsopodError:
        async with asyncio.timeout(40):
            while self.error is None:
                self.changed.clear()
                await self.changed.wait()
        return self.error


def open_pair(world: World, kind: ChannelKind, **more: int) -> tuple[Channel, Channel]:
    channel = ChannelSettings(kind=kind, **more)
    left, right = world.shards.pair(channel)
    return world.shards.open_channel(left, channel, "right"), world.shards.open_channel(right, channel, "left")


async def echo(world: World, link: Link) -> None:
    """What the test's shards run: answers on its link, and on the channels that it is sent."""
    ended = asyncio.Event()
    channels: list[Channel] = []

    def serve(channel: Channel) -> None:
        def answer(messages: list[bytes]) -> None:
            for message in messages:
                channel.send(message)

        channel.start(answer, lambda _: None)

    def on_message(message: bytes, parts: Sequence[Part]) -> None:
        for part in parts:
            channel = world.shards.open_channel(part, ChannelSettings(kind="ring", ring_bytes=SMALL), "starter")
            channels.append(channel)
            serve(channel)
        link.send(message)

    link.start(on_message, ended.set)
    await ended.wait()
    for channel in channels:
        channel.close()


@asynccontextmanager
async def started(world: World) -> AsyncIterator[tuple[ShardProcess, "asyncio.Queue[bytes | None]"]]:
    process = await world.shards.start(ENTRY, name="shard-test")
    answers: asyncio.Queue[bytes | None] = asyncio.Queue()
    process.link.start(lambda message, _: answers.put_nowait(message), lambda: answers.put_nowait(None))
    try:
        yield process, answers
    finally:
        await process.end()


@pytest.mark.row("S4")
async def test_a_shard_lives_while_its_link_is_open(world: World) -> None:
    async with started(world) as (process, answers):
        process.link.send(b"hello")
        assert await answers.get() == b"hello"
        assert world.processes.identify(process.identity.pid) == process.identity
        process.link.close()
        async with asyncio.timeout(40):
            assert await process.wait() == 0
    assert world.processes.identify(process.identity.pid) is None


async def test_a_killed_shard_closes_its_link_and_channels(world: World) -> None:
    async with started(world) as (process, answers):
        ours, theirs = world.shards.pair(ChannelSettings(kind="ring", ring_bytes=SMALL))
        end = End(world.shards.open_channel(ours, ChannelSettings(kind="ring", ring_bytes=SMALL), "shard 7"))
        process.link.send(b"take", [theirs])
        assert await answers.get() == b"take"
        for number in range(1000):
            end.channel.send(b"%d" % number)
        assert await end.until(1000) == [b"%d" % number for number in range(1000)]
        world.processes.signal(process.identity, 9)
        assert isinstance(await end.until_closed(), Disconnected)
        assert "shard 7" in str(end.error)
        assert await answers.get() is None
        end.channel.send(b"nobody hears")
        end.channel.close()
        assert await process.wait() == -9


@pytest.mark.parametrize("kind", KINDS)
async def test_messages_arrive_whole_in_order_both_ways(world: World, kind: ChannelKind) -> None:
    left, right = (End(channel) for channel in open_pair(world, kind, ring_bytes=SMALL))
    there = [b"%d" % number * (number % 50) for number in range(3000)]
    back = [b"", b"x" * 100_000, b"y"]
    for message in there:
        left.channel.send(message)
    for message in back:
        right.channel.send(message)
    assert await right.until(len(there)) == there
    assert await left.until(len(back)) == back
    counts = left.channel.statistics()
    assert (counts.n_messages_out, counts.n_messages_in, counts.n_messages_pending) == (len(there), len(back), 0)
    assert counts.n_bytes_out == sum(map(len, there))
    left.channel.close()
    assert isinstance(await right.until_closed(), Disconnected)
    right.channel.close()
    assert left.error is None, "who closes is not told"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_sent_before_the_end_still_arrives(world: World, kind: ChannelKind) -> None:
    left, right = open_pair(world, kind)
    left.send(b"last words")
    left.close()
    end = End(right)
    assert await end.until(1) == [b"last words"]
    await end.until_closed()
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_reader_makes_the_sender_keep_its_rest(world: World, kind: ChannelKind) -> None:
    """Nothing is lost, doubled or sent twice, however long the reader sleeps; the sender's loop goes on meanwhile."""
    sender, reader = open_pair(world, kind, ring_bytes=SMALL)
    wanted = [b"%06d" % number + b"." * 200 for number in range(20_000)]
    for message in wanted:
        sender.send(message)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert sender.statistics().n_messages_pending > 0
    end = End(reader)
    sender.send(b"after")
    assert await end.until(len(wanted) + 1) == [*wanted, b"after"]
    assert sender.statistics().n_messages_pending == 0
    sender.close()
    reader.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_too_long_messages_are_refused(world: World, kind: ChannelKind) -> None:
    left, right = open_pair(world, kind, message_bytes_max=1000)
    end = End(right)
    with pytest.raises(InvalidArgument, match="1001 bytes are over 1000"):
        left.send(b"x" * 1001)
    left.send(b"x" * 1000)
    assert await end.until(1) == [b"x" * 1000]
    left.close()
    right.close()


@pytest.mark.row("S29")
@pytest.mark.parametrize("kind", KINDS)
def test_any_messages_come_out_as_they_went_in(kind: ChannelKind) -> None:
    """10^5 messages in all, of any lengths, through a ring far smaller than some of them."""
    from isopod.world.host.loop import new_loop
    from isopod.world.host.world import make_host_world

    n_sent = 0
    loop, world = new_loop("asyncio"), make_host_world()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, 12_000), min_size=1, max_size=60), st.integers(1, 100), st.sampled_from([4096, 8192, 65536]))
    def check(lengths: list[int], n_rounds: int, ring_bytes: int) -> None:
        nonlocal n_sent
        wanted = [
            bytes([(number + at) % 256]) * (n_bytes if number % 7 == 0 else n_bytes % 100)
            for number in range(n_rounds)
            for at, n_bytes in enumerate(lengths)
        ]
        loop.run_until_complete(transfer(wanted, ring_bytes))
        n_sent += len(wanted)

    async def transfer(wanted: list[bytes], ring_bytes: int) -> None:
        sender, reader = open_pair(world, kind, ring_bytes=ring_bytes)
        end = End(reader)
        for message in wanted:
            sender.send(message)
        assert await end.until(len(wanted)) == wanted
        sender.close()
        reader.close()

    try:
        check()
        rest = [b"%d" % number for number in range(max(0, 100_000 - n_sent))]
        loop.run_until_complete(transfer(rest, SMALL))
    finally:
        world.close()
        loop.close()


async def test_parts_are_used_once(world: World) -> None:
    channel = ChannelSettings(kind="socketpair")
    left, right = world.shards.pair(channel)
    opened = world.shards.open_channel(left, channel, "right")
    with pytest.raises(InvalidArgument):
        world.shards.open_channel(left, channel, "right")
    with pytest.raises(InvalidArgument):
        await world.shards.adopt(right, Recorder, on_gone=lambda: None)
    end = End(opened)
    right.close()
    right.close()
    assert isinstance(await end.until_closed(), Disconnected)


async def test_an_accepted_connection_is_adopted(world: World, folder: str) -> None:
    parts: asyncio.Queue[Part] = asyncio.Queue()
    gone = asyncio.Event()
    listener = await world.shards.accept(UnixAddress(f"{folder}/socket"), parts.put_nowait)
    transport, client = await world.network.connect(listener.address, Recorder)
    transport.write(b"early words")
    served: list[Recorder] = []

    def factory() -> Recorder:
        served.append(Recorder())
        return served[0]

    await world.shards.adopt(await parts.get(), factory, on_gone=gone.set)
    assert await served[0].wait_received(11) == b"early words"
    assert not gone.is_set()
    transport.close()
    await served[0].wait_end()
    (await served[0].wait_made()).close()
    async with asyncio.timeout(40):
        await gone.wait()
    await listener.close()
    await listener.close()
    assert isinstance(client, Recorder)


async def test_a_connection_nobody_wants_is_closed(world: World, folder: str) -> None:
    listener = await world.shards.accept(UnixAddress(f"{folder}/socket"), lambda part: part.close())
    transport, client = await world.network.connect(listener.address, Recorder)
    assert isinstance(client, Recorder)
    await client.wait_end()
    transport.close()
    await listener.close()


def test_processors_are_listed_once() -> None:
    from isopod.world.host.world import make_host_world
    from isopod.world.sim import make_sim_world

    sim = make_sim_world()
    host = make_host_world()
    for topology in (host.shards.topology(), sim.world.shards.topology()):
        cpus = [cpu for node in topology for cpu in node.cpus]
        assert cpus
        assert len(set(cpus)) == len(cpus)
    sim.close()
    host.close()
