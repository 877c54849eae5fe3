"""FakeShims: sandboxes' folders and sockets in either World, and all the ways in which a shim can behave.

    async with FakeShims(world, f"{folder}/sbs") as shims:
        shim = await shims.add("a" * 64, behaviour=Behaviour(framing="chunked"))

A shim answers as a raw protocol, without any HTTP library, so that it can also break the rules. What it was asked, when, and how many were
asked at once stands in it and in its `FakeShims`.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self, cast

from isopod.pulse.model import SOCKET_NAME
from isopod.world.network import Listener, UnixAddress
from isopod.world.world import World

DATA: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
SMALL: Final = b"# TYPE kata_shim_threads gauge\nkata_shim_threads 7\n"
AGENT_URL: Final = b"vsock://1000:1024"

Framing = Literal[
    "length",  # Content-Length, HTTP/1.1
    "chunked",
    "http10",  # HTTP/1.0 with a length, then closed
    "http10_close",  # HTTP/1.0 without a length, then closed
    "close",  # HTTP/1.1 without a length, then closed
    "continue",  # 100 Continue before the answer
    "short",  # closed before the announced length came
    "cut_chunks",  # closed between two chunks
    "cut_head",  # closed in the middle of the head
    "no_answer",  # closed without a byte
    "garbage",  # no HTTP at all
    "two_lengths",  # Content-Length twice, and different
    "bad_chunk",  # a chunk's size that is no number
    "endless_head",
    "endless_fields",
    "endless_body",  # chunked, for ever
    "endless_close",  # without a length, for ever
    "endless_chunk_head",
    "endless_continue",
    "trickle",  # a byte of the body each tenth of a second
    "extra",  # more bytes behind the answer than were announced
]


class Behaviour(NamedTuple):
    """How a shim answers.

    Args:
        framing: The form of the answer.
        status: Its status.
        delay_s: Before it.
        hangs: Take the request and never answer.
        keeps: Whether the connection is kept; without it, `Connection: close`.
        closes_idle: Close a kept connection right behind the answer, without having said so.
    """

    framing: Framing = "length"
    status: int = 200
    delay_s: float = 0.0
    hangs: bool = False
    keeps: bool = True
    closes_idle: bool = False


GOOD: Final = Behaviour()
HUNG: Final = Behaviour(hangs=True)
SLOW: Final = Behaviour(delay_s=10.0)


class FakeShim:
    """One shim. `behaviour` and `body` may be changed at any time.

    Args:
        shims: Who counts.
        identifier: The sandbox.
        folder: Its folder.
        body: What /metrics says: bytes, or made of the number of the request (from 1).
        behaviour: How it answers.
    """

    def __init__(
        self, shims: "FakeShims", identifier: str, folder: str, body: "bytes | Callable[[int], bytes]", behaviour: Behaviour
    ) -> None:
        self.shims = shims
        self.id = identifier
        self.folder = folder
        self.socket = f"{folder}/{SOCKET_NAME}"
        self.body = body
        self.behaviour = behaviour
        self.listener: Listener | None = None
        self.asked_s: list[float] = []
        """The loop's times at which /metrics was asked for."""
        self.n_connections = 0
        self.n_in_flight = 0
        self.open: dict[int, _Conversation] = {}
        """Connections that stand."""

    def answer(self, path: str) -> tuple[int, bytes]:
        """Return status and body for a path, as Kata's shim in Go does."""
        if self.behaviour.status != 200:
            return self.behaviour.status, b"rpc error: code = DeadlineExceeded desc = agent gone"
        if path == "/metrics":
            return 200, self.body if isinstance(self.body, bytes) else self.body(len(self.asked_s))
        if path == "/agent-url":
            return 200, AGENT_URL
        if path == "/debug/vars":
            return 200, b'{"cmdline":["shim"],"memstats":{}}'
        if path.startswith("/debug/pprof/"):
            return 200, b"<html><a href='goroutine?debug=1'>goroutine</a></html>"
        return 404, b"404 page not found\n"


class FakeShims:
    """Sandboxes under one root; use as `async with`.

    Args:
        world: Where.
        root: The folder in which each sandbox has one; made if it is missing.
    """

    def __init__(self, world: World, root: str) -> None:
        self.world = world
        self.root = root
        self.loop: Final = asyncio.get_running_loop()
        self.shims: dict[str, FakeShim] = {}
        self.requests: list[tuple[float, str, str]] = []
        """When, which sandbox, which path."""
        self.n_in_flight = 0
        self.n_in_flight_peak = 0
        self.hits: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        await self.world.disk.make_directory(self.root, mode=0o755)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for identifier in list(self.shims):
            await self.remove(identifier)

    async def add(
        self, identifier: str, *, body: bytes | Callable[[int], bytes] = SMALL, behaviour: Behaviour = GOOD, late: bool = False
    ) -> FakeShim:
        """Make a sandbox.

        Args:
            identifier: Its folder's name.
            body: What it says.
            behaviour: How.
            late: Make its folder only; `listen` follows.
        """
        shim = FakeShim(self, identifier, f"{self.root}/{identifier}", body, behaviour)
        self.shims[identifier] = shim
        await self.world.disk.make_directory(shim.folder, mode=0o755)
        if not late:
            await self.listen(shim)
        return shim

    async def listen(self, shim: FakeShim) -> None:
        """Open a sandbox's socket."""
        shim.listener = await self.world.network.listen(UnixAddress(shim.socket), lambda: _Conversation(shim))

    async def stop(self, identifier: str) -> None:
        """End a shim: its socket and connections close, its folder stays."""
        shim = self.shims[identifier]
        if shim.listener is not None:
            await shim.listener.close()
            shim.listener = None
        for conversation in list(shim.open.values()):
            conversation.cut()
        while shim.open:
            await asyncio.sleep(0)

    async def remove(self, identifier: str) -> None:
        """End a sandbox: its shim and its folder are gone."""
        await self.stop(identifier)
        shim = self.shims.pop(identifier)
        await self.world.disk.remove_tree(shim.folder)

    @property
    def n_open(self) -> int:
        """Connections of all shims."""
        return sum(len(shim.open) for shim in self.shims.values())


class _Conversation(asyncio.Protocol):
    """One connection to a shim."""

    def __init__(self, shim: FakeShim) -> None:
        self._shim = shim
        self._number = 0
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.Handle | None = None
        self._is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._shim.n_connections += 1
        self._number = self._shim.n_connections
        self._shim.open[self._number] = self

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_request()
        if self._timer is not None:
            self._timer.cancel()
        del self._shim.open[self._number]

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        self._received = rest
        shims, shim = self._shim.shims, self._shim
        path, _, _ = head.split(b" ")[1].decode().partition("?")
        now_s = shims.loop.time()
        shims.requests.append((now_s, shim.id, path))
        shims.hits[path] += 1
        if path == "/metrics":
            shim.asked_s.append(now_s)
        self._is_busy = True
        shim.n_in_flight += 1
        shims.n_in_flight += 1
        shims.n_in_flight_peak = max(shims.n_in_flight_peak, shims.n_in_flight)
        if shim.behaviour.hangs:
            return
        says_close = b"\r\nconnection: close" in head.lower()
        self._after(shim.behaviour.delay_s, lambda: self._answer(path, says_close=says_close))

    def cut(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, path: str, *, says_close: bool) -> None:
        transport = self._transport
        assert transport is not None
        behaviour = self._shim.behaviour
        status, body = self._shim.answer(path)
        framing = behaviour.framing
        if framing.startswith("endless") or framing == "trickle":
            self._endless(framing, body)
            return
        closes = not behaviour.keeps or says_close or framing not in ("length", "chunked", "continue", "extra")
        transport.write(_FORMS[framing](status, body, b"close" if closes else b"keep-alive"))
        self._end_request()
        if closes or behaviour.closes_idle:
            transport.close()

    def _endless(self, framing: str, body: bytes) -> None:
        transport = self._transport
        assert transport is not None
        begin, more, pause_s = {
            "endless_head": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 1000, 0.001),
            "endless_fields": (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n" * 50, 0.001),
            "endless_body": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n%b\r\n" % (b"x" * 4096), 0.001),
            "endless_close": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096, 0.001),
            "endless_chunk_head": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 1000, 0.001),
            "endless_continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0.001),
            "trickle": (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) + 1000), b"#", 0.1),
        }[framing]
        transport.write(begin)

        def go_on() -> None:
            if not transport.is_closing():
                transport.write(more)
                self._after(pause_s, go_on)

        go_on()

    def _after(self, delay_s: float, call: Callable[[], None]) -> None:
        if delay_s == 0:
            call()
        else:
            self._timer = self._shim.shims.loop.call_later(delay_s, call)

    def _end_request(self) -> None:
        if self._is_busy:
            self._is_busy = False
            self._shim.n_in_flight -= 1
            self._shim.shims.n_in_flight -= 1


def _head(status: int, version: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join((b"HTTP/%b %d Something" % (version, status), b"Content-Type: text/plain; version=0.0.4", *fields, b"", b""))


def _length(body: bytes) -> bytes:
    return b"Content-Length: %d" % len(body)


def _chunks(body: bytes) -> bytes:
    pieces = [body[start : start + 2048] for start in range(0, len(body), 2048)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


_FORMS: Final[dict[str, Callable[[int, bytes, bytes], bytes]]] = {
    "length": lambda status, body, how: _head(status, b"1.1", _length(body), b"Connection: " + how) + body,
    "chunked": lambda status, body, how: (
        _head(status, b"1.1", b"Transfer-Encoding: chunked", b"Connection: " + how) + _chunks(body) + b"0\r\n\r\n"
    ),
    "http10": lambda status, body, how: _head(status, b"1.0", _length(body)) + body,
    "http10_close": lambda status, body, how: _head(status, b"1.0") + body,
    "close": lambda status, body, how: _head(status, b"1.1", b"Connection: close") + body,
    "continue": lambda status, body, how: (
        b"HTTP/1.1 100 Continue\r\n\r\n" + _head(status, b"1.1", _length(body), b"Connection: " + how) + body
    ),
    "short": lambda status, body, how: _head(status, b"1.1", _length(body)) + body[:-5],
    "cut_chunks": lambda status, body, how: _head(status, b"1.1", b"Transfer-Encoding: chunked") + _chunks(body),
    "cut_head": lambda status, body, how: _head(status, b"1.1", _length(body))[:-9],
    "no_answer": lambda status, body, how: b"",
    "garbage": lambda status, body, how: b"\x16\x03\x01 this is no HTTP\r\n\r\n" + body,
    "two_lengths": lambda status, body, how: _head(status, b"1.1", _length(body), b"Content-Length: 1") + body,
    "bad_chunk": lambda status, body, how: _head(status, b"1.1", b"Transfer-Encoding: chunked") + b"xyz\r\n" + body,
    "extra": lambda status, body, how: _head(status, b"1.1", _length(body), b"Connection: " + how) + body + b"HTTP/1.1 200 OK\r\n\r\nmore",
}
