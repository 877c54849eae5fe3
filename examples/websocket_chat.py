"""A chat: one HTML page, and a WebSocket behind it that tells everybody what anybody says.

    .venv/bin/python examples/websocket_chat.py --port 8080

Open http://127.0.0.1:8080/ in two windows. A reader that is too slow is dropped and costs the others nothing. SIGTERM or SIGINT ends it:
every connection is closed with 1001 (going away).
"""

import argparse
import asyncio
import signal

from isopod.net.address import format_address, parse_address
from isopod.net.http.messages import Request, Response
from isopod.net.http.router import Router
from isopod.net.http.server import HttpServer
from isopod.net.http.websocket import WebSocket, WebSocketHub, websocket_route
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import Address

DRAIN_S = 0.5
PAGE = """<!doctype html><meta charset="utf-8"><title>Chat</title>
<form><input id="line" autofocus autocomplete="off"><button>Say</button></form><ul id="said"></ul>
<script>
const line = document.getElementById("line"), said = document.getElementById("said")
const ws = new WebSocket(`ws://${location.host}/chat`)
ws.onmessage = event => { said.append(Object.assign(document.createElement("li"), { textContent: event.data })) }
document.forms[0].onsubmit = event => { event.preventDefault(); ws.send(line.value); line.value = "" }
</script>
"""


class Chat:
    """Who is here."""

    def __init__(self) -> None:
        self._hub = WebSocketHub(slow_consumer="drop")

    def page(self, _: Request) -> Response:
        """Answer with the page."""
        return Response.html(PAGE)

    async def talk(self, ws: WebSocket) -> None:
        """Tell everybody what one says, from coming to going."""
        name = self._hub.add(ws)
        self._hub.broadcast(f"{name} came, {self._hub.connection_count} here")
        try:
            async for message in ws:
                if isinstance(message, str):
                    self._hub.broadcast(f"{name}: {message}")
        finally:
            self._hub.discard(name)
            self._hub.broadcast(f"{name} went")


async def serve(address: Address) -> int:
    """Serve until a signal comes."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, level="warning", form="text")
    chat, router = Chat(), Router()
    router.get("/", chat.page)
    router.get("/chat", websocket_route(chat.talk))
    server = HttpServer(world, router, logger=logger, metrics=Registry())
    listener = await server.listen(address)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"listening on http://{format_address(listener.address)}", flush=True)
    await stopped.wait()
    await server.drain(DRAIN_S)
    await server.close()
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="A chat over WebSocket.")
    parser.add_argument("--port", type=int, default=8080, help="the port on 127.0.0.1; 0 for a free one (default 8080)")
    arguments = parser.parse_args()
    try:
        return run(new_loop(), serve(parse_address(f"127.0.0.1:{arguments.port}")))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
