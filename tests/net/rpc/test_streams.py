"""Streams both ways, flow control, and peers that do not keep up. One body on both Worlds."""

import asyncio

import pytest

from isopod.net.rpc import ClientCall, RpcLimits
from isopod.net.rpc.streams import WINDOW_BYTES
from isopod.wire import frames as f
from isopod.world import errors
from isopod.world.world import World
from tests.net.rpc.kit import CHAT, COUNT, DEAF, ECHO, HELLO, SUM, Line, Mark, Text, raw_peer, serve, wait_until


async def test_the_server_streams_before_its_reply(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(COUNT, Text(number=1000)) as call:
            assert [item async for item in call] == [Mark(number) for number in range(1000)]
            assert await call.reply() == Text("done", 1000)
        await client.close()


async def test_the_client_streams_after_its_request(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(SUM, Text()) as call:
            for number in range(1000):
                await call.send(Mark(number))
            call.end()
            assert (await call.reply()).number == 499_500
            with pytest.raises(errors.IsopodError):
                await call.send(Mark(1))
        await client.close()


async def test_both_directions_at_once(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(CHAT, Text()) as call:
            for number in range(100):
                await call.send(Mark(number))
                assert await call.receive() == Mark(number)
            call.end()
            assert await call.receive() is None
            assert await call.reply() == Text("bye", 100)
        await client.close()


async def test_a_bulk_of_ten_windows_passes_each_way(world: World, folder: str) -> None:
    data = bytes(range(256)) * 250
    n_items = 10 * WINDOW_BYTES // len(data)
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(SUM, Text()) as up:
            for _ in range(n_items):
                await up.send(Line(data))
            up.end()
            assert (await up.reply()).text == str(n_items * len(data))
        n_received = 0
        async with client.open(COUNT, Text("x" * len(data), n_items)) as down:
            async for item in down:
                n_received += len(item.data)
        assert n_received == n_items * len(data)
        await client.close()


async def test_a_frame_as_large_as_the_window_passes(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(SUM, Text()) as up:
            for _ in range(3):
                await up.send(Line(bytes((1 << 20) - 100)))
            with pytest.raises(errors.InvalidArgument, match="over 1048576"):
                await up.send(Line(bytes(1 << 20)))
            up.end()
            assert (await up.reply()).text == str(3 * ((1 << 20) - 100))
        await client.close()


async def test_credit_runs_out_and_comes_back(world: World, folder: str) -> None:
    size = 64 << 10
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(COUNT, Text("x" * size, 100)) as call:
            first = await call.receive()
            assert first is not None
            # Whoever takes nothing gets one window and no more, however long we wait ...
            await wait_until(lambda: stage.service.n_sent >= WINDOW_BYTES // size)
            assert await client.call(ECHO, Text("meanwhile")) == Text("meanwhile")
            assert WINDOW_BYTES // size <= stage.service.n_sent <= WINDOW_BYTES // size + 2
            # ... and the rest once he does.
            assert len([item async for item in call]) == 99
        await client.close()


async def test_a_handler_that_takes_nothing_stops_its_sender_only(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(DEAF, Text()) as call:
            sending = asyncio.create_task(_send_many(call, 100))
            await asyncio.sleep(0.3)  # not a wait for a condition: time in which it could go on
            assert not sending.done()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            (session,) = stage.server._sessions.values()
            assert session.in_flight_bytes // (64 << 10) == WINDOW_BYTES // (64 << 10)
            assert await client.call(ECHO, Text("meanwhile")) == Text("meanwhile")
        await stage.wait_calls_open(0)
        await client.close()


async def test_leaving_early_withdraws_the_call(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(DEAF, Text()):
            await stage.service.wait_event("hang begins deaf")
        await stage.service.wait_event("hang ends deaf")
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()


@pytest.mark.virtual_time
async def test_an_open_call_has_a_deadline_if_asked(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(CHAT, Text(), timeout_s=0.05) as call:
            with pytest.raises(errors.DeadlineExceeded):
                await call.receive()
            with pytest.raises(errors.DeadlineExceeded):
                await call.send(Mark(1))
            with pytest.raises(errors.DeadlineExceeded):
                await call.reply()
        await stage.wait_calls_open(0)
        await client.close()


async def test_a_plain_call_of_a_streaming_method_needs_no_reader(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        assert await client.call(COUNT, Text("x" * 100_000, 50)) == Text("done", 50)
        assert await client.call(SUM, Text()) == Text("0", 0)
        await client.close()


async def test_items_before_the_end_of_the_connection_are_still_delivered(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(CHAT, Text()) as call:
            await call.send(Mark(1))
            await call.send(Mark(2))
            assert await call.receive() == Mark(1)
            await wait_until(lambda: stage.server.calls_open.value == 1)
            await stage.server.close()
            await client.connection.wait_gone()
            assert await call.receive() == Mark(2)
            with pytest.raises(errors.Disconnected):
                await call.receive()
        await client.close()


async def test_a_peer_that_reads_nothing_does_not_grow_our_memory(world: World, folder: str) -> None:
    limits = RpcLimits(write_high_water_bytes=64 << 10)
    async with serve(world, folder, limits) as stage, raw_peer(stage, HELLO) as peer:
        assert peer.transport is not None
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 1)
        peer.transport.pause_reading()
        (session,) = stage.server._sessions.values()
        request = f.encode_frame(f.Request(1, "test.big", None, Text(number=100_000)))
        for call_id in range(1, 501):
            peer.write(f.encode_frame(f.Request(call_id, "test.big", None, Text(number=100_000))))
        await wait_until(lambda: session.connection.is_write_paused)
        await asyncio.sleep(0.05)  # not a wait for a condition: time in which it could grow
        served = stage.value("isopod_rpc_calls_total", method="test.big", outcome="ok")
        assert served < 500
        assert session.connection._transport is not None
        assert session.connection._transport.get_write_buffer_size() < 40_000_000
        assert len(request) < 100
        peer.transport.resume_reading()
        await peer.wait(lambda: len(peer.frames) == 500)


async def test_a_stalled_stream_is_resumed(world: World, folder: str) -> None:
    limits = RpcLimits(write_high_water_bytes=16 << 10)
    async with serve(world, folder, limits) as stage, raw_peer(stage, HELLO) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        for call_id in range(1, 9):
            peer.write(f.Request(call_id, "test.count", None, Text("x" * 10_000, 80)))
        await wait_until(lambda: any(s.connection.is_write_paused for s in stage.server._sessions.values()))
        sent = stage.service.n_sent
        assert sent < 640
        peer.transport.resume_reading()
        await peer.wait(lambda: sum(isinstance(frame, f.Reply) for frame in peer.frames) == 8)
        assert sum(isinstance(frame, f.Item) for frame in peer.frames) == 640


async def _send_many(call: ClientCall[Text], number: int) -> None:
    for _ in range(number):
        await call.send(Line(bytes(64 << 10)))


async def test_a_handler_that_goes_on_sending_to_nobody_is_told(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, HELLO, f.Request(1, "test.babbler", None, Text())) as peer:
        await peer.wait_frames(3)
        peer.write(f.Cancel(1))
        await stage.service.wait_event("babbler was told Cancelled")
        await peer.wait(lambda: isinstance(peer.frames[-1], f.Error))
        await stage.wait_calls_open(0)


async def test_what_a_handler_did_not_take_is_given_up_with_it(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(in_flight_bytes_max=100_000)) as stage, raw_peer(stage, HELLO) as peer:
        for call_id in range(1, 6):
            peer.write(f.Request(call_id, "test.deaf", None, Text()), f.Item(call_id, Line(bytes(60_000))), f.Cancel(call_id))
            frames = await peer.wait_frames(call_id)
            assert getattr(frames[-1], "code", "") == "cancelled"
        (session,) = stage.server._sessions.values()
        await stage.wait_calls_open(0)
        assert session.in_flight_bytes == 0
        assert stage.server.held_bytes == 0


async def test_a_server_closes_although_its_peer_does_not_read(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(close_grace_s=0.05)) as stage, raw_peer(stage, HELLO) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        for call_id in range(1, 51):
            peer.write(f.Request(call_id, "test.big", 10_000, Text(number=100_000)))
        await wait_until(lambda: any(s.connection.is_write_paused for s in stage.server._sessions.values()))
        async with asyncio.timeout(5):
            await stage.server.close()
        assert stage.value("isopod_rpc_connections") == 0
        peer.transport.resume_reading()


async def test_deadlines_of_ended_calls_are_forgotten(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        for _ in range(5):
            await client.call(ECHO, Text())
        await stage.wait_calls_open(0)
        (session,) = stage.server._sessions.values()
        assert list(session._open_deadlines()) == list(client._open_deadlines()) == []
        await client.close()
