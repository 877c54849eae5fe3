"""Two ways to serve a fake's rules: on a World's network, and as a process of its own.

Neither uses isopod's HTTP server: requests are read by h11 there and by the standard library here.
"""

import asyncio
import contextlib
import http.server
import os
import socket
import socketserver
import sys
from collections.abc import AsyncIterator
from typing import Final, cast

import h11

from isopod.world.network import Listener, UnixAddress
from isopod.world.world import World
from tests.engine.vm.fakes.rules import Rules

HUNG: Final = b""
"""As an answer's bytes: none ever comes."""


class _Peer(asyncio.Protocol):
    """One connection to a fake on a World's network."""

    def __init__(self, stage: "Stage") -> None:
        self.stage = stage
        self.parser = h11.Connection(h11.SERVER)
        self.request: h11.Request | None = None
        self.body = b""
        self.transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.stage.peers.append(self)

    def data_received(self, data: bytes) -> None:
        self.parser.receive_data(data)
        while True:
            event = self.parser.next_event()
            if isinstance(event, h11.Request):
                self.request, self.body = event, b""
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.task = asyncio.get_running_loop().create_task(self._answer(), name="fake VMM")
            else:
                return

    async def _answer(self) -> None:
        assert self.request is not None and self.transport is not None
        self.stage.n_requests += 1
        if self.stage.n_requests == self.stage.dies_at:
            await self.stage.die()
            return
        if self.stage.raw is not None:
            self.transport.write(self.stage.raw)
            return
        path = self.request.target.decode()
        status, body = await self.stage.rules.handle(self.request.method.decode(), path, self.body)
        fields = [("Server", "Fake"), ("Connection", "keep-alive"), *((("Content-Length", str(len(body))),) if status != 204 else ())]
        events = [h11.Response(status_code=status, headers=fields), *((h11.Data(data=body),) if body else ()), h11.EndOfMessage()]
        self.transport.write(b"".join(self.parser.send(event) or b"" for event in events))
        if self.parser.our_state is h11.DONE:
            self.parser.start_next_cycle()


class Stage:
    """A fake on a World's network.

    Args:
        rules: What it answers.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.raw: bytes | None = None
        """What it writes instead of an answer; b"" for nothing."""
        self.peers: list[_Peer] = []
        self.n_requests = 0
        self.dies_at = 0
        """The number of the request that it dies of, unanswered; 0 for none."""
        self.listener: Listener | None = None

    async def die(self) -> None:
        """Do as a process does that is killed: everything is closed at once."""
        if self.listener is not None:
            await self.listener.close()
        for peer in self.peers:
            if peer.transport is not None:
                peer.transport.abort()


@contextlib.asynccontextmanager
async def served(world: World, path: str, rules: Rules) -> AsyncIterator[Stage]:
    """Serve rules at a Unix socket until the block ends."""
    stage = Stage(rules)
    stage.listener = await world.network.listen(UnixAddress(path), lambda: _Peer(stage))
    try:
        yield stage
    finally:
        await stage.die()
        for peer in stage.peers:
            if peer.task is not None:
                await asyncio.gather(peer.task, return_exceptions=True)


def bind(path: str) -> socket.socket:
    """Return a socket that listens at a path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    return listener


def serve_forever(rules: Rules, listener: socket.socket) -> None:
    """Serve rules in this process until they say that it has ended."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = asyncio.run(rules.handle(self.command, self.path, data))
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            try:
                self.end_headers()
                if body:  # who got an answer without one may be gone
                    self.wfile.write(body)
            finally:
                if rules.has_ended:
                    os._exit(0)

        do_GET = do_PUT = do_PATCH = _answer  # noqa: N815 - the standard library's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
            sys.stdout.write(format % args + "\n")

        def address_string(self) -> str:
            return "api"

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    server = Server("", Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever(poll_interval=0.1)
