"""The pool: bounds, order, health, fail-over, and that nothing leaks whatever happens."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.pool import ConnectionPool, Lease, PoolLimits
from isopod.net.tcp import Connection, TcpServer, connect_tcp
from isopod.world.errors import DeadlineExceeded, Disconnected, Exhausted, InvalidArgument, IsopodError, UnavailableError, WrongState
from isopod.world.network import TcpAddress
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.world import World

pytestmark = pytest.mark.row("S10")


class Fake:
    """A connection that knows who has it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.is_open = True
        self.is_usable = True
        self.answers = True
        self.n_users = 0


class Service:
    """Opens fakes, and counts."""

    def __init__(self, sim: SimWorld, limits: PoolLimits, *, endpoints: tuple[str, ...] = ("one",), probed: bool = True) -> None:
        self.down: set[str] = set()
        self.hangs = False
        self.open: list[Fake] = []
        self.n_opening = 0
        self.n_open_max = 0
        self.asked: list[str] = []
        self.probed: list[Fake] = []
        self.delay_s = 0.001
        self.pool: ConnectionPool[Fake, str] = ConnectionPool(
            sim.world,
            endpoints,
            connect=self.connect,
            close=self.close,
            is_usable=lambda fake: fake.is_usable,
            probe=self.probe if probed else None,
            limits=limits,
            name="fakes",
        )

    async def connect(self, endpoint: str) -> Fake:
        self.asked.append(endpoint)
        self.n_opening += 1
        self.n_open_max = max(self.n_open_max, len(self.open) + self.n_opening)
        try:
            await asyncio.sleep(1000 if self.hangs else self.delay_s)
        finally:
            self.n_opening -= 1
        if endpoint in self.down:
            raise ConnectionRefusedError
        fake = Fake(endpoint)
        self.open.append(fake)
        return fake

    def close(self, fake: Fake) -> None:
        assert fake.is_open
        fake.is_open = False
        self.open.remove(fake)

    async def probe(self, fake: Fake) -> bool:
        self.probed.append(fake)
        await asyncio.sleep(0.001)
        return fake.answers


async def test_connections_are_used_again_the_newest_first(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits())
    async with service.pool.use() as first, service.pool.use() as second:
        assert first is not second
    async with service.pool.use() as again:
        assert again is first
    facts = service.pool.statistics()
    assert (facts.n_open, facts.n_idle, facts.n_used, facts.n_opened, facts.n_reused) == (2, 2, 0, 2, 1)
    assert await service.pool.close()
    assert service.open == []


async def test_no_more_than_the_bound_and_first_come_first_served(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(n_max=2))
    order: list[int] = []

    async def user(number: int) -> None:
        async with service.pool.use():
            order.append(number)
            await asyncio.sleep(0.1)

    users = []
    for number in range(8):
        users.append(asyncio.ensure_future(user(number)))
        await asyncio.sleep(0.002)
    assert service.pool.statistics().n_waiting == 6
    await asyncio.gather(*users)
    assert order == list(range(8))
    assert service.n_open_max == 2
    await service.pool.close()


async def test_waiting_has_its_time_and_the_queue_its_bound(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(n_max=1, n_waiting_max=1, acquire_s=0.5))
    lease = await service.pool.acquire()
    waiting = asyncio.ensure_future(service.pool.acquire())
    await asyncio.sleep(0.1)
    with pytest.raises(Exhausted, match="1 wait"):
        await service.pool.acquire()
    with pytest.raises(DeadlineExceeded):
        await waiting
    lease.release()
    lease.release()
    lease.discard()
    (await service.pool.acquire()).discard()
    assert service.pool.statistics().n_acquire_timeouts == 1
    await service.pool.close()
    assert service.open == []


async def test_a_user_that_fails_or_is_cancelled_leaves_no_connection_behind(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits())
    with pytest.raises(Disconnected):
        async with service.pool.use():
            raise Disconnected("one")

    async def hold() -> None:
        async with service.pool.use():
            await asyncio.sleep(100)

    holding = asyncio.ensure_future(hold())
    await asyncio.sleep(0.1)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    assert service.open == []
    assert service.pool.statistics()[:3] == (0, 0, 0)
    await service.pool.close()


async def test_what_is_no_longer_usable_is_not_given_out(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(health_s=10, idle_s=1000))
    async with service.pool.use() as gone:
        pass
    gone.is_usable = False
    async with service.pool.use() as second:
        assert second is not gone
        second.answers = False
    await asyncio.sleep(9)
    async with service.pool.use() as third:
        assert third is second
        assert service.probed == []
    await asyncio.sleep(30)  # the background probe finds it
    assert service.open == []
    assert service.probed == [second]
    async with service.pool.use():
        pass
    await service.pool.close()


async def test_one_that_was_idle_for_long_is_probed_before_use(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(health_s=10, idle_s=1000))
    async with service.pool.use() as first:
        pass
    first.answers = False
    sim_world.loop.elapsed_ns += 11 * 10**9  # no turn for the maintenance
    async with service.pool.use() as second:
        assert second is not first
    assert service.probed == [first]
    await service.pool.close()


async def test_unused_ones_are_closed_but_for_the_minimum(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(n_idle_min=2, idle_s=10, health_s=1000))
    leases = [await service.pool.acquire() for _ in range(5)]
    for lease in leases:
        lease.release()
    await asyncio.sleep(5)
    assert len(service.open) == 5
    await asyncio.sleep(20)
    assert len(service.open) == 2
    assert service.pool.statistics().n_expired == 3
    (await service.pool.acquire()).discard()
    await asyncio.sleep(10)
    assert len(service.open) == 2  # opened ahead of need
    await service.pool.close()
    assert service.open == []


async def test_another_endpoint_takes_over_and_the_first_gets_its_chance_later(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(down_s=60), endpoints=("one", "two"))
    service.down.add("one")
    for wanted, asked in (("two", ["one", "two"]), ("two", ["two"])):
        service.asked.clear()
        lease = await service.pool.acquire()
        assert (lease.endpoint, service.asked) == (wanted, asked)
        lease.discard()
    service.down.clear()
    await asyncio.sleep(61)
    lease = await service.pool.acquire()
    assert lease.endpoint == "one"
    lease.release()
    assert service.pool.statistics().n_failovers == 2
    await service.pool.close()


async def test_opening_is_tried_again_with_growing_pauses(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(n_attempts=4, backoff_s=0.1))
    service.down.add("one")
    began = sim_world.loop.time()
    with pytest.raises(UnavailableError, match="after 4 attempts"):
        await service.pool.acquire()
    assert 0.35 < sim_world.loop.time() - began < 0.75
    assert service.pool.statistics().n_open_failures == 4
    service.hangs = True
    service.down.clear()
    with pytest.raises(DeadlineExceeded):
        await service.pool.acquire()
    assert service.pool.statistics()[:3] == (0, 0, 0)
    await service.pool.close()


async def test_closing_waits_for_users_then_takes_their_connections(sim_world: SimWorld) -> None:
    service = Service(sim_world, PoolLimits(n_max=1))
    lease = await service.pool.acquire()
    waiting = asyncio.ensure_future(service.pool.acquire())
    await asyncio.sleep(0.1)
    closing = asyncio.ensure_future(service.pool.close(deadline_s=5))
    await asyncio.sleep(0.1)
    with pytest.raises(WrongState):
        await waiting
    with pytest.raises(WrongState):
        await service.pool.acquire()
    assert lease.connection.is_open
    assert not await closing
    assert service.open == []
    lease.release()
    patient = Service(sim_world, PoolLimits())
    lease = await patient.pool.acquire()
    sim_world.loop.call_later(1, lease.release)
    assert await patient.pool.close(deadline_s=5)
    assert patient.open == []


def test_limits_that_contradict_each_other(sim_world: SimWorld) -> None:
    for limits, endpoints in ((PoolLimits(n_max=0), ("one",)), (PoolLimits(n_max=1, n_idle_min=2), ("one",)), (PoolLimits(), ())):
        with pytest.raises(InvalidArgument):
            Service(sim_world, limits, endpoints=endpoints)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_whatever_fails_and_whoever_is_cancelled_nothing_is_shared_exceeded_or_leaked(seed: int, n_max: int, n_idle_min: int) -> None:
    sim = make_sim_world(seed)
    chance = random.Random(seed)
    limits = PoolLimits(
        n_max=n_max,
        n_idle_min=min(n_idle_min, n_max),
        acquire_s=0.3,
        connect_s=0.05,
        idle_s=0.2,
        health_s=0.1,
        n_attempts=2,
        backoff_s=0.01,
    )

    async def user(service: Service) -> None:
        await asyncio.sleep(chance.random())
        try:
            lease: Lease[Fake, str] = await service.pool.acquire()
        except IsopodError:
            return
        fake = lease.connection
        fake.n_users += 1
        try:
            assert fake.n_users == 1
            assert fake.is_open
            await asyncio.sleep(chance.random() * 0.1)
            assert fake.n_users == 1
            assert fake.is_open
        finally:
            fake.n_users -= 1
            fake.is_usable, fake.answers = chance.random() > 0.1, chance.random() > 0.2
            if chance.random() < 0.2:
                lease.discard()
            else:
                lease.release()

    async def disturb(service: Service, users: "list[asyncio.Task[None]]") -> None:
        for _ in range(60):
            await asyncio.sleep(0.02)
            service.delay_s = chance.choice([0.001, 0.02, 0.2])
            service.down = {name for name in ("one", "two") if chance.random() < 0.3}
            chance.choice(users).cancel()
            assert len(service.open) + service.n_opening <= n_max

    async def body() -> None:
        service = Service(sim, limits, endpoints=("one", "two"))
        users = [asyncio.get_running_loop().create_task(user(service)) for _ in range(40)]
        await disturb(service, users)
        outcomes = await asyncio.gather(*users, return_exceptions=True)
        assert [each for each in outcomes if each is not None and not isinstance(each, asyncio.CancelledError)] == []
        assert service.n_open_max <= n_max
        facts = service.pool.statistics()
        assert (facts.n_used, facts.n_waiting) == (0, 0)
        assert await service.pool.close()
        assert service.open == []
        assert service.pool.statistics().n_open == 0

    try:
        sim.run(body())
    finally:
        sim.close()


async def test_a_pool_of_real_connections(world: World) -> None:
    async def echo(connection: Connection) -> None:
        while line := await connection.readuntil():
            if line == b"die\n":
                return
            connection.write(line)

    server = TcpServer(world, echo)
    listener = await server.listen(TcpAddress("127.0.0.1", 0))
    address = listener.address
    assert isinstance(address, TcpAddress)

    async def ping(connection: Connection) -> bool:
        connection.write(b"ping\n")
        return await connection.readuntil() == b"ping\n"

    pool: ConnectionPool[Connection, TcpAddress] = ConnectionPool(
        world,
        [address],
        connect=lambda endpoint: connect_tcp(world, endpoint),
        close=lambda connection: connection.abort(),
        is_usable=lambda connection: not connection.is_closed and not connection.at_end,
        probe=ping,
        limits=PoolLimits(n_max=3),
    )

    async def ask(number: int) -> None:
        async with pool.use() as connection:
            connection.write(b"%d\n" % number)
            assert await connection.readuntil() == b"%d\n" % number

    await asyncio.gather(*(ask(number) for number in range(50)))
    assert pool.statistics().n_opened <= 3
    async with pool.use() as connection:
        connection.write(b"die\n")
        assert await connection.read() == b""
    await asyncio.gather(*(ask(number) for number in range(10)))
    assert pool.statistics().n_discarded >= 1
    await pool.close()
    await server.close()


async def test_a_probe_or_a_connect_with_a_bug_does_not_end_the_maintenance(sim_world: SimWorld) -> None:
    """What they raise counts as "no", whatever it is: nobody awaits the maintenance, so that nobody would see it end."""
    broken = {"connect"}

    async def connect(endpoint: str) -> Fake:
        if "connect" in broken:
            raise ValueError("a bug")
        return Fake(endpoint)

    async def probe(fake: Fake) -> bool:
        if "probe" in broken:
            raise KeyError("a bug")
        return True

    limits = PoolLimits(n_idle_min=1, health_s=1, n_attempts=1)
    pool = ConnectionPool(sim_world.world, ("one",), connect=connect, close=lambda _: None, probe=probe, limits=limits)
    with pytest.raises(UnavailableError, match="a bug"):
        await pool.acquire()
    await asyncio.sleep(10)
    broken.clear()
    await asyncio.sleep(10)
    assert pool.statistics().n_idle == 1
    broken.add("probe")
    await asyncio.sleep(10)
    assert pool.statistics().n_discarded > 0
    broken.clear()
    await asyncio.sleep(10)
    assert pool.statistics().n_idle == 1
    await pool.close()
