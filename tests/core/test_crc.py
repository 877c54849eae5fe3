"""The checksum of stored records, against the vectors of RFC 3720 (B.4) and a bit-by-bit implementation."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod._core import crc32c


def bit_by_bit(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_sums(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_it_is_what_the_definition_says_and_chains(first: bytes, second: bytes) -> None:
    assert crc32c(first) == bit_by_bit(first)
    assert crc32c(second, crc32c(first)) == bit_by_bit(first + second)


@pytest.mark.parametrize("n_bytes", [0, 1, 65536, 65537, 1 << 20])
def test_any_buffer_will_do(n_bytes: int) -> None:
    data = bytes(range(256)) * (n_bytes // 256 + 1)
    data = data[:n_bytes]
    expected = crc32c(data)
    assert crc32c(bytearray(data)) == crc32c(memoryview(data)) == crc32c(memoryview(b"xx" + data)[2:]) == expected
    with pytest.raises(BufferError):
        crc32c(memoryview(bytes(8))[::2])
    with pytest.raises(TypeError):
        crc32c("text")  # type: ignore[arg-type]


def test_threads_get_the_same_sum_of_much_data() -> None:
    data = bytes(range(256)) * (1 << 13)
    sums: list[int] = []
    threads = [threading.Thread(target=lambda: sums.append(crc32c(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sums == [crc32c(data)] * 4
