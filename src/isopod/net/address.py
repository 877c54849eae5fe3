"""Addresses as text: "HOST:PORT", "[::1]:80", "unix:/run/x.sock", and the same with a scheme in front ("tcp://HOST:PORT").

A pure function each way. Who wants an address's numeric form asks a resolver.
"""

from isopod.world.errors import InvalidArgument
from isopod.world.network import Address, TcpAddress, UnixAddress

_PORT_MAX = 65535


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Read an address.

    Args:
        text: What a user wrote.
        default_port: For a host without a port; None: a port is needed.

    Raises:
        InvalidArgument: It is none.
    """
    rest = text.removeprefix("tcp://")
    for prefix in ("unix://", "unix:"):
        if text.startswith(prefix):
            return _unix(text, text.removeprefix(prefix))
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise InvalidArgument("address", text, "want [HOST]:PORT")
        return TcpAddress(host, _port(text, tail[1:], default_port))
    host, _, port = rest.partition(":") if rest.count(":") == 1 else (rest, "", "")
    return TcpAddress(host, _port(text, port, default_port))


def format_address(address: Address) -> str:
    """Return an address as `parse_address` reads it."""
    if isinstance(address, UnixAddress):
        return f"unix:{address.path}"
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def _unix(text: str, path: str) -> UnixAddress:
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument("address", text, "want unix:/ABSOLUTE/PATH")
    return UnixAddress(path)


def _port(text: str, port: str, default: int | None) -> int:
    if not port and default is not None:
        return default
    if not (port.isascii() and port.isdigit()) or int(port) > _PORT_MAX:
        raise InvalidArgument("address", text, f"want HOST:PORT, the port 0 to {_PORT_MAX}")
    return int(port)
