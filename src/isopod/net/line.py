"""A line protocol: the smallest useful one, an example of what the registry takes, and handy for control ports.

A client sends lines (UTF-8, ended by LF or CR LF), the server answers each with one line, in their order. "quit" or the end of the stream
ends the connection. Lines have a bound; what is no UTF-8 or too long ends the connection after a line that says so.
"""

from collections.abc import Awaitable, Callable
from typing import Final

from isopod.net.tcp import Connection, TcpLimits, TcpServer
from isopod.world.errors import IsopodError, ProtocolViolation
from isopod.world.world import World

LINE_BYTES_MAX: Final = 8 << 10
Answer = Callable[[str, Connection], str | Awaitable[str]]
"""Answers one line. An `IsopodError` it raises is answered as "error: MESSAGE"."""


def line_server(world: World, answer: Answer, *, limits: TcpLimits | None = None, n_bytes_max: int = LINE_BYTES_MAX) -> TcpServer:
    """Return a server of the line protocol; `listen` it, and close it.

    Args:
        world: The ports.
        answer: Answers one line.
        limits: Times and bounds.
        n_bytes_max: The longest line, its end included.
    """

    async def handle(connection: Connection) -> None:
        while line := await _next_line(connection, n_bytes_max):
            connection.write((await _answer(answer, line, connection)).encode() + b"\n")
            await connection.drain()

    return TcpServer(world, handle, limits=limits, name="line")


async def ask_line(connection: Connection, line: str) -> str:
    """Send a line and return the answer: the client's side.

    Raises:
        PeerError: The connection ended, or was too slow.
    """
    connection.write(line.encode() + b"\n")
    await connection.drain()
    return (await connection.readuntil(b"\n")).decode().removesuffix("\n")


async def _next_line(connection: Connection, n_bytes_max: int) -> str:
    """Return the next line that is not empty, "" at the end."""
    while True:
        try:
            raw = await connection.readuntil(b"\n", n_bytes_max=n_bytes_max)
            line = raw.decode().rstrip("\r\n")
        except (ProtocolViolation, UnicodeDecodeError) as error:
            connection.write(b"error: a line is too long or no UTF-8\n")
            raise ProtocolViolation(connection.peer, "a line is too long or no UTF-8") from error
        if not raw or line == "quit":
            return ""
        if line:
            return line


async def _answer(answer: Answer, line: str, connection: Connection) -> str:
    try:
        found = answer(line, connection)
        text = found if isinstance(found, str) else await found
    except IsopodError as error:
        text = f"error: {error.message}"
    return text.replace("\n", " ")
