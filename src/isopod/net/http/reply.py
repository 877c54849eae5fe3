"""Reply: a response as it goes over the wire: its head, and how its body is framed.

    a whole body                    content-length
    a stream of announced length    content-length; more or less than announced is a bug: the connection is cut, so the peer can tell
    a stream, to a 1.1 peer         chunked
    a stream, to a 1.0 peer         until the connection closes
    HEAD, 204, 304                  no body

What a handler may not do (a bad header, a length that is not its body's) becomes a 500, and a line in the log. Source: RFC 9112 section 6.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Final, Literal, NamedTuple, Protocol, Self

from isopod.net.http.core import Core
from isopod.net.http.encode import LAST_CHUNK, Block, check_field, encode_block, take_upgrade
from isopod.net.http.messages import Request, Response, Upgrade
from isopod.net.http.static import FilePart
from isopod.net.http.status import status_line
from isopod.net.http.syntax import Facts
from isopod.runtime.scheduling import maybe_yield
from isopod.world.errors import BugError, Disconnected, InvalidArgument

JOINED_BYTES_MAX: Final = 16 << 10
"""Up to this size a chunk is copied into one piece with its frame."""
YIELD_BYTES: Final = 64 << 10
"""How much of a stream is sent before others get a turn."""
FILE_PIECE_FACTOR: Final = 4
"""A piece of a file that the kernel sends may take this many times `HttpLimits.write_s`."""
_NO_LENGTH: Final = frozenset((204, 304))
_UPGRADE_REQUIRED: Final = 426

Framing = Literal["whole", "length", "chunked", "close", "none"]


class Output(Protocol):
    """The connection, as a stream sees it."""

    @property
    def transport(self) -> asyncio.Transport:
        """What a file is sent to past `write`."""

    @property
    def is_lost(self) -> bool:
        """Whether there is nobody to write to."""

    def write(self, *pieces: bytes) -> None:
        """Send."""

    def note_sent(self, n_bytes: int) -> None:
        """Count what was sent past `write`."""

    async def wait_writable(self) -> None:
        """Wait until there is room, or the peer is gone."""


class Reply(NamedTuple):
    """One response, encoded."""

    status: int
    head: bytes
    body: bytes | AsyncIterable[bytes]
    framing: Framing
    content_length: int
    """Of a stream that announced one."""
    is_last: bool

    @classmethod
    def of(cls, core: Core, method: str, response: Response, facts: Facts, *, is_last: bool, request: Request | None = None) -> Self:
        """Encode a response.

        Args:
            core: The server's.
            method: The request's.
            response: What the handler gave.
            facts: The request's.
            is_last: Whether the connection ends after it.
            request: For the log, if the response cannot be sent.
        """
        try:
            return cls._of(core, method, response, facts, is_last=is_last)
        except (InvalidArgument, BugError, TypeError, AttributeError, ValueError) as error:
            bug = BugError(f"a response that cannot be sent: {error}")
            bug.__cause__ = error
            return cls._of(core, method, core.failure(request, bug), facts, is_last=is_last)

    @classmethod
    def _of(cls, core: Core, method: str, response: Response, facts: Facts, *, is_last: bool) -> Self:
        status, body = response.status, response.body
        if not 200 <= status < 600:
            raise BugError(f"status {status} is not one of a response")
        headers, upgrade_lines = response.headers, b""
        if status == _UPGRADE_REQUIRED:
            headers, upgrade_lines = take_upgrade(headers)
        block = core.blocks.encode(headers)
        is_last = is_last or block.wants_close
        if isinstance(body, bytearray | memoryview):
            body = bytes(body)
        content_length = block.content_length
        if isinstance(body, bytes):
            framing: Framing = "whole"
            if content_length is None:
                content_length = len(body)
            elif content_length != len(body) and method != "HEAD" and status not in _NO_LENGTH:
                raise BugError(f"a content-length of {content_length} on a body of {len(body)} bytes")
        else:
            aiter(body)
            framing = "length" if content_length is not None else "chunked" if facts.version == "1.1" else "close"
        if method == "HEAD" or status in _NO_LENGTH:
            framing, body = "none", (b"" if isinstance(body, bytes) else body)
        is_last = is_last or framing == "close"
        head = b"".join(
            (
                status_line(status) if block.has_date else core.prefix(status),
                _framing_lines(status, content_length, is_old=facts.version == "1.0", is_last=is_last),
                upgrade_lines,
                block.lines,
                b"\r\n",
            )
        )
        return cls(status, head, body, framing, content_length or 0, is_last)

    @staticmethod
    def switching(upgrade: Upgrade) -> bytes:
        """Return the head of a 101.

        Raises:
            InvalidArgument: A header that cannot be sent.
        """
        check_field("x", upgrade.protocol)
        block: Block = encode_block(tuple(upgrade.headers))
        return b"".join(
            (status_line(101), b"connection: upgrade\r\nupgrade: ", upgrade.protocol.encode("latin-1"), b"\r\n", block.lines, b"\r\n")
        )


async def send_stream(output: Output, reply: Reply, core: Core, request: Request) -> bool:
    """Send a response whose body is a stream; return False if it broke and the connection has to be cut.

    The stream is closed in any case, also when this is cancelled.
    """
    stream = aiter(reply.body)  # type: ignore[arg-type]  # callers send whole bodies themselves
    try:
        output.write(reply.head)
        if reply.framing != "none":
            await _send_pieces(output, reply, stream, core)
    except Disconnected:
        return False
    except Exception as error:  # noqa: BLE001 - the root of every stream
        core.report(request, error)
        return False
    finally:
        await _close(stream, core, request)
    return True


async def _send_pieces(output: Output, reply: Reply, stream: AsyncIterator[bytes], core: Core) -> None:
    if isinstance(reply.body, FilePart) and reply.framing == "length":
        await output.wait_writable()
        await reply.body.send(output.transport, FILE_PIECE_FACTOR * core.limits.write_s, output.note_sent)
        return
    n_left = reply.content_length
    n_since_turn = 0
    async for piece in stream:
        if output.is_lost:
            return
        if not piece:
            continue
        if reply.framing == "chunked":
            _write_chunk(output, piece)
        else:
            n_left -= len(piece)
            if n_left < 0 and reply.framing == "length":
                raise BugError(f"a stream of more than the {reply.content_length} bytes that were announced")
            output.write(bytes(piece))
        await output.wait_writable()
        n_since_turn += len(piece)
        if n_since_turn >= YIELD_BYTES:
            n_since_turn = 0
            await maybe_yield()
    if reply.framing == "chunked":
        output.write(LAST_CHUNK)
    elif reply.framing == "length" and n_left:
        raise BugError(f"a stream ended {n_left} bytes before the {reply.content_length} that were announced")


def _write_chunk(output: Output, piece: bytes) -> None:
    if len(piece) <= JOINED_BYTES_MAX:
        output.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    else:
        output.write(b"%x\r\n" % len(piece), bytes(piece), b"\r\n")


async def _close(stream: AsyncIterator[bytes], core: Core, request: Request) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        try:
            await close()
        except Exception as error:  # noqa: BLE001 - the stream is over either way
            core.report(request, error)


def _framing_lines(status: int, content_length: int | None, *, is_old: bool, is_last: bool) -> bytes:
    if status in _NO_LENGTH:
        lines = b""
    elif content_length is not None:
        lines = b"content-length: %d\r\n" % content_length
    else:
        lines = b"" if is_old else b"transfer-encoding: chunked\r\n"
    if is_last:
        return lines + b"connection: close\r\n"
    return lines + b"connection: keep-alive\r\n" if is_old else lines
