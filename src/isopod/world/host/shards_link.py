"""The link between a shard and who started it: a SOCK_SEQPACKET socket, so that a message and its descriptors come together or not at all.

A part travels as its descriptors (SCM_RIGHTS) and one letter that says what they are. Messages are small and few; they are sent at once,
and queue only while the peer's buffer is full. Sources: unix(7), cmsg(3).
"""

import asyncio
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from isopod.world.errors import InvalidArgument
from isopod.world.shards import LINK_BYTES_MAX, LINK_PARTS_MAX, Part

_FDS_MAX: Final = 253
"""SCM_MAX_FD."""
_HEAD_BYTES: Final = 1
_MESSAGES_PER_TURN: Final = 64


class HostPart:
    """Descriptors on their way, and what they are.

    Args:
        letter: "s" a socketpair, "r" and "R" the two ends of a ring, "c" an accepted connection.
        fds: The descriptors, which it owns until they are taken.
    """

    N_FDS: Final = {"s": 1, "c": 1, "r": 4, "R": 4}

    def __init__(self, letter: str, fds: Sequence[int]) -> None:
        self.letter = letter
        self._fds = list(fds)

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors."""
        return self._fds

    def take(self) -> list[int]:
        """Return the descriptors, which belong to the caller now.

        Raises:
            InvalidArgument: They were taken before.
        """
        if not self._fds:
            raise InvalidArgument("part", self.letter, "it was used, sent or closed before")
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """See `Part.close`."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class HostLink:
    """`Link` over a connected SOCK_SEQPACKET socket, which it owns."""

    def __init__(self, sock: socket.socket, *, log_fd: int = 2) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._log_fd = log_fd
        self._queue: deque[tuple[bytes, list[HostPart]]] = deque()
        self._is_started = False
        self._is_closed = False
        self._on_message: Callable[[bytes, Sequence[Part]], None] = lambda *_: None
        self._on_closed: Callable[[], None] = lambda: None
        sock.setblocking(False)

    def start(self, on_message: Callable[[bytes, Sequence[Part]], None], on_closed: Callable[[], None]) -> None:
        """See `Link.start`."""
        self._on_message = on_message
        self._on_closed = on_closed
        self._is_started = True
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def send(self, message: bytes, parts: Sequence[Part] = ()) -> None:
        """See `Link.send`."""
        ours = [part for part in parts if isinstance(part, HostPart)]
        if len(message) > LINK_BYTES_MAX - _HEAD_BYTES - len(parts) or len(parts) > LINK_PARTS_MAX or len(ours) != len(parts):
            raise InvalidArgument("link message", f"{len(message)} bytes, {len(parts)} parts", f"over {LINK_BYTES_MAX} bytes or too many")
        if self._is_closed:
            _close_all(ours)
            return
        self._queue.append((message, ours))
        if len(self._queue) == 1:
            self._flush()

    def write_log(self, line: bytes) -> None:
        """See `Link.write_log`."""
        os.write(self._log_fd, line)

    def close(self) -> None:
        """See `Link.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_started:
            self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        for _, parts in self._queue:
            _close_all(parts)
        self._queue.clear()
        self._socket.close()

    def _flush(self) -> None:
        while self._queue:
            message, parts = self._queue[0]
            head = bytes([len(parts)]) + "".join(part.letter for part in parts).encode()
            fds = array("i", [fd for part in parts for fd in part.fds])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
            try:
                self._socket.sendmsg([head, message], rights)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._on_writable)
                return
            except OSError:
                self._lose()
                return
            self._queue.popleft()
            _close_all(parts)

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket.fileno())
        self._flush()

    def _on_readable(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            if self._is_closed:
                return
            try:
                data, fds, flags, _ = socket.recv_fds(self._socket, LINK_BYTES_MAX, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds, flags = b"", [], 0
            parts = None if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else _parts(data, fds)
            if parts is None:
                for fd in fds:
                    os.close(fd)
                self._lose()
                return
            self._on_message(data[_HEAD_BYTES + len(parts) :], parts)

    def _lose(self) -> None:
        """The other side is gone, or talks nonsense."""
        if not self._is_closed:
            self.close()
            self._loop.call_soon(self._on_closed)


def _parts(data: bytes, fds: list[int]) -> list[HostPart] | None:
    """Return the parts of a message; None at the end of file and for what nobody of ours sends."""
    if not data:
        return None
    letters = data[_HEAD_BYTES : _HEAD_BYTES + data[0]].decode("latin-1")
    sizes = [HostPart.N_FDS.get(letter, 0) for letter in letters]
    if len(letters) != data[0] or 0 in sizes or sum(sizes) != len(fds):
        return None
    parts: list[HostPart] = []
    for letter, size in zip(letters, sizes, strict=True):
        parts.append(HostPart(letter, fds[:size]))
        fds = fds[size:]
    return parts


def _close_all(parts: Sequence[Part]) -> None:
    for part in parts:
        part.close()
