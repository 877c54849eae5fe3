"""The mask of WebSocket frames (RFC 6455, section 5.3): every byte is combined with one of a key's four, in turn.

In the Rust core because Python has no operation on whole buffers: 16 KiB took 19 us as big integers or translation tables, and half a
microsecond there. Pure: no state, no I/O, so both Worlds use it.
"""

from isopod._core import apply_mask

__all__ = ["apply_mask"]
