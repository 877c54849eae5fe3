"""GrpcServer: grpcio's asyncio server, and what every call passes through on its way to a handler.

Rules: a request is decoded here and not by grpcio, so that one that is malformed ends with INVALID_ARGUMENT and no traceback; each call has
a deadline, the client's or ours, whichever is nearer; whatever a handler raises becomes a status, and only what is our own fault is logged
with its traceback. Everything a client can make grow has a bound in `settings`. A handler that is not there, or one too many, is found when
the server is made.

What is not bounded here: grpcio reads a message whole before it looks at it, up to its limit for each call that may be open at once.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection

from isopod.faces.grpc import settings as bounds
from isopod.faces.grpc.node import CALL_S, START_S, Asked, Fields
from isopod.faces.grpc.schema import Method, Schema
from isopod.faces.grpc.statuses import CODE_KEY, Status, status_of
from isopod.runtime.logger import Logger
from isopod.world.errors import BugError, DeadlineExceeded, IsopodError, UnavailableError

Handler = Callable[[Asked], Awaitable[Fields]]
Handlers = Mapping[str, Handler]
"""By the path of the call: "/blixard.ClusterService/StartVm"."""
LONG: Final = ("StartVm", "StopVm", "JoinCluster", "LeaveCluster")
"""Calls that wait for machines or members."""
_SOON_S: Final = 0.05
"""So much before the client's deadline a call ends, so that it hears why."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", bounds.REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", bounds.REPLY_BYTES_MAX),
    ("grpc.max_metadata_size", bounds.METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", bounds.METADATA_BYTES_MAX),
    ("grpc.max_concurrent_streams", bounds.STREAMS_MAX),
    ("grpc.max_allowed_incoming_connections", bounds.CONNECTIONS_MAX),
    ("grpc.max_connection_idle_ms", int(bounds.IDLE_S * 1000)),
    ("grpc.server_handshake_timeout_ms", int(bounds.HANDSHAKE_S * 1000)),
    ("grpc.so_reuseport", 0),  # a second server at the same place is an error, not a rival
    ("grpc.enable_http_proxy", 0),
)


class GrpcServer:
    """One server. Start it, and stop it.

    Args:
        schema: What there is to be served.
        handlers: Who serves it.
        logger: Told of our own faults, and at debug level of every call.
        services: Which of the schema's services to serve.

    Raises:
        BugError: A call has no handler, or a handler no call.
    """

    def __init__(self, schema: Schema, handlers: Handlers, logger: Logger, *, services: tuple[str, ...]) -> None:
        self._logger = logger
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=bounds.CALLS_MAX)
        served = {method.path: method for name in services for method in schema.services[name]}
        if sorted(served) != sorted(handlers):
            wrong = [path for path in (*served, *handlers) if (path in served) != (path in handlers)]
            raise BugError(f"calls and handlers of the gRPC face do not agree: {', '.join(wrong)}")
        for name in services:
            table = {method.name: self._serve(method, handlers[method.path]) for method in schema.services[name]}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, table),))
        reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], self._server, pool=schema.pool)

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
        """Listen and serve; return where, with the port that was chosen where 0 was asked for.

        Args:
            address: "HOST:PORT" or "unix:PATH".
            credentials: For TLS.

        Raises:
            UnavailableError: The address is in use, or not ours.
        """
        try:
            if credentials is not None:
                port = self._server.add_secure_port(address, credentials)
            else:  # on loopback, or a Unix socket
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:  # grpcio says no more than that it could not
            hint = "see: ss -ltnp; choose another grpc.listen"
            raise UnavailableError(f"Address {address} already in use, or not this machine's", hint) from error
        await self._server.start()
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let those under way end within so many seconds, cancel the rest."""
        await self._server.stop(grace_s)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _serve(self, method: Method, handler: Handler) -> "grpc.RpcMethodHandler[bytes, bytes]":
        bound_s = START_S if method.name in LONG else CALL_S

        async def behave(data: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
            begun_s = asyncio.get_running_loop().time()
            status = Status("OK", "", "")
            try:
                left_s = _left_s(context, bound_s)
                request = method.request.FromString(data)
                metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
                async with asyncio.timeout(left_s):
                    fields = await handler(Asked(request, metadata, left_s))
                reply: bytes = method.reply(**fields).SerializeToString()
                return reply
            except DecodeError:
                status = Status("INVALID_ARGUMENT", f"the request is no {method.request.DESCRIPTOR.full_name}", "invalid_argument")
            except TimeoutError:
                status = status_of(DeadlineExceeded(method.name, bound_s))
            except IsopodError as error:
                status = status_of(error)
            except Exception as error:  # noqa: BLE001  the root of a call
                trace = "".join(traceback.format_exception(error))
                self._logger.error("grpc.bug", method=method.name, error=repr(error), traceback=trace)
                status = status_of(BugError(f"{method.name} failed"))
            finally:
                took_ms = round(1000 * (asyncio.get_running_loop().time() - begun_s), 1)
                self._logger.debug("grpc.call", method=method.name, status=status.name, took_ms=took_ms)
            await context.abort(getattr(grpc.StatusCode, status.name), status.details, ((CODE_KEY, status.code),))
            raise AssertionError  # abort raises

        return grpc.unary_unary_rpc_method_handler(behave)


def _left_s(context: Any, bound_s: float) -> float:  # the stubs do not say what it answers without a deadline
    """Return how long a call may take: our bound, or what the client leaves, if that is less."""
    left_s = context.time_remaining()
    return bound_s if left_s is None else max(0.001, min(bound_s, left_s - _SOON_S))
