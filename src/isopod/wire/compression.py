"""Compression of single frames by zstd, with a bound on what comes out.

Each frame is a zstd frame of its own that says how large it will be: a peer cannot make us allocate more than one RPC frame, however
little it sends (a "bomb"), and nothing is kept between frames. Source: RFC 8878 (Frame_Content_Size, Window_Size).
"""

from typing import Final

import zstandard

from isopod.wire.frames import FRAME_BYTES_MAX, WireError

LEVEL: Final = 1
"""The fastest: it runs in the loop's thread, some 2 ms for the largest frame."""
THRESHOLD_BYTES: Final = 4 << 10
"""Below, a packet is a packet: nothing would be saved."""


class Zstd:
    """The two directions, with their contexts made once. For one thread."""

    __slots__ = ("_compressor", "_decompressor")

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES_MAX)

    def compress(self, payload: bytes) -> bytes:
        """Return `payload` compressed, or `payload` itself if that saves nothing."""
        packed = self._compressor.compress(payload)
        return packed if len(packed) < len(payload) else payload

    def decompress(self, payload: bytes | memoryview) -> bytes:
        """Return what was compressed.

        Raises:
            WireError: It is damaged, does not say its size, or is over 1 MiB.
        """
        try:
            n_bytes = zstandard.get_frame_parameters(payload).content_size
            if n_bytes > FRAME_BYTES_MAX:  # an unknown size is the largest number
                raise WireError(f"a compressed frame of {_size(n_bytes)} is over {FRAME_BYTES_MAX}")
            return self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"a compressed frame is damaged: {error}") from None


def _size(n_bytes: int) -> str:
    return "unknown size" if n_bytes == zstandard.CONTENTSIZE_UNKNOWN else f"{n_bytes} bytes"
