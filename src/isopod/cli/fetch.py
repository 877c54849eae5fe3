"""Fetch: one GET of HTTP/1.1, driven by its owner's waiting, for the commands that ask a metrics agent.

Not a general client: one request to a connection, no redirects, no TLS (the agent's Unix listener serves who is on the machine). The answer
may have a length, be chunked, or end with the connection. Source: RFC 9112.
"""

from __future__ import annotations

from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

CONNECT_TIMEOUT_S: Final = 3.0
ANSWER_TIMEOUT_S: Final = 10.0
BODY_BYTES_MAX: Final = 64 << 20
HEAD_BYTES_MAX: Final = 64 << 10
PORT_MAX: Final = 65535


class Fetch:
    """A request under way. `close` it, whatever came of it.

    Args:
        address: "HOST:PORT" or "unix:PATH".
        path: What is asked for.
        authorization: Who asks, as HTTP's field says it ("Bearer TOKEN"), "" for nobody.

    Raises:
        InvalidArgument: The address is none.
        Disconnected: Nobody listens there.
    """

    def __init__(self, address: str, path: str, authorization: str = "") -> None:
        self._address: Final = address
        host = "localhost" if address.startswith("unix:") else address
        who = f"Authorization: {authorization}\r\n" if authorization else ""
        self._outbox = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n{who}Connection: close\r\n\r\n".encode()
        self._inbox = bytearray()
        try:
            self._connection: Final = console.Connection(parse_address(address), CONNECT_TIMEOUT_S)
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error
        self.until_s: Final = console.monotonic_s() + ANSWER_TIMEOUT_S
        """When it is too late for the answer, by the console's clock."""
        self.reads: Final = self._connection.fd

    @property
    def writes(self) -> list[int]:
        """The descriptor to be waited for until it can be written, if there is something to send."""
        return [self._connection.fd] if self._outbox else []

    def advance(self) -> bytes | None:
        """Send and take what can be; return the body once all of it is there.

        Raises:
            PeerError: The agent went away, took too long, or said something else.
        """
        if console.monotonic_s() > self.until_s:
            from isopod.world.errors import DeadlineExceeded

            raise DeadlineExceeded(f"the answer of the metrics agent at {self._address}", ANSWER_TIMEOUT_S)
        try:
            if self._outbox:
                self._outbox = self._outbox[self._connection.send(self._outbox) :]
            data = self._connection.receive(1 << 18)
        except ConnectionError as error:
            raise self._lost(error.strerror or str(error)) from error
        if data:
            self._inbox += data
            if len(self._inbox) > BODY_BYTES_MAX:
                raise self._violated(f"its answer is over {BODY_BYTES_MAX} bytes")
        return None if data is None else self._body(is_over=not data)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _body(self, *, is_over: bool) -> bytes | None:
        head, gap, body = bytes(self._inbox).partition(b"\r\n\r\n")
        if self._inbox and not self._inbox.startswith(b"HTTP/"[: len(self._inbox)]):
            raise self._violated("its answer is no HTTP", "does it serve TLS? then give it a Unix listener too, and ask that")
        if not gap:
            if is_over or len(self._inbox) > HEAD_BYTES_MAX:
                raise self._lost("it closed the connection before the answer") if is_over else self._violated("its answer has no body")
            return None
        fields = _fields(head)
        whole = self._whole(body, fields, is_over=is_over)
        if whole is None and is_over:
            raise self._lost("it closed the connection in the middle of the answer")
        if whole is not None:
            self._check(head, whole)
        return whole

    def _whole(self, body: bytes, fields: dict[str, str], *, is_over: bool) -> bytes | None:
        if fields.get("transfer-encoding", "").lower() == "chunked":
            try:
                return _dechunked(body)
            except ValueError:
                raise self._violated("its answer is chunked, but not well") from None
        length = fields.get("content-length", "")
        if not length:
            return body if is_over else None
        if not (length.isascii() and length.isdigit() and len(length) < 12):
            raise self._violated("its answer has a length that is none")
        return body[: int(length)] if len(body) >= int(length) else None

    def _check(self, head: bytes, body: bytes) -> None:
        status = head[:64].split(b" ")[1:2]
        if status == [b"200"]:
            return
        if status in ([b"401"], [b"403"]):
            from isopod.world.errors import RefusedError

            raise RefusedError(
                f"the metrics agent at {self._address} wants to know who asks, and did not take what it was told",
                "give a file with its token, --token-file FILE, or with USER:PASSWORD, --basic-file FILE",
            )
        if status == [b"429"]:
            from isopod.world.errors import UnavailableError

            raise UnavailableError(f"the metrics agent at {self._address} checks too many passwords", "try again in a moment")
        why = body[:200].decode("utf-8", "replace").partition("\n")[0]
        number = status[0].decode("latin-1") if status else "none"
        raise self._violated(f"status {number}: {why}", "is that the metrics agent? see --address")

    def _lost(self, why: str) -> Exception:
        from isopod.world.errors import Disconnected

        return Disconnected(f"cannot reach the metrics agent at {self._address}", why, "start one: isopod pulse; or say where: --address")

    def _violated(self, why: str, hint: str = "") -> Exception:
        from isopod.world.errors import ProtocolViolation

        error = ProtocolViolation(f"the metrics agent at {self._address}", why)
        error.hint = hint or error.hint
        return error


def parse_address(text: str) -> str | tuple[str, int]:
    """Return a Unix socket's path, or host and port; a listener's "any address" stands for this machine.

    Raises:
        InvalidArgument: It is neither "HOST:PORT" nor "unix:PATH".
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path and "\0" not in path:
            return console.absolute(path.removeprefix("//"))
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if colon and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) <= PORT_MAX and (is_bracketed or ":" not in host):
        host = host[1:-1] if is_bracketed else host
        return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port)  # noqa: S104  compared, not bound
    from isopod.world.errors import InvalidArgument

    raise InvalidArgument("address", text, "want HOST:PORT or unix:PATH")


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}


def _dechunked(body: bytes) -> bytes | None:
    """Return what chunks carry, None while the last is missing; ValueError if they are malformed."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            return None
        size = int(body[at:end].partition(b";")[0], 16)
        if size <= 0:
            if size < 0:
                raise ValueError
            return b"".join(parts)
        at = end + 2 + size + 2
        if len(body) < at:
            return None
        parts.append(body[end + 2 : at - 2])
