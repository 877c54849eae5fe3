"""Row R12: every message of the contract, and every frame around it, survives the wire: msgspec's codec and the lean one."""

import inspect
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.api import messages, methods
from isopod.wire import frames as f
from isopod.wire import minipack
from isopod.wire.decoder import StreamDecoder
from isopod.wire.service import Method
from tests.wire.strategies import from_struct

STRUCTS: list[type[msgspec.Struct]] = [
    kind for _, kind in inspect.getmembers(messages, inspect.isclass) if issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct
]
MESSAGES = [kind for kind in STRUCTS if kind not in (messages.Message, messages.Item)]
CASES = settings(max_examples=40, deadline=None)


def plain(value: object) -> Any:
    """Return a message as MessagePack's plain values (so that Raw parts compare by their contents)."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), strict=False)


def test_the_contract_is_not_empty() -> None:
    assert len(MESSAGES) > 40
    assert {kind.__name__ for kind in MESSAGES} >= {"Container", "RunContainer", "Stdout", "Image", "NetworkRecord", "RenderRequest"}


@pytest.mark.row("R12")
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@CASES
@given(data=st.data())
def test_a_message_survives_both_codecs(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(from_struct(kind))
    packed = msgspec.msgpack.encode(message)
    again = msgspec.msgpack.decode(packed, type=kind)
    assert type(again) is kind
    assert plain(again) == plain(message)
    if kind is not messages.RenderRequest:  # its Raw compares by identity
        assert again == message
    lean = minipack.decode(packed)
    assert lean == plain(message)
    assert plain(msgspec.msgpack.decode(minipack.encode(lean), type=kind)) == plain(message)


@pytest.mark.row("R12")
@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
@CASES
@given(data=st.data())
def test_every_frame_of_a_method_survives(method: Method[Any, Any], data: st.DataObject) -> None:
    request, reply = data.draw(from_struct(method.request)), data.draw(from_struct(method.reply))
    sent: list[f.OutFrame] = [f.Request(1, method.name, 30_000, request), f.Reply(1, reply, 12)]
    kinds: list[Any] = [method.request, method.reply]
    for stream in (method.sends, method.receives):
        for kind in _members(stream):
            sent.append(f.Item(1, data.draw(from_struct(kind))))
            kinds.append(stream)
    decoder = StreamDecoder()
    received = decoder.feed(f.encode_hello(f.Hello((1, 1), "x")) + b"".join(f.encode_frame(frame) for frame in sent))
    assert len(received) == len(sent)
    for (frame, _), original, kind in zip(received, sent, kinds, strict=True):
        assert type(frame) is type(original)
        assert isinstance(frame, f.Request | f.Reply | f.Item)
        assert isinstance(original, f.Request | f.Reply | f.Item)
        body = msgspec.msgpack.decode(frame.body, type=kind)
        assert type(body) is type(original.body)
        assert plain(body) == plain(original.body)
        lean = minipack.decode(f.encode_frame(original)[4:])
        assert minipack.decode(minipack.encode(lean)) == lean == plain(original)


@pytest.mark.row("R12")
def test_streams_are_unions_of_tagged_items() -> None:
    for method in methods.METHODS:
        for stream in (method.sends, method.receives):
            for kind in _members(stream):
                assert issubclass(kind, messages.Item)
                assert kind.__struct_config__.tag


def _members(stream: Any) -> list[Any]:
    if stream is None:
        return []
    return list(stream.__args__) if hasattr(stream, "__args__") else [stream]
