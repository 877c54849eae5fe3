"""The client that connects again: what it repeats, what it does not, and how long it waits."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.rpc import ReconnectingClient, RetryPolicy, RpcLimits
from isopod.wire import frames as f
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import BLOB, CHAT, ECHO, FAIL, FLAKY, FRAGILE, HANG, NOTE, Mark, Stage, Text, serve, wait_until
from tests.net.rpc.test_violations import FakeServer

pytestmark = pytest.mark.row("S17", "S34")
POLICY = RetryPolicy(attempts_max=4, pause_first_s=0.01, pause_max_s=0.05)


def client_of(stage: Stage, policy: RetryPolicy = POLICY) -> ReconnectingClient:
    return ReconnectingClient(stage.world, stage.address, policy=policy)


async def test_it_connects_when_first_used_and_again_when_the_connection_ended(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = client_of(stage)
        assert client.n_connects == 0
        assert await asyncio.gather(*(client.call(ECHO, Text(str(n))) for n in range(10))) == [Text(str(n)) for n in range(10)]
        assert client.n_connects == 1, "ten calls share one attempt"
        for session in list(stage.server._sessions.values()):
            session.connection.abort()
        # Until its client has seen it too: a call that is not idempotent is not repeated.
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0 and not (client._client and client._client.is_usable))
        assert await client.call(ECHO, Text("again")) == Text("again")
        assert client.n_connects == 2
        async with client.open(CHAT, Text()) as call:
            await call.send(Mark(1))
            assert await call.receive() == Mark(1)
        await client.notify(NOTE, Text("n"))
        await stage.service.wait_event("noted n True")
        await client.close()
        with pytest.raises(errors.Disconnected, match="was closed"):
            await client.call(ECHO, Text())


async def test_a_server_that_comes_later_is_waited_for(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/rpc.sock")
    client = ReconnectingClient(world, address, policy=RetryPolicy(attempts_max=1000, pause_first_s=0.005, factor=1.0))
    calling = asyncio.create_task(client.call(FRAGILE, Text("not idempotent, but never begun")))
    await wait_until(lambda: client.n_repeats >= 3)
    async with serve(world, folder):
        assert (await calling).text == "not idempotent, but never begun"
        await client.close()


FAILURES: dict[str, tuple[Callable[[], errors.IsopodError], int, int]] = {
    # what a handler raises; attempts for an idempotent method, and for one that is not
    "disconnected": (lambda: errors.Disconnected("x"), 3, 1),
    "deadline": (lambda: errors.DeadlineExceeded("x", 1), 3, 1),
    "exhausted": (lambda: errors.Exhausted("x", "1"), 3, 1),
    "busy": (lambda: errors.Exhausted("x", "1", retry_after_s=0.001), 3, 3),
    "unavailable": (lambda: errors.UnavailableError("x"), 3, 1),
    "in use": (lambda: errors.InUse("volume", "x", "y"), 1, 1),
    "not found": (lambda: errors.NotFound("x", "y"), 1, 1),
    "bug": (lambda: errors.BugError("x"), 1, 1),
}


@pytest.mark.parametrize("name", list(FAILURES))
async def test_only_what_may_be_repeated_is(world: World, folder: str, name: str) -> None:
    failure, *expected = FAILURES[name]
    async with serve(world, folder) as stage:
        client = client_of(stage)
        stage.service.failure = failure
        for method, n_attempts in zip((FLAKY, FRAGILE), expected, strict=True):
            stage.service.n_failures = 2
            stage.service.events.clear()
            if n_attempts == 3:
                assert await client.call(method, Text("x")) == Text("x")
            else:
                with pytest.raises(type(failure())):
                    await client.call(method, Text("x"))
            assert stage.service.events == ["flaky"] * n_attempts
        await client.close()


async def test_it_gives_up_after_its_attempts_and_at_its_deadline(world: World, folder: str) -> None:
    loop = asyncio.get_running_loop()
    async with serve(world, folder) as stage:
        stage.service.n_failures = 1000
        client = client_of(stage)
        with pytest.raises(errors.Disconnected):
            await client.call(FLAKY, Text())
        assert stage.service.events == ["flaky"] * 4
        slow = client_of(stage, RetryPolicy(attempts_max=1000, pause_first_s=0.02, factor=1.0, jitter=0.0))
        began_s = loop.time()
        with pytest.raises((errors.Disconnected, errors.DeadlineExceeded)):  # before the next pause, or within an attempt
            await slow.call(FLAKY, Text(), timeout_s=0.1)
        assert loop.time() - began_s < 5
        assert slow.n_repeats <= 5
        with pytest.raises(errors.DeadlineExceeded, match=r"test\.hang took longer than 0\.05 s"):
            await slow.call(HANG, Text(), timeout_s=0.05)
        with pytest.raises(errors.NotFound):
            await client.call(FAIL, Text())
        await client.close()
        await slow.close()


async def test_a_connection_lost_in_the_middle_repeats_what_is_idempotent(world: World, folder: str) -> None:
    """The first server takes the request and dies; the second answers."""
    address = UnixAddress(f"{folder}/rpc.sock")
    servers: list[FakeServer] = []

    def accept() -> FakeServer:
        servers.append(FakeServer(f.encode_hello(f.Hello((1, 1), "mortal"))))
        return servers[-1]

    listener = await world.network.listen(address, accept)
    client = ReconnectingClient(world, address, policy=POLICY)
    idempotent = asyncio.create_task(client.call(BLOB, b"x"))
    await wait_until(lambda: len(servers) == 1 and len(servers[0].frames) == 1)
    servers[0].close()
    await wait_until(lambda: len(servers) == 2 and len(servers[1].frames) == 1)
    servers[1].write(f.Reply(1, b"y", 0))
    assert await idempotent == b"y"
    other = asyncio.create_task(client.call(FRAGILE, Text()))
    await wait_until(lambda: len(servers[1].frames) == 2)
    servers[1].close()
    with pytest.raises(errors.Disconnected) as caught:
        await other
    assert not isinstance(caught.value, errors.NotStarted)
    # GOAWAY says that it was not begun: then anything is repeated.
    third = asyncio.create_task(client.call(FRAGILE, Text("z")))
    await wait_until(lambda: len(servers) == 3 and len(servers[2].frames) == 1)
    servers[2].write(f.GoAway(0))
    await wait_until(lambda: len(servers) == 4 and len(servers[3].frames) == 1)
    servers[3].write(f.Reply(1, Text("z"), 0))
    assert await third == Text("z")
    await client.close()
    await listener.close()


async def test_closing_ends_an_attempt_to_connect(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/mute.sock")
    listener = await world.network.listen(address, lambda: FakeServer(b""))
    client = ReconnectingClient(world, address)
    calling = asyncio.create_task(client.call(ECHO, Text()))
    await asyncio.sleep(0.02)
    await client.close()
    with pytest.raises(errors.Disconnected, match="was closed"):
        await calling
    await listener.close()


async def test_a_busy_server_says_when_to_come_again(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(calls_max=1, retry_after_s=0.03)) as stage:
        hanging = await stage.connect()
        task = asyncio.create_task(hanging.call(HANG, Text("h")))
        await stage.wait_calls_open(1)
        with pytest.raises(errors.Exhausted) as caught:
            await hanging.call(ECHO, Text())
        assert caught.value.retry_after_s == 0.03
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await hanging.close()


@given(st.integers(1, 100), st.floats(0, 1))
def test_pauses_grow_up_to_their_bound(n_failed: int, chance: float) -> None:
    policy = RetryPolicy()
    pause_s = policy.pause_s(n_failed, chance)
    assert policy.pause_first_s * (1 - policy.jitter) <= pause_s <= policy.pause_max_s
    assert policy.pause_s(n_failed, 0.0) <= policy.pause_s(n_failed + 1, 0.0)
