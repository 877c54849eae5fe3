"""CRC-32C (Castagnoli), the checksum of everything in a journal.

Chosen over zlib's CRC-32 for its better distance at the lengths of records, and because processors have an instruction for it. In the Rust
core because the standard library has none. Pure: no state, no I/O, so both Worlds use it. Source: RFC 3720, appendix B.4 (the polynomial
and the test vectors).
"""

from isopod._core import crc32c

__all__ = ["crc32c"]
