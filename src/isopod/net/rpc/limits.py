"""RpcLimits: the bounds of a server and, where they apply, of a client. Times are seconds."""

from typing import Final, NamedTuple

HEARTBEAT_S_MIN: Final = 0.05
"""No peer gets more frequent looks, whatever it asks for or grants: each costs a timer on every connection."""
HEARTBEATS_MISSED_MAX: Final = 3
"""A peer that was silent for so many intervals, asked in each, is dead."""


class RpcLimits(NamedTuple):
    """Bounds of a server (and, where they apply, of a client)."""

    connections_max: int = 1024
    calls_max: int = 256
    """Open calls per connection."""
    in_flight_bytes_max: int = 64 << 20
    """Per connection: requests being served and stream items not yet taken by their handlers."""
    server_bytes_max: int = 256 << 20
    """The same of all connections together, with what was written and not yet read by peers."""
    unread_bytes_max: int = 32 << 20
    """Per connection: what was written and not yet read by its peer. One that lets more pile up is dropped."""
    retry_after_s: float = 0.1
    """What a caller is told to wait who was refused for one of these bounds."""
    hello_timeout_s: float = 5.0
    write_high_water_bytes: int = 256 << 10
    heartbeat_s: float = 0.0
    """A client asks for so short a silence, 0 for any; a server grants no shorter one than this (nor than 50 ms)."""
    close_grace_s: float = 1.0
    """How long a closed connection may take to hand its last bytes to the peer."""
    cancel_grace_s: float = 5.0
    """How long handlers may take to clean up once they were cancelled on the way down."""
