"""Channel: one connection to a machine's shim, and the streams on it, seen from the asking side.

A stream is opened by a request and answered by one response; then come bytes, under a credit for each direction, and an end. Bytes are
granted anew only when somebody took them, so that a reader that is slow holds 256 KiB of a stream and no more.

Rules: the other side may be a guest that lies. What is no frame, a frame of a stream nobody opened (one that just closed excepted), or more
than the credit ends the connection; every reader then sees the end. Nothing here waits without the caller's deadline.
Source: the frames of `isopod.wire.agent`.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from isopod.wire.agent import (
    PAYLOAD_BYTES_MAX,
    TAKES_CREDIT,
    WINDOW_BYTES,
    BrokenChannel,
    Decoder,
    Frame,
    Kind,
    encode,
    encode_credit,
    encode_json,
    encode_size,
)
from isopod.world.network import UnixAddress
from isopod.world.world import World

FRAMES_MAX: Final = 4096
"""Frames without a payload that counts, waiting to be taken on one stream."""
_CREDIT_STEP: Final = WINDOW_BYTES // 4
"""Granted at once, so that small reads do not each cost a frame."""


class Answer(NamedTuple):
    """A response: `ok` is None if it is an error."""

    ok: Mapping[str, Any] | None
    code: str = ""
    message: str = ""


class Stream:
    """One stream. Made by `Channel.open`."""

    def __init__(self, channel: "Channel", number: int) -> None:
        self._channel = channel
        self._number = number
        self._frames: deque[Frame] = deque()
        self._arrived = asyncio.Event()
        self._granted = asyncio.Event()
        self._credit = WINDOW_BYTES
        self._unread_bytes = 0
        self._taken_bytes = 0
        self._is_over = False
        self._takes_input = True

    async def receive(self) -> Frame | None:
        """Return the next frame, None when no more come."""
        while not self._frames:
            if self._is_over:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        if frame.kind in TAKES_CREDIT:
            self._take(len(frame.payload))
        return frame

    async def answer(self) -> Answer | None:
        """Return the response to the request that opened the stream, None if the connection ended before."""
        frame = await self.receive()
        if frame is None:
            return None
        if frame.kind is not Kind.RESPONSE:
            self._channel.fail("no response to a request")
            return None
        return self._channel.decode_answer(frame)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send one frame that needs no credit."""
        self._channel.write(encode(kind, self._number, payload))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the size of the command's terminal."""
        self._channel.write(encode_size(self._number, rows, columns))

    async def send_bytes(self, kind: Kind, data: bytes) -> bool:
        """Send bytes as fast as the other side grants; False if it takes no more."""
        view = memoryview(data)
        while view:
            while not self._credit and self._can_send():
                self._granted.clear()
                await self._granted.wait()
            if not self._can_send():
                return False
            n_bytes = min(len(view), self._credit, PAYLOAD_BYTES_MAX)
            self._credit -= n_bytes
            self._channel.write(encode(kind, self._number, bytes(view[:n_bytes])))
            view = view[n_bytes:]
        return self._can_send()

    # -- for the channel -------------------------------------------------------------------------------------------------

    def feed(self, frame: Frame) -> None:
        """Take what came. Raises BrokenChannel."""
        if frame.kind is Kind.CREDIT:
            self._credit = min(self._credit + frame.number(), 1 << 31)
            self._granted.set()
            return
        if frame.kind in TAKES_CREDIT:
            self._unread_bytes += len(frame.payload)
            if self._unread_bytes > WINDOW_BYTES:
                raise BrokenChannel("more bytes than were granted")
        if frame.kind is Kind.CLOSE:
            self._takes_input = False
            self._granted.set()
        if len(self._frames) >= FRAMES_MAX:
            raise BrokenChannel("more frames than anybody asked for")
        self._frames.append(frame)
        self._arrived.set()

    def end(self) -> None:
        """No more comes, and nothing can be sent."""
        self._is_over = True
        self._arrived.set()
        self._granted.set()

    def _can_send(self) -> bool:
        return self._takes_input and not self._is_over

    def _take(self, n_bytes: int) -> None:
        self._taken_bytes += n_bytes
        if self._taken_bytes >= _CREDIT_STEP:
            self._unread_bytes -= self._taken_bytes
            self._channel.write(encode_credit(self._number, self._taken_bytes))
            self._taken_bytes = 0


class Channel(asyncio.Protocol):
    """One connection. Made by `open_channel`, closed by who opened it."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._streams: dict[int, Stream] = {}
        self._n_streams = 0
        self._transport: asyncio.Transport | None = None
        self._gone = asyncio.Event()
        self.why = ""
        """Why the connection ended, if the other side broke the rules."""

    def open(self, request: Mapping[str, Any]) -> Stream:
        """Send a request on a stream of its own."""
        self._n_streams += 1
        number = self._n_streams
        stream = self._streams[number] = Stream(self, number)
        if self._transport is None:
            stream.end()
        else:
            self.write(encode_json(Kind.REQUEST, number, request))
        return stream

    def close(self) -> None:
        """Close the connection; commands run on."""
        if self._transport is not None:
            self._transport.close()
        self._end()

    async def wait_closed(self) -> None:
        """Return when the connection has ended."""
        await self._gone.wait()

    # -- for streams -------------------------------------------------------------------------------------------------------

    def write(self, frame: bytes) -> None:
        """Send a frame, if the connection still lives."""
        if self._transport is not None:
            self._transport.write(frame)

    def fail(self, why: str) -> None:
        """End the connection: the other side broke the rules."""
        self.why = self.why or why
        if self._transport is not None:
            self._transport.abort()
        self._end()

    def decode_answer(self, frame: Frame) -> Answer | None:
        """Return what a response says, None if it makes no sense; the connection has ended then."""
        try:
            found = frame.json()
        except BrokenChannel as error:
            self.fail(str(error))
            return None
        ok, error_part = (found.get("ok"), found.get("error")) if isinstance(found, dict) else (None, None)
        if isinstance(ok, dict):
            return Answer(ok)
        if isinstance(error_part, dict):
            return Answer(None, str(error_part.get("code", ""))[:64], " ".join(str(error_part.get("message", "")).split())[:1000])
        self.fail("a response that makes no sense")
        return None

    # -- asyncio's -----------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Hand frames to their streams."""
        try:
            for frame in self._decoder.feed(data):
                stream = self._streams.get(frame.stream)
                if stream is not None:
                    stream.feed(frame)
                elif frame.stream != 0:
                    raise BrokenChannel("a frame of a stream that nobody opened")
        except BrokenChannel as error:
            self.fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let every reader see the end."""
        self._end()

    def _end(self) -> None:
        self._transport = None
        for stream in self._streams.values():
            stream.end()
        self._gone.set()


async def open_channel(world: World, path: str) -> Channel:
    """Connect to a shim's socket; the caller closes the channel.

    Raises:
        OSError: Nobody listens there.
    """
    _, protocol = await world.network.connect(UnixAddress(path), Channel)
    assert isinstance(protocol, Channel), "the factory made it"
    return protocol
