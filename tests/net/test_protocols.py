"""The registry of protocols: a line protocol over TCP and TLS, and one of a third party."""

import asyncio
import contextlib
from typing import cast

import pytest

from isopod.net.line import ask_line, line_server
from isopod.net.protocols import Endpoints, ProtocolRegistry, from_factory
from isopod.net.tcp import Connection, TcpServer, connect_tcp
from isopod.world.errors import AlreadyExists, Disconnected, InvalidArgument, NotFound, WrongState
from isopod.world.network import Address, ClientTls, ServerTls, TcpAddress, UnixAddress
from isopod.world.world import World
from tests.net.certificates import client_leaf, client_material, server_material

LOOPBACK = TcpAddress("127.0.0.1", 0)
pytestmark = pytest.mark.row("S36")


def answer(line: str, connection: Connection) -> str:
    if line == "fail":
        raise NotFound("line", line)
    identity = connection.identity if connection.transport.get_extra_info("ssl_object") else None
    return f"{identity.common_name if identity else 'somebody'} said {line}"


async def slowly(line: str, connection: Connection) -> str:
    await asyncio.sleep(0.001)
    return line[::-1]


def registry() -> ProtocolRegistry:
    made = ProtocolRegistry()
    made.register("line", lambda world: line_server(world, answer, n_bytes_max=100))
    made.register("reversed/1.0", lambda world: line_server(world, slowly))
    return made


async def test_the_line_protocol_over_tcp_unix_and_tls(world: World, folder: str) -> None:
    endpoints = Endpoints(world, registry())
    tls = ServerTls(server_material(client_auth="required"))
    plain = await endpoints.listen(LOOPBACK, protocol="line")
    local = await endpoints.listen(UnixAddress(f"{folder}/line"), protocol="line")
    secure = await endpoints.listen(LOOPBACK, protocol="line", tls=tls)
    other = await endpoints.listen(LOOPBACK, protocol="reversed/1.0")
    trust = ClientTls(client_material(client_leaf()))
    for address, secured, said in (
        (plain.address, None, "somebody said hällo"),
        (local.address, None, "somebody said hällo"),
        (secure.address, trust, "a client said hällo"),
        (other.address, None, "olläh"),
    ):
        connection = await connect_tcp(world, address, tls=secured)
        assert await ask_line(connection, "hällo") == said
        connection.write(b"\r\n\nquit\nnever\n")
        assert await connection.read() == b""
        await connection.wait_closed()
    await endpoints.drain(5)
    await endpoints.close()
    with pytest.raises(WrongState):
        await endpoints.listen(LOOPBACK, protocol="line")


async def test_lines_that_are_none(world: World) -> None:
    endpoints = Endpoints(world, registry())
    listener = await endpoints.listen(LOOPBACK, protocol="line")
    connection = await connect_tcp(world, listener.address)
    assert await ask_line(connection, "fail") == "error: no such line: fail"
    await connection.wait_closed()
    for sent in (b"x" * 200, b"\xff\xfe\n"):
        connection = await connect_tcp(world, listener.address)
        connection.write(sent)
        assert await connection.readuntil() == b"error: a line is too long or no UTF-8\n"
        with contextlib.suppress(Disconnected):  # closed with bytes unread
            assert await connection.read() == b""
        await connection.wait_closed()
    await endpoints.close()


async def test_a_third_partys_protocol(world: World) -> None:
    class Upper(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(data.upper())

    made = registry()
    made.register("upper", from_factory(Upper))
    endpoints = Endpoints(world, made)
    listener = await endpoints.listen(LOOPBACK, protocol="upper", tls=ServerTls(server_material()))
    connection = await connect_tcp(world, listener.address, tls=ClientTls(client_material()))
    connection.write(b"shout")
    assert await connection.readexactly(5) == b"SHOUT"
    ending = asyncio.ensure_future(endpoints.drain(0.05))
    await ending  # the connection was still open: it is dropped
    with pytest.raises(Disconnected):
        await connection.readexactly(1)
    await connection.wait_closed()
    await endpoints.close()


async def test_draining_a_third_partys_protocol_waits_for_its_connections(world: World) -> None:
    made = ProtocolRegistry()
    made.register("quiet", from_factory(asyncio.Protocol))
    endpoints = Endpoints(world, made)
    listener = await endpoints.listen(LOOPBACK, protocol="quiet")
    connection = await connect_tcp(world, listener.address)
    connection.write(b"x")
    await connection.wait_closed()
    await endpoints.drain(5)
    await endpoints.close()


async def test_names(world: World) -> None:
    made = registry()
    assert made.names() == ("line", "reversed/1.0")
    with pytest.raises(AlreadyExists):
        made.register("line", lambda world: TcpServer(world, nothing))
    for name in ("", "Line", "a b", "x" * 65):
        with pytest.raises(InvalidArgument):
            made.register(name, lambda world: TcpServer(world, nothing))
    endpoints = Endpoints(world, made)
    with pytest.raises(NotFound, match="lime") as caught:
        await endpoints.listen(cast(Address, LOOPBACK), protocol="lime")
    assert caught.value.hint == "did you mean line?"
    made.remove("line")
    with pytest.raises(NotFound) as gone:
        made.remove("line")
    assert "reversed/1.0" in gone.value.hint
    await endpoints.close()


async def nothing(connection: Connection) -> None:
    """Serve nobody."""
