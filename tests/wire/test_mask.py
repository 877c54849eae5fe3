"""The mask of WebSocket frames, against its definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.wire.mask import apply_mask


@given(data=st.binary(max_size=100), key=st.binary(min_size=4, max_size=4))
def test_every_byte_is_combined_with_its_byte_of_the_key(data: bytes, key: bytes) -> None:
    masked = apply_mask(data, key)

    assert masked == bytes(byte ^ key[at % 4] for at, byte in enumerate(data))
    assert apply_mask(masked, key) == data


@pytest.mark.parametrize("key", [b"", b"abc", b"abcde"])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="4 bytes"):
        apply_mask(b"data", key)
