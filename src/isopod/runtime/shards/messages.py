"""What shards say to each other, as data: calls on the channels, life and death on the links.

Bodies stay packed (`msgspec.Raw`) until it is known what type they are. Every message is one MessagePack array whose first element tells
which; a message that is none of them is a bug of ours, since both ends are the same program.
"""

from typing import Final, Generic, TypeVar

import msgspec

Body_co = TypeVar("Body_co", covariant=True)


class Ask(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=0, gc=False):
    """Call a verb of a shard (`instance` 0), or of its instance of a `Sharded`.

    `depth` counts how many calls between shards this one is nested in; `expires_at_s` is on the monotonic clock that all processes of a
    machine share (and that the loops' time is), so that time spent in a full channel counts; `group` is the caller's scheduling group.
    """

    id: int
    verb: str
    instance: int
    depth: int
    expires_at_s: float
    group: str
    body: Body_co


class Answer(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=1, gc=False):
    """The reply."""

    id: int
    body: Body_co


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """An error of the tree in place of the reply."""

    id: int
    code: str
    message: str
    hint: str
    exit_code: int


class Withdraw(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The caller does not want the answer any more. It gets one all the same: that is how its credit comes back."""

    id: int


Message = Ask[msgspec.Raw] | Answer[msgspec.Raw] | Failed | Withdraw

TEXT_CHARS_MAX: Final = 4096
"""What another shard is told of an error: its message and its hint, at most so long each."""

ENCODER: Final = msgspec.msgpack.Encoder()
MESSAGES: "Final[msgspec.msgpack.Decoder[Message]]" = msgspec.msgpack.Decoder(Message)


class Configure(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The first message to a new shard: who it is, and what it runs."""

    shard: int
    n_shards: int
    config: msgspec.Raw
    services: tuple[str, ...]
    main_path: str


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The shard's services have started."""


class NotReady(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The shard's services could not be started."""

    code: str
    message: str
    hint: str


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Here is your end of the channel to `shard`; it comes as a part."""

    shard: int
    number: int


class Attached(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The channel of that number is in use."""

    number: int


class Adopt(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Serve this accepted connection, which comes as a part, by the factory of that name. It is of the listener of that number."""

    name: str
    number: int


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """So many adopted connections of a listener have ended."""

    number: int
    n_connections: int


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """That shard died too often and will not come back."""

    shard: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Finish what runs within `grace_s`, stop the services, end."""

    grace_s: float


def sayable(text: str) -> str:
    """Return an error's text as another shard can be told it: bounded, and such that UTF-8 carries it (file names hold any bytes)."""
    return text[:TEXT_CHARS_MAX].encode("utf-8", "backslashreplace").decode()


Order = Configure | Ready | NotReady | Attach | Attached | Adopt | Gone | Lost | Stop
ORDERS: "Final[msgspec.msgpack.Decoder[Order]]" = msgspec.msgpack.Decoder(Order)
