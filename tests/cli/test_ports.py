"""-p, --network-rate and `isopod port`: from words to what the contract wants, and back to lines (row V2)."""

from typing import Any

import pytest

from isopod.cli.ports import published, rates
from isopod.world.errors import InvalidArgument
from tests.cli.scripted_node import Peer, ScriptedNode, isopod

pytestmark = pytest.mark.row("V2")


def mapping(port: int, host_port: int = 0, host_ip: str = "", protocol: str = "tcp") -> dict[str, Any]:
    return {"port": port, "host_port": host_port, "host_ip": host_ip, "protocol": protocol}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("80", [mapping(80)]),
        ("8080:80", [mapping(80, 8080)]),
        ("8080:53/udp", [mapping(53, 8080, protocol="udp")]),
        ("53/tcp", [mapping(53)]),
        ("127.0.0.1:8080:80", [mapping(80, 8080, "127.0.0.1")]),
        ("127.0.0.1::80/udp", [mapping(80, 0, "127.0.0.1", "udp")]),
        ("8000-8002:9000-9002", [mapping(9000, 8000), mapping(9001, 8001), mapping(9002, 8002)]),
        ("9000-9001", [mapping(9000), mapping(9001)]),
        ("7-7:8", [mapping(8, 7)]),
    ],
)
def test_what_is_published(text: str, expected: list[dict[str, Any]]) -> None:
    assert published([text]) == expected
    assert published([text, "1"]) == [*expected, mapping(1)]


@pytest.mark.parametrize(
    "text",
    ["", ":", ":80", "80:", "0", "65536", "80/sctp", "80/", "a:80", "1-2:80", "9-8", "1-600", "[::1]:80:80", "1:2:3:4", "-1", "1--2"],
)  # fmt: skip
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(InvalidArgument):
        published([text])


@pytest.mark.parametrize(
    "text, expected", [("10m", (10 << 20, 10 << 20)), ("10m:1m", (10 << 20, 1 << 20)), (":64k", (None, 65536)), ("64k:", (65536, None))]
)
def test_rates(text: str, expected: tuple[int | None, int | None]) -> None:
    assert rates(text) == {"network_in_bytes_per_s": expected[0], "network_out_bytes_per_s": expected[1]}


@pytest.mark.parametrize("text", [":", "x", "1m:x", "-1", "0", "1m:2m:3m"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(InvalidArgument):
        rates(text)


def ask(folder: str, *words: str) -> Any:
    """Run `isopod port` against a node with one container."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.inspect")
        rows = [mapping(80, 8080), mapping(80, 8081, "127.0.0.1"), mapping(53, 5353, protocol="udp")]
        peer.reply(call, {"name": "web", "network": {"published": rows}})
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        return isopod("-H", node.path, "port", "web", *words)


@pytest.mark.parametrize(
    "words, output",
    [
        ([], b"80/tcp -> 0.0.0.0:8080\n80/tcp -> 127.0.0.1:8081\n53/udp -> 0.0.0.0:5353\n"),
        (["80"], b"0.0.0.0:8080\n127.0.0.1:8081\n"),
        (["53/udp"], b"0.0.0.0:5353\n"),
    ],
)
def test_port_prints_where(folder: str, words: list[str], output: bytes) -> None:
    ended = ask(folder, *words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, output, b"")


def test_port_says_that_nothing_leads_there(folder: str) -> None:
    ended = ask(folder, "53")
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.startswith(b"error: no such published port of container web: 53\nhint: ")
