"""The OCI image configuration, read and written."""

import json

import pytest

from isopod.api.messages import ImageConfig
from isopod.engine.images.config import History, digest_bytes, extend_config, oci_architecture, parse_config, write_config
from isopod.engine.images.signals import parse_signal, signal_name
from isopod.world.errors import BadArchive

DIFF_A = "sha256:" + "a" * 64
DIFF_B = "sha256:" + "b" * 64
FULL = ImageConfig(
    env={"PATH": "/bin", "EMPTY": "", "EQ": "a=b"},
    entrypoint=("/init", "--"),
    command=("sh", "-c", "true"),
    working_dir="/srv",
    user="app:web",
    labels={"k": "v"},
    stop_signal=3,
)


def test_what_is_written_reads_back() -> None:
    data = write_config("arm64", FULL, DIFF_A, History(1_700_000_000_123_456_000, "isopod import"))

    parsed = parse_config(data, "x")

    assert parsed.config == FULL
    assert (parsed.architecture, parsed.operating_system) == ("arm64", "linux")
    assert parsed.created_at_ns == 1_700_000_000_123_456_000
    assert parsed.diff_ids == (DIFF_A,)
    assert parsed.created_by == ("isopod import",)
    assert json.loads(data)["config"]["StopSignal"] == "SIGQUIT"


def test_equal_facts_give_equal_bytes() -> None:
    data = [write_config("amd64", FULL, DIFF_A, History(5, "x")) for _ in range(2)]

    assert digest_bytes(data[0]) == digest_bytes(data[1])


def test_a_commit_keeps_what_isopod_does_not_know() -> None:
    base = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "author": "somebody",
            "config": {"ExposedPorts": {"80/tcp": {}}, "Cmd": ["old"], "Healthcheck": {"Test": ["NONE"]}},
            "rootfs": {"type": "layers", "diff_ids": [DIFF_A]},
            "history": [{"created_by": "ADD"}, {"created_by": "ENV", "empty_layer": True}],
        }
    ).encode()

    data = extend_config(base, FULL, DIFF_B, History(7, "isopod commit"))

    document, parsed = json.loads(data), parse_config(data, "x")
    assert parsed.diff_ids == (DIFF_A, DIFF_B)
    assert parsed.created_by == ("ADD", "isopod commit")
    assert parsed.config == FULL
    assert document["author"] == "somebody"
    assert document["config"]["ExposedPorts"] == {"80/tcp": {}}
    assert document["config"]["Healthcheck"] == {"Test": ["NONE"]}


def test_null_means_absent() -> None:
    config = dict.fromkeys(("Env", "Entrypoint", "Cmd", "WorkingDir", "User", "Labels", "StopSignal"))
    data = json.dumps({"created": None, "config": config, "history": None, "rootfs": {"diff_ids": None}, "os": None}).encode()

    parsed = parse_config(data, "x")

    assert parsed.config == ImageConfig()
    assert parsed.diff_ids == ()
    assert parsed.created_at_ns is None
    assert parse_config(b'{"rootfs":{},"config":null}', "x").config == ImageConfig()


def test_odd_but_legal_values() -> None:
    process = {"Env": ["A=1", "B", "=x", "A=2"], "WorkingDir": "srv"}

    parsed = parse_config(json.dumps({"rootfs": {}, "config": process, "created": "0001-01-01T00:00:00Z"}).encode(), "x")

    assert parsed.config.env == {"A": "2", "B": ""}
    assert parsed.config.working_dir == "/srv"
    assert parsed.created_at_ns == 0


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "not an image configuration"),
        (b"[]", "not an image configuration"),
        (b"{}", "rootfs"),
        (b"\xff\xfe", "not an image configuration"),
        (b'{"rootfs":{},"x":"\xff"}', "not an image configuration"),
        (b'{"rootfs":{},"config":{"Env":{"A":"1"}}}', "Env"),
        (b'{"rootfs":{},"config":{"Cmd":"sh"}}', "Cmd"),
        (b'{"rootfs":{},"config":{"Cmd":["a\\u0000b"]}}', "NUL"),
        (b'{"rootfs":{},"config":{"Env":["A=\\u0000"]}}', "NUL"),
        (b'{"rootfs":{},"config":{"StopSignal":"SIGFOO"}}', "SIGFOO"),
        (b'{"rootfs":{"diff_ids":["sha256:../../etc"]}}', "not a sha256 digest"),
        (b'{"rootfs":{"diff_ids":["md5:aaaa"]}}', "not a sha256 digest"),
        (b'{"rootfs":{},"created":"yesterday"}', "created"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"rootfs":{"diff_ids":[' + b",".join([b'"sha256:' + b"a" * 64 + b'"'] * 128) + b"]}}", "more than 127 layers"),
    ],
)
def test_damaged_configurations_are_refused_by_file(data: bytes, why: str) -> None:
    with pytest.raises(BadArchive, match=why) as caught:
        parse_config(data, "abc.json")
    assert caught.value.entry == "abc.json"


@pytest.mark.parametrize(
    "text, number",
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("SIGRTMAX", 64),
        ("POLL", 29),
        ("SYS", 31),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number
    assert parse_signal(signal_name(number)) == number


@pytest.mark.parametrize("text", ["", "SIG", "FOO", "0", "65", "-9", "9999", "RTMIN+31", "RTMIN-1", "RTMINx", "RTMAX+1", "\u0663"])
def test_what_is_no_signal(text: str) -> None:
    assert parse_signal(text) is None


def test_architectures_by_their_oci_names() -> None:
    assert [oci_architecture(machine) for machine in ("x86_64", "aarch64", "riscv64")] == ["amd64", "arm64", "riscv64"]
