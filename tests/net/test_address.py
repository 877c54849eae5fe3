"""Addresses as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.address import format_address, parse_address
from isopod.world.errors import InvalidArgument
from isopod.world.network import TcpAddress, UnixAddress

pytestmark = pytest.mark.row("S9")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:80", TcpAddress("localhost", 80)),
        ("tcp://10.0.0.1:0", TcpAddress("10.0.0.1", 0)),
        ("[::1]:443", TcpAddress("::1", 443)),
        (":8080", TcpAddress("", 8080)),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("unix:///run/x.sock", UnixAddress("/run/x.sock")),
        ("example.org", TcpAddress("example.org", 53)),
        ("::1", TcpAddress("::1", 53)),
        ("[::1]", TcpAddress("::1", 53)),
    ],
)
def test_text_becomes_an_address(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text, default_port=53) == address


@pytest.mark.parametrize(
    "text", ["", "localhost", "x:y", "x:65536", "x:-1", "x:٣", "[::1", "[::1]x", "unix:", "unix:relative", "unix:/a\0b"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)


@given(
    st.one_of(
        st.builds(TcpAddress, st.sampled_from(["h", "1.2.3.4", "::1", "fe80::1%lo"]), st.integers(0, 65535)), st.just(UnixAddress("/a b:c"))
    )
)
def test_and_back(address: TcpAddress | UnixAddress) -> None:
    assert parse_address(format_address(address)) == address
