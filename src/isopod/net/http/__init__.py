"""HTTP/1.1: messages, server, router and middleware, static files, an ASGI adapter (docs/runtime.md)."""

from isopod.net.http.headers import Headers
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import Answer, Handler, HttpError, Request, Response, Upgrade
from isopod.net.http.server import HttpListener, HttpServer

__all__ = ["Answer", "Handler", "Headers", "HttpError", "HttpLimits", "HttpListener", "HttpServer", "Request", "Response", "Upgrade"]
