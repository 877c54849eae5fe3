"""ShimClient: asks a sandbox's shim over its Unix socket, and believes nothing it says.

A request has one deadline, from looking for the socket to the last byte of the body, and a bound on the body. What fails is a `ShimError`
with a word for its class, which is what metrics and pages show:

    gone        there is no socket
    refused     nobody listens on it (or it is no socket), or we may not connect
    busy        too many wait for the shim, or we have no descriptor left
    timeout     the answer was not complete in time
    status      the answer is another one than 200 (said by the collector: `get` returns any status)
    closed      the connection ended before the answer did
    protocol    that is no HTTP, or the answer's framing is broken
    too_large   the body is over its bound

A shim keeps one connection between requests, while there are few of them: of more than `KEPT_MAX` sandboxes those found later are asked on
a new one each time, so that an agent over thousands of sandboxes needs no thousands of descriptors. Nothing compressed is asked for.

Not here: when shims are asked (`collector`), HTTP (`isopod.net.http.client`), what bodies mean (`core`).
"""

import errno
from typing import Final, NamedTuple

from isopod.net.http.client import HttpClient
from isopod.net.http.client_messages import ClientLimits, ClientResponse
from isopod.pulse.settings import PulseSettings
from isopod.world.errors import DeadlineExceeded, Disconnected, Exhausted, IsopodError, PeerError, ProtocolViolation
from isopod.world.network import UnixAddress
from isopod.world.world import World

KEPT_MAX: Final = 512
"""Connections kept between requests: half of the descriptors a process has by default."""
HEAD_BYTES_MAX: Final = 16 << 10
HEADERS_MAX: Final = 64
CONNECTIONS_PER_SHIM_MAX: Final = 4
WORDS: Final = ("gone", "refused", "busy", "timeout", "status", "closed", "protocol", "too_large")
"""The classes of failure."""
_ORIGIN: Final = "http://shim"
_CLOSE: Final = (("connection", "close"),)
_GONE: Final = (errno.ENOENT, errno.ENOTDIR)
_BUSY: Final = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_IDLE_S: Final = 30.0
_IDLE_S_MAX: Final = 660.0
_FIRST_BYTE_S: Final = 1e6
"""The head has no time of its own: the request's is for all."""


class ShimAnswer(NamedTuple):
    """What a shim answered, whatever its status. Names of headers are as they were sent."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class ShimError(PeerError):
    """A shim gave no answer that is worth the name.

    Args:
        word: The class, one of `WORDS`.
        message: One line: which shim, and what is the matter.
    """

    code = "shim"
    temporary = True
    retryable = True

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message, _HINTS.get(word, ""))
        self.word = word


class ShimClient:
    """Asks shims. Close it after use.

    Args:
        world: Whose network.
        settings: How often and for how long shims are asked.
    """

    def __init__(self, world: World, settings: PulseSettings) -> None:
        limits = ClientLimits(
            connections_max=KEPT_MAX + 2 * settings.in_flight_max,
            connections_per_host_max=CONNECTIONS_PER_SHIM_MAX,
            idle_s=min(_IDLE_S_MAX, max(_IDLE_S, 2.2 * settings.interval_s)),
            connect_s=settings.request_s,
            first_byte_s=_FIRST_BYTE_S,
            total_s=settings.request_s,
            header_bytes_max=HEAD_BYTES_MAX,
            headers_max=HEADERS_MAX,
            body_bytes_max=settings.body_bytes_max,
            drain_bytes_max=0,
            redirects_max=0,
        )
        self._client = HttpClient(world, limits=limits, headers=(("user-agent", "isopod-pulse"),), decompresses=False)
        self._timeout_s = settings.request_s
        self._n_bytes_max = settings.body_bytes_max
        self._kept: dict[str, None] = {}

    async def get(self, socket: str, path: str, *, timeout_s: float | None = None, n_bytes_max: int | None = None) -> ShimAnswer:
        """Ask a shim.

        Args:
            socket: The path of its socket.
            path: What to ask for: "/metrics", with a query or without.
            timeout_s: For everything; None for the settings' `request_s`.
            n_bytes_max: Of the body; None for the settings' `body_bytes_max`.

        Raises:
            ShimError: There was no whole answer in time.
            InvalidArgument: No such path can be asked for.
            WrongState: The client is closed.
        """
        address = UnixAddress(socket)
        keeps = socket in self._kept or len(self._kept) < KEPT_MAX
        if keeps:
            self._kept[socket] = None
        try:
            answer = await self._client.request(
                "GET",
                _ORIGIN + path,
                headers=() if keeps else _CLOSE,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
                address=address,
                follows_redirects=False,
            )
            body = await _read(answer, socket, self._n_bytes_max if n_bytes_max is None else n_bytes_max)
        except (PeerError, Exhausted) as error:
            raise error if isinstance(error, ShimError) else ShimError(_word(error), str(error)) from error
        finally:
            if socket not in self._kept:  # or it was forgotten meanwhile
                self._client.drop_idle(_ORIGIN, address)
        return ShimAnswer(answer.status, answer.headers.pairs, body)

    def forget(self, socket: str) -> None:
        """A sandbox is gone: let go of what is kept for its socket."""
        self._kept.pop(socket, None)
        self._client.drop_idle(_ORIGIN, UnixAddress(socket))

    @property
    def n_connections(self) -> int:
        """Open connections, idle ones included."""
        return self._client.statistics().n_open

    async def close(self) -> None:
        """Cut all connections; requests under way fail. Returns when all is gone."""
        self._kept.clear()
        await self._client.close()


async def _read(answer: ClientResponse, socket: str, n_bytes_max: int) -> bytes:
    length = answer.headers.get("content-length") or ""
    if length.isdecimal() and int(length[:20]) > n_bytes_max:
        answer.close()
        raise ShimError("too_large", f"{socket}: its answer says it has {length[:20]} bytes, more than {n_bytes_max}")
    try:
        return await answer.read(n_bytes_max)
    except Exhausted:
        raise ShimError("too_large", f"{socket}: its answer has more than {n_bytes_max} bytes") from None


def _word(error: IsopodError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    if isinstance(error, ProtocolViolation):
        return "protocol"
    if isinstance(error, Exhausted):
        return "busy"
    cause = error.__cause__
    if isinstance(error, Disconnected) and isinstance(cause, OSError):
        return "gone" if cause.errno in _GONE else "busy" if cause.errno in _BUSY else "refused"
    return "closed"


_HINTS: Final = {
    "gone": "the sandbox's shim has ended or is still starting",
    "refused": "the shim has ended, or the agent may not use its socket: it needs to write to it",
    "busy": "the shim takes no more connections now, or the agent's limit of open files is too low",
    "timeout": "the shim or its guest hangs; --request-timeout gives it more time",
    "too_large": "the agent's body limit is lower than what the shim says",
}
