"""RPC: typed methods over one connection, with deadlines, cancellation, streams both ways, notices and heartbeats (docs/protocol.md)."""

from isopod.net.rpc.call import Call, Handler, Later
from isopod.net.rpc.client import Client
from isopod.net.rpc.client_call import ClientCall
from isopod.net.rpc.codes import RpcErrorCode, error_from_number, number_of
from isopod.net.rpc.connect import ReconnectingClient, RetryPolicy, connect, may_repeat
from isopod.net.rpc.limits import RpcLimits
from isopod.net.rpc.reflection import REFLECT, Reflection, ReflectRequest
from isopod.net.rpc.server import Server

__all__ = [
    "REFLECT",
    "Call",
    "Client",
    "ClientCall",
    "Handler",
    "Later",
    "ReconnectingClient",
    "ReflectRequest",
    "Reflection",
    "RetryPolicy",
    "RpcErrorCode",
    "RpcLimits",
    "Server",
    "connect",
    "error_from_number",
    "may_repeat",
    "number_of",
]
