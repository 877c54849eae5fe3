"""The decoders of one method, made once and kept: what turns a packed body into the method's types, and failures into the tree."""

from typing import Any, Generic, TypeVar

import msgspec

from isopod.wire.service import Method
from isopod.world.errors import InvalidArgument, ProtocolViolation

Request = TypeVar("Request")
Reply = TypeVar("Reply")

ItemDecoder = msgspec.msgpack.Decoder[Any]  # of a union that typing cannot name, see Method


class Codec(Generic[Request, Reply]):
    """A method's four decoders; None where it has no such stream."""

    __slots__ = ("_reply", "_request", "method", "receives", "sends")

    def __init__(self, method: Method[Request, Reply]) -> None:
        self.method = method
        self._request = msgspec.msgpack.Decoder(method.request)
        self._reply = msgspec.msgpack.Decoder(method.reply)
        self.sends: ItemDecoder | None = None if method.sends is None else msgspec.msgpack.Decoder(method.sends)
        self.receives: ItemDecoder | None = None if method.receives is None else msgspec.msgpack.Decoder(method.receives)

    def decode_request(self, body: msgspec.Raw | bytes) -> Request:
        """Return the request.

        Raises:
            InvalidArgument: It is not one; the field is named.
        """
        try:
            return self._request.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            why, _, path = str(error).partition(" - at `$")
            field = path.rstrip("`").lstrip(".")
            if field and "required field" not in why:
                raise InvalidArgument("field", field, why, f"in a request of {self.method.name}") from None
            raise InvalidArgument("request of", self.method.name, f"{field}: {why}" if field else why) from None

    def decode_reply(self, body: msgspec.Raw, peer: str) -> Reply:
        """Return the reply.

        Raises:
            ProtocolViolation: It is not one.
        """
        return _decode(self._reply, body, f"reply of {self.method.name}", peer)


def decode_item(decoder: ItemDecoder, body: msgspec.Raw, *, method: str, peer: str) -> Any:  # of the decoder's type
    """Return an item of a stream.

    Raises:
        ProtocolViolation: It is not one.
    """
    return _decode(decoder, body, f"item of {method}", peer)


T = TypeVar("T")


def _decode(decoder: "msgspec.msgpack.Decoder[T]", body: msgspec.Raw, what: str, peer: str) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolViolation(peer, f"{what}: {error}") from None
