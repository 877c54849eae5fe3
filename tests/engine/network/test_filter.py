"""The packet filter's text: as written down, and as the kernel takes it."""

import subprocess
from pathlib import Path

import pytest

from isopod.engine.network.filter import Bridge, render_table

TESTDATA = Path(__file__).parent / "testdata"
ONE = [Bridge("isopod0", "10.88.0.0/24")]
TWO = [*ONE, Bridge("isopod-b3fa21", "10.90.0.0/16")]


@pytest.mark.parametrize("name, bridges", [("filter_one_network.nft", ONE), ("filter_two_networks.nft", TWO)])
def test_the_text_is_the_transcript(name: str, bridges: list[Bridge]) -> None:
    assert render_table("isopod", bridges) == (TESTDATA / name).read_text()


@pytest.mark.host
@pytest.mark.parametrize("bridges", [ONE, TWO])
def test_the_kernel_takes_it_again_and_again(bridges: list[Bridge]) -> None:
    """In a network namespace of its own: twice the table, once another instance's, then ours changed; the other stays as it was."""
    load = 'printf "%s" "$1" | nft -f -'
    script = "; ".join(["set -e", load, load, load.replace("$1", "$2"), load.replace("$1", "$3"), "nft list ruleset"])
    ours, other, changed = (
        render_table("isopod", bridges),
        render_table("iso", [Bridge("iso0", "10.99.0.0/24")]),
        render_table("isopod", ONE),
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", ours, other, changed], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("table inet ") == 2
    assert "isopod-b3fa21" not in done.stdout
    assert done.stdout.count("masquerade") == 2
