"""FaceSettings: what the node tells the face when it starts it, in one message on the link between them."""

import ipaddress
from typing import Final

import msgspec

from isopod.world.errors import InvalidArgument
from isopod.world.network import TcpAddress, parse_address

REQUEST_BYTES_MAX: Final = 1 << 20
"""Requests hold names and command lines; grpcio reads each one whole before anybody looks at it."""
REPLY_BYTES_MAX: Final = 4 << 20
"""What a standard client takes without being told to."""
CALLS_MAX: Final = 256
"""Calls that are served at once; more are refused with RESOURCE_EXHAUSTED."""
CONNECTIONS_MAX: Final = 256
STREAMS_MAX: Final = 100
"""Calls of one connection at once; the client queues the rest."""
METADATA_BYTES_MAX: Final = 16 << 10
HANDSHAKE_S: Final = 10.0
IDLE_S: Final = 600.0
"""A connection without a call is closed after so long."""


class FaceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the face is told.

    Args:
        listen: Where: "HOST:PORT" or "unix:PATH".
        socket: The node's own socket.
        node_id: The node's id in its cluster, 1 for a node that is in none.
        has_engine: Whether the node runs anything.
        is_replicated: Whether the node holds the replicated store.
        cert_file: PEM of the certificate to show, "" for no TLS; with it come the other two.
        key_file: PEM of its key.
        ca_file: PEM of whom clients must be certified by.
        vm_image: What a virtual machine is made of whose request names no configuration.
        vm_command: What such a machine runs; empty for what its image says.
        task_image: What tasks run in.
        test_services: Whether to serve RaftConsensusService.
        log_level: The least level logged.
    """

    listen: str
    socket: str
    node_id: int = 1
    has_engine: bool = True
    is_replicated: bool = False
    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""
    vm_image: str = "isopod/busybox"
    vm_command: tuple[str, ...] = ("sleep", "infinity")
    task_image: str = "isopod/busybox"
    test_services: bool = False
    log_level: str = "info"

    @property
    def is_secured(self) -> bool:
        """Whether connections are made by mutual TLS."""
        return bool(self.cert_file)


def check_listen(settings: FaceSettings) -> None:
    """Refuse a place that may not be served as it is told.

    Raises:
        InvalidArgument: It is no address; other machines reach it and there is no TLS; or some of the three files are missing.
    """
    files = (settings.cert_file, settings.key_file, settings.ca_file)
    if any(files) and not all(files):
        raise InvalidArgument("grpc.cert_file", settings.cert_file, "TLS is mutual", "give grpc.cert_file, grpc.key_file and grpc.ca_file")
    try:
        address = parse_address(settings.listen)
    except ValueError as error:
        raise InvalidArgument("grpc.listen", settings.listen, "it is no address", "want HOST:PORT or unix:/PATH") from error
    if not isinstance(address, TcpAddress) or settings.is_secured or address.host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        hint = "give grpc.cert_file, grpc.key_file and grpc.ca_file, or listen on 127.0.0.1 or unix:PATH"
        raise InvalidArgument("grpc.listen", settings.listen, "other machines reach it, which needs mutual TLS", hint)
