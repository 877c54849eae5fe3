"""RPC: typed methods over one connection, with deadlines, cancellation and streams both ways (docs/protocol.md)."""

from isopod.net.rpc.client import Client, ClientCall, connect
from isopod.net.rpc.connection import RpcLimits
from isopod.net.rpc.server import Call, Handler, Server

__all__ = ["Call", "Client", "ClientCall", "Handler", "RpcLimits", "Server", "connect"]
