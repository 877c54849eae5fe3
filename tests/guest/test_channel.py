"""The agent's side of the protocol: greetings, streams, and a host that breaks the rules."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.wire.agent import MAIN_STREAM, WINDOW_BYTES, Kind, encode, encode_json
from tests.guest.machine import Channel, Failed

pytestmark = [pytest.mark.host, pytest.mark.slow]

PING = encode(Kind.PING, 0, b"01234567")


def is_alive(channel: Channel) -> bool:
    """Whether the agent takes a new conversation and runs a command."""
    channel.greet()
    return channel.run("/bin/true").code == 0


def test_the_greeting_says_who_is_there(channel: Channel) -> None:
    hello = channel.hello
    assert (hello["version"], hello["agent"], hello["cpus"], hello["main"]) == (1, "0.1.0", 1, "none")
    assert hello["kernel"].startswith("6.")
    assert len(hello["boot_id"]) == 36
    assert 64 << 20 < hello["memory_bytes"] < 160 << 20


@pytest.mark.parametrize("payload", [b"{", b"[]", b"{}", b'{"op":1}', b"\xff\xfe", b""])
def test_a_request_that_makes_no_sense_is_invalid(channel: Channel, payload: bytes) -> None:
    stream = channel.new_stream()
    channel.send(encode(Kind.REQUEST, stream, payload))
    with pytest.raises(Failed) as caught:
        channel.answer(stream)
    assert caught.value.code == "invalid"


def test_an_unknown_operation_is_unsupported(channel: Channel) -> None:
    with pytest.raises(Failed) as caught:
        channel.request("levitate")
    assert caught.value.code == "unsupported"


def test_the_machine_is_configured_once(channel: Channel) -> None:
    with pytest.raises(Failed) as caught:
        channel.request("configure", layers=[["l0i", None]])
    assert caught.value.code == "busy"
    assert channel.request("prepare", layers=[["l0i", None], ["l1i", None]]) == {}, "the same layers once more are no mistake"
    with pytest.raises(Failed) as caught:
        channel.request("prepare", layers=[["l1i", None]])
    assert caught.value.code == "busy"


@pytest.mark.parametrize(
    "broken",
    [
        struct.pack("<IBI", 4, 1, 0),
        struct.pack("<IBI", 1 << 20, 1, 0),
        struct.pack("<IBI", 5, 99, 0),
        b"\xff" * 64,
        encode(Kind.REQUEST, 7, json.dumps({"op": "exec", "argv": ["/bin/sleep", "9"]}).encode()) * 2,
    ],
    ids=["short", "long", "unknown", "noise", "a stream in use"],
)
def test_after_a_broken_frame_the_next_greeting_is_answered(channel: Channel, broken: bytes) -> None:
    channel.send(broken + PING)
    assert is_alive(channel)
    assert channel.run("/bin/true").code == 0


def test_more_than_was_granted_breaks_the_channel(channel: Channel) -> None:
    stream = channel.begin("/bin/sleep", "5", stdin=True)
    for _ in range(WINDOW_BYTES // 65_536 + 2):
        channel.send(encode(Kind.STDIN, stream, bytes(65_536)))
    channel.pongs.clear()
    assert is_alive(channel)


@pytest.mark.parametrize("kind", [Kind.RESIZE, Kind.SIGNAL, Kind.CREDIT, Kind.DATA, Kind.EXIT])
def test_a_frame_without_sense_on_its_stream_breaks_the_channel(channel: Channel, kind: Kind) -> None:
    stream = channel.begin("/bin/sleep", "5")
    channel.send(encode(kind, stream, b"123"))
    assert is_alive(channel)


def test_late_frames_are_dropped(channel: Channel) -> None:
    for kind in (Kind.STDIN, Kind.STDIN_END, Kind.RESIZE, Kind.SIGNAL, Kind.CREDIT, Kind.DATA, Kind.DATA_END, Kind.CLOSE):
        channel.send(encode(kind, 4711, b"1234"))
    channel.pongs.clear()
    channel.send(PING)
    channel.wait(lambda: channel.pongs == [b"01234567"], "no answer")


@settings(max_examples=25)
@given(noise=st.binary(min_size=1, max_size=300))
def test_noise_harms_nobody(guest: object, noise: bytes) -> None:
    channel = guest.channel  # type: ignore[attr-defined]
    channel.send(noise)
    # What the noise began may be a long frame: greetings are swallowed by it until it is whole.
    channel.send(bytes(66_000))
    assert is_alive(channel)


def test_a_greeting_forgets_streams_and_leaves_commands_alone(channel: Channel) -> None:
    stream = channel.begin("/bin/sh", "-c", "sleep 0.3; yes | head -c 1000000; echo done >/tmp/forgotten")
    channel.greet()
    channel.wait(lambda: channel.shell("test -e /tmp/forgotten").code == 0, "it does not run on")
    assert not channel.has(stream, Kind.STDOUT, Kind.EXIT)
    assert channel.request("metrics", stream), "the number is free again"


def test_the_main_command_has_stream_1_and_outlives_greetings(channel: Channel) -> None:
    with pytest.raises(Failed) as caught:
        channel.begin("/bin/true", op="start")
    assert caught.value.code == "invalid"
    with pytest.raises(Failed) as caught:
        channel.begin("/no/such", op="start", stream=MAIN_STREAM)
    assert caught.value.code == "not_found", "and it may be tried again"
    channel.begin("/bin/sh", "-c", "read a; echo $a; read b; exit 5", op="start", stream=MAIN_STREAM, stdin=True)
    assert channel.greet()["main"] == "running"
    channel.write(MAIN_STREAM, b"hello\n")
    channel.wait(lambda: channel.output(MAIN_STREAM) == b"hello\n", "it is not heard")
    assert channel.request("metrics")["main"]["n_pids"] == 1
    channel.write(MAIN_STREAM, b"\n")
    assert channel.end(MAIN_STREAM).code == 5
    assert channel.greet()["main"] == "exited"
    assert channel.end(MAIN_STREAM).code == 5, "who greets later is told again"
    with pytest.raises(Failed) as caught:
        channel.begin("/bin/true", op="start", stream=MAIN_STREAM)
    assert caught.value.code == "busy"


def test_streams_have_a_bound(channel: Channel) -> None:
    channel.send(encode_json(Kind.REQUEST, 0, {"op": "metrics"}))
    assert is_alive(channel)
