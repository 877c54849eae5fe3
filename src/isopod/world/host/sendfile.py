"""Sending a file over a transport without its bytes passing through Python: sendfile(2), splice(2) to pipes.

uvloop has no `loop.sendfile`, and asyncio's own replaces the transport's protocol for the time. Here the transport stays as it is: a
duplicate of its descriptor is written to, once the transport's own buffer is empty. Where that cannot be (TLS, a transport without a
descriptor) the file goes through the transport in pieces, never more than one of them ahead of the peer.

A page that is not in memory would make the loop wait for the disk inside sendfile(2). So each piece is first asked for with RWF_NOWAIT at
both ends; if it is not all there, a thread does the call. A transport that is closed while we wait gives no event on the duplicate, which
keeps the connection open: that is looked for every `LOOK_S`.
"""

import asyncio
import errno
import os
import socket
import ssl
import stat as stat_bits
from collections.abc import Callable
from typing import Final, Protocol

from isopod.world.host.readiness import Readiness
from isopod.world.host.workers import Workers
from isopod.world.send_pieces import check_open, send_in_pieces

PIECE_BYTES: Final = 512 << 10
"""At most one call's worth: after it other tasks have their turn."""
LOOK_S: Final = 0.1
_NO_SENDFILE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class HasDescriptor(Protocol):
    """An open file of the host's."""

    def fileno(self) -> int:
        """Return its descriptor."""

    def enter(self) -> None:
        """Keep it open."""

    def leave(self) -> None:
        """Let it close."""


async def send(file: HasDescriptor, transport: asyncio.WriteTransport, offset: int, n_bytes: int, *, workers: Workers) -> int:
    """Send a part of an open file; see `Disk.send_file`."""
    check_open(transport)  # before its descriptor is looked at: the number may be somebody else's by now
    fd = file.fileno()

    async def read(place: int, n_wanted: int) -> bytes:
        return await workers.quick(os.pread, fd, n_wanted, place)

    file.enter()
    try:
        target = _descriptor(transport)
        if target is None:
            return await send_in_pieces(read, transport, offset, n_bytes)
        call = _splice if stat_bits.S_ISFIFO(os.fstat(target).st_mode) else _sendfile
        own = os.dup(target)
        channel = _Channel(own, transport)
        try:
            await channel.wait_drained()
            n_sent = await _send_pieces(call, fd, channel, offset=offset, n_bytes=n_bytes, workers=workers)
        finally:
            channel.close()
            os.close(own)
        return await send_in_pieces(read, transport, offset, n_bytes) if n_sent is None else n_sent
    finally:
        file.leave()


class _Channel:
    """A duplicate of a transport's descriptor, waited on until it takes bytes or the transport is closed.

    Args:
        fd: The duplicate.
        transport: Whose.
    """

    def __init__(self, fd: int, transport: asyncio.WriteTransport) -> None:
        self.fd = fd
        self._transport = transport
        self._ready = Readiness(fd)

    def check(self) -> None:
        """Fail if the transport is closed."""
        check_open(self._transport)

    async def wait_drained(self) -> None:
        """Wait until the transport holds nothing back."""
        self.check()
        while self._transport.get_write_buffer_size():
            await self.wait_writable()
            await asyncio.sleep(0)  # the transport hears of the same readiness in this turn

    async def wait_writable(self) -> None:
        """Wait until the descriptor takes bytes."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._ready.wait_writable()
            except TimeoutError:
                self.check()
                continue
            self.check()
            return

    def close(self) -> None:
        """Forget the descriptor."""
        self._ready.close()


async def _send_pieces(
    call: Callable[[int, int, int, int], int], fd: int, channel: _Channel, *, offset: int, n_bytes: int, workers: Workers
) -> int | None:
    """Send by `call`; None if this file or descriptor cannot be sent so."""
    n_sent = 0
    while n_sent < n_bytes:
        channel.check()
        n_wanted = min(PIECE_BYTES, n_bytes - n_sent)
        try:
            if _is_in_memory(fd, offset + n_sent, n_wanted):
                n_taken = call(channel.fd, fd, offset + n_sent, n_wanted)
            else:
                n_taken = await workers.quick(call, channel.fd, fd, offset + n_sent, n_wanted)
        except BlockingIOError:
            await channel.wait_writable()
            continue
        except OSError as error:
            if error.errno in _NO_SENDFILE and n_sent == 0:
                return None
            raise
        if n_taken == 0:
            break
        n_sent += n_taken
        await asyncio.sleep(0)
    return n_sent


def _sendfile(target: int, source: int, offset: int, n_bytes: int) -> int:
    return os.sendfile(target, source, offset, n_bytes)


def _splice(target: int, source: int, offset: int, n_bytes: int) -> int:
    return os.splice(source, target, n_bytes, offset_src=offset, flags=os.SPLICE_F_NONBLOCK)


def _is_in_memory(fd: int, offset: int, n_bytes: int) -> bool:
    """Return whether the first and the last byte of a piece are in the page cache; True too for a piece behind the end."""
    probe = bytearray(1)
    for place in (offset, offset + n_bytes - 1):
        try:
            os.preadv(fd, [probe], place, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP  # tmpfs: always in memory
    return True


def _descriptor(transport: asyncio.WriteTransport) -> int | None:
    """Return the descriptor under a plain transport that can take sendfile or splice, else None."""
    if transport.get_extra_info("sslcontext") is not None or transport.get_extra_info("ssl_object") is not None:
        return None
    found = transport.get_extra_info("socket") or transport.get_extra_info("pipe")
    if found is None or isinstance(found, ssl.SSLSocket):
        return None
    number: int = found.fileno()
    if number < 0:
        return None
    kind = os.fstat(number).st_mode
    is_stream = stat_bits.S_ISSOCK(kind) and found.type & 0xF == socket.SOCK_STREAM
    return number if is_stream or stat_bits.S_ISFIFO(kind) else None
