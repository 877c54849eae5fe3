"""An HTTP server: routes with parameters, JSON in and out, middleware, static files.

    .venv/bin/python examples/http_server.py --port 8080 --folder .

    curl -X PUT -d '{"name": "tea", "price": 3.5}' http://127.0.0.1:8080/items/1
    curl http://127.0.0.1:8080/items/1
    curl http://127.0.0.1:8080/static/README.md

Every request is logged to standard error, with an id that the answer carries too. SIGTERM or SIGINT ends it; requests under way finish.
"""

import argparse
import os
from typing import Annotated

import msgspec

from isopod.net.address import format_address, parse_address
from isopod.net.http.compression import compress
from isopod.net.http.messages import HttpError, Request, Response
from isopod.net.http.middleware import access_log, chain, request_id
from isopod.net.http.router import Router
from isopod.net.http.server import HttpServer
from isopod.net.http.static import static_files
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import handle_signals, run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import Address


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the shop sells."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    price: Annotated[float, msgspec.Meta(ge=0)]


class Shop:
    """The routes that know of items."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}

    def show(self, request: Request) -> Response:
        """Answer with an item: a plain function, which costs no task."""
        item = self._items.get(request.params["id"])
        if item is None:
            raise HttpError(404, "there is no such item", "put it there first")
        return Response.json(item)

    async def store(self, request: Request) -> Response:
        """Take an item: what does not fit `Item` is answered with 400 or 422."""
        item = self._items[request.params["id"]] = await request.json(Item)
        return Response.json(item, 201)


async def serve(address: Address, folder: str) -> int:
    """Serve until a signal comes."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, form="text")
    metrics = Registry()
    shop, router = Shop(), Router()
    router.get("/", lambda _: Response.html("<h1>isopod</h1>"))
    router.get("/items/:id", shop.show)
    router.put("/items/:id", shop.store)
    router.get("/metrics", lambda _: Response.text(metrics.render()))
    router.get("/static/*path", static_files(world, folder))
    handler = chain(router, request_id(world), access_log(logger, world), compress())
    server = HttpServer(world, handler, logger=logger, metrics=metrics)
    listener = await server.listen(address)
    coordinator = ShutdownCoordinator(logger, world.clock)
    signals = ShutdownSignals(coordinator, logger, metrics)
    coordinator.register(ShutdownResource("connections", ShutdownPhase.DRAIN_CONNECTIONS, lambda: server.drain(0.5)))
    coordinator.register(ShutdownResource("server", ShutdownPhase.FINAL_CLEANUP, server.close))
    with handle_signals(signals):
        print(f"listening on http://{format_address(listener.address)}", flush=True)
        await coordinator.shutdown(await signals.wait())
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="An HTTP server.")
    parser.add_argument("--port", type=int, default=8080, help="the port on 127.0.0.1; 0 for a free one (default 8080)")
    parser.add_argument("--folder", default=".", help="what is served below /static/ (default: the current folder)")
    arguments = parser.parse_args()
    try:
        return run(new_loop(), serve(parse_address(f"127.0.0.1:{arguments.port}"), os.path.abspath(arguments.folder)))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
