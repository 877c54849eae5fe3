"""DnsClient: asks name servers itself, by UDP and, when an answer is cut, by TCP.

For what the machine's resolver does not tell: SRV, MX, TXT, times to live. Against forged answers each attempt has a fresh random id and
a fresh port, hears its server only, and takes no answer to another question (RFC 5452). Whatever else arrives is ignored until the
attempt's time is up. Servers are asked in turn; a server that fails, refuses or does not answer costs one attempt. No DNSSEC, no cache
(that is `Resolver`).
"""

import asyncio
import errno
import ipaddress
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

from isopod.net.dns.message import (
    UDP_BYTES,
    Authority,
    MalformedMessage,
    Message,
    Question,
    Record,
    RecordType,
    ResponseCode,
    decode,
    encode_query,
    normal_name,
)
from isopod.net.dns.resolver import Lookup
from isopod.world.errors import DeadlineExceeded, Disconnected, InvalidArgument, NotFound, UnavailableError
from isopod.world.network import TcpAddress, UdpAddress
from isopod.world.world import World

ATTEMPT_S: Final = 2.0
N_ATTEMPTS: Final = 3
N_ALIASES_MAX: Final = 8
"""CNAMEs followed."""
NEGATIVE_S_MAX: Final = 3600
_LENGTH: Final = struct.Struct("!H")


class Answer(NamedTuple):
    """The records of the type asked for, behind all aliases, and how long they may be kept."""

    name: str
    records: tuple[Record, ...]
    ttl_s: int


class _Negative(Exception):
    """There is no such name, or it has no such records."""

    def __init__(self, ttl_s: int) -> None:
        super().__init__()
        self.ttl_s = ttl_s


class DnsClient:
    """Asks name servers.

    Args:
        world: The ports.
        servers: Numeric addresses, asked in this order.
        attempt_s: How long one attempt may take.
        n_attempts: How many attempts there are, over all servers.
    """

    def __init__(self, world: World, servers: Sequence[UdpAddress], *, attempt_s: float = ATTEMPT_S, n_attempts: int = N_ATTEMPTS) -> None:
        if not servers:
            raise InvalidArgument("name servers", "", "at least one is needed")
        self._world = world
        self._servers = tuple(servers)
        self._attempt_s = attempt_s
        self._n_attempts = n_attempts

    async def query(self, name: str, kind: RecordType) -> Answer:
        """Return the records of a name.

        Args:
            name: The name.
            kind: Of records.

        Raises:
            InvalidArgument: It cannot be a name.
            NotFound: There is no such name, or it has no such records.
            DeadlineExceeded: No server answered.
            UnavailableError: The servers failed or refused.
        """
        try:
            return await self._follow(name, kind)
        except _Negative as error:
            raise NotFound(f"{kind.name} record", name) from error

    async def lookup(self, host: str) -> Lookup:
        """Return a name's addresses, IPv4 and IPv6: a source for `Resolver`. Raises as `query`, but for `NotFound`: no addresses."""
        found = await asyncio.gather(self._addresses(host, RecordType.A), self._addresses(host, RecordType.AAAA), return_exceptions=True)
        good = [each for each in found if isinstance(each, Lookup)]
        if not good:
            raise next(each for each in found if isinstance(each, BaseException))
        addresses = tuple(address for each in good for address in each.addresses)
        useful = [each for each in good if each.addresses] or good
        return Lookup(addresses, min(each.ttl_s or 0 for each in useful))

    async def _addresses(self, host: str, kind: RecordType) -> Lookup:
        try:
            answer = await self._follow(host, kind)
        except _Negative as error:
            return Lookup((), error.ttl_s)
        return Lookup(tuple(str(record.data) for record in answer.records), answer.ttl_s)

    async def _follow(self, name: str, kind: RecordType) -> Answer:
        """Ask, and ask again where an alias points outside of the answer."""
        try:
            current = normal_name(name)
        except MalformedMessage as error:
            raise InvalidArgument("name", name, str(error)) from error
        ttl_s = 1 << 31
        n_aliases = 0
        while True:
            message = await self._ask(Question(current, kind))
            for _ in range(len(message.answers) + 1):
                records = tuple(each for each in message.answers if each.kind == kind and each.name == current)
                if records:
                    return Answer(current, records, min(ttl_s, *(each.ttl_s for each in records)))
                alias = next((each for each in message.answers if each.kind == RecordType.CNAME and each.name == current), None)
                if alias is None:
                    break
                n_aliases += 1
                current, ttl_s = str(alias.data), min(ttl_s, alias.ttl_s)
                if n_aliases > N_ALIASES_MAX:
                    raise UnavailableError(f"name {name}: more than {N_ALIASES_MAX} aliases in a row")
            if message.code == ResponseCode.NXDOMAIN or not _has_alias_to(message, current):
                raise _Negative(min(ttl_s, _negative_ttl_s(message)))

    async def _ask(self, question: Question) -> Message:
        failure: UnavailableError | DeadlineExceeded | None = None
        for attempt in range(self._n_attempts):
            server = self._servers[attempt % len(self._servers)]
            try:
                async with asyncio.timeout(self._attempt_s):
                    message = await self._exchange(server, question)
            except TimeoutError:
                failure = DeadlineExceeded(f"name server {server.host} about {question.name}", self._attempt_s)
            except (OSError, Disconnected, MalformedMessage) as error:
                failure = UnavailableError(f"name server {server.host} about {question.name}: {error}")
            else:
                if message.code in (ResponseCode.NOERROR, ResponseCode.NXDOMAIN):
                    return message
                failure = UnavailableError(f"name server {server.host} about {question.name}: {_code_name(message.code)}")
        assert failure is not None
        raise failure

    async def _exchange(self, server: UdpAddress, question: Question) -> Message:
        number = int(self._world.random.token_hex(2), 16)
        waiting = _Waiting(number, question)
        transport, _ = await self._world.network.open_udp(None, lambda: waiting, remote=server)
        try:
            transport.sendto(encode_query(number, question, udp_bytes=UDP_BYTES))
            message = await waiting.answer
        finally:
            transport.close()
        return await self._exchange_tcp(server, number, question) if message.is_truncated else message

    async def _exchange_tcp(self, server: UdpAddress, number: int, question: Question) -> Message:
        waiting = _Waiting(number, question)
        transport, _ = await self._world.network.connect(TcpAddress(*server), lambda: _Framed(waiting))
        try:
            query = encode_query(number, question, udp_bytes=0)
            transport.write(_LENGTH.pack(len(query)) + query)
            return await waiting.answer
        finally:
            transport.close()


class _Waiting(asyncio.DatagramProtocol):
    """Waits for the answer to one question; everything else is ignored."""

    def __init__(self, number: int, question: Question) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._id = number.to_bytes(2, "big")
        self._question = question

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Take the answer, if it is one."""
        if self.answer.done() or data[:2] != self._id:  # the id first: a forger's guesses are to cost us nothing
            return
        try:
            message = decode(data)
        except MalformedMessage:
            return
        if message.is_response and self._is_ours(message):
            self.answer.set_result(message)

    def error_received(self, exc: Exception) -> None:
        """Nobody listens there."""
        if not self.answer.done():
            self.answer.set_exception(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket was closed."""
        if not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError(errno.ECONNRESET, "the connection ended before the answer"))
            self.answer.exception()  # seen: whoever waited may have left already

    def _is_ours(self, message: Message) -> bool:
        if not message.questions and message.code != ResponseCode.NOERROR:
            return True  # some servers refuse without repeating the question
        return message.questions == (self._question,)


class _Framed(asyncio.Protocol):
    """Takes length-prefixed messages off a TCP connection (RFC 1035 section 4.2.2); one is all there should be."""

    def __init__(self, waiting: _Waiting) -> None:
        self._waiting = waiting
        self._received = bytearray()

    def data_received(self, data: bytes) -> None:
        """Collect."""
        self._received += data
        while len(self._received) >= _LENGTH.size:
            length = cast(int, _LENGTH.unpack_from(self._received)[0])
            if len(self._received) < _LENGTH.size + length:
                return
            message = bytes(self._received[_LENGTH.size : _LENGTH.size + length])
            del self._received[: _LENGTH.size + length]
            self._waiting.datagram_received(message, ("", 0))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server hung up."""
        self._waiting.connection_lost(exc)


def server_from(text: str) -> UdpAddress:
    """Read a name server's address, "ADDRESS" or "ADDRESS:PORT" ("[::1]:53" for IPv6).

    Raises:
        InvalidArgument: It is none.
    """
    host, colon, port = text.rpartition(":") if text.count(":") == 1 or (text.startswith("[") and "]:" in text) else (text, "", "53")
    try:
        return UdpAddress(str(ipaddress.ip_address(host.strip("[]"))), int(port) if colon or port else 53)
    except ValueError as error:
        raise InvalidArgument("name server", text, "want a numeric address and perhaps a port") from error


def _has_alias_to(message: Message, name: str) -> bool:
    return any(record.kind == RecordType.CNAME and record.data == name for record in message.answers)


def _negative_ttl_s(message: Message) -> int:
    """Return how long "no" may be kept (RFC 2308 section 5)."""
    for record in message.authorities:
        if isinstance(record.data, Authority):
            return min(record.ttl_s, record.data.minimum_s, NEGATIVE_S_MAX)
    return 0


def _code_name(code: int) -> str:
    return ResponseCode(code).name if code in ResponseCode._value2member_map_ else f"response code {code}"
