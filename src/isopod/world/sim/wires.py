"""Wire: one direction of a stream connection between two machines. What may happen on the way is listed in `world.sim.fabric`.

Bytes that were written are in flight, in segments with an instant of arrival each, which never comes before that of an earlier one.
What has arrived and was not read waits in the receiver's buffer; both together are bounded, the rest waits with the sender.
"""

import asyncio
import errno
import os
import zlib
from collections import deque
from typing import TYPE_CHECKING, Final

from isopod.world.network import TcpOptions
from isopod.world.sim.fabric import Link
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.pipe import PIPE_BYTES, SPLIT_CHANCE, Pipe
from isopod.world.tls_stream import TlsStream

if TYPE_CHECKING:
    from isopod.world.sim.streams import StreamEnd

USER_TIMEOUT_S: Final = 924.6
"""How long the kernel sends again by itself (tcp_retries2 = 15)."""
UNACKNOWLEDGED_BYTES_MAX: Final = 64 << 10
RETRANSMIT_NS: Final = 200_000_000
_RETRANSMITS_MAX: Final = 10
_HANDSHAKE_BYTES: Final = 2048
"""What a flight of a TLS handshake is taken for where bandwidth counts: its true size is not the seed's to decide."""
_END: Final = "end"
_RESET: Final = "reset"


class Wire(Pipe):
    """One direction.

    Args:
        loop: For timers.
        link: What it goes over.
        options: The sender's.
    """

    __slots__ = (
        "_acks_cut_at_ns",
        "_flight",
        "_is_dead",
        "_is_probing",
        "_is_refused",
        "_is_stalled",
        "_is_timing",
        "_keepalive_s",
        "_last_put_ns",
        "_n_flight_bytes",
        "_not_before_ns",
        "_number",
        "_probe_s",
        "_timeout_s",
        "_timer",
        "_will_look",
        "_window_left",
        "link",
        "peer",
    )

    def __init__(self, loop: SimLoop, link: Link, options: TcpOptions | None) -> None:
        super().__init__(loop, link.chance)
        self.link = link
        self.peer: Wire = self
        """The other direction of the connection."""
        self._flight: deque[tuple[int, bytes | str]] = deque()
        self._n_flight_bytes = 0
        self._last_put_ns = -1
        self._not_before_ns = 0
        self._timer: asyncio.TimerHandle | None = None
        self._will_look = False
        self._is_dead = False
        self._is_refused = False
        self._is_stalled = False
        self._is_timing = False
        self._is_probing = False
        self._acks_cut_at_ns = -1
        self._window_left = 0
        self._timeout_s = USER_TIMEOUT_S if options is None else options.user_timeout_s or USER_TIMEOUT_S
        self._keepalive_s = 0 if options is None else options.keepalive_idle_s
        self._probe_s = 0 if options is None else options.keepalive_interval_s * options.keepalive_count
        self._number = link.source.fabric.next_wire()
        link.source.wires[self._number] = self

    def holds_until(self, at_ns: int) -> int:
        """Let nothing arrive before that instant (when the connection is accepted), and return it."""
        self._not_before_ns = max(self._not_before_ns, at_ns)
        return at_ns

    # -- the sender's side -----------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more bytes fit."""
        return PIPE_BYTES - len(self.data) - self._n_flight_bytes

    @property
    def is_refused(self) -> bool:
        """Whether the sender knows that nobody reads any more."""
        return self._is_refused

    def offer(self, data: bytes) -> bool:
        """Send bytes if they fit."""
        n_bytes = len(data)
        if self._is_refused or n_bytes > PIPE_BYTES - len(self.data) - self._n_flight_bytes:
            return False
        self._n_flight_bytes += n_bytes
        link, flight, now_ns = self.link, self._flight, self._loop.elapsed_ns
        if flight or not link.is_plain:
            self._send(data, n_bytes)
            return True
        # The usual case of `_send`, without its questions: most segments travel alone over a link without faults.
        arrives_ns = now_ns + link.low_ns + int(link.spread_ns * self._chance.random())
        arrives_ns = max(arrives_ns, self._not_before_ns)
        self._last_put_ns, self._not_before_ns = now_ns, arrives_ns
        flight.append((arrives_ns, data))
        if not self._is_scheduled and not self._is_stalled:
            self._is_scheduled = True
            if self._timer is None:
                self._schedule(arrives_ns)
            else:
                self._loop.push(arrives_ns, self._timer)
        return True

    def put(self, data: bytes) -> None:
        """Send bytes."""
        self._n_flight_bytes += len(data)
        self._send(data, len(data))

    def end(self) -> None:
        """Send the end of the stream."""
        self._send(_END, 0)

    def break_off(self) -> None:
        """Send a reset: bytes of the other direction were left unread."""
        self._send(_RESET, 0)

    def forget_writer(self) -> None:
        """The sending end is gone; what it sent is still on its way."""
        self.writer = None
        self.link.source.wires.pop(self._number, None)

    def vanish(self) -> None:
        """The sending machine lost power: of what is on its way only the segments that left already may arrive."""
        self.forget_writer()
        if self._is_stalled or self.link.chance.random() < 0.5:
            self._flight.clear()
            self.link.stalled.pop(self._number, None)
            self._is_stalled = False

    def reset_both(self) -> None:
        """End the connection at both ends with ECONNRESET."""
        for end in (self.writer, self.reader):
            if end is not None:
                end.fail(_error(errno.ECONNRESET))

    def _send(self, item: bytes | str, n_bytes: int) -> None:
        if self._is_dead:
            return
        now_ns = self._loop.elapsed_ns
        flight = self._flight
        if flight and self._last_put_ns == now_ns:
            flight.append((flight[-1][0], item))
            return
        link = self.link
        if link.is_plain:
            arrives_ns = now_ns + link.low_ns + int(link.spread_ns * self._chance.random())
        else:
            if n_bytes and self.writer is not None and not _is_open(self.writer):
                n_bytes = _HANDSHAKE_BYTES
            arrives_ns = link.delay_ns(n_bytes, now_ns) + self._retransmitted_ns()
        arrives_ns = max(arrives_ns, self._not_before_ns)
        self._last_put_ns, self._not_before_ns = now_ns, arrives_ns
        flight.append((arrives_ns, item))
        if not self._is_scheduled and not self._is_stalled:
            self._schedule(arrives_ns)

    def _schedule(self, at_ns: int) -> None:
        """Look at that instant what has arrived, whatever became of the ends meanwhile; one timer object will do."""
        self._is_scheduled = True
        if self._timer is None:
            self._timer = self._loop.call_at_ns(at_ns, self._arrive, context=self._loop.outside)
        else:
            self._loop.push(at_ns, self._timer)

    def _retransmitted_ns(self) -> int:
        """Draw how much later a segment comes because it, or one sent in its place, was lost."""
        late_ns, pause_ns, n_lost = 0, RETRANSMIT_NS, 0
        while n_lost < _RETRANSMITS_MAX and self.link.is_lost():
            late_ns, pause_ns, n_lost = late_ns + pause_ns, 2 * pause_ns, n_lost + 1
        self.link.counts.n_retransmitted += n_lost
        return late_ns

    # -- the receiver's side ---------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Have the reader look again: it reads on, has only begun, or hangs, and will look when it goes on."""
        if self.reader is not None and not self._will_look:
            self._will_look = True
            self._loop.call_soon(self._look, context=self.reader.context)

    def _look(self) -> None:
        self._will_look = False
        if self.reader is not None:
            self.reader.on_readable()

    def _arrive(self) -> None:
        """Hand over what has arrived: the usual single segment at once, past the receiver's buffer."""
        self._is_scheduled = False
        link, flight, reader, loop = self.link, self._flight, self.reader, self._loop
        if (
            len(flight) != 1
            or reader is None
            or not reader.is_thirsty
            or link.is_blocked
            or link.back.is_blocked
            or self.data
            or self._is_stalled
            or (loop.looks_at_owners and reader.is_hung)
        ):
            self._receive()
            return
        item = flight[0][1]
        if type(item) is bytes:
            self._deliver_one(reader, item)
        else:
            self._receive()

    def _receive(self) -> None:
        """Move what has arrived into the receiver's buffer, and tell it."""
        link, flight = self.link, self._flight
        if not flight or self._is_stalled:
            return
        reader = self.reader
        if link.is_blocked or (link.back.is_blocked and (reader is None or not self._passes_unacknowledged())):
            self._stall()
            return
        if reader is None:
            self._refuse()
            return
        first = flight[0][1]
        if len(flight) == 1 and not self.data and isinstance(first, bytes) and reader.is_thirsty and not reader.is_hung:
            self._deliver_one(reader, first)
            return
        now_ns = self._loop.elapsed_ns
        while flight and flight[0][0] <= now_ns:
            item = flight.popleft()[1]
            if isinstance(item, bytes):
                self._n_flight_bytes -= len(item)
                self.data += item
                self._count(item)
            elif item == _END:
                self.is_ended = True
            else:
                self.is_broken = True
        if flight:
            self._schedule(flight[0][0])
        if reader.is_hung:
            self.wake()
        else:
            reader.context.run(reader.on_readable)

    def _deliver_one(self, reader: "StreamEnd", item: bytes) -> None:
        """Hand over the only segment that is there, past the buffer."""
        self._flight.clear()
        self._n_flight_bytes = 0
        self._count(item)
        if self._chance.random() < SPLIT_CHANCE and len(item) > 1 and reader.may_split:
            cut = 1 + int(self._chance.random() * (len(item) - 1))
            self.data += item[cut:]
            reader.context.run(reader.hand_over, item[:cut])
            self.wake()
        else:
            reader.context.run(reader.hand_over, item)

    def _count(self, item: bytes) -> None:
        counts = self.link.counts
        counts.n_segments += 1
        counts.n_bytes += len(item)
        trace = self._loop.trace
        if trace is not None and self.reader is not None:
            what = f"{len(item)} {zlib.crc32(item):08x}" if not self.reader.is_secured else "tls"
            trace.add(self._loop.elapsed_ns, self.link.target.name, f"net {self.link.label} {what}")

    def _refuse(self) -> None:
        """Nobody reads here: the socket was closed, its process died, or its machine started anew."""
        had_data = any(isinstance(item, bytes) for _, item in self._flight)
        self._flight.clear()
        self._n_flight_bytes = 0
        if had_data and self.writer is not None:
            at_ns = self.link.back.delay_ns(0, self._loop.elapsed_ns)
            self.link.counts.n_resets += 1
            self._loop.call_at_ns(at_ns, self._on_reset, context=self.writer.context)

    def _on_reset(self) -> None:
        self._is_refused = True
        if self.writer is not None:
            self.writer.fail(_error(errno.ECONNRESET))

    # -- cuts ------------------------------------------------------------------------------------------------------------------------

    def _passes_unacknowledged(self) -> bool:
        """Return whether the first segment still passes, though acknowledgements do not come back; takes its bytes off the window."""
        if self._acks_cut_at_ns != self.link.back.blocked_at_ns:
            self._acks_cut_at_ns = self.link.back.blocked_at_ns
            self._window_left = self.link.chance.randrange(UNACKNOWLEDGED_BYTES_MAX)
        self._window_left -= sum(len(item) for _, item in self._flight if isinstance(item, bytes))
        self._begin_timeout()
        return self._window_left >= 0

    def _stall(self) -> None:
        self._is_stalled = True
        self.link.stalled[self._number] = self
        self.link.counts.n_held += 1
        self._begin_timeout()

    def go_on(self, at_ns: int) -> None:
        """Send again at that instant what was held back. Called when a cut ends."""
        self._is_stalled = False
        if self._flight and not self._is_scheduled:
            self._not_before_ns = max(self._not_before_ns, at_ns)
            self._flight = deque((max(each_ns, at_ns), item) for each_ns, item in self._flight)
            self._schedule(self._flight[0][0])

    def _begin_timeout(self) -> None:
        if not self._is_timing and self.writer is not None:
            self._is_timing = True
            since_ns = self._loop.elapsed_ns
            self._loop.call_at_ns(since_ns + round(self._timeout_s * 1e9), self._time_out, since_ns, context=self.writer.context)

    def _time_out(self, since_ns: int) -> None:
        """The user timeout is over: it counts if nothing was acknowledged meanwhile."""
        self._is_timing = False
        for link in (self.link, self.link.back):
            if link.is_blocked and link.blocked_at_ns <= since_ns:
                self._give_up()
                return
        if self._is_stalled:
            self._begin_timeout()

    def _give_up(self) -> None:
        self._is_dead = self._is_refused = True  # not even an end is sent: the peer must not take what it has for everything
        self._flight.clear()
        self._n_flight_bytes = 0
        if self.writer is not None:
            self.link.counts.n_timed_out += 1
            self.writer.fail(_error(errno.ETIMEDOUT))

    # -- keepalive -------------------------------------------------------------------------------------------------------------------

    def on_trouble(self) -> None:
        """The connection's way was blocked: the next keepalive probe will tell, if there is to be one."""
        if self._keepalive_s and not self._is_probing and self.writer is not None:
            self._is_probing = True
            now_ns = self._loop.elapsed_ns
            at_ns = now_ns + int(self._keepalive_s * 1e9 * self.link.chance.random())
            self._loop.call_at_ns(at_ns, self._probe, now_ns, context=self.writer.context)

    def _probe(self, since_ns: int) -> None:
        if self.writer is None:
            return
        if any(link.is_blocked for link in (self.link, self.link.back)):
            now_ns = self._loop.elapsed_ns
            self._loop.call_at_ns(now_ns + int(self._probe_s * 1e9), self._probe_failed, now_ns, context=self.writer.context)
        else:
            self._is_probing = False
            if self.reader is None and self.peer.writer is None:
                self._on_reset()

    def _probe_failed(self, since_ns: int) -> None:
        self._is_probing = False
        if self.writer is None:
            return
        if any(link.is_blocked and link.blocked_at_ns <= since_ns for link in (self.link, self.link.back)):
            self._give_up()
        else:
            self.on_trouble()


def _is_open(end: "StreamEnd") -> bool:
    """Return whether the sizes of what an end sends are the seed's: not during a TLS handshake."""
    protocol = end.get_protocol()
    return not isinstance(protocol, TlsStream) or protocol.is_open


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
