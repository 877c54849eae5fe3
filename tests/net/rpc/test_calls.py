"""Unary calls: answers, errors, deadlines, cancellation, the way down. One body on both Worlds."""

import asyncio

import msgspec
import pytest

from isopod.net.rpc import RpcLimits, connect
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import BIG, BUG, CHAT, COUNT, ECHO, FAIL, HANG, HELLO, MULE, STUBBORN, Mark, Stage, Text, raw_peer, serve, wait_until


async def test_a_call_is_answered(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        assert client.peer == "test-server"
        assert await client.call(ECHO, Text("hi", 7)) == Text("hi", 7)
        await client.close()
        assert stage.value("isopod_rpc_calls_total", method="test.echo", outcome="ok") == 1


async def test_256_calls_at_once_and_their_answers_find_their_callers(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        answers = await asyncio.gather(*(client.call(ECHO, Text("n", number)) for number in range(256)))
        assert [answer.number for answer in answers] == list(range(256))
        await client.close()


async def test_the_257th_open_call_is_exhausted_and_the_others_go_on(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        hanging = [asyncio.create_task(client.call(HANG, Text(str(number)))) for number in range(256)]
        await stage.wait_calls_open(256)
        with pytest.raises(errors.Exhausted, match="256 per connection"):
            await client.call(ECHO, Text())
        other = await stage.connect()
        assert await other.call(ECHO, Text("free")) == Text("free")
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        await stage.wait_calls_open(0)
        assert await client.call(ECHO, Text("again")) == Text("again")
        await client.close()
        await other.close()


async def test_an_error_of_the_tree_arrives_whole(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.NotFound) as caught:
            await client.call(FAIL, Text("web"))
        error = caught.value
        assert (error.message, error.hint, error.exit_code) == ("no such container: web", "look with `isopod ps`", 1)
        await client.close()


async def test_a_bug_is_logged_here_and_told_without_its_traceback(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.BugError) as caught:
            await client.call(BUG, Text())
        assert "secret of the handler" not in caught.value.message + caught.value.hint
        (line,) = stage.logged("rpc.bug")
        assert "ZeroDivisionError: the secret of the handler" in line["traceback"]
        assert line["method"] == "test.bug"
        assert line["peer"] == "test-client"
        await client.close()


async def test_a_wrong_request_names_its_field(world: World, folder: str) -> None:
    wrong = Method("test.echo", dict, Text)
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.InvalidArgument, match="field 'number': Expected `int`, got `str`"):
            await client.call(wrong, {"text": "a", "number": "b"})
        with pytest.raises(errors.InvalidArgument, match=r"test\.echo"):
            await client.call(Method("test.echo", list, Text), [1])
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()


async def test_an_unknown_method_does_not_end_the_connection(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.NotFound, match=r"no such method: test\.nothing"):
            await client.call(Method("test.nothing", Text, Text), Text())
        with pytest.raises(errors.NotFound) as caught:
            await client.call(Method("x" * 100_000, Text, Text), Text())
        assert len(caught.value.message) < 200
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()


@pytest.mark.virtual_time
async def test_a_deadline_cancels_the_handler(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.DeadlineExceeded, match=r"test.hang took longer than 0.5 s"):
            await client.call(HANG, Text("x"), timeout_s=0.5)
        await stage.service.wait_event("hang ends x")
        await stage.wait_calls_open(0)
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()


@pytest.mark.virtual_time
async def test_the_server_keeps_the_deadline_for_a_client_that_does_not(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, HELLO, f.Request(1, "test.stubborn", 20, Text())) as peer:
        (frame,) = await peer.wait_frames(1)
        assert isinstance(frame, f.Error)
        assert (frame.id, frame.code) == (1, "deadline_exceeded")
        assert "stubborn ends" not in stage.service.events  # answered before the handler had cleaned up
        await stage.wait_calls_open(0)
        assert peer.frames == [frame]  # and what it returned later was dropped


@pytest.mark.virtual_time
async def test_late_answers_are_dropped(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.DeadlineExceeded):
            await client.call(STUBBORN, Text(), timeout_s=0.5)
        await stage.service.wait_event("stubborn ends")
        assert await client.call(ECHO, Text("mine")) == Text("mine")
        await client.close()


async def test_a_cancelled_caller_cancels_the_handler(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(HANG, Text("y")))
        await stage.service.wait_event("hang begins y")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stage.service.wait_event("hang ends y")
        await stage.wait_calls_open(0)
        assert stage.value("isopod_rpc_calls_total", method="test.hang", outcome="cancelled") == 1
        await client.close()


async def test_a_call_withdrawn_before_its_first_step_is_answered(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, HELLO, f.Request(1, "test.hang", None, Text("z")), f.Cancel(1)) as peer:
        (frame,) = await peer.wait_frames(1)
        assert isinstance(frame, f.Error)
        assert (frame.id, frame.code) == (1, "cancelled")
        await stage.wait_calls_open(0)
        assert stage.service.events in ([], ["hang begins z", "hang ends z"])


async def test_a_lost_connection_cancels_its_handlers(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(HANG, Text("w")))
        await stage.service.wait_event("hang begins w")
        await client.close()
        with pytest.raises(errors.Disconnected, match="closed by us"):
            await task
        await stage.service.wait_event("hang ends w")
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        with pytest.raises(errors.Disconnected):
            await client.call(ECHO, Text())


async def test_a_server_that_closes_fails_open_calls(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(HANG, Text("v")))
        await stage.service.wait_event("hang begins v")
        await stage.server.close()
        with pytest.raises(errors.Disconnected, match="shutting down"):
            await task
        assert stage.service.events[-1] == "hang ends v"
        await client.close()


async def test_drain_lets_open_calls_end_and_takes_no_new_ones(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(CHAT, Text()) as call:
            await call.send(Mark(1))
            assert await call.receive() == Mark(1)
            draining = asyncio.create_task(stage.server.drain(5.0))
            await wait_until(lambda: stage.server.gate.is_closed)
            with pytest.raises(errors.Disconnected, match="shutting down"):
                await client.call(ECHO, Text())
            await call.send(Mark(2))
            assert await call.receive() == Mark(2)
            assert not draining.done()
            call.end()
            assert await call.reply() == Text("bye", 2)
        await draining
        with pytest.raises(errors.Disconnected):
            await connect(world, stage.address)
        await client.close()


async def test_drain_cancels_what_is_left_at_its_deadline(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(HANG, Text("u")))
        await stage.service.wait_event("hang begins u")
        await stage.server.drain(0.02)
        assert stage.service.events[-1] == "hang ends u"
        with pytest.raises(errors.Disconnected, match="shutting down"):
            await task
        await client.close()


async def test_a_handler_that_will_not_be_cancelled_cannot_hold_up_the_way_down(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(cancel_grace_s=0.05)) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(MULE, Text()))
        await stage.service.wait_event("mule begins")
        await stage.server.drain(0.01)
        await stage.server.close()
        with pytest.raises(errors.Disconnected):
            await task
        assert stage.logged("rpc.handlers_stuck")[0]["methods"] == ["test.mule"]
        stage.service.release.set()
        await stage.wait_calls_open(0)
        await client.close()


async def test_too_large_a_reply_is_exhausted_and_too_large_a_request_invalid(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.Exhausted, match="over 1048576"):
            await client.call(BIG, Text(number=2 << 20))
        with pytest.raises(errors.InvalidArgument, match="over 1048576"):
            await client.call(ECHO, Text("x" * (2 << 20)))
        assert len((await client.call(BIG, Text(number=1_000_000))).text) == 1_000_000
        await client.close()


async def test_more_bytes_in_flight_than_the_bound_are_exhausted(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(in_flight_bytes_max=100_000)) as stage:
        client = await stage.connect()
        task = asyncio.create_task(client.call(HANG, Text("x" * 60_000)))
        await stage.wait_calls_open(1)
        with pytest.raises(errors.Exhausted, match="bytes in flight"):
            await client.call(ECHO, Text("x" * 60_000))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stage.wait_calls_open(0)
        assert len((await client.call(ECHO, Text("x" * 60_000))).text) == 60_000
        await client.close()


async def test_connecting_to_nobody_says_how_to_start(world: World, folder: str) -> None:
    with pytest.raises(errors.Disconnected) as caught:
        await connect(world, UnixAddress(f"{folder}/nobody.sock"))
    assert "No such file" in caught.value.message
    assert "isopod node" in caught.value.hint


async def test_connections_over_the_bound_are_refused_with_a_reason(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(connections_max=2)) as stage:
        clients = [await stage.connect() for _ in range(2)]
        with pytest.raises(errors.Exhausted, match="connections"):
            await _connect_and_call(stage)
        await clients[0].close()
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 1)
        assert stage.value("isopod_rpc_refused_connections_total") == 1
        third = await stage.connect()
        assert await third.call(ECHO, Text("in")) == Text("in")
        for client in (third, clients[1]):
            await client.close()


async def test_invoke_calls_a_unary_handler_in_process(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        packed = msgspec.msgpack.encode(Text("in", 3))
        assert await stage.server.invoke("test.echo", packed) == Text("in", 3)
        assert await stage.server.invoke("test.echo", msgspec.Raw(packed)) == Text("in", 3)
        with pytest.raises(errors.NotFound):
            await stage.server.invoke("test.nothing", packed)
        with pytest.raises(errors.UsageError):
            await stage.server.invoke(COUNT.name, packed)
        with pytest.raises(errors.InvalidArgument, match="number"):
            await stage.server.invoke("test.echo", msgspec.msgpack.encode({"number": "x"}))


async def _connect_and_call(stage: Stage) -> None:
    """Be refused in one or the other: the server's hello may arrive before its refusal."""
    client = await stage.connect()
    await client.call(ECHO, Text())
