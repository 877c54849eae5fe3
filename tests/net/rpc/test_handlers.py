"""How handlers run: plain functions without a task, coroutines in real tasks that several of them may share one after the other."""

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from isopod.net.rpc import Call, Client, RpcLimits, Server, connect
from isopod.runtime.abort import deadline, remaining_s
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.tasks import TaskGroup
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import BUG, ECHO, EITHER, FAIL, HANG, HELLO, PLAIN, Text, raw_peer, serve, wait_until

LOOK = Method("test.look", Text, Text)
MARK: ContextVar[str] = ContextVar("mark", default="clean")


class Looker:
    """Handlers that look around themselves."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.marks: list[str] = []
        self.left_s: dict[str, float | None] = {}

    async def look(self, call: Call[Any, Any], request: Text) -> Text:
        task = asyncio.current_task()
        self.tasks.append(task)
        self.marks.append(MARK.get())
        self.left_s[request.text] = remaining_s()
        if "mark" in request.text:
            MARK.set(request.text)
        if "cancel" in request.text and task is not None:
            task.cancel()
        if "timeout" in request.text:
            async with asyncio.timeout(0.02):
                await asyncio.get_running_loop().create_future()
        if "group" in request.text:
            async with TaskGroup() as group:
                group.create_task(asyncio.sleep(0.001), name="inner")
        if "catch" in request.text:
            try:
                async with asyncio.timeout(0.02):
                    await asyncio.get_running_loop().create_future()
            except TimeoutError:
                assert asyncio.current_task() is task
                await asyncio.sleep(0)
                return Text("caught")
        if "wait" in request.text:
            await asyncio.sleep(0)
            assert asyncio.current_task() is task, "the task of the first step is the task of all"
            self.marks.append(MARK.get())
        return request


async def run(world: World, folder: str, *texts: str, timeouts: tuple[float | None, ...] = ()) -> tuple[Looker, list[Any]]:
    """Have a server look for each text, all sent in one turn."""
    looker = Looker()
    server = Server(world, [(LOOK, looker.look)], logger=Logger(lambda line: None, world.clock), metrics=Registry())
    address = UnixAddress(f"{folder}/look.sock")
    await server.listen(address)
    client = await connect(world, address)
    limits = timeouts or (5.0,) * len(texts)
    calls = [client.call(LOOK, Text(text), timeout_s=limit) for text, limit in zip(texts, limits, strict=True)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    await client.close()
    await server.close()
    return looker, answers


async def test_handlers_that_never_wait_share_a_task(world: World, folder: str) -> None:
    looker, answers = await run(world, folder, *"abcdefgh")
    assert [answer.text for answer in answers] == list("abcdefgh")
    assert None not in looker.tasks
    assert len(dict.fromkeys(looker.tasks)) < 8


async def test_a_context_variable_reaches_no_other_call(world: World, folder: str) -> None:
    looker, _ = await run(world, folder, "a", "mark", "b", "mark wait", "c", "wait", "d")
    assert [mark for mark in looker.marks if mark != "mark wait"] == ["clean"] * 8
    assert looker.marks.count("mark wait") == 1


async def test_a_handler_that_cancels_its_task_cancels_no_other(world: World, folder: str) -> None:
    _, answers = await run(world, folder, "a", "cancel", "b", "cancel wait", "c")
    assert [getattr(answer, "text", getattr(answer, "code", "")) for answer in answers] == ["a", "cancel", "b", "cancelled", "c"]


async def test_what_needs_a_real_task_works_from_the_first_step(world: World, folder: str) -> None:
    _, answers = await run(world, folder, "catch", "group", "a", "timeout")
    assert [getattr(answer, "text", getattr(answer, "code", "")) for answer in answers] == ["caught", "group", "a", "bug"]


async def test_the_deadline_of_each_call_is_in_its_context(world: World, folder: str) -> None:
    looker, _ = await run(world, folder, "a", "b", "c", "d", timeouts=(None, 60.0, None, 600.0))
    assert looker.left_s["a"] is looker.left_s["c"] is None
    for text, limit_s in (("b", 60.0), ("d", 600.0)):
        left_s = looker.left_s[text]
        assert left_s is not None
        assert limit_s - 30 < left_s <= limit_s


async def test_a_client_keeps_the_deadline_of_its_context(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.DeadlineExceeded):
            async with deadline(0.05):
                await client.call(HANG, Text("x"), timeout_s=None)
        await stage.service.wait_event("hang ends x")
        await client.close()


async def test_many_that_wait_begin_together(world: World, folder: str) -> None:
    """A method that waits gets tasks of its own: the last does not begin as many turns of the loop later as there are calls."""
    async with serve(world, folder) as stage:
        client = await stage.connect()
        calls = [asyncio.create_task(client.call(HANG, Text(str(number)))) for number in range(100)]
        await stage.wait_calls_open(100)
        assert sorted(stage.service.events) == sorted(f"hang begins {number}" for number in range(100))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await stage.wait_calls_open(0)
        await client.close()


async def test_a_plain_function_is_answered_within_the_turn(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, HELLO) as peer:
        await peer.wait(lambda: peer.decoder.hello is not None)
        (session,) = stage.server._sessions.values()
        before = asyncio.all_tasks()
        session.connection.data_received(f.encode_frame(f.Request(1, "test.plain", None, Text("now"))))
        assert stage.service.events == ["plain now"]
        assert asyncio.all_tasks() == before
        (reply,) = await peer.wait_frames(1)
        assert isinstance(reply, f.Reply)


async def test_a_plain_function_may_fail_or_answer_later(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.NotFound, match="refuse"):
            await client.call(PLAIN, Text("refuse"))
        with pytest.raises(errors.BugError) as caught:
            await client.call(PLAIN, Text("bug"))
        assert "secret" not in caught.value.message
        assert "the secret of the function" in stage.logged("rpc.bug")[0]["traceback"]
        assert await asyncio.gather(*(client.call(EITHER, Text("e", n)) for n in (0, 5, 0, 1))) == [Text("e", n) for n in (0, 5, 0, 1)]
        assert await stage.server.invoke("test.plain", b"\x80") == Text()
        assert await stage.server.invoke("test.either", b"\x81\xa6number\x01") == Text("", 1)
        assert stage.value("isopod_rpc_calls_total", method="test.plain", outcome="bug") == 1
        assert stage.value("isopod_rpc_calls_total", method="test.either", outcome="ok") == 4
        await client.close()


async def test_a_later_answer_can_be_withdrawn_before_it_begins(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        frames = (f.Request(1, "test.either", None, Text("x", 50)), f.Cancel(1), f.Request(2, "test.either", None, Text("y", 1)))
        async with raw_peer(stage, HELLO, *frames) as peer:
            frames_back = await peer.wait_frames(2)
            codes = {getattr(frame, "id", 0): getattr(frame, "code", "ok") for frame in frames_back}
            assert codes == {1: "cancelled", 2: "ok"}
        await stage.wait_calls_open(0)


async def test_too_many_later_answers_are_exhausted(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(calls_max=2)) as stage:
        client = await stage.connect()
        answers = await asyncio.gather(*(client.call(EITHER, Text("e", 20)) for _ in range(3)), return_exceptions=True)
        (refused,) = [answer for answer in answers if not isinstance(answer, Text)]
        assert isinstance(refused, errors.Exhausted)
        assert refused.retry_after_s is None, "it was begun: not to be repeated blindly"
        await client.close()


async def test_metrics_count_every_call_once(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        await asyncio.gather(*(client.call(PLAIN, Text()) for _ in range(300)), *(client.call(ECHO, Text()) for _ in range(300)))
        for method in (FAIL, BUG):
            with pytest.raises(errors.IsopodError):
                await client.call(method, Text())
        for method, outcome, number in ((PLAIN, "ok", 300), (ECHO, "ok", 300), (FAIL, "error", 1), (BUG, "bug", 1)):
            assert stage.value("isopod_rpc_calls_total", method=method.name, outcome=outcome) == number
            assert stage.value("isopod_rpc_call_duration_seconds_count", method=method.name) == number
        assert 0 <= stage.value("isopod_rpc_call_duration_seconds_sum", method="test.plain") < 60
        await client.close()


async def test_a_flood_of_one_client_leaves_turns_for_others(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, HELLO) as flood:
        other: Client = await stage.connect()
        flood.write(b"".join(f.encode_frame(f.Request(n, "test.plain", None, Text())) for n in range(1, 5001)))
        await wait_until(lambda: len(stage.service.events) > 0)
        assert await other.call(ECHO, Text("between")) == Text("between")
        await flood.wait_frames(5000)
        assert [getattr(frame, "id", 0) for frame in flood.frames] == list(range(1, 5001))
        await other.close()


@pytest.mark.parametrize("calls_max", [1, 256])
async def test_a_burst_of_short_calls_is_served_however_long_it_is(world: World, folder: str, calls_max: int) -> None:
    """Only calls that wait are counted against the bound of open calls: short ones are begun as they can be."""
    async with serve(world, folder, RpcLimits(calls_max=calls_max)) as stage:
        client = await stage.connect()
        answers = await asyncio.gather(*(client.call(ECHO, Text("n", number)) for number in range(1500)))
        assert [answer.number for answer in answers] == list(range(1500))
        await client.close()


async def test_a_plain_function_that_raises_cancelled_hurts_nobody(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        with pytest.raises(errors.Cancelled):
            await client.call(PLAIN, Text("cancelled"))
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()
