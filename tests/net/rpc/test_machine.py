"""Everything at once: clients that call, stream, notify, cancel, run into deadlines and vanish, in any order that hypothesis thinks of, on
simulated connections. Each outcome is one the rules allow for that very operation, and nothing is left."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.rpc import Client, RpcLimits
from isopod.wire.frames import Encoding
from isopod.world import errors
from isopod.world.world import World
from tests.net.rpc.kit import BLOB, CHAT, COUNT, ECHO, EITHER, FAIL, HANG, NOTE, PIPE, PLAIN, SUM, Mark, Stage, Text, serve, wait_until
from tests.net.rpc.test_fuzz import FOLDER, run_simulated

LIMITS = RpcLimits(calls_max=40, heartbeat_s=1.0, cancel_grace_s=1.0)
Operation = Callable[["Actor", int], Awaitable[None]]


class Actor:
    """One client and what is to be true of it in the end."""

    def __init__(self, stage: Stage, client: Client) -> None:
        self.stage = stage
        self.client = client
        self.n_notices = 0
        self.has_vanished = False

    async def answered(self, number: int) -> None:
        method = (ECHO, PLAIN, EITHER)[number % 3]
        assert await self.client.call(method, Text("a", number)) == Text("a", number)

    async def bulk(self, number: int) -> None:
        data = bytes((number,)) * (number * 700)
        assert await self.client.call(BLOB, data) == data

    async def refused(self, number: int) -> None:
        with pytest.raises(errors.NotFound, match=f"n{number}"):
            await self.client.call(FAIL, Text(f"n{number}"))

    async def late(self, number: int) -> None:
        with pytest.raises(errors.DeadlineExceeded):
            await self.client.call(HANG, Text(f"late {number}"), timeout_s=number / 1000)

    async def cancelled(self, number: int) -> None:
        task = asyncio.create_task(self.client.call(HANG, Text(f"cancelled {number}")))
        await asyncio.sleep(number / 10_000)
        if not task.cancel():
            await task
        with pytest.raises(asyncio.CancelledError):
            await task

    async def noted(self, number: int) -> None:
        await self.client.notify(NOTE, Text(f"of {id(self)}"))
        self.n_notices += 1

    async def streamed_down(self, number: int) -> None:
        async with self.client.open(COUNT, Text(number=number)) as call:
            assert [item async for item in call] == [Mark(n) for n in range(number)]
            assert (await call.reply()).number == number

    async def streamed_up(self, number: int) -> None:
        async with self.client.open(SUM, Text()) as call:
            for n in range(number):
                await call.send(Mark(n))
            call.end()
            assert (await call.reply()).number == sum(range(number))

    async def streamed_both(self, number: int) -> None:
        async with self.client.open(PIPE, Text()) as call:
            for n in range(number % 7):
                data = bytes((n,)) * 20_000
                await call.send(data)
                assert await call.receive() == data
            call.end()
            assert await call.receive() is None

    async def left(self, number: int) -> None:
        async with self.client.open(CHAT, Text()) as call:
            for n in range(number % 5):
                await call.send(Mark(n))

    async def vanished(self, number: int) -> None:
        await asyncio.sleep(number / 1000)
        self.has_vanished = True
        self.client.connection.abort()

    async def act(self, operation: Operation, number: int) -> None:
        """Do one; a connection that was made to vanish excuses being disconnected."""
        try:
            await operation(self, number)
        except errors.Disconnected:
            assert self.has_vanished
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"{operation.__name__}({number}) raised {error!r}") from error


OPERATIONS: list[Operation] = [
    Actor.answered, Actor.bulk, Actor.refused, Actor.late, Actor.cancelled, Actor.noted, Actor.streamed_down, Actor.streamed_up,
    Actor.streamed_both, Actor.left,
]  # fmt: skip
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 30)), max_size=25)
Scenario = list[tuple[list[tuple[Operation, int]], Encoding, bool]]
scenarios = st.lists(st.tuples(operations, st.sampled_from(["msgpack", "json"]), st.booleans()), min_size=1, max_size=3)


@pytest.mark.row("S17")
@settings(max_examples=60, deadline=None)
@given(scenario=scenarios, vanishing=st.none() | st.integers(0, 40), drains=st.booleans())
def test_any_mixture_of_operations(scenario: Scenario, vanishing: int | None, drains: bool) -> None:
    async def body(world: World) -> None:
        async with serve(world, FOLDER, LIMITS) as stage:
            actors, doing = [], []
            for todo, encoding, compression in scenario:
                client = await stage.connect(encoding=encoding, compression=compression, limits=LIMITS)
                actor = Actor(stage, client)
                actors.append(actor)
                doing += [asyncio.create_task(actor.act(operation, number)) for operation, number in todo]
            if vanishing is not None:
                doing.append(asyncio.create_task(actors[0].act(Actor.vanished, vanishing)))
            await asyncio.gather(*doing)
            for actor in actors:
                if not actor.has_vanished:
                    await actor.client.ping()  # frames are served in their order: the notices are, too
                noted = stage.service.events.count(f"noted of {id(actor)} True")
                assert noted == actor.n_notices or (actor.has_vanished and noted < actor.n_notices)
                await actor.client.close()
                assert not actor.client._waiting
                assert not actor.client._open
            if drains:
                await stage.server.drain(1.0)
            await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
            assert stage.value("isopod_rpc_calls_open") == 0
            assert stage.server.held_bytes == 0
            assert stage.server.gate.n_inside == 0
            begun = sum(event.startswith("hang begins") for event in stage.service.events)
            assert begun == sum(event.startswith("hang ends") for event in stage.service.events)
            assert stage.logged("rpc.bug") == stage.logged("rpc.violation") == []

    run_simulated(body)
