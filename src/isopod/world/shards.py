"""Shards: the port to the processes of one program that share nothing, one per core, and to what they send each other.

A shard is a process (in the simulation an owner in the same loop) that runs an entry function, given by name, with a World of its own.
Its `Link` to the one who started it carries small messages, and with them `Part`s: things that live in one process at a time, such as the
end of a channel or an accepted connection. A `Channel` carries the messages between two shards, in order, many at a time.

Not a protocol of calls, and no supervision: those are `isopod.runtime.shards`.

Rules: who starts a shard ends it; a shard whose link closes has lost its reason to live and ends, also when the starter was killed. A part
that is sent belongs to the receiver; one that is neither sent nor used is closed by its owner. Failures are OSErrors.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from isopod.world.errors import IsopodError
from isopod.world.network import Address, Listener, ProtocolFactory, ServerTls, TcpOptions
from isopod.world.processes import ProcessIdentity

ChannelKind = Literal["auto", "ring", "socketpair"]
"""How two shards' messages travel. "auto" is the ring where the machine has it: it was measured to be the faster one."""
MESSAGE_BYTES_MAX: Final = 16 << 20
"""The longest message of a channel."""
RING_BYTES: Final = 256 << 10
"""The size of a ring, each way, unless one is asked for. Longer messages pass through it in pieces."""
LINK_BYTES_MAX: Final = 64 << 10
"""The longest message of a link."""
LINK_PARTS_MAX: Final = 16
"""Parts that can go with one message of a link."""


class NumaNode(NamedTuple):
    """A memory node and those of its processors that we may use."""

    number: int
    cpus: tuple[int, ...]


class ChannelSettings(NamedTuple):
    """How channels are made.

    Args:
        kind: See `ChannelKind`.
        ring_bytes: The size of a ring, each way: a power of two from 4 KiB to 1 GiB.
        message_bytes_max: The longest message.
        spin_s: How long a reader keeps looking before it sleeps: shorter answers, at the price of a busy core. 0 never.
    """

    kind: ChannelKind = "auto"
    ring_bytes: int = RING_BYTES
    message_bytes_max: int = MESSAGE_BYTES_MAX
    spin_s: float = 0.0


class ChannelCounts(NamedTuple):
    """What went through a channel so far, and what waits to be sent."""

    n_messages_out: int
    n_bytes_out: int
    n_messages_in: int
    n_bytes_in: int
    n_messages_pending: int
    n_flushes: int
    """Writes of a whole batch."""
    n_wakeups: int
    """How often the peer had to be woken, or, over a socket, system calls made to send."""


class Part(Protocol):
    """Something that can be handed to another shard, once."""

    def close(self) -> None:
        """Give it up unused; after it was sent or used, nothing happens."""


class Channel(Protocol):
    """One end of a connection between two shards. Whole messages, in order. Who opened it closes it."""

    @property
    def kind(self) -> str:
        """How it travels: "ring", "socketpair" or "memory"."""

    def start(self, on_messages: Callable[[list[bytes]], None], on_closed: Callable[[IsopodError], None]) -> None:
        """Begin to receive, in the loop's thread and the caller's context.

        Args:
            on_messages: Gets what came since the last time, at least one message. Must not raise.
            on_closed: Called once when the peer is gone (`Disconnected`) or breaks the rules (`ProtocolViolation`); not after `close`.
        """

    def send(self, message: bytes) -> None:
        """Queue a message; those of one turn of the loop go out together. On a closed channel it is dropped.

        Raises:
            InvalidArgument: It is too long.
        """

    def statistics(self) -> ChannelCounts:
        """Return the counts so far."""

    def close(self) -> None:
        """Send what fits at once, then close; the peer's `on_closed` follows."""


class Link(Protocol):
    """Our end of the connection between a shard and who started it."""

    def start(self, on_message: Callable[[bytes, Sequence[Part]], None], on_closed: Callable[[], None]) -> None:
        """Begin to receive: messages with their parts, which belong to the callee; and once the end of the other side."""

    def send(self, message: bytes, parts: Sequence[Part] = ()) -> None:
        """Queue a message with its parts, which are gone for us. On a closed link both are dropped."""

    def write_log(self, line: bytes) -> None:
        """Write a line to the program's standard error (the simulation keeps it)."""

    def close(self) -> None:
        """Close our end."""


class ShardProcess(Protocol):
    """A started shard."""

    @property
    def identity(self) -> ProcessIdentity:
        """Who it is."""

    @property
    def link(self) -> Link:
        """Our end of its link."""

    async def wait(self) -> int:
        """Return its exit status (negative for a signal)."""

    async def end(self) -> None:
        """Kill it and return when it is gone. Programs that it started live on."""


Entry = Callable[..., Awaitable[None]]
"""What a shard runs: `async def entry(world: World, link: Link) -> None`."""


class Shards(Protocol):
    """Processors, shard processes, channels and accepted connections."""

    def topology(self) -> Sequence[NumaNode]:
        """Return the memory nodes with the processors that we may run on, by number; those without one are left out."""

    def pin(self, cpu: int) -> None:
        """Let this process run on that processor only. Memory it touches first from now on lies on its node."""

    def unpin(self) -> None:
        """Let this process run where it could before the first `pin`."""

    async def start(self, entry: str, *, name: str, cpu: int | None = None) -> ShardProcess:
        """Start a shard.

        Args:
            entry: "package.module:function", an `Entry`.
            name: For listings of processes.
            cpu: Where to pin it, before it imports anything; None does not.
        """

    def pair(self, settings: ChannelSettings) -> tuple[Part, Part]:
        """Make the two ends of a channel, to be sent to where they are opened."""

    def open_channel(self, part: Part, settings: ChannelSettings, peer: str) -> Channel:
        """Use an end that came; `peer` names the other one in errors. Each end must be opened with equal settings."""

    async def accept(
        self,
        address: Address,
        on_accept: Callable[[Part], None],
        *,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        options: TcpOptions | None = None,
    ) -> Listener:
        """Listen, and hand out accepted connections as parts. Arguments as for `Network.listen`; a part not wanted must be closed."""

    async def adopt(
        self, part: Part, factory: ProtocolFactory, *, on_gone: Callable[[], None], tls: ServerTls | None = None
    ) -> asyncio.BaseTransport:
        """Serve an accepted connection here.

        Args:
            part: What `accept` gave, here or in another shard.
            factory: Makes its protocol.
            on_gone: Called once when the connection's descriptor is closed, whoever is its protocol by then.
            tls: Secure it first.

        Raises:
            OSError: The connection is over.
        """
