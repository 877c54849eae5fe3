"""Stream servers and clients over TCP and Unix sockets, plain or with TLS: connections to read from and write to."""

from isopod.net.tcp.client import TcpClient, connect_tcp
from isopod.net.tcp.connection import Connection, ConnectionStatistics, TcpLimits
from isopod.net.tcp.server import TcpServer, TcpServerStatistics

__all__ = [
    "Connection",
    "ConnectionStatistics",
    "TcpClient",
    "TcpLimits",
    "TcpServer",
    "TcpServerStatistics",
    "connect_tcp",
]
