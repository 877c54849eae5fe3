"""HttpLimits: what one server bears from its peers and its own handlers."""

import msgspec

from isopod.world.errors import InvalidArgument


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one `HttpServer`. Times are seconds; all must be above 0.

    What is over a bound is answered with the status in brackets where there is still someone to answer to, and the connection is closed.
    """

    head_bytes_max: int = 16 << 10
    """Request line and header section together [431]."""
    target_bytes_max: int = 8 << 10
    """The request target [414]."""
    header_fields_max: int = 100
    """[431]."""
    body_bytes_max: int = 4 << 20
    """A request's body as it is read; `Request.read` and `stream` may be given another bound [413]."""
    body_buffer_bytes: int = 64 << 10
    """How much of a body waits for its handler before the peer is slowed down."""
    discard_bytes_max: int = 256 << 10
    """How much of a body that no handler wants is received to save the connection."""
    head_s: float = 10.0
    """From a request's first byte to the end of its head, and from connecting to the first byte [408]."""
    body_s: float = 10.0
    """How often a body's pace is looked at [408]."""
    bytes_per_s_min: int = 240
    """The least pace of a peer that sends a body or takes a response, over one look."""
    handler_s: float = 300.0
    """How long a handler may take for its answer; the stream of a response's body is not part of it [504]."""
    idle_s: float = 60.0
    """How long a connection may stay open between requests."""
    write_s: float = 30.0
    """How often the pace of a peer that reads too slowly is looked at; a stalled one is cut off."""
    linger_s: float = 2.0
    """How long a refused peer may still send before it is cut off, so that it can read why."""
    half_closed_s: float = 5.0
    """How long a handler may go on, or a stream pause, for a peer that has shut down its sending side: it may be gone altogether."""
    connections_max: int = 10_000
    """Open connections of the server, upgraded ones included [503]."""
    pipelined_max: int = 32
    """Requests of one connection that are answered in one turn of the loop; the next wait for the other connections."""
    retry_after_s: int = 1
    """What a 503 tells the peer."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"HTTP limit {name}", getattr(self, name), "must be above 0")
