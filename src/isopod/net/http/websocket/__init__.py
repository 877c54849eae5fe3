"""WebSocket (RFC 6455): server, client and hub on the HTTP package, and the codec they share (docs/runtime.md)."""

from isopod.net.http.websocket.client import connect_websocket
from isopod.net.http.websocket.connection import WebSocket, WebSocketHandler, WebSocketLimits
from isopod.net.http.websocket.server import WebSocketHub, WebSocketRoute, websocket_route

__all__ = ["WebSocket", "WebSocketHandler", "WebSocketHub", "WebSocketLimits", "WebSocketRoute", "connect_websocket", "websocket_route"]
