"""Messages between nodes arrive once and in order, or are known not to have (S20)."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from isopod.cluster.messaging import BATCH_MAX, BODY_BYTES_MAX, QUEUE_MAX, SEND, Batch, Message, Messenger, Verdicts
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import DeadlineExceeded, Disconnected, Exhausted, InvalidArgument, NotFound, RefusedError, WrongState
from isopod.world.world import World

pytestmark = pytest.mark.row("S20")


class Wire:
    """Connects messengers; `lose` says of each call whether the request (before it is handled) or the answer (after) is lost."""

    def __init__(self) -> None:
        self.messengers: dict[int, Messenger] = {}
        self.lose: Callable[[int], str] = lambda _: ""
        self.n_calls = 0
        self.batches: list[Batch] = []

    async def call(self, node_id: int, _method: Any, request: Any, *, timeout_s: float) -> Any:
        self.n_calls += 1
        number = self.n_calls
        self.batches.append(request)
        await asyncio.sleep(0.001)
        if self.lose(number) == "request" or node_id not in self.messengers:
            raise Disconnected(f"node {node_id}", "lost on the way")
        async with asyncio.timeout(timeout_s):
            verdicts = await self.messengers[node_id]._take(request)
        if self.lose(number) == "answer":
            raise Disconnected(f"node {node_id}", "the answer was lost")
        return Verdicts(verdicts)

    def add(self, world: World, node_id: int) -> Messenger:
        logger = Logger(lambda _: None, world.clock)
        made = self.messengers[node_id] = Messenger(world, node_id, lambda: self, logger=logger, metrics=Registry())
        return made

    async def close(self) -> None:
        for messenger in self.messengers.values():
            await messenger.close()


async def test_messages_are_handled_in_order_and_acknowledged(world: World) -> None:
    wire = Wire()
    one, two = wire.add(world, 1), wire.add(world, 2)
    got: list[tuple[int, bytes]] = []

    async def take(message: Message) -> None:
        await asyncio.sleep(0)
        got.append((message.sender, message.body))

    two.on("x", take)
    receipts = [one.send(2, "x", str(number).encode()) for number in range(300)]
    await asyncio.gather(*receipts)
    assert got == [(1, str(number).encode()) for number in range(300)]
    assert wire.n_calls <= 2 + 300 // BATCH_MAX + 1
    await wire.close()


async def test_what_is_lost_is_sent_again_and_handled_once(sim_world: Any) -> None:
    wire = Wire()
    one, two = wire.add(sim_world.world, 1), wire.add(sim_world.world, 2)
    chance = sim_world.world.random.stream("test")
    wire.lose = lambda _: chance.choice(["", "request", "answer", "answer"])
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.body)

    two.on("x", take)
    receipts = []
    for number in range(200):
        receipts.append(one.send(2, "x", str(number).encode(), ttl_s=3600))
        await asyncio.sleep(0.01)
    await asyncio.gather(*receipts)
    assert got == [str(number).encode() for number in range(200)]
    assert sum(len(batch.messages) for batch in wire.batches) > 200  # some came more than once
    await wire.close()


async def test_what_nobody_took_in_time_is_given_up(sim_world: Any) -> None:
    wire = Wire()
    one = wire.add(sim_world.world, 1)
    early, late = one.send(2, "x", b"early", ttl_s=1.0), one.send(2, "x", b"late", ttl_s=100.0)
    with pytest.raises(DeadlineExceeded, match="a message of x to node 2 took longer than 1 s"):
        await early
    assert not late.done()
    two = wire.add(sim_world.world, 2)
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.body)

    two.on("x", take)
    await late
    assert got == [b"late"]
    await wire.close()


async def test_a_message_too_old_when_its_turn_comes_is_not_handled(sim_world: Any) -> None:
    wire = Wire()
    one, two = wire.add(sim_world.world, 1), wire.add(sim_world.world, 2)
    got: list[bytes] = []

    async def slow(message: Message) -> None:
        got.append(message.body)
        await asyncio.sleep(2.0)

    two.on("x", slow)
    first, second = one.send(2, "x", b"1", ttl_s=5.0), one.send(2, "x", b"2", ttl_s=1.0)
    await first
    with pytest.raises(DeadlineExceeded):
        await second
    assert got == [b"1"]
    await wire.close()


async def test_errors_of_handlers_reach_the_sender_temporary_ones_are_tried_again(world: World) -> None:
    wire = Wire()
    one, two = wire.add(world, 1), wire.add(world, 2)
    n_tries = 0

    async def moody(message: Message) -> None:
        nonlocal n_tries
        n_tries += 1
        if message.body == b"never":
            raise RefusedError("not with me", "ask another")
        if message.body == b"bug":
            raise KeyError("x")
        if n_tries < 4:
            raise WrongState("it", "x", "busy", "take that")

    two.on("x", moody)
    await one.send(2, "x", b"later")
    assert n_tries == 4
    with pytest.raises(RefusedError, match="not with me"):
        await one.send(2, "x", b"never")
    with pytest.raises(Exception, match="the handler for messages of x failed"):
        await one.send(2, "x", b"bug")
    with pytest.raises(NotFound, match="handler for messages of: y"):
        await one.send(2, "y", b"")
    await wire.close()


async def test_a_refusal_whose_answer_was_lost_is_told_again(sim_world: Any) -> None:
    wire = Wire()
    one, two = wire.add(sim_world.world, 1), wire.add(sim_world.world, 2)
    wire.lose = lambda number: "answer" if number == 1 else ""
    n = 0

    async def refuse(_: Message) -> None:
        nonlocal n
        n += 1
        raise RefusedError("no")

    two.on("x", refuse)
    with pytest.raises(RefusedError):
        await one.send(2, "x", b"")
    assert n == 1
    await wire.close()


async def test_a_restarted_sender_is_not_taken_for_its_former_self(world: World) -> None:
    wire = Wire()
    first, two = wire.add(world, 1), wire.add(world, 2)
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.body)

    two.on("x", take)
    await first.send(2, "x", b"before")
    await first.close()
    again = wire.add(world, 1)
    await again.send(2, "x", b"after")
    assert got == [b"before", b"after"]
    await wire.close()


async def test_a_late_batch_of_an_earlier_life_makes_nothing_come_twice(world: World) -> None:
    """The connection of the process that died was slow: its last batch comes after the first one of its successor."""
    wire = Wire()
    first, two = wire.add(world, 1), wire.add(world, 2)
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.body)

    two.on("x", take)
    await first.send(2, "x", b"before")
    [late] = wire.batches
    again = wire.add(world, 1)
    await again.send(2, "x", b"after")
    await two._take(late)
    await two._take(wire.batches[-1])
    assert got == [b"before", b"after"]
    await first.close()
    await wire.close()


async def test_to_itself_and_bounds(world: World) -> None:
    wire = Wire()
    one = wire.add(world, 1)
    got: list[bytes] = []

    async def take(message: Message) -> None:
        got.append(message.body)

    one.on("x", take)
    await one.send(1, "x", b"own")
    assert got == [b"own"]
    with pytest.raises(InvalidArgument, match="over 262144"):
        one.send(1, "x", bytes(BODY_BYTES_MAX + 1))
    with pytest.raises(InvalidArgument, match="time to live"):
        one.send(1, "x", b"", ttl_s=0)
    with pytest.raises(InvalidArgument, match="topic"):
        one.send(1, "", b"")
    for _ in range(QUEUE_MAX):
        one.send(9, "x", b"")
    with pytest.raises(Exhausted, match="messages to node 9"):
        one.send(9, "x", b"")
    for _ in range(16):
        one.send(8, "x", bytes(BODY_BYTES_MAX))
    with pytest.raises(Exhausted):
        one.send(8, "x", b"x")
    waiting = one.send(7, "x", b"")
    await wire.close()
    with pytest.raises(Disconnected):
        await waiting
    with pytest.raises(Disconnected):
        one.send(1, "x", b"")


async def test_a_batch_is_bounded_and_the_verb_is_idempotent(world: World) -> None:
    wire = Wire()
    one = wire.add(world, 1)
    assert SEND.idempotent
    with pytest.raises(InvalidArgument, match="at most"):
        await one._on_batch(_Call(), Batch(2, "e", [None] * (BATCH_MAX + 1)))  # type: ignore[arg-type,list-item]
    await wire.close()


class _Call:
    identity = None
