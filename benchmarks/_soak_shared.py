"""What the soak's server, its clients and its judge share: addresses, methods, the shape of a look, and certificates."""

from pathlib import Path
from typing import Final

import msgspec

from isopod.net.ca import Authority, Subject
from isopod.wire.service import Method
from isopod.world.host.world import make_host_world
from isopod.world.network import ClientTls, ServerTls, TlsMaterial

PIECE: Final = bytes(range(256)) * 64
"""16 KiB."""
FILE_BYTES: Final = 1 << 20
LARGE_BYTES: Final = 8 << 20
N_PIECES: Final = 16


class Message(msgspec.Struct, frozen=True):
    """A request and a reply."""

    text: str = ""
    number: int = 0


class Ports(msgspec.Struct, frozen=True):
    """Where the server listens; the Unix sockets lie in its folder."""

    http: int
    https: int
    rpc: int
    web: int


class Look(msgspec.Struct):
    """What one process of the server holds, as it says itself. Fields from `transports` on are counted among all Python objects, after a
    collection of garbage, only when a deep look is asked for: that takes some tenths of a second."""

    shard: int
    pid: int
    tasks: list[str]
    connections: int
    """HTTP and WebSocket, by their own count."""
    websockets: int
    rpc_connections: int
    calls_open: int
    adopted: int
    """Connections handed out to this shard."""
    shard_calls: int
    """Calls to and from other shards that are under way."""
    transports: int = 0
    protocols: int = 0
    timers: int = 0
    """On all wheels."""
    objects: dict[str, int] = {}
    """How many of each type."""


class Ask(msgspec.Struct, frozen=True):
    """A request for a `Look`."""

    deep: bool = False


LOOK: Final = Method("soak.look", Ask, Look)
ADD: Final = Method("soak.add", Message, Message, idempotent=True)
"""Between shards."""
ECHO: Final = Method("soak.echo", Message, Message, idempotent=True)
PLAIN: Final = Method("soak.plain", Message, Message, idempotent=True)
SLOW: Final = Method("soak.slow", Message, Message)
"""Sleeps `number` milliseconds."""
FAIL: Final = Method("soak.fail", Message, Message)
TICK: Final = Method("soak.tick", Message, Message)
SHARDED: Final = Method("soak.sharded", Message, Message)
"""Is passed on to shard `number`."""
UPPER: Final = Method("soak.upper", Message, Message, sends=bytes, receives=bytes)
BULK: Final = Method("soak.bulk", Message, Message, receives=bytes)
"""Streams `number` bytes."""


def write_certificates(folder: Path) -> None:
    """Write an authority, and what the server and its clients show."""
    world = make_host_world()
    try:
        authority = Authority.create(world, "soak")
        (folder / "ca.crt").write_bytes(authority.certificate)
        for name, purpose in (("server", "server"), ("client", "client")):
            issued = authority.issue(Subject(name, addresses=("127.0.0.1",), purpose="server" if purpose == "server" else "client"))
            (folder / f"{name}.crt").write_bytes(issued.certificate)
            (folder / f"{name}.key").write_bytes(issued.key)
    finally:
        world.close()


def server_tls(folder: Path, *, mutual: bool) -> ServerTls:
    """Return what the server presents; `mutual` asks clients for a certificate. Handshakes get two seconds."""
    certificate, key, authorities = ((folder / name).read_bytes() for name in ("server.crt", "server.key", "ca.crt"))
    return ServerTls(TlsMaterial(certificate, key, authorities, client_auth="required" if mutual else "none"), handshake_s=2.0)


def client_tls(folder: Path) -> ClientTls:
    """Return what clients show."""
    certificate, key, authorities = ((folder / name).read_bytes() for name in ("client.crt", "client.key", "ca.crt"))
    return ClientTls(TlsMaterial(certificate, key, authorities))
