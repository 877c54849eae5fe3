"""MessagePack for programs that start in milliseconds: nil, booleans, integers, floats, text, bytes, arrays and maps.

Not the codec of the daemon (that is msgspec, in `frames`): this one exists for the lean command line, where importing msgspec
would cost more than the call. It imports nothing but the interpreter's own `_struct`. No extension types, no timestamps.

Rules: any input ends in a value or in ValueError. Depth is bounded, and no length is believed beyond the bytes that are there.
Source: the MessagePack specification, https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from _struct import pack, unpack_from

DEPTH_MAX = 64

Value = object
"""None, bool, int, float, str, bytes, list or dict."""

_NUMBERS = {
    0xCA: (">f", 4), 0xCB: (">d", 8),
    0xCC: (">B", 1), 0xCD: (">H", 2), 0xCE: (">I", 4), 0xCF: (">Q", 8),
    0xD0: (">b", 1), 0xD1: (">h", 2), 0xD2: (">i", 4), 0xD3: (">q", 8),
}  # fmt: skip
_LENGTHS = {
    0xC4: (">B", 1), 0xC5: (">H", 2), 0xC6: (">I", 4),
    0xD9: (">B", 1), 0xDA: (">H", 2), 0xDB: (">I", 4),
    0xDC: (">H", 2), 0xDD: (">I", 4),
    0xDE: (">H", 2), 0xDF: (">I", 4),
}  # fmt: skip


def encode(value: Value) -> bytes:
    """Return `value` packed.

    Args:
        value: None, bool, int (-2^63 .. 2^64-1), float, str, bytes-like, list, tuple or dict of these.

    Raises:
        ValueError: Another type, an integer out of range, or nested deeper than 64.
    """
    out = bytearray()
    _append(out, value, DEPTH_MAX)
    return bytes(out)


def decode(data: bytes) -> Value:
    """Return the one value that `data` holds.

    Raises:
        ValueError: Truncated, trailing or malformed bytes, an extension type, or nested deeper than 64.
    """
    value, end = decode_from(data, 0)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes after the value")
    return value


def decode_from(data: bytes, offset: int) -> tuple[Value, int]:
    """Return the value that begins at `offset`, and where it ends.

    Raises:
        ValueError: As for `decode`, but bytes may follow.
    """
    return _take(data, offset, DEPTH_MAX)


def _append(out: bytearray, value: Value, depth: int) -> None:
    if value is None:
        out.append(0xC0)
    elif value is True or value is False:
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, str):
        raw = value.encode()
        n = len(raw)
        out += bytes((0xA0 | n,)) if n < 32 else _head(n, 0xD9, 0xDA, 0xDB)
        out += raw
    elif isinstance(value, int):
        out += _integer(value)
    elif isinstance(value, float):
        out += pack(">Bd", 0xCB, value)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        out += _head(len(value), 0xC4, 0xC5, 0xC6)
        out += value
    elif depth <= 0:
        raise ValueError(f"nested deeper than {DEPTH_MAX}")
    elif isinstance(value, (list, tuple)):
        n = len(value)
        out += bytes((0x90 | n,)) if n < 16 else _head(n, None, 0xDC, 0xDD)
        for element in value:
            _append(out, element, depth - 1)
    elif isinstance(value, dict):
        n = len(value)
        out += bytes((0x80 | n,)) if n < 16 else _head(n, None, 0xDE, 0xDF)
        for key, element in value.items():
            _append(out, key, depth - 1)
            _append(out, element, depth - 1)
    else:
        raise ValueError(f"cannot encode a {type(value).__name__}")


def _integer(value: int) -> bytes:
    if -32 <= value < 128:
        return bytes((value & 0xFF,))
    if value > 0:
        if value < 1 << 8:
            return pack(">BB", 0xCC, value)
        if value < 1 << 16:
            return pack(">BH", 0xCD, value)
        if value < 1 << 32:
            return pack(">BI", 0xCE, value)
        if value < 1 << 64:
            return pack(">BQ", 0xCF, value)
    else:
        if value >= -(1 << 7):
            return pack(">Bb", 0xD0, value)
        if value >= -(1 << 15):
            return pack(">Bh", 0xD1, value)
        if value >= -(1 << 31):
            return pack(">Bi", 0xD2, value)
        if value >= -(1 << 63):
            return pack(">Bq", 0xD3, value)
    raise ValueError("integer out of range")


def _head(n: int, kind8: "int | None", kind16: int, kind32: int) -> bytes:
    if kind8 is not None and n < 1 << 8:
        return pack(">BB", kind8, n)
    if n < 1 << 16:
        return pack(">BH", kind16, n)
    if n < 1 << 32:
        return pack(">BI", kind32, n)
    raise ValueError("too long")


def _take(data: bytes, offset: int, depth: int) -> tuple[Value, int]:
    if offset >= len(data):
        raise ValueError("truncated")
    kind = data[offset]
    offset += 1
    if kind < 0x80:
        return kind, offset
    if kind >= 0xE0:
        return kind - 0x100, offset
    if kind < 0x90:
        return _take_map(data, offset, kind & 0x0F, depth)
    if kind < 0xA0:
        return _take_array(data, offset, kind & 0x0F, depth)
    if kind < 0xC0:
        end = _end(data, offset, kind & 0x1F)
        return data[offset:end].decode(), end
    if kind in _NUMBERS:
        layout, width = _NUMBERS[kind]
        end = _end(data, offset, width)
        return unpack_from(layout, data, offset)[0], end
    if kind in _LENGTHS:
        return _take_sized(data, offset, kind, depth)
    if kind == 0xC0:
        return None, offset
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, offset
    raise ValueError(f"unknown type byte 0x{kind:02x}")


def _take_sized(data: bytes, offset: int, kind: int, depth: int) -> tuple[Value, int]:
    """Take text, bytes, an array or a map whose length stands in bytes of its own."""
    layout, width = _LENGTHS[kind]
    start = _end(data, offset, width)
    n = unpack_from(layout, data, offset)[0]
    if kind >= 0xDE:
        return _take_map(data, start, n, depth)
    if kind >= 0xDC:
        return _take_array(data, start, n, depth)
    end = _end(data, start, n)
    return (data[start:end] if kind <= 0xC6 else data[start:end].decode()), end


def _take_array(data: bytes, offset: int, n: int, depth: int) -> tuple[Value, int]:
    _check(data, offset, n, depth)
    values = []
    for _ in range(n):
        value, offset = _take(data, offset, depth - 1)
        values.append(value)
    return values, offset


def _take_map(data: bytes, offset: int, n: int, depth: int) -> tuple[Value, int]:
    _check(data, offset, 2 * n, depth)
    values = {}
    for _ in range(n):
        key, offset = _take(data, offset, depth - 1)
        if isinstance(key, (list, dict)):
            raise ValueError("a map's key is an array or a map")
        values[key], offset = _take(data, offset, depth - 1)
    return values, offset


def _check(data: bytes, offset: int, n_values: int, depth: int) -> None:
    """Refuse what is too deep, or claims more values than there are bytes left."""
    if depth <= 0:
        raise ValueError(f"nested deeper than {DEPTH_MAX}")
    if n_values > len(data) - offset:
        raise ValueError("truncated")


def _end(data: bytes, offset: int, n_bytes: int) -> int:
    end = offset + n_bytes
    if end > len(data):
        raise ValueError("truncated")
    return end
