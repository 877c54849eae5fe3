"""WebSocket on the server: a route that checks handshakes and runs a handler per connection, and a hub for broadcasts.

`websocket_route` makes an ordinary HTTP handler, to be mounted in a router. Behind it stands either a coroutine function, run as a task
per connection (returning closes with 1000, raising with 1011), or a `WebSocketHandler`, plain calls from the loop.

Rules: when the HTTP server drains, every connection is closed with 1001. A handler that goes on after its connection is gone is cancelled
after the closing deadline. A broadcast builds each frame once and never waits: who reads too slowly is dropped or skipped, by the hub's
policy, so one slow peer costs the others nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final, Literal

import msgspec

from isopod.net.http.messages import Answer, HttpError, Request, Response, Upgrade
from isopod.net.http.websocket import codec as c
from isopod.net.http.websocket import handshake
from isopod.net.http.websocket.connection import WebSocket, WebSocketHandler, WebSocketLimits
from isopod.net.http.websocket.deflate import Deflate
from isopod.runtime.timers import TimerWheel
from isopod.runtime.waiters import Waiters
from isopod.world.clock import Clock
from isopod.world.errors import PeerError

_SHUTTING_DOWN: Final = "the server is shutting down"

ConnectionTask = Callable[[WebSocket], Awaitable[None]]
"""A coroutine function that talks on one connection until its end."""
SlowConsumer = Literal["drop", "skip"]


class WebSocketRoute:
    """A mounted WebSocket end point: call it with a handshake request. Made by `websocket_route`.

    Args:
        handler: What talks.
        subprotocols: See `websocket_route`.
        origins: See `websocket_route`.
        limits: Bounds.
        compresses: Whether to agree on permessage-deflate.
        clock: See `websocket_route`.
    """

    def __init__(
        self,
        handler: ConnectionTask | WebSocketHandler,
        *,
        subprotocols: Sequence[str],
        origins: Sequence[str] | None,
        limits: WebSocketLimits,
        compresses: bool,
        clock: Clock | None,
    ) -> None:
        self._handler = handler
        self._subprotocols = tuple(subprotocols)
        self._origins = origins
        self._limits = limits
        self._compresses = compresses
        self._clock = clock
        self._wheel: TimerWheel | None = None
        self._open: dict[WebSocket, None] = {}
        self._tasks: dict[WebSocket, asyncio.Task[None]] = {}
        self._changed = Waiters()
        self._is_closing = False

    @property
    def connection_count(self) -> int:
        """The connections open now."""
        return len(self._open)

    def __call__(self, request: Request) -> Answer:
        """Answer a handshake: an `Upgrade`, or why not."""
        try:
            agreed = handshake.accept(request, subprotocols=self._subprotocols, origins=self._origins, offers_deflate=self._compresses)
        except HttpError as error:
            return Response.error(error.status, error.message, error.hint, headers=error.headers)
        if self._is_closing or len(self._open) >= self._limits.connections_max:
            return Response.error(503, _SHUTTING_DOWN if self._is_closing else "too many WebSockets are open")

        def take_over(transport: asyncio.Transport, leftover: bytes) -> asyncio.Protocol:
            ws = self._adopt(transport, request, agreed)
            upgrade.on_drain = partial(ws.start_close, c.GOING_AWAY, _SHUTTING_DOWN)
            ws.begin(leftover, on_lost=self._on_lost)
            transport.resume_reading()
            return ws

        upgrade = Upgrade("websocket", take_over, agreed.headers)
        return upgrade

    async def close(self, code: int = c.GOING_AWAY, reason: str = _SHUTTING_DOWN) -> None:
        """Close all connections, refuse new ones, and wait until they and their handlers are gone."""
        self._is_closing = True
        for ws in list(self._open):
            ws.start_close(code, reason)
        while self._open or self._tasks:
            await self._changed.wait()

    def _adopt(self, transport: asyncio.Transport, request: Request, agreed: handshake.Agreed) -> WebSocket:
        """Make a connection a WebSocket, and start its handler."""
        loop = asyncio.get_running_loop()
        if self._wheel is None:
            self._wheel = TimerWheel(loop)
        plain = None if callable(self._handler) else self._handler
        deflate = None if agreed.deflate is None else Deflate(agreed.deflate, is_client=False)
        ws = WebSocket(
            transport,
            self._wheel,
            self._limits,
            subprotocol=agreed.subprotocol,
            deflate=deflate,
            request=request,
            handler=plain,
            clock=self._clock,
        )
        self._open[ws] = None
        if callable(self._handler):
            self._tasks[ws] = loop.create_task(self._talk(ws, self._handler), name=f"websocket {request.target[:80]}")
        return ws

    async def _talk(self, ws: WebSocket, handler: ConnectionTask) -> None:
        """Run a handler to its end, and the connection too."""
        try:
            await handler(ws)
        except asyncio.CancelledError:
            if not ws.is_lost:
                ws.abort()
            raise
        except PeerError as error:
            if ws.is_open:  # not about this connection: it still stands
                self._report(ws, error)
                ws.start_close(c.INTERNAL_ERROR)
        except Exception as error:  # noqa: BLE001 - the root of a handler's code
            self._report(ws, error)
            ws.start_close(c.INTERNAL_ERROR)
        else:
            ws.start_close()
        finally:
            self._tasks.pop(ws, None)
            self._changed.wake()

    def _report(self, ws: WebSocket, error: Exception) -> None:
        asyncio.get_running_loop().call_exception_handler({"message": f"websocket handler failed on {ws.peer}", "exception": error})

    def _on_lost(self, ws: WebSocket) -> None:
        self._open.pop(ws, None)
        self._changed.wake()
        task = self._tasks.get(ws)
        if task is not None and self._wheel is not None:
            timer = self._wheel.call_later(self._limits.close_timeout_s, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())


def websocket_route(
    handler: ConnectionTask | WebSocketHandler,
    *,
    subprotocols: Sequence[str] = (),
    origins: Sequence[str] | None = None,
    limits: WebSocketLimits = WebSocketLimits(),  # noqa: B008 - immutable
    compresses: bool = False,
    clock: Clock | None = None,
) -> WebSocketRoute:
    """Make an HTTP handler that opens WebSockets.

    Args:
        handler: `async def handler(ws)`, or an object with `on_open`, `on_message` and `on_close`.
        subprotocols: What we speak, the preferred first; the first that the client offers too is agreed on.
        origins: Pages that may connect, "*" for any; None for those that this host serves itself. Programs send no Origin.
        limits: Bounds of each connection, and of their number.
        compresses: Whether to agree on permessage-deflate when a client offers it.
        clock: `world.clock`, for what `ping` returns; without it round trips are in whole milliseconds.
    """
    return WebSocketRoute(handler, subprotocols=subprotocols, origins=origins, limits=limits, compresses=compresses, clock=clock)


class WebSocketHub:
    """Many connections to say the same to.

    Args:
        slow_consumer: What becomes of a peer whose unsent bytes are over the bound at a broadcast: "drop" closes it (1013, try again
            later), "skip" leaves this message out for it.
        unsent_bytes_max: That bound.
    """

    def __init__(self, *, slow_consumer: SlowConsumer = "drop", unsent_bytes_max: int = 1 << 20) -> None:
        self._slow_consumer = slow_consumer
        self._unsent_bytes_max = unsent_bytes_max
        self._members: dict[str, WebSocket] = {}
        self._n_named = 0
        self._n_dropped = 0
        self._n_skipped = 0

    @property
    def connection_count(self) -> int:
        """The members now."""
        return len(self._members)

    @property
    def n_dropped(self) -> int:
        """How many peers were closed because they read too slowly."""
        return self._n_dropped

    @property
    def n_skipped(self) -> int:
        """How many messages were left out for slow peers."""
        return self._n_skipped

    def names(self) -> list[str]:
        """Return the names of the members, oldest first."""
        return list(self._members)

    def add(self, ws: WebSocket, name: str = "") -> str:
        """Let a connection take part, until `discard`.

        Args:
            ws: The connection.
            name: For `send_to`; a number if empty. A member of that name is replaced.

        Returns:
            Its name.
        """
        if not name:
            self._n_named += 1
            name = str(self._n_named)
        self._members[name] = ws
        return name

    def discard(self, name: str) -> None:
        """Let a member go; unknown names are fine."""
        self._members.pop(name, None)

    def send_to(self, name: str, message: str | bytes) -> bool:
        """Send to one member without waiting; return whether it was sent (unknown, closed and slow ones get nothing)."""
        ws = self._members.get(name)
        if ws is None or not self._may_write(name, ws, len(message)):
            return False
        ws.write_frame(ws.encode(message))
        return True

    def broadcast(self, message: str | bytes, *, besides: Iterable[str] = ()) -> int:
        """Send to all without waiting; the frame is built once.

        Args:
            message: What.
            besides: Names of members that do not get it.

        Returns:
            To how many it was sent.
        """
        left_out = frozenset(besides)
        frame: bytes | None = None
        n_sent = 0
        for name, ws in list(self._members.items()):
            if name in left_out or not self._may_write(name, ws, len(message)):
                continue
            if not ws.is_plain_server:  # masked and compressed frames are each connection's own
                ws.write_frame(ws.encode(message))
            else:
                if frame is None:
                    frame = ws.encode(message)
                ws.write_frame(frame)
            n_sent += 1
        return n_sent

    def broadcast_json(self, value: object, *, besides: Iterable[str] = ()) -> int:
        """Send a value to all as a text message of JSON. Args and Returns as `broadcast`."""
        return self.broadcast(msgspec.json.encode(value).decode(), besides=besides)

    def _may_write(self, name: str, ws: WebSocket, n_bytes: int) -> bool:
        """Whether a member can take so much more; if it is too slow for that, the policy is carried out."""
        if not ws.is_open:
            return False
        if not ws.is_write_paused or ws.n_unsent + n_bytes <= self._unsent_bytes_max:
            return True
        if self._slow_consumer == "skip":
            self._n_skipped += 1
        else:
            self._n_dropped += 1
            self.discard(name)
            ws.start_close(c.TRY_AGAIN_LATER, "too slow")
        return False
