"""The lean codec against msgspec, both ways, and against hostile input."""

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.wire import minipack

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    | st.binary(max_size=40)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.integers(-(1 << 63), (1 << 64) - 1)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(KEYS, inner, max_size=20), max_leaves=40)
EDGES = [
    n + d for bits in (5, 7, 8, 15, 16, 31, 32, 63, 64) for n in (1 << bits, -(1 << bits)) for d in (-1, 0, 1)
    if -(1 << 63) <= n + d < 1 << 64
]  # fmt: skip
SIZES = [0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536]


@pytest.mark.row("R12")
@settings(deadline=None)
@given(VALUES)
def test_msgspec_and_minipack_understand_each_other(value: Any) -> None:
    assert minipack.decode(msgspec.msgpack.encode(value)) == value
    assert msgspec.msgpack.decode(minipack.encode(value)) == value
    assert minipack.encode(value) == msgspec.msgpack.encode(value)  # the smallest form, as there


@pytest.mark.parametrize("value", EDGES)
def test_integers_at_the_edges(value: int) -> None:
    packed = minipack.encode(value)
    assert packed == msgspec.msgpack.encode(value)
    assert minipack.decode(packed) == value


@pytest.mark.parametrize("size", SIZES)
def test_lengths_at_the_edges(size: int) -> None:
    for value in ("x" * size, b"x" * size, [None] * size, dict.fromkeys(range(size))):
        packed = minipack.encode(value)
        assert packed == msgspec.msgpack.encode(value)
        assert minipack.decode(packed) == value


def test_tuples_and_views_are_taken_and_small_floats_are_read() -> None:
    assert minipack.decode(minipack.encode((1, (2,)))) == [1, [2]]
    assert minipack.decode(minipack.encode([bytearray(b"a"), memoryview(b"b")])) == [b"a", b"b"]
    assert minipack.decode(b"\xca\x3f\xc0\x00\x00") == 1.5
    assert minipack.decode_from(b"\x01\xa1x\x02", 1) == ("x", 3)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, object(), {1, 2}, 1j])
def test_what_cannot_be_packed_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        minipack.encode([value])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\xa5abc",
        b"\xa1\xff",
        b"\xd9",
        b"\xdb\xff\xff\xff\xffx",
        b"\xc6\xff\xff\xff\xffx",
        b"\xdd\xff\xff\xff\xff\x01",
        b"\xdf\xff\xff\xff\xff\x01",
        b"\x92\x01",
        b"\x81\x90\x01",
        b"\x81\x80\x01",
        b"\xcb\x00",
        b"\xd4\x01\x02",
        b"\xc7\x01\x01\x01",
        b"\x91" * 65 + b"\x01",
        b"\x81\x01" * 65 + b"\x01",
        b"\x91" * 100_000,
    ],
)
def test_hostile_input_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        minipack.decode(data)


def test_depth_is_bounded_both_ways() -> None:
    value: list[Any] = []
    for _ in range(63):
        value = [value]
    assert minipack.decode(minipack.encode(value)) == value
    with pytest.raises(ValueError, match="deeper than 64"):
        minipack.encode([value])


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_random_bytes_end_in_a_value_or_in_value_error(data: bytes) -> None:
    try:
        value = minipack.decode(data)
    except ValueError:
        return
    assert repr(minipack.decode(minipack.encode(value))) == repr(value)  # by repr: NaN is not equal to itself


@settings(deadline=None)
@given(VALUES, st.integers(0, 1000), st.integers(0, 255))
def test_a_changed_byte_is_read_as_msgspec_reads_it(value: Any, at: int, byte: int) -> None:
    data = bytearray(msgspec.msgpack.encode(value))
    data[at % len(data)] = byte
    try:
        theirs = msgspec.msgpack.decode(bytes(data))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    if "Ext(" in repr(theirs) or "datetime" in repr(theirs):
        with pytest.raises(ValueError):
            minipack.decode(bytes(data))
    else:
        assert repr(minipack.decode(bytes(data))) == repr(theirs)


def test_it_imports_nothing_else() -> None:
    """Start-up time is its reason: what it pulls in is a promise, and can be tested where its time cannot."""
    script = "import sys; import isopod.wire; before = set(sys.modules); import isopod.wire.minipack; print(set(sys.modules) - before)"
    paths = [path for path in sys.path if path.endswith("src")]
    found = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {paths!r}; {script}"], capture_output=True, text=True, check=True
    )
    assert eval(found.stdout) <= {"isopod.wire.minipack", "_struct"}
