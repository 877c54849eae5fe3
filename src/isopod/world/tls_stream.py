"""TlsStream: TLS between a World's transport and the user's protocol; the same code on uvloop, asyncio and in the simulation.

It is the protocol of the transport below and the transport of the protocol above. OpenSSL works on memory only (`ssl.MemoryBIO`), so
nothing here blocks. Not the loops' own TLS, of which there would be three, and which close a connection at the first half-close, keep a
256 KiB buffer for each, and wait half a minute for a peer that does not say goodbye.

What the protocol above may rely on:

- `connection_made` comes once the handshake is done and verified; a failed one is never seen by it.
- Half-close works both ways (close_notify one way, RFC 8446 section 6.1). A peer that ends without close_notify may have been cut off by
  somebody in between: that is `connection_lost` with an error, not `eof_received`.
- `close` sends what was written, then close_notify, and waits a moment for the peer's end, so that the last bytes are not lost to a reset.
- The handshake has its time limit; data that is paused stays with the kernel, so memory stays bounded.

Failures are errors of the tree (`HandshakeFailed`, `ProtocolViolation`), or the OSErrors of the transport below.
"""

import asyncio
import errno
import os
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Literal, cast

from isopod.world.errors import DeadlineExceeded, HandshakeFailed, InvalidArgument, IsopodError, ProtocolViolation
from isopod.world.network import ProtocolFactory
from isopod.world.tls import ClientTls, ServerTls, ValidityCheck, explain

RECORD_BYTES_MAX: Final = 16 << 10
"""What one `read` can give: a record's plaintext (RFC 8446, section 5.1)."""
LINGER_S: Final = 2.0
"""How long the end of the peer is waited for after ours."""
_CUT: Final = "UNEXPECTED_EOF_WHILE_READING"
_EXTRA: Final = frozenset({"ssl_object", "sslcontext", "peercert", "cipher"})

Outcome = Callable[[BaseException | None], None]
"""Told once how the handshake ended: None, or why it failed."""


def securing(factory: ProtocolFactory, tls: ServerTls, check: ValidityCheck | None = None) -> ProtocolFactory:
    """Return a factory for the protocols of a listener's connections, each with the context that the holder has by then."""

    def make() -> TlsStream:
        return TlsStream(
            factory(), tls.context, server_side=True, handshake_s=tls.handshake_s, outcome=tls.note, admit=tls.admit, check=check
        )

    return make


def secure_client(
    protocol: asyncio.BaseProtocol, tls: ClientTls, host: str | None, *, check: ValidityCheck | None = None
) -> "tuple[TlsStream, asyncio.Future[None]]":
    """Return the stream of a connection to be made, and what to await once it is: the end of the handshake.

    Args:
        protocol: Who uses it.
        tls: Its settings.
        host: The host connected to, None for a Unix socket.
        check: The World's own look at the peer's certificate.

    Raises:
        InvalidArgument: There is no name to verify, or it cannot be one.
    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(failure: BaseException | None) -> None:
        tls.note(failure)
        if done.done():
            return
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)
            done.exception()  # no failure that nobody saw, if the caller was cancelled before it could await this

    name = (tls.server_name or host or "").removesuffix(".")  # certificates and SNI (RFC 6066 section 3) do without a final dot
    context = tls.context
    if not name and context.check_hostname:
        raise InvalidArgument("TLS server name", "", "a Unix socket has no host to verify", "give ClientTls a server_name")
    try:
        stream = TlsStream(
            protocol, context, server_side=False, handshake_s=tls.handshake_s, outcome=settle, server_hostname=name or None, check=check
        )
    except ValueError as error:
        raise InvalidArgument("TLS server name", name, str(error)) from error
    return stream, done


class TlsStream(asyncio.Transport, asyncio.Protocol):
    """One secured connection.

    Args:
        protocol: Who uses it.
        context: The settings of this connection.
        server_side: Whether it was accepted.
        server_hostname: On the client, the name the server must prove (also a numeric address).
        handshake_s: Bound on the handshake.
        outcome: Told how the handshake ended, just before the protocol is.
        admit: Asked before a handshake begins; if it says no, the connection is cut and `outcome` hears nothing.
        check: The World's own look at the peer's certificate.
    """

    def __init__(
        self,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        handshake_s: float,
        outcome: Outcome,
        admit: Callable[[], bool] | None = None,
        server_hostname: str | None = None,
        check: ValidityCheck | None = None,
    ) -> None:
        super().__init__()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._secured = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        self._below: asyncio.Transport | None = None
        self._handshake_s = handshake_s
        self._outcome = outcome
        self._admit = admit
        self._check = check
        self._timer: asyncio.TimerHandle | None = None
        self._state: Literal["handshake", "open", "closed"] = "handshake"
        self._is_paused = False
        self._is_closing = False
        self._sent_end = False
        self._got_end = False
        self._got_below_end = False
        self._told_end = False
        self._failure: Exception | None = None
        self._n_held = 0
        self._held: list[bytes] = []
        self.set_protocol(protocol)

    @property
    def is_open(self) -> bool:
        """Whether the handshake is done and the connection stands."""
        return self._state == "open"

    # -- the transport below calls -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._below = cast(asyncio.Transport, transport)  # uvloop's only look like it
        if self._admit is not None and not self._admit():
            self._state, self._is_closing = "closed", True
            self._below.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._handshake_s, self._on_handshake_late)
        self._shake()

    def data_received(self, data: bytes) -> None:
        """Decrypt."""
        self._incoming.write(data)
        if self._state == "open":
            if not self._is_paused or self._is_closing:
                self._pump()
        elif self._state == "handshake":
            self._shake()

    def eof_received(self) -> bool:
        """The peer's TCP ended: rightly only after its close_notify."""
        self._got_below_end = True
        self._incoming.write_eof()
        if self._state == "handshake":
            self._fail_handshake(ConnectionResetError(errno.ECONNRESET, "the peer closed during the handshake"))
            return False
        if self._state == "open" and (not self._is_paused or self._is_closing):
            self._pump()
        return self._state == "open" and not self._is_closing

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: tell whoever was told of its beginning."""
        was, self._state = self._state, "closed"
        self._is_closing = True
        self._cancel_timer()
        if was == "handshake":
            self._outcome(exc or self._failure or ConnectionResetError(errno.ECONNRESET, "the peer closed during the handshake"))
        elif was == "open":
            self._protocol.connection_lost(self._failure or exc)

    def pause_writing(self) -> None:
        """Pass on that the buffer below is full."""
        if self._state == "open":
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that it has room again."""
        if self._state == "open":
            self._protocol.resume_writing()

    # -- the protocol above calls ------------------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return facts about TLS (ssl_object, sslcontext, peercert, cipher) or about the connection below."""
        if name in _EXTRA:
            return self._tls_fact(name)
        return default if self._below is None else self._below.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace who uses it."""
        self._protocol = cast(asyncio.Protocol, protocol)
        self._buffered = protocol if isinstance(protocol, asyncio.BufferedProtocol) else None

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return who uses it."""
        return self._buffered or self._protocol

    def is_closing(self) -> bool:
        """Return whether it is closed or about to be."""
        return self._is_closing

    def is_reading(self) -> bool:
        """Return whether data is delivered."""
        return not self._is_paused and not self._is_closing

    def pause_reading(self) -> None:
        """Deliver nothing until `resume_reading`."""
        self._is_paused = True
        if self._below is not None and not self._below.is_closing():
            self._below.pause_reading()

    def resume_reading(self) -> None:
        """Deliver again."""
        if not self._is_paused or self._is_closing:
            return
        self._is_paused = False
        if self._below is not None and not self._below.is_closing():
            self._below.resume_reading()
        asyncio.get_running_loop().call_soon(self._pump_if_open)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send, without waiting."""
        if self._sent_end and not self._is_closing:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._is_closing or not data:
            return
        try:
            n_sent = self._secured.write(data)
            while n_sent < len(data):
                data = memoryview(data)[n_sent:]
                n_sent = self._secured.write(data)
        except ssl.SSLError as error:
            self._break(error)
            return
        self._flush()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces as one."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Half close is supported."""
        return True

    def write_eof(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        if not self._is_closing:
            self._send_end()

    def close(self) -> None:
        """Close once everything written is sent; `connection_lost` follows when the peer has ended too, or a moment later."""
        if self._is_closing:
            return
        self._is_closing = True
        below = self._below
        if below is None or below.is_closing():
            return
        self._send_end()
        self._held.clear()
        if self._got_below_end or self._got_end or self._failure is not None:
            below.close()
            return
        below.resume_reading()
        self._linger()

    def abort(self) -> None:
        """Close at once, dropping what was not sent."""
        self._is_closing = True
        if self._below is not None:
            self._below.abort()

    def get_write_buffer_size(self) -> int:
        """Return the encrypted bytes that wait."""
        return 0 if self._below is None else self._below.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and high marks."""
        assert self._below is not None
        return self._below.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks that resume and pause the protocol."""
        assert self._below is not None
        self._below.set_write_buffer_limits(high=high, low=low)

    # -- the handshake -----------------------------------------------------------------------------------------------------------------

    def _shake(self) -> None:
        try:
            self._secured.do_handshake()
            if self._check is not None:
                self._check(self._secured)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # the alert that tells the peer why
            self._fail_handshake(HandshakeFailed(self._peer_name(), explain(error)))
        else:
            self._cancel_timer()
            self._flush()
            self._state = "open"
            self._outcome(None)
            self._protocol.connection_made(self)
            if not self._is_paused:
                self._pump()

    def _on_handshake_late(self) -> None:
        self._fail_handshake(DeadlineExceeded(f"the TLS handshake with {self._peer_name()}", self._handshake_s), abort=True)

    def _fail_handshake(self, failure: Exception, *, abort: bool = False) -> None:
        if self._state != "handshake" or self._below is None:
            return
        self._state = "closed"
        self._is_closing = True
        self._cancel_timer()
        if abort:
            self._below.abort()
        else:
            self._below.close()
        self._outcome(failure)

    # -- data --------------------------------------------------------------------------------------------------------------------------

    def _pump_if_open(self) -> None:
        if self._state != "open" or self._is_paused:
            return
        try:
            self._pump()
        except Exception as error:  # noqa: BLE001 - the root of this callback: what the protocol raised ends the connection, as below it
            message = "Fatal error: protocol.data_received() call failed."
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error, "protocol": self._protocol})
            self._give_up(error)

    def _pump(self) -> None:
        """Deliver what was decrypted, until there is no more, the protocol pauses, or the connection ends."""
        try:
            while not self._is_paused and not self._is_closing and self._held:
                self._deliver(self._held.pop(0))
            if self._got_end and not self._is_paused:
                self._on_end()
            while not self._is_paused or self._is_closing:
                if not (self._incoming.pending or self._secured.pending() or self._incoming.eof):
                    break  # as `SSLWantReadError` would tell, but that costs more than the reading
                data = self._secured.read(RECORD_BYTES_MAX)
                if not data:
                    self._on_end()
                    break
                if not self._is_closing:
                    self._deliver(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._on_end()
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError) or error.reason == _CUT:
                self._on_cut()
            else:
                self._break(error)
            return
        if self._outgoing.pending:
            self._flush()
        if self._got_below_end and self._got_end and self._is_closing and self._below is not None:
            self._below.close()

    def _deliver(self, data: bytes) -> None:
        if self._buffered is None:
            self._protocol.data_received(data)
            return
        rest = memoryview(data)
        while rest:
            room = memoryview(self._buffered.get_buffer(len(rest)))
            n_bytes = min(len(room), len(rest))
            room[:n_bytes] = rest[:n_bytes]
            self._buffered.buffer_updated(n_bytes)
            rest = rest[n_bytes:]

    def _on_end(self) -> None:
        """The peer's close_notify."""
        self._got_end = True
        if self._is_closing:
            if self._below is not None:
                self._below.close()
        elif not self._told_end:
            self._told_end = True
            if not self._protocol.eof_received():
                self.close()

    def _on_cut(self) -> None:
        """The peer's TCP ended without close_notify."""
        if self._is_closing:
            if self._below is not None:
                self._below.close()
            return
        self._give_up(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET) + " (the peer ended without a TLS goodbye)"))

    def _break(self, error: ssl.SSLError) -> None:
        """The peer broke TLS, or refuses us by an alert after its handshake (TLS 1.3 does so for client certificates)."""
        self._flush()
        why = explain(error)
        failure: IsopodError = HandshakeFailed(self._peer_name(), why) if "refused" in why else ProtocolViolation(self._peer_name(), why)
        self._give_up(failure)

    def _give_up(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._is_closing = True
        if self._below is not None:
            self._below.close()

    def _send_end(self) -> None:
        """Send close_notify, once, and end the TCP stream behind it if the peer has ended too or we are closing."""
        if self._state != "open" or self._below is None:
            return
        if not self._sent_end:
            self._sent_end = True
            self._hold_back()
            with suppress(ssl.SSLError):  # it wants the peer's, which comes later if at all
                self._secured.unwrap()
            self._flush()
        if self._is_closing and not self._below.is_closing() and self._below.can_write_eof():
            with suppress(OSError):  # the peer is gone: asyncio's transport lets shutdown(2) complain
                self._below.write_eof()

    def _hold_back(self) -> None:
        """Take what is decrypted already out of OpenSSL's hands: `unwrap` takes waiting data for a fault of the peer."""
        try:
            while data := self._secured.read(RECORD_BYTES_MAX):
                self._held.append(data)
        except ssl.SSLZeroReturnError:
            pass
        except ssl.SSLError:
            return
        self._got_end = True

    def _linger(self) -> None:
        """Wait for the peer's end; the time runs once all is sent."""
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._on_linger_late)

    def _on_linger_late(self) -> None:
        if self._below is None:
            return
        if self._below.get_write_buffer_size():
            self._linger()
        else:
            self._below.abort()

    def _flush(self) -> None:
        if self._outgoing.pending and self._below is not None and not self._below.is_closing():  # uvloop's raises once it is closed
            self._below.write(self._outgoing.read())

    # -- facts -------------------------------------------------------------------------------------------------------------------------

    def _tls_fact(self, name: str) -> Any:
        if name == "ssl_object":
            return self._secured
        if name == "sslcontext":
            return self._secured.context
        if self._state == "handshake":
            return None
        return self._secured.getpeercert() if name == "peercert" else self._secured.cipher()

    def _peer_name(self) -> str:
        name = None if self._below is None else self._below.get_extra_info("peername")
        if isinstance(name, tuple):
            return f"{name[0]}:{name[1]}"
        return str(name) if name else "the peer"

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
