"""DnsServer: answers what its zone knows, and passes everything else on to other name servers.

For a small circle of clients: whoever is not one of them is not heard, so that it never is an open resolver. A question that is passed on
travels as it came, with another id from another port (RFC 5452), so that EDNS, DNSSEC and unknown types work; its answer comes back as it
came. No cache: the servers behind have one. By UDP and by TCP (RFC 7766).

Rules: everything is bounded. Beyond the bounds a question is answered with SERVFAIL, a connection closed; an answer from behind that is
late, forged or malformed is not passed on. Bytes that are no question are answered with FORMERR if they have a header, else dropped;
answers are never answered. A message in a zone's class or operation that we do not know is passed on or refused, never guessed at.
Sources: RFC 1035, RFC 2308 (NXDOMAIN and "no such records" are two things), RFC 5452, RFC 7766.
"""

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, cast

from isopod.net.dns.message import (
    UDP_BYTES,
    MalformedMessage,
    Query,
    Question,
    Record,
    ResponseCode,
    decode,
    decode_query,
    encode_answer,
    encode_refusal,
    is_question,
)
from isopod.world.network import Listener, TcpAddress, UdpAddress
from isopod.world.world import World

PLAIN_UDP_BYTES: Final = 512
"""What a client without EDNS takes by UDP."""
MESSAGE_BYTES_MAX: Final = 65535
_LENGTH: Final = struct.Struct("!H")
_QUERY, _IN = 0, 1
_TRY_ANOTHER: Final = (ResponseCode.SERVFAIL, ResponseCode.REFUSED, ResponseCode.NOTIMP)


class Known(NamedTuple):
    """What a zone knows of a name: its records of the type asked for, perhaps none, or that there is no such name."""

    records: tuple[Record, ...] = ()
    exists: bool = True


Zone = Callable[[Question], Known | None]
"""Answers at once; None: it is somebody else's name."""
Upstreams = Callable[[], Awaitable[Sequence[UdpAddress]]]
"""Tells whom to ask, in this order."""


class ServerLimits(NamedTuple):
    """Bounds and times, in seconds."""

    n_forwards_each_max: int = 64
    """Questions that are being passed on for one client; for all of them: see `Room`."""
    n_connections_max: int = 64
    n_connections_each_max: int = 8
    attempt_s: float = 2.0
    """For one server behind."""
    forward_s: float = 5.0
    """For all of them."""
    idle_s: float = 10.0
    """How long a TCP client may take to send a question, or to take an answer."""


class Room:
    """How many questions may be passed on at a time, each with a socket; several servers may share one.

    Args:
        n_max: So many.
    """

    def __init__(self, n_max: int = 256) -> None:
        self._n_free = n_max

    def take(self) -> bool:
        """Take a place if there is one."""
        has_room = self._n_free > 0
        self._n_free -= has_room
        return has_room

    def give(self) -> None:
        """Give a place back."""
        self._n_free += 1


class ServerStatistics(NamedTuple):
    """Counts since the beginning, and what goes on now."""

    n_answered: int
    """From the zone."""
    n_forwarded: int
    n_failed: int
    """Passed on, but not answered."""
    n_refused: int
    """Malformed, from strangers, or too many at a time."""
    n_forwarding: int
    n_connections: int


class DnsServer:
    """A name server. Who made it closes it.

    Args:
        world: The ports.
        zone: What it knows itself.
        upstreams: Who is asked about the rest.
        is_client: Whether a numeric address may ask.
        limits: Bounds.
        room: For questions that are passed on; None for one of its own.
    """

    def __init__(
        self,
        world: World,
        zone: Zone,
        upstreams: Upstreams,
        *,
        is_client: Callable[[str], bool],
        limits: ServerLimits | None = None,
        room: Room | None = None,
    ) -> None:
        self._world = world
        self._zone = zone
        self._upstreams = upstreams
        self._is_client = is_client
        self.limits: Final = limits or ServerLimits()
        self._room = room or Room()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: Listener | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._n_tasks = 0
        self._forwarding: dict[str, int] = {}
        self._connections: dict[int, _Connection] = {}
        self._counts = dict.fromkeys(("answered", "forwarded", "failed", "refused"), 0)

    async def listen(self, address: UdpAddress) -> UdpAddress:
        """Serve an address, by UDP and TCP; return it with its real port.

        Raises:
            OSError: It is in use, or none of this machine's; nothing is open then.
        """
        self._tcp = await self._world.network.listen(TcpAddress(*address), lambda: _Connection(self))
        try:
            bound = UdpAddress(address.host, cast(TcpAddress, self._tcp.address).port)
            self._udp, _ = await self._world.network.open_udp(bound, lambda: _Datagrams(self))
        except BaseException:
            await self._tcp.close()
            self._tcp = None
            raise
        return bound

    async def close(self) -> None:
        """Stop; questions under way are dropped. May be called again."""
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            await self._tcp.close()
        for connection in list(self._connections.values()):
            connection.abort()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # uvloop closes a socket in its next turn: who listens here anew is not to find it

    def statistics(self) -> ServerStatistics:
        """Return the counts."""
        counts = self._counts
        n_forwarding = sum(self._forwarding.values())
        return ServerStatistics(
            counts["answered"], counts["forwarded"], counts["failed"], counts["refused"], n_forwarding, len(self._connections)
        )

    # --- UDP ----------------------------------------------------------------------------------------------------------

    def on_datagram(self, data: bytes, sender: tuple[str, int]) -> None:
        """Answer a datagram, now or when those behind have answered."""
        if not self._is_client(sender[0]) or not is_question(data):
            self._counts["refused"] += 1
            return
        query, answer = self._answer(data, is_udp=True)
        if answer is None and query is not None and self._has_room(sender[0]):
            self._start(self._forward_datagram(data, query, sender))
        else:
            self._send(answer or encode_refusal(data, ResponseCode.SERVFAIL), sender)

    async def _forward_datagram(self, data: bytes, query: Query, sender: tuple[str, int]) -> None:
        self._send(await self._forward(data, query, sender[0], is_udp=True), sender)

    def _send(self, answer: bytes, to: tuple[str, int]) -> None:
        if self._udp is not None and not self._udp.is_closing():
            self._udp.sendto(answer, to)

    # --- TCP ----------------------------------------------------------------------------------------------------------

    def admit(self, connection: "_Connection") -> bool:
        """Begin to serve a connection, if it may come in."""
        host = connection.host
        n_others = sum(other.host == host for other in self._connections.values())
        if not self._is_client(host) or len(self._connections) >= self.limits.n_connections_max:
            n_others = self.limits.n_connections_each_max
        if n_others >= self.limits.n_connections_each_max:
            self._counts["refused"] += 1
            return False
        key = self._start(self._serve(connection))
        self._connections[key] = connection
        self._tasks[key].add_done_callback(lambda _: self._connections.pop(key, None))
        return True

    async def _serve(self, connection: "_Connection") -> None:
        """Answer one question of a connection after the other."""
        try:
            while True:
                async with asyncio.timeout(self.limits.idle_s):
                    data = await connection.receive()
                if data is None or not is_question(data):
                    return
                query, answer = self._answer(data, is_udp=False)
                if answer is None and query is not None and self._has_room(connection.host):
                    answer = await self._forward(data, query, connection.host, is_udp=False)
                async with asyncio.timeout(self.limits.idle_s):
                    await connection.send(answer or encode_refusal(data, ResponseCode.SERVFAIL))
        except (TimeoutError, ConnectionError):
            return
        finally:
            connection.abort()

    # --- both ---------------------------------------------------------------------------------------------------------

    def _answer(self, data: bytes, *, is_udp: bool) -> tuple[Query | None, bytes | None]:
        """Return the question, if it is one, and what we answer ourselves; None: pass it on."""
        try:
            query = decode_query(data)
        except MalformedMessage:
            self._counts["refused"] += 1
            return None, encode_refusal(data, ResponseCode.FORMERR)
        if query.opcode != _QUERY:
            self._counts["refused"] += 1
            return query, encode_refusal(data, ResponseCode.NOTIMP)
        known = self._zone(query.question) if query.cls == _IN else None
        if known is None:
            return query, None
        self._counts["answered"] += 1
        bytes_max = MESSAGE_BYTES_MAX if not is_udp else UDP_BYTES if query.has_edns else PLAIN_UDP_BYTES
        code = ResponseCode.NOERROR if known.exists else ResponseCode.NXDOMAIN
        return query, encode_answer(query, known.records, code=code, authoritative=True, bytes_max=bytes_max)

    def _has_room(self, client: str) -> bool:
        has_room = self._forwarding.get(client, 0) < self.limits.n_forwards_each_max and self._room.take()
        if has_room:
            self._forwarding[client] = self._forwarding.get(client, 0) + 1
        else:
            self._counts["refused"] += 1
        return has_room

    async def _forward(self, data: bytes, query: Query, client: str, *, is_udp: bool) -> bytes:
        """Ask those behind; the room was taken by `_has_room`."""
        answer: bytes | None = None
        try:
            async with asyncio.timeout(self.limits.forward_s):
                for server in await self._upstreams():
                    found = await self._ask(server, data, query, is_udp=is_udp)
                    answer = found or answer
                    if found is not None and found[3] & 0xF not in _TRY_ANOTHER:
                        break
        except TimeoutError:
            pass
        finally:
            self._room.give()
            self._forwarding[client] -= 1
            if not self._forwarding[client]:
                del self._forwarding[client]
        self._counts["failed" if answer is None else "forwarded"] += 1
        return encode_refusal(data, ResponseCode.SERVFAIL) if answer is None else data[:2] + answer[2:]

    async def _ask(self, server: UdpAddress, data: bytes, query: Query, *, is_udp: bool) -> bytes | None:
        """Return one server's answer, None if it gave none."""
        number = bytes.fromhex(self._world.random.token_hex(2))
        waiting = _Waiting(number, query.question)
        question = number + data[2:]
        transport: asyncio.BaseTransport
        try:
            async with asyncio.timeout(self.limits.attempt_s):
                if is_udp:
                    datagrams, _ = await self._world.network.open_udp(None, lambda: waiting, remote=server)
                    transport = datagrams
                    datagrams.sendto(question)
                else:
                    stream, _ = await self._world.network.connect(TcpAddress(*server), lambda: _Frames(waiting.take, waiting.fail))
                    transport = stream
                    stream.write(_LENGTH.pack(len(question)) + question)
                try:
                    return await waiting.answer
                finally:
                    transport.close()
        except (TimeoutError, OSError):
            return None

    def _start(self, work: Any) -> int:  # a coroutine of ours
        self._n_tasks += 1
        key = self._n_tasks
        task = self._tasks[key] = asyncio.get_running_loop().create_task(work, name="answer a DNS question")
        task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return key


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._server.on_datagram(data, (str(addr[0]), int(addr[1])))


class _Frames(asyncio.Protocol):
    """Takes length-prefixed messages off a stream.

    Args:
        take: Given each message.
        fail: Called when there will be no more.
    """

    def __init__(self, take: Callable[[bytes], None], fail: Callable[[Exception | None], None]) -> None:
        self._take = take
        self._fail = fail
        self._received = bytearray()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + cast(int, _LENGTH.unpack_from(self._received)[0])
            if len(self._received) < end:
                return
            message = bytes(self._received[_LENGTH.size : end])
            del self._received[:end]
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc)


class _Connection(_Frames):
    """A TCP client's. While a question of it is being answered, no more is read: what it sends ahead waits with it."""

    def __init__(self, server: DnsServer) -> None:
        super().__init__(self._on_message, self._on_end)
        self.host = ""
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._messages: list[bytes] = []
        self._is_over = False
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.host = str(peer[0]) if peer else ""
        if not self._server.admit(self):
            self._transport.abort()

    def _on_message(self, message: bytes) -> None:
        self._messages.append(message)
        if self._transport is not None:
            self._transport.pause_reading()
        self._changed.set()

    def _on_end(self, _: Exception | None) -> None:
        self._is_over = True
        self._changed.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def receive(self) -> bytes | None:
        """Return the next message, None at the end."""
        while not self._messages:
            if self._is_over:
                return None
            assert self._transport is not None
            self._transport.resume_reading()
            self._changed.clear()
            await self._changed.wait()
        return self._messages.pop(0)

    async def send(self, message: bytes) -> None:
        """Write a message, and wait until the client takes it."""
        if self._transport is None or self._is_over:
            raise ConnectionResetError(errno.ECONNRESET, "the client has gone")
        self._transport.write(_LENGTH.pack(len(message)) + message)
        await self._writable.wait()

    def abort(self) -> None:
        """Close: at once what the client does not take, else when it has taken it."""
        if self._transport is not None and not self._transport.is_closing():
            if self._writable.is_set():
                self._transport.close()
            else:
                self._transport.abort()


class _Waiting(asyncio.DatagramProtocol):
    """Waits for the answer to one question that was passed on; everything else is ignored."""

    def __init__(self, number: bytes, question: Question) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._number = number
        self._question = question

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Take the answer, if it is one."""
        self.take(data)

    def error_received(self, exc: Exception) -> None:
        """Nobody listens there."""
        self.fail(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket was closed."""
        self.fail(exc)

    def take(self, data: bytes) -> None:
        """Take the answer, if it is one: the id first, as a forger's guesses are to cost us nothing."""
        if self.answer.done() or data[:2] != self._number or is_question(data):
            return
        try:
            message = decode(data)
        except MalformedMessage:
            return
        refused = not message.questions and message.code != ResponseCode.NOERROR  # some servers refuse without repeating the question
        if refused or message.questions == (self._question,):
            self.answer.set_result(data)

    def fail(self, exc: Exception | None) -> None:
        """Give up."""
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError(errno.ECONNRESET, "the connection ended before the answer"))
            self.answer.exception()  # seen: whoever waited may have left already
