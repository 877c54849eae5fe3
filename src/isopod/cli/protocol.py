"""The client's half of docs/protocol.md without any I/O: bytes in, events out; calls in, bytes to send out.

Not the daemon's implementation (that is `isopod.net.rpc`, on msgspec): this one is for a process that lives for milliseconds,
serves no calls, and packs with `isopod.wire.minipack`. A test holds the numbers of both together.

The caller's duties: send what `outbox` holds; feed every received byte; `consumed` what it took of a stream, or the server
stops; look at `room` before `send_item`.

Rules: whatever the server sends ends in events or in an error of the tree. At most one incomplete frame is held.
"""

from __future__ import annotations

from isopod.wire.minipack import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NoReturn

    Body = dict[str, object]
    Event = tuple[int, int, object, int]
    """Kind, call id, body (an error for ERROR, None for END), length of the frame on the wire."""

MAGIC: Final = b"ISO1"
VERSION: Final = 1
HELLO_BYTES_MAX: Final = 64 << 10
FRAME_BYTES_MAX: Final = 1 << 20
WINDOW_BYTES: Final = 1 << 20
CREDIT_STEP_BYTES: Final = 128 << 10

REQUEST: Final = 0
REPLY: Final = 1
ERROR: Final = 2
CANCEL: Final = 3
ITEM: Final = 4
END: Final = 5
CREDIT: Final = 6
GOAWAY: Final = 7
PING: Final = 8
PONG: Final = 9


class Protocol:
    """One connection's state.

    Args:
        peer: What to call the server in errors.
        version: Our own version, for the server's logs.
    """

    def __init__(self, peer: str, version: str) -> None:
        self.outbox = bytearray()
        """What is still to be sent; the caller deletes from its front what the socket took."""
        self.greeted = False
        """The server's hello has come."""
        self._peer: Final = peer
        self._inbox = bytearray()
        self._n_calls = 0
        self._room: Final[dict[int, int]] = {}
        self._owed: Final[dict[int, int]] = {}
        self._held: Final[dict[int, int]] = {}
        hello = encode({"versions": [VERSION, VERSION], "peer": f"isopod-cli/{version}", "group": ""})
        self.outbox += MAGIC + len(hello).to_bytes(4, "little") + hello

    def request(self, method: str, body: Body, deadline_ms: int | None) -> int:
        """Begin a call; return its id. It may go out before the server's hello came: only one version exists."""
        self._n_calls += 1
        call = self._n_calls
        self._room[call] = WINDOW_BYTES
        self._owed[call] = self._held[call] = 0
        self._frame([REQUEST, call, method, deadline_ms, body])
        return call

    def room(self, call: int) -> int:
        """Return how many bytes of item frames the server takes now (an item's frame is some 40 bytes more than its data)."""
        return self._room.get(call, 0)

    def send_item(self, call: int, body: Body) -> None:
        """Send one item of a call's stream."""
        self._room[call] -= self._frame([ITEM, call, body])

    def send_end(self, call: int) -> None:
        """Say that no more items come from this side."""
        self._frame([END, call])

    def cancel(self, call: int) -> None:
        """Withdraw a call; its ERROR comes as its end."""
        self._frame([CANCEL, call])

    def consumed(self, call: int, n_bytes: int) -> None:
        """Give the server back the room of an item that was taken (`n_bytes`: the length in its event)."""
        if call not in self._owed:
            return
        self._held[call] -= n_bytes
        self._owed[call] += n_bytes
        if self._owed[call] >= CREDIT_STEP_BYTES:
            self._frame([CREDIT, call, self._owed[call]])
            self._owed[call] = 0

    def feed(self, data: bytes) -> list[Event]:
        """Take received bytes.

        Returns:
            The events they complete, in order: REPLY, ERROR, ITEM, END of calls, GOAWAY.

        Raises:
            ProtocolViolation: The server broke the protocol.
            VersionMismatch: No version in common.
            IsopodError: The server ended the connection with an error.
        """
        inbox = self._inbox
        inbox += data
        offset = 0
        if not self.greeted:
            offset = self._take_hello()
        events: list[Event] = []
        while self.greeted and len(inbox) - offset >= 4:
            end = offset + 4 + int.from_bytes(inbox[offset : offset + 4], "little")
            if end - offset - 4 > FRAME_BYTES_MAX:
                self._broken(f"a frame of {end - offset - 4} bytes is over {FRAME_BYTES_MAX}")
            if end > len(inbox):
                break
            self._take_frame(bytes(inbox[offset + 4 : end]), events)
            offset = end
        del inbox[:offset]
        return events

    def _take_hello(self) -> int:
        """Read the hello if all of it is there; return where frames begin."""
        inbox = self._inbox
        if not MAGIC.startswith(bytes(inbox[:4])) and not inbox.startswith(MAGIC):
            self._broken("it does not speak isopod's protocol")
        if len(inbox) < 8:
            return 0
        end = 8 + int.from_bytes(inbox[4:8], "little")
        if end - 8 > HELLO_BYTES_MAX:
            self._broken(f"a hello of {end - 8} bytes is over {HELLO_BYTES_MAX}")
        if len(inbox) < end:
            return 0
        hello = self._unpack(bytes(inbox[8:end]))
        versions = hello.get("versions") if isinstance(hello, dict) else None
        if not isinstance(versions, list) or len(versions) != 2 or not all(isinstance(v, int) for v in versions):
            self._broken("its hello names no versions")
        if not versions[0] <= VERSION <= versions[1]:
            from isopod.world.errors import VersionMismatch

            raise VersionMismatch(self._peer, str(VERSION), f"{versions[0]}-{versions[1]}")
        self.greeted = True
        return end

    def _take_frame(self, payload: bytes, events: list[Event]) -> None:
        """Act on one frame, or make an event of it."""
        frame = self._unpack(payload)
        if not isinstance(frame, list) or len(frame) < 2 or not isinstance(frame[0], int) or not isinstance(frame[1], int):
            self._broken("a frame is not [kind, id, ...]")
        kind, call = frame[0], frame[1]
        n_bytes = len(payload) + 4
        if kind == PING:
            self._frame([PONG, call])
        elif kind == GOAWAY:
            events.append((GOAWAY, call, None, n_bytes))
        elif kind == ERROR:
            error = self._error(frame)
            if call == 0:
                raise error
            self._finish(call, (ERROR, call, error, n_bytes), events)
        elif kind == REPLY and len(frame) >= 3:
            self._finish(call, (REPLY, call, frame[2], n_bytes), events)
        elif call not in self._room:
            return  # late, or for nobody: dropped, as the protocol says
        elif kind == ITEM and len(frame) >= 3:
            self._held[call] += n_bytes
            if self._held[call] > WINDOW_BYTES + FRAME_BYTES_MAX:
                self._broken("it sent more than its window")
            events.append((ITEM, call, frame[2], n_bytes))
        elif kind == CREDIT and len(frame) >= 3 and isinstance(frame[2], int) and frame[2] >= 0:
            self._room[call] = min(WINDOW_BYTES, self._room[call] + frame[2])
        elif kind == END:
            events.append((END, call, None, n_bytes))
        else:
            self._broken(f"an unexpected frame of kind {kind}")

    def _finish(self, call: int, event: Event, events: list[Event]) -> None:
        """A call is over; a second end of it is late and dropped."""
        if self._room.pop(call, None) is not None:
            del self._owed[call], self._held[call]
            events.append(event)

    def _error(self, frame: list[object]) -> Exception:
        """Rebuild the error of an ERROR frame."""
        from isopod.world.errors import from_code

        _kind, _id, code, message, hint, exit_code = (*frame, None, None, None, None)[:6]
        if not isinstance(code, str) or not isinstance(message, str):
            self._broken("an error without code and message")
        return from_code(
            code,
            one_line(message),
            one_line(hint) if isinstance(hint, str) else "",
            exit_code if isinstance(exit_code, int) and 0 < exit_code < 256 else None,
        )

    def _unpack(self, data: bytes) -> object:
        try:
            return decode(data)
        except ValueError as error:
            self._broken(f"malformed MessagePack: {error}")

    def _frame(self, frame: list[object]) -> int:
        """Queue a frame; return its length on the wire."""
        packed = encode(frame)
        if len(packed) > FRAME_BYTES_MAX:
            from isopod.world.errors import InvalidArgument

            raise InvalidArgument("request", f"of {len(packed)} bytes", f"over the limit of {FRAME_BYTES_MAX}", "pass less")
        self.outbox += len(packed).to_bytes(4, "little") + packed
        return len(packed) + 4

    def _broken(self, why: str) -> NoReturn:
        """Raise ProtocolViolation."""
        from isopod.world.errors import ProtocolViolation

        raise ProtocolViolation(self._peer, why)


def one_line(text: str) -> str:
    """Return `text` without line breaks and control characters: what a server says is printed on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
