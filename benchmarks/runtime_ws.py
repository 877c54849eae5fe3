"""WebSocket and the HTTP client beside their peers: CPU time of the process under test for one operation.

Echo: 32 connections, one message each on its way. Broadcast: one message to 1000 connections, again and again; the figure is for one
delivery. HTTP client: 16 requests at once over kept connections to one server of ours; the figure is the client's own CPU for one request.

Every server and every client under test is a process of its own, on uvloop. Peers (websockets with its C extension, picows, aiohttp, httpx)
live in build/peers/ws-venv, which is made on first use; their programs are the short texts below, written as their documentation does.
"""

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import uvloop

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row

VENV: Final = PROJECT / "build" / "peers" / "ws-venv"
PACKAGES: Final = ("websockets", "picows", "aiohttp", "httpx", "uvloop")
N_CONNECTIONS: Final = 32
N_AUDIENCE: Final = 1000
N_AT_ONCE: Final = 16
DEADLINE_S: Final = 60.0
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_KEY: Final = b"\x01\x02\x03\x04"
_HANDSHAKE: Final = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

# A server under test prints its port. "go" in a message asks the broadcasting ones for a broadcast of 64 bytes.
_OUR_SERVER: Final = """
import asyncio, sys
from isopod.net.http.server import HttpServer
from isopod.net.http.messages import Response
from isopod.net.http.websocket import WebSocketHub, WebSocketLimits, websocket_route
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress

class Echo:
    def on_open(self, ws): pass
    def on_message(self, ws, message): ws.send_nowait(message)
    def on_close(self, ws): pass

class Hall:
    def __init__(self): self.hub, self.names = WebSocketHub(), {}
    def on_open(self, ws): self.names[ws] = self.hub.add(ws)
    def on_message(self, ws, message): self.hub.broadcast(b"x" * 64)
    def on_close(self, ws): self.hub.discard(self.names.pop(ws))

async def task(ws):
    async for message in ws:
        await ws.send(message)

async def main():
    world = make_host_world()
    kind = sys.argv[1]
    route = websocket_route({"calls": Echo(), "task": task, "broadcast": Hall(), "http": Echo()}[kind])
    answer = Response.json({"hello": "world"})
    handler = (lambda request: answer) if kind == "http" else route
    server = HttpServer(world, handler, logger=Logger(lambda line: None, world.clock), metrics=Registry())
    listener = await server.listen(TcpAddress("127.0.0.1", 0))
    print(listener.address.port, flush=True)
    await asyncio.Event().wait()

new_loop().run_until_complete(main())
"""
_WEBSOCKETS_SERVER: Final = """
import asyncio, sys, uvloop
from websockets.asyncio.server import broadcast, serve
connections = set()

async def echo(connection):
    async for message in connection:
        await connection.send(message)

async def hall(connection):
    connections.add(connection)
    try:
        async for message in connection:
            broadcast(connections, b"x" * 64)
    finally:
        connections.discard(connection)

async def main():
    async with serve(hall if sys.argv[1] == "broadcast" else echo, "127.0.0.1", 0, compression=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""
_PICOWS_SERVER: Final = """
import asyncio, sys, uvloop
from picows import WSListener, WSMsgType, ws_create_server
transports = set()

class Echo(WSListener):
    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_bytes())

class Hall(WSListener):
    def on_ws_connected(self, transport):
        transports.add(transport)
    def on_ws_disconnected(self, transport):
        transports.discard(transport)
    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
            return
        for each in transports:
            each.send(WSMsgType.BINARY, b"x" * 64)

async def main():
    kind = Hall if sys.argv[1] == "broadcast" else Echo
    server = await ws_create_server(lambda request: kind(), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

uvloop.run(main())
"""
_AIOHTTP_SERVER: Final = """
import asyncio, sys, uvloop
from aiohttp import WSMsgType, web
sockets = set()

async def echo(request):
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    async for message in ws:
        if message.type is WSMsgType.BINARY:
            await ws.send_bytes(message.data)
    return ws

async def hall(request):
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    sockets.add(ws)
    async for message in ws:
        for each in sockets:
            await each.send_bytes(b"x" * 64)
    sockets.discard(ws)
    return ws

async def main():
    app = web.Application()
    app.router.add_get("/", hall if sys.argv[1] == "broadcast" else echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""

# A client under test warms up, makes N requests, and prints its CPU microseconds for one.
_CLIENT_FRAME: Final = """
import asyncio, resource, sys
url, n, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

async def measure(one):
    async def worker(count):
        for _ in range(count):
            await one()
    await asyncio.gather(*(worker(20) for _ in range(at_once)))
    began = cpu_s()
    await asyncio.gather(*(worker(n // at_once) for _ in range(at_once)))
    print((cpu_s() - began) * 1e6 / (n // at_once * at_once), flush=True)
"""
_OUR_CLIENT: Final = (
    _CLIENT_FRAME
    + """
from isopod.net.http.client import HttpClient
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

async def main():
    client = HttpClient(make_host_world())
    async def one():
        answer = await client.get(url)
        assert await answer.json() == {"hello": "world"}
    await measure(one)
    await client.close()

new_loop().run_until_complete(main())
"""
)
_AIOHTTP_CLIENT: Final = (
    _CLIENT_FRAME
    + """
import aiohttp, uvloop

async def main():
    async with aiohttp.ClientSession() as session:
        async def one():
            async with session.get(url) as answer:
                assert await answer.json() == {"hello": "world"}
        await measure(one)

uvloop.run(main())
"""
)
_HTTPX_CLIENT: Final = (
    _CLIENT_FRAME
    + """
import httpx, uvloop

async def main():
    async with httpx.AsyncClient() as client:
        async def one():
            assert (await client.get(url)).json() == {"hello": "world"}
        await measure(one)

uvloop.run(main())
"""
)


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows: echo, broadcast, HTTP client."""
    _install()
    n_runs = 2 if quick else 5
    scale = 5 if quick else 1
    peers = [("websockets", _WEBSOCKETS_SERVER), ("picows", _PICOWS_SERVER), ("aiohttp", _AIOHTTP_SERVER)]
    for size, n_messages in ((64, 100_000), (16 << 10, 20_000)):
        count = n_messages // scale
        ours = [(OURS, _OUR_SERVER, "calls"), ("isopod, a task each", _OUR_SERVER, "task")]
        servers = [*ours, *((name, source, "echo") for name, source in peers)]
        label = f"WebSocket echo {size} B: server CPU" if size < 1024 else f"WebSocket echo {size >> 10} KiB: server CPU"
        yield Row(label, "us", [Contender(name, _echo(source, kind, size, n_messages=count)) for name, source, kind in servers], n_runs)
    hall = [(OURS, _OUR_SERVER), *peers]
    broadcasts = 100 // scale
    label = f"WebSocket broadcast to {N_AUDIENCE}: CPU of one"
    yield Row(label, "us", [Contender(name, _broadcast(source, broadcasts)) for name, source in hall], n_runs)
    n_requests = 10_000 // scale
    clients = [(OURS, _OUR_CLIENT), ("aiohttp", _AIOHTTP_CLIENT), ("httpx", _HTTPX_CLIENT)]
    yield Row(
        "HTTP client, small JSON: client CPU", "us", [Contender(name, _client(source, n_requests)) for name, source in clients], n_runs
    )


def _install() -> None:
    """Make the peers' environment, once. What cannot be installed is missing from the table, with its reason."""
    if (VENV / "ready").exists():
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True, timeout=DEADLINE_S)
        subprocess.run([str(VENV / "bin/pip"), "install", "-q", *PACKAGES], check=True, capture_output=True, timeout=300)
        (VENV / "ready").touch()
    except (subprocess.SubprocessError, OSError) as error:
        print(f"peers of the WebSocket rows were not installed: {error}", file=sys.stderr)


def _python(source: str) -> str:
    """Return the interpreter a program needs: ours, or the peers'."""
    return sys.executable if "isopod" in source else str(VENV / "bin" / "python")


def _echo(source: str, kind: str, size: int, *, n_messages: int) -> Callable[[], float]:
    def sample() -> float:
        with _server(source, kind) as (pid, port):
            return _cpu_us(pid, n_messages, _drive_echo(port, size, n_messages))

    return sample


def _broadcast(source: str, n_broadcasts: int) -> Callable[[], float]:
    def sample() -> float:
        with _server(source, "broadcast") as (pid, port):
            audience = _Audience(port)
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(audience.gather())
                before = _process_cpu_s(pid)
                runner.run(audience.hear(n_broadcasts))
                used_s = _process_cpu_s(pid) - before
                audience.leave()
                runner.run(asyncio.sleep(0.05))
            return used_s * 1e6 / (n_broadcasts * N_AUDIENCE)

    return sample


def _client(source: str, n_requests: int) -> Callable[[], float]:
    def sample() -> float:
        with _server(_OUR_SERVER, "http") as (_, port):
            argv = [_python(source), "-c", source, f"http://127.0.0.1:{port}/", str(n_requests), str(N_AT_ONCE)]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=_environment())
            except subprocess.TimeoutExpired as error:
                raise CommandFailed(argv[:1], -1, f"longer than {DEADLINE_S} s") from error
            if done.returncode != 0:
                raise CommandFailed(argv[:1], done.returncode, done.stderr)
            return float(done.stdout)

    return sample


@contextmanager
def _server(source: str, kind: str) -> Iterator[tuple[int, int]]:
    """Run a server under test; yield its process id and port."""
    argv = [_python(source), "-c", source, kind]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.strip().isdecimal():
                process.kill()
                raise CommandFailed(argv[:1], process.wait(), process.stderr.read() if process.stderr else "")
            yield process.pid, int(line)
        finally:
            process.kill()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT / "src")}


def _cpu_us(pid: int, n_operations: int, load: Coroutine[Any, Any, None]) -> float:
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        before = _process_cpu_s(pid)
        runner.run(load)
        return (_process_cpu_s(pid) - before) * 1e6 / n_operations


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _new_loop() -> asyncio.AbstractEventLoop:
    return uvloop.new_event_loop()


def _frame(payload: bytes) -> bytes:
    """Return a client's binary frame."""
    n_bytes = len(payload)
    head = bytes((0x82, 0x80 | n_bytes)) if n_bytes < 126 else b"\x82\xfe" + n_bytes.to_bytes(2, "big")
    return head + _KEY + bytes(byte ^ _KEY[i % 4] for i, byte in enumerate(payload))


class _Peer(asyncio.Protocol):
    """A cheap client: it counts bytes and decodes nothing."""

    def __init__(self, on_bytes: Callable[["_Peer", int], None]) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.n_bytes = 0
        self.transport: asyncio.Transport | None = None
        self._head = b""
        self._on_bytes = on_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(_HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        if self.opened.done():
            self._on_bytes(self, len(data))
            return
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if end:
            if b" 101 " not in head[:20]:
                self.opened.set_exception(OSError(f"no WebSocket: {head[:80]!r}"))
                return
            self.opened.set_result(None)
            if rest:
                self._on_bytes(self, len(rest))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(OSError("no WebSocket"))


async def _open(port: int, n_peers: int, on_bytes: Callable[[_Peer, int], None]) -> list[_Peer]:
    loop = asyncio.get_running_loop()
    peers: list[_Peer] = []
    for _ in range(n_peers):
        _, peer = await loop.create_connection(lambda: _Peer(on_bytes), "127.0.0.1", port)
        peers.append(peer)
        await peer.opened
    return peers


async def _drive_echo(port: int, size: int, n_messages: int) -> None:
    """Keep one message on its way on every connection until all have come back."""
    frame = _frame(os.urandom(size))
    echo_bytes = len(frame) - len(_KEY)
    left = {"begun": n_messages, "ended": n_messages}
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_bytes(peer: _Peer, n_bytes: int) -> None:
        peer.n_bytes += n_bytes
        if peer.n_bytes < echo_bytes:
            return
        peer.n_bytes -= echo_bytes
        left["ended"] -= 1
        if left["begun"]:
            left["begun"] -= 1
            assert peer.transport is not None
            peer.transport.write(frame)
        elif not left["ended"] and not done.done():
            done.set_result(None)

    peers = await _open(port, N_CONNECTIONS, on_bytes)
    for peer in peers:
        left["begun"] -= 1
        assert peer.transport is not None
        peer.transport.write(frame)
    async with asyncio.timeout(DEADLINE_S):
        await done
    for peer in peers:
        assert peer.transport is not None
        peer.transport.abort()
    await asyncio.sleep(0.01)


class _Audience:
    """A thousand connections that listen; the first of them asks for the broadcasts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._peers: Sequence[_Peer] = ()
        self._n_missing = 0
        self._heard: asyncio.Future[None] | None = None

    async def gather(self) -> None:
        """Connect."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * N_AUDIENCE)), hard))
        self._peers = await _open(self._port, N_AUDIENCE, self._on_bytes)

    async def hear(self, n_broadcasts: int) -> None:
        """Ask for broadcasts, each when the one before has reached everybody."""
        go = _frame(b"go")
        speaker = self._peers[0].transport
        assert speaker is not None
        for _ in range(n_broadcasts):
            self._n_missing = N_AUDIENCE * 66
            self._heard = asyncio.get_running_loop().create_future()
            speaker.write(go)
            async with asyncio.timeout(DEADLINE_S):
                await self._heard

    def leave(self) -> None:
        """Disconnect."""
        for peer in self._peers:
            if peer.transport is not None:
                peer.transport.abort()

    def _on_bytes(self, _: _Peer, n_bytes: int) -> None:
        self._n_missing -= n_bytes
        if self._n_missing == 0 and self._heard is not None and not self._heard.done():
            self._heard.set_result(None)
