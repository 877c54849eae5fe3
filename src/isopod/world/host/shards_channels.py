"""The host's channels between shards: a Unix socketpair, or a pair of shared-memory rings beside one.

Both are one class each over the same half (`_Channel`): what is sent in a turn of the loop goes out at its end, or at the end of the batch
of messages that it answers.

`SocketpairChannel`: messages with a length before each, over a stream socket; a batch is one system call.

`RingChannel`: the messages go through the rings of `isopod._core.Ring`, a batch is one call without the kernel. Who sleeps is woken through
an eventfd, one for each end, which means "look": there are messages, or there is room again. The socketpair beside it carries nothing; its
end of file says that the peer's process is gone, however it went. Nothing polls, unless `spin_s` asks for it.

A peer that breaks the rules (a length out of range, a damaged ring) ends the channel with `ProtocolViolation`.
Sources: unix(7), eventfd(2), rust/core/src/ring.rs.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from struct import Struct as Layout
from typing import Final

from isopod.world.errors import Disconnected, InvalidArgument, IsopodError, ProtocolViolation
from isopod.world.shards import ChannelCounts, ChannelSettings

READ_BYTES: Final = 256 << 10
POP_BYTES_MAX: Final = 256 << 10
"""What one turn of the loop takes out of a ring: other work gets its turn in between."""
SOCKET_BUFFER_BYTES: Final = 1 << 20
_LENGTH: Final = Layout("<I")
_LENGTH_BYTES: Final = 4


class _Channel:
    """What both kinds share: the queue, its flush once per turn, the counts and the end."""

    kind = ""

    def __init__(self, lifeline: socket.socket, settings: ChannelSettings, peer: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = lifeline
        self._message_bytes_max = settings.message_bytes_max
        self._peer = peer
        self._out: list[bytes] = []
        self._n_unsent = 0
        """Messages of a batch that is under way."""
        self._flush_is_due = False
        self._is_started = False
        self._is_closed = False
        self._on_messages: Callable[[list[bytes]], None] = _ignore
        self._on_closed: Callable[[IsopodError], None] = _ignore
        self._n_messages_out = self._n_bytes_out = self._n_messages_in = self._n_bytes_in = self._n_flushes = self._n_wakeups = 0

    def start(self, on_messages: Callable[[list[bytes]], None], on_closed: Callable[[IsopodError], None]) -> None:
        """See `Channel.start`."""
        self._on_messages = on_messages
        self._on_closed = on_closed
        self._is_started = True

    def send(self, message: bytes) -> None:
        """See `Channel.send`."""
        n_bytes = len(message)
        if n_bytes > self._message_bytes_max:
            raise InvalidArgument("message to", self._peer, f"its {n_bytes} bytes are over {self._message_bytes_max}")
        if self._is_closed:
            return
        self._out.append(message)
        self._n_bytes_out += n_bytes
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush_turn)

    def statistics(self) -> ChannelCounts:
        """See `Channel.statistics`."""
        return ChannelCounts(
            self._n_messages_out,
            self._n_bytes_out,
            self._n_messages_in,
            self._n_bytes_in,
            len(self._out) + self._n_unsent,
            self._n_flushes,
            self._n_wakeups,
        )

    def close(self) -> None:
        """See `Channel.close`."""
        if self._out and not self._is_closed:
            self._flush()
        if not self._is_closed:
            self._end()

    def _flush_turn(self) -> None:
        self._flush_is_due = False
        if self._out:
            self._flush()

    def _flush(self) -> None:
        raise NotImplementedError

    def _deliver(self, messages: list[bytes]) -> None:
        """Hand a batch over, and send at once what it made us say."""
        self._n_messages_in += len(messages)
        self._on_messages(messages)
        if self._out:
            self._flush()

    def _fail(self, error: IsopodError) -> None:
        """The channel is over: say so once, from the loop and not from within a caller's `send`."""
        if not self._is_closed:
            self._end()
            self._loop.call_soon(self._on_closed, error)

    def _end(self) -> None:
        self._is_closed = True
        self._out.clear()
        self._socket.close()


class SocketpairChannel(_Channel):
    """Messages over a stream socket.

    Args:
        sock: Our end; the channel owns it.
        settings: Bounds.
        peer: The other end, for errors.
    """

    kind = "socketpair"

    def __init__(self, sock: socket.socket, settings: ChannelSettings, peer: str) -> None:
        super().__init__(sock, settings, peer)
        self._unsent: memoryview | None = None
        self._pieces: list[bytes] = []
        """The beginning of a message whose rest has not come."""
        self._n_kept = 0
        self._n_wanted = 0

    def start(self, on_messages: Callable[[list[bytes]], None], on_closed: Callable[[IsopodError], None]) -> None:
        """See `Channel.start`."""
        super().start(on_messages, on_closed)
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def _flush(self) -> None:
        if self._unsent is not None:
            return  # the socket is full: the rest follows when there is room
        out, self._out = self._out, []
        pack = _LENGTH.pack
        batch = b"".join([piece for message in out for piece in (pack(len(message)), message)])
        self._n_unsent = len(out)
        self._n_flushes += 1
        self._send(memoryview(batch))

    def _send(self, rest: memoryview) -> None:
        try:
            self._n_wakeups += 1
            n_sent = self._socket.send(rest)
        except BlockingIOError:
            n_sent = 0
        except OSError as error:
            self._fail(Disconnected(self._peer, f"connection lost: {error.strerror}"))
            return
        if n_sent < len(rest):
            if self._unsent is None:
                self._loop.add_writer(self._socket.fileno(), self._on_writable)
            self._unsent = rest[n_sent:]
        else:
            self._n_messages_out += self._n_unsent
            self._n_unsent = 0
            if self._unsent is not None:
                self._unsent = None
                self._loop.remove_writer(self._socket.fileno())

    def _on_writable(self) -> None:
        if self._unsent is not None:
            self._send(self._unsent)
        if self._unsent is None and self._out and not self._is_closed:
            self._flush()

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(Disconnected(self._peer, f"connection lost: {error.strerror}"))
            return
        if not data:
            self._fail(Disconnected(self._peer))
            return
        self._n_bytes_in += len(data)
        try:
            messages = self._split(data)
        except ProtocolViolation as error:
            self._fail(error)
            return
        if messages:
            self._deliver(messages)

    def _split(self, data: bytes) -> list[bytes]:
        """Return the whole messages in what came; keep the rest. A long message's pieces are joined once, when its last one is there."""
        if self._pieces:
            self._pieces.append(data)
            self._n_kept += len(data)
            if self._n_kept < self._n_wanted:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        messages: list[bytes] = []
        offset, n_data, unpack = 0, len(data), _LENGTH.unpack_from
        n_wanted = _LENGTH_BYTES
        while n_data - offset >= _LENGTH_BYTES:
            (n_bytes,) = unpack(data, offset)
            if n_bytes > self._message_bytes_max:
                raise ProtocolViolation(self._peer, f"a message of {n_bytes} bytes is over {self._message_bytes_max}")
            end = offset + _LENGTH_BYTES + n_bytes
            if end > n_data:
                n_wanted += n_bytes
                break
            messages.append(data[offset + _LENGTH_BYTES : end])
            offset = end
        if offset < n_data:
            self._pieces.append(data[offset:])
            self._n_kept, self._n_wanted = n_data - offset, n_wanted
        return messages

    def _end(self) -> None:
        if self._is_started:
            self._loop.remove_reader(self._socket.fileno())
        if self._unsent is not None:
            self._loop.remove_writer(self._socket.fileno())
            self._unsent = None
        super()._end()


class RingChannel(_Channel):
    """Messages through shared memory.

    Args:
        lifeline: Our end of the socketpair beside it; the channel owns it and the descriptors.
        memory_fd: The rings' memfd.
        events: Our eventfd and the peer's.
        side: 0 or 1.
        settings: Bounds, and whether to spin.
        peer: The other end, for errors.

    Raises:
        OSError: The memory cannot be mapped; the descriptors are closed.
    """

    kind = "ring"

    def __init__(
        self, lifeline: socket.socket, memory_fd: int, events: tuple[int, int], *, side: int, settings: ChannelSettings, peer: str
    ) -> None:
        from isopod._core import Ring, RingError

        super().__init__(lifeline, settings, peer)
        self._event, self._peer_event = events
        self._damage = RingError
        self._spin_s = settings.spin_s
        self._spin_until_s = 0.0
        self._is_full = False
        self._drain_is_due = False
        self._peer_is_gone = False
        try:
            self._ring = Ring(memory_fd, side, settings.message_bytes_max)
        except BaseException:
            self._end()
            raise
        finally:
            os.close(memory_fd)
        self._loop.add_reader(self._event, self._on_event)  # a full ring wakes its writer, also one that does not receive yet

    def start(self, on_messages: Callable[[list[bytes]], None], on_closed: Callable[[IsopodError], None]) -> None:
        """See `Channel.start`."""
        super().start(on_messages, on_closed)
        self._loop.add_reader(self._socket.fileno(), self._on_lifeline)
        self._schedule_drain()

    def _flush(self) -> None:
        if self._is_full:
            return  # the reader wakes us when there is room
        try:
            n_sent, wake = self._ring.push(self._out)
        except self._damage as error:
            self._fail(ProtocolViolation(self._peer, str(error)))
            return
        self._n_messages_out += n_sent
        self._n_flushes += 1
        if n_sent == len(self._out):
            self._out.clear()
        else:
            del self._out[:n_sent]
            self._is_full = True
        if wake:
            self._wake_peer()

    def _wake_peer(self) -> None:
        self._n_wakeups += 1
        try:
            os.eventfd_write(self._peer_event, 1)
        except BlockingIOError:  # the counter is full: it will be woken anyway
            return

    def _on_event(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return
        if self._is_full:
            self._is_full = False
            self._flush()
        self._drain()

    def _schedule_drain(self) -> None:
        if not self._drain_is_due:
            self._drain_is_due = True
            self._loop.call_soon(self._drain_turn)

    def _drain_turn(self) -> None:
        self._drain_is_due = False
        self._drain()

    def _drain(self) -> None:
        """Take a batch; sleep when nothing is left."""
        if self._is_closed or not self._is_started:
            return
        try:
            messages, wake = self._ring.pop(POP_BYTES_MAX)
        except self._damage as error:
            self._fail(ProtocolViolation(self._peer, str(error)))
            return
        if wake:
            self._wake_peer()
        if messages:
            self._n_bytes_in += sum(map(len, messages))
            self._deliver(messages)
            if self._spin_s:
                self._spin_until_s = self._loop.time() + self._spin_s
        self._rest()

    def _rest(self) -> None:
        """Sleep if nothing is left, else go on in the loop's next turn."""
        if self._is_closed:
            return
        spins = self._spin_s and not self._peer_is_gone and self._loop.time() < self._spin_until_s
        if spins or not self._ring.may_sleep():
            self._schedule_drain()
        elif self._peer_is_gone:
            self._fail(Disconnected(self._peer))

    def _on_lifeline(self) -> None:
        """The peer is gone; what it had sent is still in the ring."""
        self._loop.remove_reader(self._socket.fileno())
        self._peer_is_gone = True
        self._schedule_drain()

    def _end(self) -> None:
        self._loop.remove_reader(self._event)
        if self._is_started:
            self._loop.remove_reader(self._socket.fileno())
        os.close(self._event)
        os.close(self._peer_event)
        super()._end()


def _ignore(_: object) -> None:
    """Stand in for a callback before `start`."""
