"""The websocket scope of ASGI, on top of our own WebSocket.

The handshake is answered when the application has accepted or closed; until then nothing is sent. Source: ASGI WebSocket spec 2.4.
"""

import asyncio
import traceback
from typing import TYPE_CHECKING, Any, Final

from isopod.net.http.messages import Answer, Request, Response, Upgrade
from isopod.net.http.websocket.connection import WebSocket
from isopod.net.http.websocket.server import websocket_route
from isopod.world.errors import Disconnected, IsopodError, PeerError

if TYPE_CHECKING:
    from isopod.net.http.asgi import Message, Owner

_ABNORMAL: Final = 1006
_INTERNAL_ERROR: Final = 1011


async def answer_websocket(owner: "Owner", request: Request) -> Answer:
    """Return what an application says to a handshake: an Upgrade, or a 403."""
    if request.has_body:  # the connection would not switch, whatever the application says
        return Response.error(400, "a WebSocket's handshake has no body")
    scope = owner.scope(request, "websocket")
    del scope["method"]
    scope["subprotocols"] = [word.strip() for word in request.headers.combined("sec-websocket-protocol").split(",") if word.strip()]
    talk = _Talk(owner)
    task = talk.task = owner.spawn(talk.run(scope))
    try:
        accepted = await talk.accepted
    except BaseException:
        task.cancel()
        raise
    if accepted is None:
        return Response.error(403, "the application refused the WebSocket")
    chosen = accepted.get("subprotocol")
    route = websocket_route(talk.carry, subprotocols=(chosen,) if chosen else (), origins=("*",))
    answer = route(request)
    if isinstance(answer, Upgrade):
        extra = ((bytes(name).decode("latin-1"), bytes(value).decode("latin-1")) for name, value in accepted.get("headers", ()))
        answer.headers = (*answer.headers, *extra)
        talk.expect_socket()
    else:
        task.cancel()
    return answer


class _Talk:
    """One connection between the application and its peer."""

    def __init__(self, owner: "Owner") -> None:
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[Message | None] = loop.create_future()
        self.task: asyncio.Task[None] | None = None
        """The application's."""
        self._loop = loop
        self._owner = owner
        self._socket: asyncio.Future[WebSocket] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._has_connected = False
        self._is_closed = False

    async def carry(self, ws: WebSocket) -> None:
        """Hand the open connection to the application, and keep it until that has ended; if the connection ends first, it gets a while."""
        self._socket.set_result(ws)
        try:
            await self._ended
        finally:
            self._cancel_later()

    def expect_socket(self) -> None:
        """The application has accepted: if the connection ends before it is handed over, nobody else would tell it."""
        timer = self._loop.call_later(self._owner.orphan_s, self._on_no_socket)
        self._socket.add_done_callback(lambda _: timer.cancel())

    def _on_no_socket(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _cancel_later(self) -> None:
        task = self.task
        if task is not None and not task.done():
            timer = self._loop.call_later(self._owner.orphan_s, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())

    async def run(self, scope: dict[str, Any]) -> None:
        """Run the application to its end."""
        failure: Exception | None = None
        try:
            await self._owner.app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - the root of the application
            failure = error
        finally:
            if not self.accepted.done():
                self.accepted.set_exception(failure or RuntimeError("the ASGI application ended without accepting the WebSocket"))
                failure = None
            if not self._ended.done():
                self._ended.set_result(None)
        if failure is not None and not isinstance(failure, OSError | PeerError):
            if self._socket.done():
                self._socket.result().start_close(_INTERNAL_ERROR)
            self._owner.logger.error("asgi.websocket_failed", traceback="".join(traceback.format_exception(failure)))

    async def _receive(self) -> "Message":
        if not self._has_connected:
            self._has_connected = True
            return {"type": "websocket.connect"}
        ws = await self._socket
        try:
            message = await ws.receive()
        except IsopodError:
            self._is_closed = True
            return {"type": "websocket.disconnect", "code": ws.close_code or _ABNORMAL, "reason": ws.close_reason}
        is_text = isinstance(message, str)
        return {"type": "websocket.receive", "text": message if is_text else None, "bytes": None if is_text else message}

    async def _send(self, message: "Message") -> None:
        kind = message["type"]
        if kind == "websocket.accept" and not self.accepted.done():
            self.accepted.set_result(message)
        elif kind == "websocket.close" and not self.accepted.done():
            self.accepted.set_result(None)
        elif kind == "websocket.close" and self.accepted.done():
            ws = await self._socket
            ws.start_close(message.get("code", 1000), message.get("reason") or "")
            self._is_closed = True
        elif kind == "websocket.send" and self.accepted.done():
            if self._is_closed:
                raise OSError("the WebSocket is closed")
            ws = await self._socket
            text = message.get("text")
            try:
                await ws.send(text if text is not None else bytes(message["bytes"]))
            except Disconnected as error:
                raise OSError(str(error)) from error
        else:
            raise RuntimeError(f"{kind} is out of turn")
