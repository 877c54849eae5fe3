"""A counter in parts: one on each shard, every shard a process of its own, and HTTP in front.

    .venv/bin/python examples/sharded_counter.py --port 8080 --shards 2

    curl -d "[1, 5]" http://127.0.0.1:8080/add      # add 5 to the part on shard 1
    curl http://127.0.0.1:8080/parts                # the counts by shard
    curl http://127.0.0.1:8080/total                # map_reduce over all

What one shard counts, the others see only by asking. SIGTERM or SIGINT ends them all.
"""

import argparse
import asyncio
import operator
import signal

from isopod.net.address import format_address, parse_address
from isopod.net.http.messages import Request, Response
from isopod.net.http.router import Router
from isopod.net.http.server import HttpServer
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards import Sharded, SmpConfig, SmpService, verb
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world


class Counter:
    """One part of the counter; there is one instance on each shard."""

    def __init__(self) -> None:
        self._count = 0

    @verb
    async def add(self, amount: int) -> int:
        """Count, and tell the result."""
        self._count += amount
        return self._count

    @verb
    async def read(self) -> int:
        """Tell the count."""
        return self._count


def routes(counter: Sharded[Counter]) -> Router:
    """Return the handlers; they run on shard 0 and ask the others."""
    router = Router()

    async def add(request: Request) -> Response:
        shard, amount = await request.json(tuple[int, int])
        return Response.json(await counter.on(shard).add(amount))

    async def parts(_: Request) -> Response:
        return Response.json(await counter.on_all(lambda each: each.read()))

    async def total(_: Request) -> Response:
        return Response.json(await counter.map_reduce(lambda each: each.read(), operator.add, 0))

    router.post("/add", add)
    router.get("/parts", parts)
    router.get("/total", total)
    return router


async def serve(port: int, n_shards: int) -> int:
    """Start the shards, serve until a signal comes, and stop them."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, level="warning", form="text")
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with SmpService(world, SmpConfig(n_shards=n_shards), logger=logger), await Sharded.start(Counter) as counter:
        server = HttpServer(world, routes(counter), logger=logger, metrics=Registry())
        listener = await server.listen(parse_address(f"127.0.0.1:{port}"))
        print(f"listening on http://{format_address(listener.address)}", flush=True)
        await stopped.wait()
        await server.drain(0.2)
        await server.close()
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="A counter in parts, one on each shard.")
    parser.add_argument("--port", type=int, default=8080, help="the port on 127.0.0.1; 0 for a free one (default 8080)")
    parser.add_argument("--shards", type=int, default=2, metavar="N", help="how many; 0 for one on each processor (default 2)")
    arguments = parser.parse_args()
    try:
        return run(new_loop(), serve(arguments.port, arguments.shards))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
