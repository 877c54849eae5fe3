"""Method: one verb of a service as data, from which server and client are typed."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")
Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Reply]):
    """A verb.

    Args:
        name: "noun.verb", the name on the wire.
        request: The request's msgspec struct; `bytes` for bulk, which is handed on as it is.
        reply: The final answer's struct, or `bytes`.
        sends: Struct, or union of tagged structs, that the client may stream after the request; None for no such stream.
        receives: The same for what the server streams before the reply. Both may be `bytes`.
        idempotent: Whether serving the same request twice does no harm, so that a client may repeat it when it cannot know what became of
            the first.
    """

    name: str
    request: type[Request]
    reply: type[Reply]
    sends: Any = None  # a type or a union of types: typing has no name for that in 3.11
    receives: Any = None
    idempotent: bool = False
