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
        request: The request's msgspec struct.
        reply: The final answer's struct.
        sends: Struct, or union of tagged structs, that the client may stream after the request; None for no such stream.
        receives: The same for what the server streams before the reply.
    """

    name: str
    request: type[Request]
    reply: type[Reply]
    sends: Any = None  # a type or a union of types: typing has no name for that in 3.11
    receives: Any = None
