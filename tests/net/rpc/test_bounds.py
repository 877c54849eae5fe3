"""Memory: whatever clients do, what a server holds for them is bounded, and it says "later" beyond. One body on both Worlds."""

import asyncio

import pytest

from isopod.net.rpc import RpcLimits
from isopod.wire import frames as f
from isopod.world import errors
from isopod.world.world import World
from tests.net.rpc.kit import ECHO, HANG, HELLO, Line, Text, raw_peer, serve, wait_until

pytestmark = pytest.mark.row("S17")


async def test_the_bytes_of_all_connections_together_are_bounded(world: World, folder: str) -> None:
    limits = RpcLimits(server_bytes_max=100_000, retry_after_s=0.25)
    async with serve(world, folder, limits) as stage:
        clients = [await stage.connect() for _ in range(3)]
        hanging = [asyncio.create_task(client.call(HANG, Text("x" * 40_000))) for client in clients[:2]]
        await stage.wait_calls_open(2)
        assert 80_000 < stage.server.held_bytes < 100_000
        with pytest.raises(errors.Exhausted, match="100000 per server") as caught:
            await clients[2].call(ECHO, Text("x" * 40_000))
        assert caught.value.retry_after_s == 0.25
        assert await clients[2].call(ECHO, Text("small")) == Text("small")
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        await stage.wait_calls_open(0)
        assert stage.server.held_bytes == 0
        assert len((await clients[2].call(ECHO, Text("x" * 40_000))).text) == 40_000
        for client in clients:
            await client.close()


async def test_items_count_for_the_server_too(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(server_bytes_max=100_000)) as stage:
        frames: tuple[f.OutFrame, ...] = (f.Request(1, "test.deaf", None, Text()), *(f.Item(1, Line(bytes(60_000))) for _ in range(2)))
        async with raw_peer(stage, HELLO, *frames) as peer:
            (error,) = await peer.wait_frames(1)
            assert getattr(error, "code", "") == "exhausted"
            await stage.wait_calls_open(0)
            assert stage.server.held_bytes == 0


@pytest.mark.parametrize("method", ["test.plain", "test.echo"])
async def test_a_client_that_calls_and_never_reads_is_not_served_on(world: World, folder: str, method: str) -> None:
    """Requests stay where they are, in the kernel: the server takes none while its answers are not read."""
    async with serve(world, folder, RpcLimits(write_high_water_bytes=64 << 10)) as stage, raw_peer(stage, HELLO) as peer:
        await peer.wait(lambda: peer.decoder.hello is not None)
        assert peer.transport is not None
        peer.transport.pause_reading()
        (session,) = stage.server._sessions.values()
        for call_id in range(1, 2001):
            peer.write(f.Request(call_id, method, None, Text("x" * 5000)))
        await wait_until(lambda: session.connection.is_write_paused)
        await asyncio.sleep(0.05)  # not a wait for a condition: time in which it could grow
        assert session.connection._transport is not None
        assert session.connection._transport.get_write_buffer_size() < 5_000_000
        assert stage.value("isopod_rpc_calls_total", method=method, outcome="ok") < 2000
        other = await stage.connect()
        assert await other.call(ECHO, Text("meanwhile")) == Text("meanwhile")
        peer.transport.resume_reading()
        await peer.wait(lambda: len(peer.frames) == 2000)
        assert stage.server.held_bytes == 0
        await other.close()


async def test_who_lets_answers_pile_up_is_dropped(world: World, folder: str) -> None:
    """Handlers that were begun answer at once: more than is bearable ends the connection, not the server."""
    limits = RpcLimits(write_high_water_bytes=64 << 10, unread_bytes_max=3_000_000)
    async with serve(world, folder, limits) as stage, raw_peer(stage, HELLO) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        for call_id in range(1, 257):
            peer.write(f.Request(call_id, "test.big", None, Text(number=200_000)))
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        assert stage.server.held_bytes == 0
        client = await stage.connect()
        assert await client.call(ECHO, Text("others go on")) == Text("others go on")
        await client.close()
        peer.transport.resume_reading()


async def test_the_servers_bound_drops_the_one_that_does_not_read(world: World, folder: str) -> None:
    limits = RpcLimits(write_high_water_bytes=64 << 10, server_bytes_max=3_000_000)
    async with serve(world, folder, limits) as stage, raw_peer(stage, HELLO) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        for call_id in range(1, 257):
            peer.write(f.Request(call_id, "test.big", None, Text(number=200_000)))
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        assert stage.server.held_bytes == 0
        peer.transport.resume_reading()


async def test_pings_of_a_peer_that_does_not_read_pile_nothing_up(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(write_high_water_bytes=16 << 10)) as stage, raw_peer(stage, HELLO) as peer:
        await peer.wait(lambda: peer.decoder.hello is not None)
        assert peer.transport is not None
        peer.transport.pause_reading()
        (session,) = stage.server._sessions.values()
        pings = b"".join(f.encode_frame(f.Ping(number)) for number in range(1000))
        for _ in range(200):
            peer.write(pings)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # not a wait for a condition: time in which it could grow
        assert session.connection._transport is not None
        assert session.connection._transport.get_write_buffer_size() < 200_000
        peer.transport.resume_reading()
