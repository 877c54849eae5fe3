"""ShimClient against every kind of answer, in both Worlds (T9)."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from isopod.pulse.model import SOCKET_NAME
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import KEPT_MAX, WORDS, ShimClient, ShimError
from isopod.world.errors import InvalidArgument, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.shims import AGENT_URL, DATA, GOOD, HUNG, SMALL, Behaviour, FakeShims, Framing

BODY_BYTES_MAX = 100_000
GRACE_S = 30.0
LARGE = b"".join(b'kata_guest_meminfo{item="%d"} %d\n' % (number, number) for number in range(1500))


@asynccontextmanager
async def rig(world: World, folder: str, *, request_s: float = 20.0) -> AsyncIterator[tuple[FakeShims, ShimClient]]:
    """Yield shims and a client of theirs."""
    client = ShimClient(world, PulseSettings(body_bytes_max=BODY_BYTES_MAX, request_s=request_s))
    try:
        async with FakeShims(world, f"{folder}/sbs") as shims, asyncio.timeout(GRACE_S * 4):
            yield shims, client
    finally:
        await client.close()


async def failure(client: ShimClient, socket: str, *, timeout_s: float | None = None, n_bytes_max: int | None = None) -> str:
    """Return the class of a request's failure."""
    with pytest.raises(ShimError) as failed:
        await client.get(socket, "/metrics", timeout_s=timeout_s, n_bytes_max=n_bytes_max)
    assert failed.value.word in WORDS
    assert "\n" not in failed.value.message
    assert failed.value.retryable
    return failed.value.word


@pytest.mark.row("T9")
@pytest.mark.parametrize("framing", ["length", "chunked", "http10", "http10_close", "close", "continue", "extra"])
@pytest.mark.parametrize("body", [SMALL, LARGE, b""], ids=["small", "large", "empty"])
async def test_whole_answers(world: World, folder: str, framing: Framing, body: bytes) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", body=body, behaviour=Behaviour(framing=framing))
        for _ in range(3):
            answer = await client.get(shim.socket, "/metrics")
            assert (answer.status, answer.body) == (200, body)
            assert dict(answer.headers)["Content-Type"].startswith("text/plain")
        assert len(shim.asked_s) == 3


@pytest.mark.row("T9")
@pytest.mark.parametrize(
    ("framing", "word"),
    [
        ("short", "closed"),
        ("cut_chunks", "closed"),
        ("cut_head", "closed"),
        ("no_answer", "closed"),
        ("garbage", "protocol"),
        ("two_lengths", "protocol"),
        ("bad_chunk", "protocol"),
        ("endless_head", "protocol"),
        ("endless_fields", "protocol"),
        ("endless_chunk_head", "protocol"),
        ("endless_continue", "protocol"),
        ("endless_body", "too_large"),
        ("endless_close", "too_large"),
    ],
)
async def test_answers_that_are_none(world: World, folder: str, framing: Framing, word: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", body=LARGE, behaviour=Behaviour(framing=framing))
        assert await failure(client, shim.socket) == word
        shim.behaviour = GOOD
        assert (await client.get(shim.socket, "/metrics")).body == LARGE


@pytest.mark.row("T9")
async def test_bodies_over_the_limit(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", body=b"x" * BODY_BYTES_MAX)
        assert len((await client.get(shim.socket, "/metrics")).body) == BODY_BYTES_MAX
        for framing in ("length", "chunked", "close"):
            shim.body, shim.behaviour = b"x" * (BODY_BYTES_MAX + 1), Behaviour(framing=framing)
            assert await failure(client, shim.socket) == "too_large"
        assert await failure(client, shim.socket, n_bytes_max=10) == "too_large"


@pytest.mark.row("T9")
async def test_the_status_is_the_callers_matter(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", behaviour=Behaviour(status=500))
        answer = await client.get(shim.socket, "/metrics")
        assert answer.status == 500
        assert b"DeadlineExceeded" in answer.body
        shim.behaviour = GOOD
        assert (await client.get(shim.socket, "/agent-url")).body == AGENT_URL
        assert (await client.get(shim.socket, "/no?such=page")).status == 404


@pytest.mark.row("T9")
async def test_sockets_that_are_none(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        late = await shims.add("late", late=True)
        assert await failure(client, late.socket) == "gone"
        assert await failure(client, f"{folder}/nobody/{SOCKET_NAME}") == "gone"
        await world.disk.write(late.socket, b"a file")
        assert await failure(client, late.socket) == "refused"
        assert await failure(client, f"{late.socket}/below") == "gone"
        await world.disk.remove(late.socket)
        await shims.listen(late)
        assert (await client.get(late.socket, "/metrics")).body == SMALL
        await shims.stop("late")
        assert await failure(client, late.socket) == "gone"


async def test_a_shim_that_died_leaves_its_socket(sim_world: SimWorld, folder: str) -> None:
    async with rig(sim_world.world, folder) as (shims, client):
        shim = await shims.add("a")
        sim_world.network.listeners()[0].stop()
        assert await failure(client, shim.socket) == "refused"


async def test_a_full_queue_and_want_of_descriptors_are_no_fault_of_the_shim(sim_world: SimWorld, folder: str) -> None:
    async with rig(sim_world.world, folder) as (shims, client):
        shim = await shims.add("a")
        for number, word in ((errno.EAGAIN, "busy"), (errno.EMFILE, "busy"), (errno.EACCES, "refused")):
            sim_world.network.refuse_next(number)
            assert await failure(client, shim.socket) == word


@pytest.mark.row("K12")
@pytest.mark.virtual_time
@pytest.mark.parametrize("behaviour", [HUNG, Behaviour(delay_s=10.0), Behaviour(framing="trickle")], ids=["hung", "slow", "trickle"])
async def test_the_deadline_is_of_the_whole_request(world: World, folder: str, behaviour: Behaviour) -> None:
    async with rig(world, folder, request_s=3.0) as (shims, client):
        shim = await shims.add("a", behaviour=behaviour)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await failure(client, shim.socket) == "timeout"
        assert loop.time() - began_s == pytest.approx(3.0, abs=0.01)
        assert await failure(client, shim.socket, timeout_s=0.5) == "timeout"
        assert loop.time() - began_s == pytest.approx(3.5, abs=0.02)
        while shim.open:
            await asyncio.sleep(0.01)


@pytest.mark.row("K12")
async def test_a_hung_shim_is_given_up_on_the_host_too(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", behaviour=HUNG)
        assert await failure(client, shim.socket, timeout_s=0.2) == "timeout"
        shim.behaviour = GOOD
        assert (await client.get(shim.socket, "/metrics")).body == SMALL


@pytest.mark.row("T9")
async def test_a_connection_is_used_again(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a")
        for _ in range(5):
            await client.get(shim.socket, "/metrics")
        assert (shim.n_connections, client.n_connections) == (1, 1)
        client.forget(shim.socket)
        while client.n_connections:
            await asyncio.sleep(0)
        await client.get(shim.socket, "/metrics")
        assert shim.n_connections == 2


@pytest.mark.row("T9")
@pytest.mark.parametrize("behaviour", [Behaviour(keeps=False), Behaviour(closes_idle=True)], ids=["said", "unsaid"])
async def test_shims_that_close_their_connections(world: World, folder: str, behaviour: Behaviour) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", behaviour=behaviour)
        for number in range(1, 6):
            assert (await client.get(shim.socket, "/metrics")).body == SMALL
            assert shim.n_connections == number


async def test_a_restarted_shim_is_asked_on_a_new_connection(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a")
        await client.get(shim.socket, "/metrics")
        await shims.stop("a")
        await shims.listen(shim)
        assert (await client.get(shim.socket, "/metrics")).body == SMALL


async def test_no_more_connections_are_kept_than_the_bound(sim_world: SimWorld, folder: str) -> None:
    n_shims = KEPT_MAX + 40
    async with rig(sim_world.world, folder) as (shims, client):
        added = [await shims.add(f"{number:04}") for number in range(n_shims)]
        for _ in range(2):
            for shim in added:
                assert (await client.get(shim.socket, "/metrics")).body == SMALL
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert client.n_connections == shims.n_open == KEPT_MAX
        assert [shim.n_connections for shim in added] == [1] * KEPT_MAX + [2] * 40
        client.forget(added[0].socket)  # its place is given to another
        await client.get(added[-1].socket, "/metrics")
        await client.get(added[-1].socket, "/metrics")
        assert added[-1].n_connections == 3


async def test_a_request_that_is_given_up_closes_its_connection(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a", behaviour=HUNG)
        asking = asyncio.ensure_future(client.get(shim.socket, "/metrics"))
        while not shim.asked_s:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while shim.open:
            await asyncio.sleep(0.001)
        assert client.n_connections == 0


async def test_paths_that_cannot_be_asked_for(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a")
        with pytest.raises(InvalidArgument):
            await client.get(shim.socket, "/metrics\r\nX: y")
        assert shim.n_connections == 0


async def test_a_closed_client_asks_nobody(world: World, folder: str) -> None:
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a")
        await client.close()
        with pytest.raises(WrongState):
            await client.get(shim.socket, "/metrics")


@pytest.mark.parametrize("name", ["shim_sample.prom", "shim_sample_full.prom", "shim_sample_rs.prom"])
async def test_recorded_bodies_come_whole(world: World, folder: str, name: str) -> None:
    with open(f"{DATA}/{name}", "rb") as file:
        body = file.read()
    async with rig(world, folder) as (shims, client):
        shim = await shims.add("a" * 64, body=body, behaviour=Behaviour(framing="chunked"))
        assert (await client.get(shim.socket, "/metrics")).body == body
