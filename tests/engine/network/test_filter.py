"""The packet filter's text: as written down, and as the kernel takes it."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from isopod.api.messages import PortMapping
from isopod.engine.network.filter import Bridge, Plug, render_added, render_guard, render_guard_removal, render_removed, render_table

TESTDATA = Path(__file__).parent / "testdata"
ONE = [Bridge("isopod0", "10.88.0.0/24")]
TWO = [*ONE, Bridge("isopod-b3fa21", "10.90.0.0/16")]
WEB = Plug(
    "isopod-v09c4d",
    "10.88.0.2",
    ports=(PortMapping(host_port=8080, port=80), PortMapping(host_ip="127.0.0.1", host_port=53, port=5353, protocol="udp")),
    bytes_per_s_out=1_000_000,
)
GUEST = Plug("isopod-t5e01b", "10.88.0.3", "0a:01:02:03:04:05", (PortMapping(host_port=2222, port=22),))
BARE = Plug("isopod-vaaaaa", "10.88.0.4")


@pytest.mark.parametrize(
    "name, text",
    [
        ("filter_one_network.nft", render_table("isopod", ONE)),
        ("filter_two_networks.nft", render_table("isopod", TWO)),
        ("filter_ports.nft", render_table("isopod", ONE, [WEB, BARE, GUEST])),
        ("filter_guard.nft", render_guard("isopod", [WEB, BARE, GUEST])),
        ("filter_change.nft", render_added("isopod", WEB) + render_added("isopod", GUEST) + render_removed("isopod", WEB)),
    ],
)
def test_the_text_is_the_transcript(name: str, text: str) -> None:
    assert text == (TESTDATA / name).read_text()


def test_who_wants_nothing_changes_nothing() -> None:
    assert (render_added("isopod", BARE), render_removed("isopod", BARE)) == ("", "")
    assert not BARE.is_guarded
    assert WEB.is_guarded and GUEST.is_guarded


@pytest.mark.host
def test_the_kernel_takes_changes_and_lists_the_same_as_the_whole() -> None:
    """Two who come and one who goes, one by one, are the same to the kernel as the one who stays, at once."""
    bare = render_table("isopod", ONE) + render_guard("isopod", [])
    steps = [bare, render_added("isopod", WEB), render_added("isopod", GUEST), render_removed("isopod", WEB)]
    assert listed(steps) == listed([render_table("isopod", ONE, [GUEST]) + render_guard("isopod", [GUEST])])
    assert listed([*steps, render_guard_removal("isopod"), render_guard_removal("isopod")]).count("table ") == 1
    back = [*steps, render_removed("isopod", GUEST), render_added("isopod", WEB), render_removed("isopod", WEB)]
    assert listed(back) == listed([bare])


def listed(scripts: Sequence[str]) -> str:
    """Apply scripts in a network namespace of its own; return what the kernel has then."""
    load = "; ".join(f'printf "%s" "${number}" | nft -f -' for number in range(1, len(scripts) + 1))
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", f"set -e; {load}; nft list ruleset", "sh", *scripts],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.host
@pytest.mark.parametrize("bridges", [ONE, TWO])
def test_the_kernel_takes_it_again_and_again(bridges: list[Bridge]) -> None:
    """In a network namespace of its own: twice the table, once another instance's, then ours changed; the other stays as it was."""
    ours = render_table("isopod", bridges, [WEB, GUEST])
    found = listed([ours, ours, render_table("iso", [Bridge("iso0", "10.99.0.0/24")]), render_table("isopod", ONE)])
    assert found.count("table inet ") == 2
    assert "isopod-b3fa21" not in found
    assert "8080" not in found
    assert found.count("masquerade") == 6
