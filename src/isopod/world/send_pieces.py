"""Sending a file through a transport, piece by piece: what works everywhere (TLS, the simulation), for both Worlds' `Disk.send_file`."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Final

PIECE_BYTES: Final = 256 << 10
"""Read and written at once."""
AHEAD_BYTES: Final = 64 << 10
"""What may wait in the transport when the next piece is read."""
_PAUSE_S_FIRST: Final = 0.0005
_PAUSE_S_MAX: Final = 0.02


async def send_in_pieces(read: Callable[[int, int], Awaitable[bytes]], transport: asyncio.WriteTransport, offset: int, n_bytes: int) -> int:
    """Send a part of a file.

    Args:
        read: Returns up to so many bytes from an offset, b"" at the end.
        transport: Where to.
        offset: Where in the file, in bytes.
        n_bytes: How many.

    Returns:
        How many were sent: fewer if the file ends before.

    Raises:
        ConnectionResetError: The transport was closed meanwhile.
    """
    n_sent = 0
    while n_sent < n_bytes:
        data = await read(offset + n_sent, min(PIECE_BYTES, n_bytes - n_sent))
        if not data:
            break
        check_open(transport)
        transport.write(data)
        await _wait_room(transport)
        n_sent += len(data)
    return n_sent


def check_open(transport: asyncio.WriteTransport) -> None:
    """Fail if the transport is closed or about to be."""
    if transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the connection was closed while a file was sent")


async def _wait_room(transport: asyncio.WriteTransport) -> None:
    """Wait until little is left in the transport. That it shrinks is told to its protocol only, which is not ours: a growing pause."""
    pause_s = 0.0
    while transport.get_write_buffer_size() > AHEAD_BYTES:
        await asyncio.sleep(pause_s)
        check_open(transport)
        pause_s = min(max(_PAUSE_S_FIRST, 2 * pause_s), _PAUSE_S_MAX)
