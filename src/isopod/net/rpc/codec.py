"""The decoders of one method, made once and kept: what turns a body into the method's types, and failures into the tree.

A method has one codec for each encoding. Types of plain `bytes` (bulk) also come as raw bodies, outside their frame's array: then the
body is a `memoryview`, and copying it out of the received piece is all that is done.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from isopod.wire.frames import Encoding
from isopod.wire.service import Method
from isopod.world.errors import InvalidArgument, ProtocolViolation

Request = TypeVar("Request")
Reply = TypeVar("Reply")

Body = msgspec.Raw | bytes | memoryview
"""A body as received: packed, or (a memoryview) raw."""
Decode = Callable[[Any], Any]  # from a Body to a type that typing cannot name (a union, see Method)
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class Codec(Generic[Request, Reply]):
    """A method's four decoders; None where it has no such stream. `request` and `reply` are for hot paths: they raise `DECODE_ERRORS`."""

    __slots__ = ("method", "receives", "reply", "request", "sends")

    def __init__(self, method: Method[Request, Reply], encoding: Encoding = "msgpack") -> None:
        self.method = method
        self.request: Callable[[Any], Request] = _decoder(method.request, encoding)
        self.reply: Callable[[Any], Reply] = _decoder(method.reply, encoding)
        self.sends: Decode | None = None if method.sends is None else _item_decoder(method.sends, encoding)
        self.receives: Decode | None = None if method.receives is None else _item_decoder(method.receives, encoding)

    def decode_request(self, body: Body) -> Request:
        """Return the request.

        Raises:
            InvalidArgument: It is not one; the field is named.
        """
        try:
            return self.request(body)
        except DECODE_ERRORS as error:
            raise self.explain(error) from None

    def explain(self, error: Exception) -> InvalidArgument:
        """Return what was wrong with a request."""
        why, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        if field and "required field" not in why:
            return InvalidArgument("field", field, why, f"in a request of {self.method.name}")
        return InvalidArgument("request of", self.method.name, f"{field}: {why}" if field else why)

    def decode_reply(self, body: Body, peer: str) -> Reply:
        """Return the reply.

        Raises:
            ProtocolViolation: It is not one.
        """
        try:
            return self.reply(body)
        except DECODE_ERRORS as error:
            raise ProtocolViolation(peer, f"reply of {self.method.name}: {error}") from None


def decode_item(decode: Decode, body: Body, *, method: str, peer: str) -> Any:  # of the decoder's type
    """Return an item of a stream.

    Raises:
        ProtocolViolation: It is not one.
    """
    try:
        return decode(body)
    except DECODE_ERRORS as error:
        raise ProtocolViolation(peer, f"item of {method}: {error}") from None


def _decoder(kind: Any, encoding: Encoding) -> Decode:
    packed = (msgspec.msgpack.Decoder(kind) if encoding == "msgpack" else msgspec.json.Decoder(kind)).decode
    if kind is not bytes:
        return packed

    def decode(body: Body) -> bytes:
        return bytes(body) if type(body) is memoryview else packed(body)

    return decode


def _item_decoder(kind: Any, encoding: Encoding) -> Decode:
    decode = _decoder(kind, encoding)
    if kind is bytes:
        return decode

    def checked(body: Body) -> Any:  # of that kind
        if type(body) is memoryview:
            raise ValueError("it has no raw body")
        return decode(body)

    return checked
