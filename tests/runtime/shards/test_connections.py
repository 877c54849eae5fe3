"""Accepted connections handed to the shard with the fewest open ones."""

import asyncio

import pytest

from isopod.runtime.shards import RestartPolicy
from isopod.world.errors import InvalidArgument
from isopod.world.network import Address, ClientTls, ServerTls, TcpAddress, UnixAddress
from isopod.world.world import World
from tests.net.certificates import client_material, server_material
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import shards
from tests.runtime.shards.test_supervision import kill


class Client(asyncio.Protocol):
    """Keeps what came, and says when something did."""

    def __init__(self) -> None:
        self.data = b""
        self.came = asyncio.Event()
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.came.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()


async def open_client(world: World, address: Address) -> tuple[asyncio.Transport, Client, int]:
    """Connect, and return which shard greeted."""
    transport, protocol = await world.network.connect(address, Client)
    assert isinstance(protocol, Client)
    async with asyncio.timeout(40):
        await protocol.came.wait()
    return transport, protocol, int(protocol.data)


async def ask(transport: asyncio.Transport, protocol: Client, data: bytes) -> bytes:
    protocol.data = b""
    transport.write(data)
    async with asyncio.timeout(40):
        while len(protocol.data) < len(data):
            protocol.came.clear()
            await protocol.came.wait()
    return protocol.data


@pytest.mark.row("S4")
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_connections_go_to_the_shard_with_the_fewest(world: World, folder: str, kind: str) -> None:
    address: Address = UnixAddress(f"{folder}/socket") if kind == "unix" else TcpAddress("127.0.0.1", 0)
    async with shards(world, 3, services=[p.greet]) as rig:
        listener = await rig.service.listen(address, "greet")
        clients = [await open_client(world, listener.address) for _ in range(9)]
        where = [shard for _, _, shard in clients]

        assert sorted(where) == [0] * 3 + [1] * 3 + [2] * 3
        assert listener.n_open() == {0: 3, 1: 3, 2: 3}
        for transport, protocol, _ in clients:
            assert await ask(transport, protocol, b"x" * 100_000) == b"x" * 100_000
        assert [each.connections for each in await rig.service.statistics()] == [3, 3, 3]

        # All of shard 1's leave: it is where the next three go.
        for transport, _, shard in clients:
            if shard == 1:
                transport.close()
        async with asyncio.timeout(40):
            while listener.n_open()[1]:
                await asyncio.sleep(0.01)
        late = [await open_client(world, listener.address) for _ in range(3)]
        assert [shard for _, _, shard in late] == [1, 1, 1]
        for transport, protocol, _ in [*clients, *late]:
            transport.close()
            async with asyncio.timeout(40):
                await protocol.lost.wait()
        async with asyncio.timeout(40):
            while listener.n_open() != {0: 0, 1: 0, 2: 0}:
                await asyncio.sleep(0.01)


async def test_a_choice_of_shards_and_one_that_dies(world: World, folder: str) -> None:
    async with shards(world, 3, services=[p.serve, p.greet], restart=RestartPolicy(backoff_s=60)) as rig:
        listener = await rig.service.listen(UnixAddress(f"{folder}/socket"), "greet", shards=[1, 2])
        clients = [await open_client(world, listener.address) for _ in range(4)]
        assert sorted(shard for _, _, shard in clients) == [1, 1, 2, 2]

        await kill(world, 1)
        async with asyncio.timeout(40):
            for _, client, shard in clients:
                if shard == 1:
                    await client.lost.wait()
            while rig.service.states()[1] == "up":
                await asyncio.sleep(0.01)
        more = [await open_client(world, listener.address) for _ in range(3)]
        assert [shard for _, _, shard in more] == [2, 2, 2]
        await kill(world, 2)
        async with asyncio.timeout(40):
            while rig.service.states()[2] == "up":
                await asyncio.sleep(0.01)
        transport, protocol = await world.network.connect(listener.address, Client)
        assert isinstance(protocol, Client)
        async with asyncio.timeout(40):
            await protocol.lost.wait()
        assert listener.n_refused == 1
        transport.close()
        for each, _, _ in [*clients, *more]:
            each.close()
        with pytest.raises(InvalidArgument):
            await rig.service.listen(UnixAddress(f"{folder}/other"), "greet", shards=[])


async def test_nobody_serves_that_name(world: World, folder: str) -> None:
    async with shards(world, 2, services=[p.serve]) as rig:
        listener = await rig.service.listen(UnixAddress(f"{folder}/socket"), "nobody")
        for _ in range(2):
            transport, protocol = await world.network.connect(listener.address, Client)
            assert isinstance(protocol, Client)
            async with asyncio.timeout(40):
                await protocol.lost.wait()
            transport.close()
        async with asyncio.timeout(40):
            while listener.n_open() != {0: 0, 1: 0}:
                await asyncio.sleep(0.01)


async def test_the_count_survives_a_change_of_protocol(world: World, folder: str) -> None:
    """An upgraded connection has another protocol at its end than at its beginning."""
    async with shards(world, 1, services=[p.greet_upgrading]) as rig:
        listener = await rig.service.listen(UnixAddress(f"{folder}/socket"), "greet")
        transport, protocol, _ = await open_client(world, listener.address)
        assert await ask(transport, protocol, b"once") == b"once"
        assert listener.n_open() == {0: 1}
        transport.close()
        async with asyncio.timeout(40):
            while listener.n_open() != {0: 0}:
                await asyncio.sleep(0.01)


async def test_handed_out_connections_can_be_secured(world: World, folder: str) -> None:
    async with shards(world, 1) as rig:
        rig.smp.serve_connections("secured", p.Greeter, tls=ServerTls(server_material()))
        listener = await rig.service.listen(TcpAddress("127.0.0.1", 0), "secured")
        tls = ClientTls(client_material(), server_name="localhost")
        transport, protocol = await world.network.connect(listener.address, Client, tls=tls)
        assert isinstance(protocol, Client)
        async with asyncio.timeout(40):
            await protocol.came.wait()
        assert await ask(transport, protocol, b"hello") == b"hello"
        transport.close()
        async with asyncio.timeout(40):
            while listener.n_open() != {0: 0}:
                await asyncio.sleep(0.01)


async def test_listening_ends_with_the_shards(world: World, folder: str) -> None:
    async with shards(world, 1, services=[p.greet]) as rig:
        listener = await rig.service.listen(UnixAddress(f"{folder}/socket"), "greet")
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            await rig.service.listen(UnixAddress(f"{folder}/socket"), "greet")
        address = listener.address
    with pytest.raises(OSError):
        await world.network.connect(address, Client)


class Unused:
    """A part of which nobody has made use."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


async def test_a_connection_that_comes_as_all_ends_is_closed(world: World) -> None:
    gone: list[int] = []
    part = Unused()
    async with shards(world, 1, services=[p.greet]) as rig:
        rig.smp.adopt("greet", part, lambda: gone.append(1))
        rig.smp.close()
        while not part.is_closed:
            await asyncio.sleep(0)
        assert gone == [1]
        assert rig.smp.n_connections == 0
