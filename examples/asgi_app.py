"""An unmodified ASGI application on isopod's HTTP server: here Starlette's, with a lifespan, JSON, a stream and a WebSocket.

    .venv/bin/python examples/asgi_app.py --port 8080

    curl http://127.0.0.1:8080/hello/you
    curl -N http://127.0.0.1:8080/count/5
It needs starlette, and says so if that is not there. SIGTERM or SIGINT ends it, after the application's own way down.
"""

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

try:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket
except ImportError as missing:
    raise SystemExit(f"this example needs starlette ({missing}): .venv/bin/pip install starlette") from missing

from isopod.net.address import format_address, parse_address
from isopod.net.http.asgi import AsgiApplication
from isopod.net.http.server import HttpServer
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Open and close what the application needs."""
    print("starting", flush=True)
    yield
    print("ended", flush=True)


async def hello(request: Request) -> JSONResponse:
    """Answer with JSON."""
    return JSONResponse({"hello": request.path_params["name"]})


async def count(request: Request) -> StreamingResponse:
    """Answer with a stream."""

    async def lines() -> AsyncIterator[str]:
        for number in range(request.path_params["n"]):
            yield f"{number}\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(lines(), media_type="text/plain")


async def echo(ws: WebSocket) -> None:
    """Send back each text."""
    await ws.accept()
    async for text in ws.iter_text():
        await ws.send_text(text)


async def serve(port: int) -> int:
    """Serve until a signal comes."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, form="text")
    routes = [Route("/hello/{name}", hello), Route("/count/{n:int}", count), WebSocketRoute("/echo", echo)]
    application = AsgiApplication(Starlette(routes=routes, lifespan=lifespan), logger=logger)
    server = HttpServer(world, application, logger=logger, metrics=Registry())
    await application.start()
    listener = await server.listen(parse_address(f"127.0.0.1:{port}"))
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"listening on http://{format_address(listener.address)}", flush=True)
    await stopped.wait()
    await server.drain(0.5)
    await server.close()
    await application.stop()
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="A Starlette application on isopod's HTTP server.")
    parser.add_argument("--port", type=int, default=8080, help="the port on 127.0.0.1; 0 for a free one (default 8080)")
    arguments = parser.parse_args()
    try:
        return run(new_loop(), serve(arguments.port))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
