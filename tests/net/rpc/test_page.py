"""docs/protocol.md says what the code does: kinds, features, numbers and bounds are compared with the page."""

import re
from typing import Any

import pytest

from isopod.net.rpc import RpcErrorCode, RpcLimits
from isopod.net.rpc.codes import code_table
from isopod.net.rpc.connection import RAW_BYTES_MIN
from isopod.net.rpc.limits import HEARTBEATS_MISSED_MAX
from isopod.net.rpc.streams import CREDIT_STEP_BYTES, WINDOW_BYTES
from isopod.wire import frames as f
from isopod.wire.compression import THRESHOLD_BYTES
from isopod.wire.decoder import TURN_FRAMES
from tests.project.sources import PROJECT

PAGE = (PROJECT / "docs" / "protocol.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
KINDS: list[Any] = [f.Request, f.Reply, f.Error, f.Cancel, f.Item, f.End, f.Credit, f.GoAway, f.Ping, f.Pong, f.Notify]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_frame_has_its_row(kind: Any) -> None:
    row = re.search(rf"^\| (\d+) {kind.__name__.upper()} \| `\[([^`]*)\]` \|", PAGE, re.MULTILINE)
    assert row is not None
    number, *fields = [field.strip().removesuffix(" or nil") for field in row[2].split(",")]
    assert int(row[1]) == int(number) == kind.__struct_config__.tag
    assert fields == list(kind.__struct_fields__)


def test_the_hello_is_told_whole() -> None:
    for key in f.Hello.__struct_fields__:
        assert f"| `{key}` |" in PAGE
    assert ", ".join(f'"{feature}"' for feature in f.FEATURES) in TEXT


def test_every_number_is_told() -> None:
    told = {int(number): names for number, names in re.findall(r"\| (-32\d{3}) \| ([^|]*)", PAGE)}
    assert sorted(told) == sorted(RpcErrorCode)
    for row in code_table():
        if f"`{row.code}`" in "".join(told.values()):
            assert f"`{row.code}`" in told[row.number]


@pytest.mark.parametrize(
    "words",
    [
        f"{RpcLimits().connections_max} connections",
        f"{RpcLimits().calls_max} open calls per connection",
        f"{RpcLimits().in_flight_bytes_max >> 20} MiB of requests and items in flight per connection",
        f"and {RpcLimits().server_bytes_max >> 20} MiB of these and of unread answers for all connections",
        f"more than {RpcLimits().unread_bytes_max >> 20} MiB of answers unread",
        f"no more than {TURN_FRAMES} in one turn",
        f"has not arrived {RpcLimits().hello_timeout_s:g} s after",
        f"window of {WINDOW_BYTES >> 20} MiB",
        f"steps of at least {CREDIT_STEP_BYTES >> 10} KiB",
        f"in place; isopod does so below {RAW_BYTES_MIN >> 10} KiB",
        f"isopod compresses from {THRESHOLD_BYTES >> 10} KiB on",
        f"at most {f.HELLO_BYTES_MAX >> 10} KiB), and a map",
        f"at most {f.FRAME_BYTES_MAX >> 20} MiB), then an array",
        {3: "more than three times as long"}[HEARTBEATS_MISSED_MAX],
        f"bit {f.RAW_FLAG.bit_length() - 1} of the length",
        f"With bit {f.ZSTD_FLAG.bit_length() - 1} set",
    ],
)
def test_every_bound_is_told(words: str) -> None:
    assert words in TEXT
