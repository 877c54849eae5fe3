"""The simulated shim's side of the channel to the agent: which streams are open, and what the guest may say on each.

The guest is not trusted. A frame on a stream that nobody opened, of a kind that its operation does not have, beyond the credit, or with
words that make no sense breaks the channel (`BadFrame`).
"""

from typing import Any, Final, Literal, NamedTuple

from isopod.world.sim.programs.frames import MAIN_STREAM, STREAMS_MAX, WINDOW_BYTES, BadFrame, Frame, Kind
from isopod.world.sim.programs.sockets import Connection

Shape = Literal["call", "command", "archive", "extract"]
_SHAPES: Final[dict[str, Shape]] = {"exec": "command", "start": "command", "archive": "archive", "extract": "extract"}
_BYTES: Final[dict[Shape, tuple[Kind, ...]]] = {
    "call": (),
    "command": (Kind.STDOUT, Kind.STDERR),
    "archive": (Kind.DATA,),
    "extract": (),
}
_LASTS: Final[dict[Shape, tuple[Kind, ...]]] = {"call": (), "command": (Kind.EXIT,), "archive": (Kind.DATA_END,), "extract": ()}


class Asker(NamedTuple):
    """Who opened a stream: a connection, and its own number for it. None: the shim itself, or somebody who left."""

    connection: Connection
    stream: int


class GuestStream:
    """One stream of the channel."""

    def __init__(self, asker: Asker | None, shape: Shape) -> None:
        self.asker = asker
        self.shape: Shape = shape
        self.is_agreed = False
        self.may_receive = WINDOW_BYTES


class Streams:
    """The open streams."""

    def __init__(self) -> None:
        self._open: dict[int, GuestStream] = {}
        self._next = MAIN_STREAM + 1

    def open(self, asker: Asker | None, operation: str) -> int | None:
        """Return the number of a new stream, None if too many are open."""
        if len(self._open) >= STREAMS_MAX - 2:
            return None
        number, self._next = self._next, self._next + 1
        self._open[number] = GuestStream(asker, _SHAPES.get(operation, "call"))
        return number

    def open_main(self, asker: Asker | None, *, is_agreed: bool = False) -> None:
        """Open the main command's stream."""
        stream = self._open[MAIN_STREAM] = GuestStream(asker, "command")
        stream.is_agreed = is_agreed

    def find(self, connection: Connection, stream: int) -> int | None:
        """Return the guest's number for a client's stream."""
        return next((number for number, each in self._open.items() if each.asker == Asker(connection, stream)), None)

    def leave(self, connection: Connection) -> list[int]:
        """A client is gone; return its streams, of which it hears no more."""
        found = [number for number, each in self._open.items() if each.asker is not None and each.asker.connection is connection]
        for number in found:
            self._open[number].asker = None
        return found

    def grant(self, number: int, n_bytes: int) -> bool:
        """The guest may send more; False if the stream is gone."""
        stream = self._open.get(number)
        if stream is not None:
            stream.may_receive += n_bytes
        return stream is not None

    def take(self, frame: Frame) -> Asker | None:
        """Check a frame from the guest; return who is to hear it.

        Raises:
            BadFrame: The guest may not say that.
        """
        stream = self._open.get(frame.stream)
        if stream is None:
            if frame.kind in (Kind.CREDIT, Kind.CLOSE) and 0 < frame.stream < self._next:
                return None  # it was on its way when the stream ended
            raise BadFrame("a frame of a stream that nobody opened")
        asker = stream.asker
        if frame.kind is Kind.RESPONSE:
            self._take_response(frame, stream)
        elif frame.kind in _BYTES[stream.shape] and stream.is_agreed:
            stream.may_receive -= len(frame.payload)
            if stream.may_receive < 0:
                raise BadFrame("more bytes than were granted")
        elif frame.kind in _LASTS[stream.shape] and stream.is_agreed:
            if frame.kind is Kind.EXIT:
                _check_exit(frame.object())
            del self._open[frame.stream]
        elif frame.kind is Kind.CREDIT:
            frame.number()
        elif frame.kind is not Kind.CLOSE:
            raise BadFrame("a frame that its stream does not have")
        return asker

    def _take_response(self, frame: Frame, stream: GuestStream) -> None:
        answer = frame.object()
        if ("ok" in answer) == ("error" in answer):
            raise BadFrame("a response that makes no sense")
        lasts = stream.shape in ("command", "archive")
        if stream.is_agreed:
            raise BadFrame("a second response")
        stream.is_agreed = True
        if "error" in answer or not lasts:
            del self._open[frame.stream]


def _check_exit(facts: dict[str, Any]) -> None:
    code, number = facts.get("code"), facts.get("signal")
    if not isinstance(code, int) or not 0 <= code <= 255 or not (number is None or (isinstance(number, int) and 1 <= number <= 64)):
        raise BadFrame("an exit that makes no sense")
