"""`Later`: replies of plain handlers that come later, without a task."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from isopod.net.rpc import Call, Client, Later, RpcLimits, Server, connect
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.wire.service import Method
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import Text, wait_until

ASK = Method("test.ask", Text, Text)


class Desk:
    """Handlers that promise."""

    def __init__(self) -> None:
        self.open: dict[str, Later] = {}
        self.n_cancelled = 0

    def ask(self, call: Call[Any, Any], request: Text) -> Later:
        later = Later()
        if request.text == "at once":
            later.set_result(Text("done already"))
        elif request.text == "fail at once":
            later.set_exception(errors.NotFound("thing", "x"))
        self.open[request.text] = later
        return later


@asynccontextmanager
async def serving(world: World, folder: str, limits: RpcLimits = RpcLimits()) -> AsyncIterator[tuple[Desk, Server, Client, Registry]]:  # noqa: B008
    desk, metrics = Desk(), Registry()
    server = Server(world, [(ASK, desk.ask)], logger=Logger(lambda line: None, world.clock), metrics=metrics, limits=limits)
    address = UnixAddress(f"{folder}/later.sock")
    await server.listen(address)
    client = await connect(world, address)
    try:
        yield desk, server, client, metrics
    finally:
        await client.close()
        await server.close()


@pytest.mark.row("S17")
async def test_a_reply_comes_when_it_is_settled(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, _, client, _):
        calls = [asyncio.ensure_future(client.call(ASK, Text(name), timeout_s=20.0)) for name in ("a", "b", "at once")]
        assert (await calls[2]).text == "done already"
        await wait_until(lambda: {"a", "b"} <= desk.open.keys())
        desk.open["b"].set_result(Text("B"))
        assert (await calls[1]).text == "B", "out of order"
        assert not calls[0].done()
        desk.open["a"].set_exception(errors.InUse("thing", "a", "other"))
        with pytest.raises(errors.InUse):
            await calls[0]
        with pytest.raises(errors.NotFound):
            await client.call(ASK, Text("fail at once"), timeout_s=20.0)
        for later in desk.open.values():
            later.set_result(Text("too late"))  # is ignored
        assert all(later.done() for later in desk.open.values())


async def test_a_deadline_ends_the_wait(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, _, client, _):
        with pytest.raises(errors.DeadlineExceeded):
            await client.call(ASK, Text("never"), timeout_s=0.05)
        await wait_until(desk.open["never"].done)
        assert (await client.call(ASK, Text("at once"), timeout_s=20.0)).text == "done already"


async def test_a_caller_that_leaves_is_waited_for_no_more(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, _, client, _):
        waiting = asyncio.ensure_future(client.call(ASK, Text("left"), timeout_s=20.0))
        await wait_until(lambda: "left" in desk.open)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await wait_until(desk.open["left"].done)
        gone = asyncio.ensure_future(client.call(ASK, Text("gone"), timeout_s=20.0))
        await wait_until(lambda: "gone" in desk.open)
        await client.close()
        await asyncio.gather(gone, return_exceptions=True)
        await wait_until(desk.open["gone"].done)


async def test_a_server_that_stops_ends_it(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, server, client, _):
        waiting = asyncio.ensure_future(client.call(ASK, Text("x"), timeout_s=20.0))
        await wait_until(lambda: "x" in desk.open)
        await server.close()
        assert desk.open["x"].done()
        with pytest.raises(errors.IsopodError):
            await waiting


async def test_open_ones_count_against_the_bound(world: World, folder: str) -> None:
    async with serving(world, folder, RpcLimits(calls_max=2)) as (desk, _, client, _):
        calls = {name: asyncio.ensure_future(client.call(ASK, Text(name), timeout_s=20.0)) for name in "abc"}
        await wait_until(lambda: any(call.done() for call in calls.values()))
        [refused] = [name for name, call in calls.items() if call.done()]
        with pytest.raises(errors.Exhausted):
            await calls.pop(refused)
        assert desk.open[refused].done(), "nobody waits for it"
        for name, call in calls.items():
            desk.open[name].set_result(Text("ok"))
            assert (await call).text == "ok"


async def test_a_wrong_reply_is_a_bug_that_is_told(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, _, client, _):
        waiting = asyncio.ensure_future(client.call(ASK, Text("w"), timeout_s=20.0))
        await wait_until(lambda: "w" in desk.open)
        desk.open["w"].set_result(object())
        with pytest.raises(errors.BugError):
            await waiting


async def test_in_the_own_process_it_is_awaited(world: World, folder: str) -> None:
    async with serving(world, folder) as (desk, server, _, _):
        assert await server.invoke(ASK.name, msgspec.msgpack.encode(Text("at once"))) == Text("done already")
        asking = asyncio.ensure_future(server.invoke(ASK.name, msgspec.msgpack.encode(Text("soon"))))
        await wait_until(lambda: "soon" in desk.open)
        desk.open["soon"].set_result(Text("now"))
        assert await asking == Text("now")


async def test_cancelling_reaches_who_awaits(world: World) -> None:
    later = Later()

    async def wait() -> object:
        return await later

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    later.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
