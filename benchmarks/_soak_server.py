"""The server that is soaked: `python -m benchmarks._soak_server FOLDER SHARDS`. It prints its ports and serves until SIGTERM.

Everything at once, in one program: HTTP in plain text, over TLS and on a Unix socket, WebSockets, RPC over TCP with mutual TLS and on a
Unix socket, and HTTP connections handed out to shards; each in a scheduling group, with the stall detector on. Limits are short, so that
peers that stall are met by time-outs within seconds. On admin.sock it says what it holds.
"""

import asyncio
import contextlib
import ctypes
import gc
import signal
import sys
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgspec

from benchmarks._soak_shared import (
    ADD,
    BULK,
    ECHO,
    FAIL,
    FILE_BYTES,
    LARGE_BYTES,
    LOOK,
    PIECE,
    PLAIN,
    SHARDED,
    SLOW,
    TICK,
    UPPER,
    Ask,
    Look,
    Message,
    Ports,
    server_tls,
)
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HttpError, Request, Response
from isopod.net.http.router import Router
from isopod.net.http.server import HttpServer
from isopod.net.http.static import static_files
from isopod.net.http.websocket import WebSocket, WebSocketHub, websocket_route
from isopod.net.http.websocket.connection import WebSocketLimits
from isopod.net.rpc import Call, RpcLimits, Server
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.shards import Sharded, Smp, SmpConfig, SmpService, shard_count, submit_to, this_shard_id, verb
from isopod.runtime.stalls import StallDetector
from isopod.runtime.task_list import list_tasks
from isopod.runtime.timers import TimerWheel
from isopod.world.errors import NotFound
from isopod.world.host.daemon import run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress, UnixAddress

HTTP_LIMITS: Final = HttpLimits(head_s=2.0, body_s=1.0, idle_s=5.0, write_s=2.0, linger_s=0.5, half_closed_s=1.0, bytes_per_s_min=64 << 10)
WEBSOCKET_LIMITS: Final = WebSocketLimits(ping_interval_s=1.0, ping_timeout_s=3.0, close_timeout_s=1.0)
RPC_LIMITS: Final = RpcLimits(hello_timeout_s=2.0, heartbeat_s=1.0, unread_bytes_max=4 << 20, in_flight_bytes_max=8 << 20)
WEB: Final = SchedulingGroup("web", 1000)
CALLS: Final = SchedulingGroup("calls", 1000)
BULK_GROUP: Final = SchedulingGroup("bulk", 200)
ADMIN: Final = SchedulingGroup("admin", 1000, latency_s=0.005)
STALL_S: Final = 0.25
"""The machine is full on purpose, and deep looks take their time: only what is longer is a line in the log."""
HUB_S: Final = 0.05
SLOW_MS_MAX: Final = 10_000

_probes: Final[list[Callable[[Look], None]]] = []
"""What fills in a look, by whoever holds it, in this process."""


class Part:
    """A part of a counter; one on every shard."""

    def __init__(self) -> None:
        self._count = 0

    @verb
    async def add(self, amount: int) -> int:
        """Count."""
        self._count += amount
        return self._count


# -- what every shard runs -------------------------------------------------------------------------------------------------------------


async def service(smp: Smp) -> Callable[[], Awaitable[None]]:
    """Serve handed out connections, and looks, on this shard."""
    _report_failures(smp.logger)
    world = smp.world
    for group in (WEB, CALLS, BULK_GROUP):
        smp.use_scheduling_group(group)
    stalls = StallDetector(smp.logger, world.clock, smp.metrics, threshold_s=STALL_S)
    stalls.start()
    router, sockets = Router(), websocket_route(_echo_socket, limits=WEBSOCKET_LIMITS)
    router.get("/shard", lambda _: Response.json({"shard": this_shard_id()}))
    router.get("/neighbour", _ask_neighbour)
    router.get("/ws", sockets)
    server = HttpServer(world, router, logger=smp.logger, metrics=smp.metrics, limits=HTTP_LIMITS, group=WEB)
    smp.serve_connections("web", server.factory("web"))

    async def stop() -> None:
        stalls.stop()
        await server.close()

    def fill(look: Look) -> None:
        look.connections += server.statistics().n_connections
        look.websockets += sockets.connection_count
        stats = smp.statistics()
        look.adopted += stats.connections
        look.shard_calls += sum(lane.calls_in_flight + lane.calls_waiting + lane.calls_serving for lane in stats.lanes)

    _probes.append(fill)
    smp.serve({LOOK: lambda ask: _look(smp, deep=ask.deep), ADD: _add})
    return stop


async def _add(message: Message) -> Message:
    await asyncio.sleep(0.001)
    return Message(message.text, message.number + 1)


async def _ask_neighbour(_: Request) -> Response:
    here = this_shard_id()
    answer = await submit_to((here + 1) % shard_count(), ADD, Message("n", here))
    return Response.json({"number": answer.number - here})


def _look(smp: Smp, *, deep: bool) -> Look:
    look = Look(smp.shard, smp.world.processes.own_pid(), [], 0, 0, 0, 0, 0, 0)
    for probe in _probes:
        probe(look)
    if deep:
        gc.collect()
        _count_objects(look)
    with contextlib.suppress(AttributeError, OSError):  # give back what the allocator keeps: what is held is what counts
        ctypes.CDLL(None).malloc_trim(0)
    look.tasks = sorted(f"{task.coroutine} {task.location.rpartition('/')[2]}" for task in list_tasks())
    # The call by which a look at another shard is asked for is under way while it is answered.
    look.shard_calls = max(0, look.shard_calls - (1 if smp.shard else 0))
    return look


def _count_objects(look: Look) -> None:
    counts: Counter[str] = Counter()
    for item in gc.get_objects():
        kind = type(item)
        name = f"{kind.__module__}.{kind.__qualname__}"
        counts[name] += 1
        if isinstance(item, asyncio.BaseTransport) or kind.__name__.endswith("Transport"):  # uvloop's are none of asyncio's
            look.transports += 1
        elif isinstance(item, asyncio.BaseProtocol):
            look.protocols += 1
        elif kind is TimerWheel:
            look.timers += len(item)
    look.objects = dict(counts)


def _report_failures(logger: Logger) -> None:
    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        trace = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
        logger.error("loop.failure", message=str(context.get("message")), error=repr(error), traceback=trace)

    asyncio.get_running_loop().set_exception_handler(report)


# -- HTTP ------------------------------------------------------------------------------------------------------------------------------


def _stream(request: Request) -> Response:
    n_pieces = min(1024, int(request.params["n"]))

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(n_pieces):
            if number % 8 == 0:
                await asyncio.sleep(0)
            yield PIECE

    return Response(200, (("content-type", "application/octet-stream"),), pieces())


async def _upload(request: Request) -> Response:
    n_bytes = check = 0
    async for piece in request.stream(n_bytes_max=LARGE_BYTES):
        n_bytes += len(piece)
        check = crc32(piece, check)
    return Response.json({"n_bytes": n_bytes, "crc": check})


async def _wait(request: Request) -> Response:
    await asyncio.sleep(min(SLOW_MS_MAX, int(request.params["ms"])) / 1000)
    return Response.text("done")


def _fail(_: Request) -> Response:
    raise HttpError(404, "no such thing")


async def _echo_socket(ws: WebSocket) -> None:
    async for message in ws:
        await ws.send(message)


def _routes(folder: Path, hub: WebSocketHub, static: static_files) -> Router:
    large = bytes(LARGE_BYTES)
    (folder / "www").mkdir()
    (folder / "www" / "file.bin").write_bytes(PIECE * (FILE_BYTES // len(PIECE)))

    async def join(ws: WebSocket) -> None:
        name = hub.add(ws)
        try:
            async for _ in ws:
                pass
        finally:
            hub.discard(name)

    router = Router()
    router.get("/json", lambda _: Response.json({"hello": "world"}))
    router.get("/stream/:n", _stream)
    router.post("/upload", _upload)
    router.get("/wait/:ms", _wait)
    router.get("/fail", _fail)
    router.get("/large", lambda _: Response(200, (("content-type", "application/octet-stream"),), large))
    router.get("/static/*path", static)
    sockets, hubbed = (websocket_route(each, limits=WEBSOCKET_LIMITS) for each in (_echo_socket, join))
    router.get("/ws", sockets)
    router.get("/hub", hubbed)

    def fill(look: Look) -> None:
        look.websockets += sockets.connection_count + hubbed.connection_count + hub.connection_count

    _probes.append(fill)
    return router


async def _tell(hub: WebSocketHub) -> None:
    while True:
        await asyncio.sleep(HUB_S)
        hub.broadcast("news " * 100)


# -- RPC -------------------------------------------------------------------------------------------------------------------------------


async def _echo(_call: Call[Any, Any], request: Message) -> Message:
    await asyncio.sleep(0)
    return request


def _plain(_call: Call[Any, Any], request: Message) -> Message:
    return request


async def _slow(_call: Call[Any, Any], request: Message) -> Message:
    await asyncio.sleep(min(SLOW_MS_MAX, request.number) / 1000)
    return request


def _fail_call(_call: Call[Any, Any], request: Message) -> Message:
    raise NotFound("thing", request.text)


async def _upper(call: Call[bytes, bytes], _: Message) -> Message:
    n_bytes = 0
    async for piece in call:
        n_bytes += len(piece)
        await call.send(piece.upper())
    return Message("", n_bytes)


async def _bulk(call: Call[Any, bytes], request: Message) -> Message:
    for _ in range(min(LARGE_BYTES, request.number) // len(PIECE)):
        await call.send(PIECE)
    return request


def _rpc_server(smp: Smp, parts: Sharded[Part]) -> Server:
    async def sharded(_call: Call[Any, Any], request: Message) -> Message:
        shard = request.number % shard_count()
        await parts.on(shard).add(1)
        answer = await submit_to(shard, ADD, request)
        return Message(answer.text, answer.number - 1)

    handlers: list[Any] = [(ECHO, _echo), (PLAIN, _plain), (SLOW, _slow), (FAIL, _fail_call), (TICK, _plain), (SHARDED, sharded)]
    handlers += [(UPPER, _upper), (BULK, _bulk)]
    server = Server(smp.world, handlers, logger=smp.logger, metrics=smp.metrics, limits=RPC_LIMITS, groups=[BULK_GROUP])

    def fill(look: Look) -> None:
        look.rpc_connections += int(server.connections.value)
        look.calls_open += int(server.calls_open.value)

    _probes.append(fill)
    return server


# -- the program -----------------------------------------------------------------------------------------------------------------------


async def serve(folder: Path, n_shards: int) -> int:
    """Start everything, serve until a signal, and go down in order."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    shards = SmpService(world, SmpConfig(n_shards=n_shards), logger=logger, metrics=Registry(), services=[f"{_MODULE}:service"])
    async with shards as smp, contextlib.AsyncExitStack() as stack:
        parts: Sharded[Part] = await Sharded.start(f"{_MODULE}:Part")
        hub = WebSocketHub(slow_consumer="drop", unsent_bytes_max=256 << 10)
        http = HttpServer(
            world,
            _routes(folder, hub, static_files(world, str(folder / "www"))),
            logger=logger,
            metrics=smp.metrics,
            limits=HTTP_LIMITS,
            group=WEB,
        )
        stack.push_async_callback(http.close)
        rpc = _rpc_server(smp, parts)
        stack.push_async_callback(rpc.close)
        admin = HttpServer(world, _admin(smp), logger=logger, metrics=Registry(), group=ADMIN)
        stack.push_async_callback(admin.close)
        _probes.append(lambda look: _add_http(look, http))
        plain = await http.listen(TcpAddress("127.0.0.1", 0))
        secured = await http.listen(TcpAddress("127.0.0.1", 0), tls=server_tls(folder, mutual=False))
        await http.listen(UnixAddress(f"{folder}/http.sock"))
        calls = await rpc.listen(TcpAddress("127.0.0.1", 0), tls=server_tls(folder, mutual=True), group=CALLS)
        await rpc.listen(UnixAddress(f"{folder}/rpc.sock"), group=CALLS)
        web = await shards.listen(TcpAddress("127.0.0.1", 0), "web")
        await admin.listen(UnixAddress(f"{folder}/admin.sock"))
        ports = Ports(*(address.port for address in (plain.address, secured.address, calls.address, web.address)))  # type: ignore[union-attr]
        print(msgspec.json.encode(ports).decode(), flush=True)
        telling = asyncio.get_running_loop().create_task(_tell(hub), context=WEB.context())
        await stopped.wait()
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await asyncio.gather(http.drain(2.0), rpc.drain(2.0))
    world.close()
    return 0


def _add_http(look: Look, http: HttpServer) -> None:
    look.connections += http.statistics().n_connections


def _admin(smp: Smp) -> Router:
    async def looks(request: Request) -> Response:
        ask = Ask(deep=request.query == "deep")
        found = [_look(smp, deep=ask.deep)]
        found += [await submit_to(shard, LOOK, ask) for shard in smp.peers()]
        return Response.json(found)

    router = Router()
    router.get("/looks", looks)
    return router


_MODULE: Final = "benchmarks._soak_server"


if __name__ == "__main__":
    # As a module of its own name: shards import it by that, and what is counted in it must be one thing.
    from benchmarks import _soak_server

    sys.exit(run(new_loop(), _soak_server.serve(Path(sys.argv[1]), int(sys.argv[2]))))
