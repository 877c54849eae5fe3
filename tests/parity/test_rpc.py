"""RPC: calls, one-way calls, time-outs, cancellation, late replies, isolation groups."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from isopod.net.rpc import Call, Client, Server, connect
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.wire.service import Method
from isopod.world.errors import BugError, DeadlineExceeded, Disconnected, IsopodError, NotFound
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.parity.kit import keeping, until

pytestmark = pytest.mark.row("S35")


class Text(msgspec.Struct, frozen=True):
    """A request or a reply."""

    text: str = ""


ECHO = Method("parity.echo", Text, Text)
FAIL = Method("parity.fail", Text, Text)
BUG = Method("parity.bug", Text, Text)
HANG = Method("parity.hang", Text, Text)
LATE = Method("parity.late", Text, Text)
NOTE = Method("parity.note", Text, Text)
GROUP = Method("parity.group", Text, Text)
CHAT = Method("parity.chat", Text, Text, sends=bytes, receives=bytes)


class Service:
    """The handlers, and what happened in them."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def echo(self, call: Call[Any, Any], request: Text) -> Text:
        return request

    def fail(self, call: Call[Any, Any], request: Text) -> Text:
        raise NotFound("thing", request.text, "look elsewhere")

    def bug(self, call: Call[Any, Any], request: Text) -> Text:
        raise ZeroDivisionError("a secret")

    async def hang(self, call: Call[Any, Any], request: Text) -> Text:
        self.events.append("hang begins")
        try:
            await asyncio.sleep(3600)
        finally:
            self.events.append("hang was cancelled")
        return request

    async def late(self, call: Call[Any, Any], request: Text) -> Text:
        """Answer although nobody waits any more."""
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.events.append("late answers")
        return Text("late")

    def note(self, call: Call[Any, Any], request: Text) -> Text:
        self.events.append(f"noted {request.text}")
        return request

    async def group(self, call: Call[Any, Any], request: Text) -> Text:
        return Text(current_group().name)

    async def chat(self, call: Call[bytes, bytes], request: Text) -> Text:
        n_items = 0
        async for item in call:
            await call.send(item.upper())
            n_items += 1
        return Text(str(n_items))


@asynccontextmanager
async def pair(world: World, folder: str, *, group: str = "", **options: Any) -> AsyncIterator[tuple[Client, Service]]:
    """A server and a client of it."""
    service = Service()
    methods = (ECHO, FAIL, BUG, HANG, LATE, NOTE, GROUP, CHAT)
    handlers = {method: getattr(service, method.name.removeprefix("parity.")) for method in methods}
    server = Server(world, handlers, logger=keeping(world), metrics=Registry(), **options)
    listener = await server.listen(UnixAddress(f"{folder}/rpc"))
    try:
        client = await connect(world, listener.address, group=group)
        try:
            yield client, service
        finally:
            await client.close()
    finally:
        await server.close()


async def test_calls_are_answered_many_at_once_on_one_connection(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, _):
        hanging = asyncio.create_task(client.call(HANG, Text()))
        replies = await asyncio.gather(*(client.call(ECHO, Text(str(number))) for number in range(100)))
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
    assert [reply.text for reply in replies] == [str(number) for number in range(100)]


async def test_an_error_of_the_handler_reaches_the_caller(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, _):
        with pytest.raises(NotFound, match="no such thing: x") as caught:
            await client.call(FAIL, Text("x"))
        assert caught.value.hint == "look elsewhere"
        with pytest.raises(BugError) as bug:
            await client.call(BUG, Text())
        assert "secret" not in str(bug.value), "a bug is told without what it said"


async def test_a_one_way_call_is_served_and_not_answered(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, service):
        await client.notify(NOTE, Text("this"))
        await client.notify(BUG, Text())
        assert await client.call(ECHO, Text("after")) == Text("after")
        await until(lambda: service.events == ["noted this"])


@pytest.mark.virtual_time
async def test_a_time_out_ends_the_call_here_and_the_handler_there(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, service):
        with pytest.raises(DeadlineExceeded):
            await client.call(HANG, Text(), timeout_s=0.05)
        await until(lambda: service.events == ["hang begins", "hang was cancelled"])


async def test_cancelling_the_caller_cancels_the_handler(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, service):
        task = asyncio.create_task(client.call(HANG, Text()))
        await until(lambda: service.events)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: service.events == ["hang begins", "hang was cancelled"])


@pytest.mark.virtual_time
async def test_a_late_reply_is_dropped_and_disturbs_nobody(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, service):
        with pytest.raises(DeadlineExceeded):
            await client.call(LATE, Text(), timeout_s=0.05)
        await until(lambda: service.events == ["late answers"])
        assert await client.call(ECHO, Text("mine")) == Text("mine")


async def test_streams_flow_both_ways_before_the_reply(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, _), client.open(CHAT, Text()) as call:
        for word in (b"one", b"two"):
            await call.send(word)
            assert await call.receive() == word.upper()
        call.end()
        assert await call.receive() is None
        assert await call.reply() == Text("2")


async def test_calls_fail_when_the_connection_ends(world: World, folder: str) -> None:
    async with pair(world, folder) as (client, service):
        task = asyncio.create_task(client.call(HANG, Text()))
        await until(lambda: service.events)
        await client.close()
        with pytest.raises(Disconnected):
            await task
        with pytest.raises(IsopodError):
            await client.call(ECHO, Text())


async def test_handlers_run_in_the_isolation_group_that_the_client_asked_for(world: World, folder: str) -> None:
    groups = [SchedulingGroup("bulk", 100)]
    async with pair(world, folder, group="bulk", groups=groups) as (client, _):
        assert await client.call(GROUP, Text()) == Text("bulk")


async def test_a_group_that_is_not_offered_is_refused(world: World, folder: str) -> None:
    with pytest.raises(NotFound, match="no such scheduling group: greedy"):
        async with pair(world, folder, group="greedy", groups=[SchedulingGroup("bulk", 100)]):
            pass
