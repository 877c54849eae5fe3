"""The HTTP server beside granian, uvicorn and aiohttp: CPU of the server per request, and rate.

Each server runs as a process of its own with one worker; its CPU is read from /proc before and after, of all its processes together. The
load is `wrk` with 64 connections kept alive. The peers answer with a body that was encoded before; ours encodes it for each request, routes
it, and has its limits, time-outs and metrics on. All send Date. Peers live in build/peers/http-venv, wrk comes from Debian.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row
from isopod.net.http import Handler, HttpServer, Request, Response
from isopod.net.http.asgi import AsgiApplication
from isopod.net.http.router import Router
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress

VENV: Final = PROJECT / "build" / "peers" / "http-venv"
APPS: Final = VENV / "apps"
PACKAGES: Final = ("granian[uvloop]>=1.6", "uvicorn>=0.30", "httptools>=0.6", "uvloop>=0.21", "aiohttp>=3.10")
N_CONNECTIONS: Final = 64
LOAD_S: Final = 3
QUICK_S: Final = 1
WARM_S: Final = 1
START_S: Final = 20.0
INSTALL_S: Final = 300.0
TICKS_S: Final = os.sysconf("SC_CLK_TCK")
HEADERS: Final = tuple(word for n in range(11) for word in ("-H", f"X-Header-{n}: a value of usual length {n}"))
# No two requests are the same: what a server remembers of the last one does not help it.
SCRIPT: Final = """
local n = 0
request = function()
  n = n + 1
  return wrk.format("GET", "/?n=" .. n)
end
"""
CHANGING: Final = ("-s", str(APPS / "http_changing.lua"))
_DONE: Final = re.compile(r"(\d+) requests in")
_ERRORS: Final = re.compile(r"(Socket errors|Non-2xx).*")

ASGI: Final = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    headers = [(b"content-type", b"application/json"), (b"content-length", b"27")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"message":"Hello, World!"}'})
"""
RSGI: Final = """
async def app(scope, protocol):
    protocol.response_bytes(200, [("content-type", "application/json")], b'{"message":"Hello, World!"}')
"""
AIOHTTP: Final = """
import asyncio, sys, uvloop
from aiohttp import web

async def hello(request):
    return web.Response(body=b'{"message":"Hello, World!"}', content_type="application/json")

app = web.Application()
app.router.add_get("/", hello)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, loop=uvloop.new_event_loop())
"""


class Server(NamedTuple):
    """A server's name, and its command line for a port."""

    name: str
    argv: Callable[[int], Sequence[str]]


class Measured(NamedTuple):
    """One run of the load."""

    cpu_us: float
    rate: float


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows; the servers run as long as a row is measured, and are gone after it."""
    problem = _install()
    if problem:
        print(f"HTTP: {problem}", file=sys.stderr)
    n_runs, seconds = (1, QUICK_S) if quick else (5, LOAD_S)
    peers = [_granian("rsgi"), _granian("asgi"), _uvicorn(), _aiohttp()]
    for name, kind, load in (
        ("HTTP small JSON", "function", ()),
        ("HTTP small JSON, changing query", "function", CHANGING),
        ("HTTP small JSON, coroutine", "coroutine", ()),
        ("HTTP small JSON, 12 header fields", "function", HEADERS),
    ):
        yield from _pair(name, [_ours(kind), *peers], load, n_runs=n_runs, seconds=seconds)
    yield from _pair("HTTP, ASGI application", [_ours("asgi"), _granian("asgi"), _uvicorn()], (), n_runs=n_runs, seconds=seconds)


def _pair(name: str, servers: Sequence[Server], load: Sequence[str], *, n_runs: int, seconds: int) -> Iterator[Row]:
    """Yield the row of CPU, and that of the rates seen in the same runs."""
    rates: dict[str, list[float]] = {server.name: [] for server in servers}

    def sample(server: Server) -> float:
        found = _measure(server, load, seconds)
        rates[server.name].append(found.rate)
        return found.cpu_us

    def seen(server: Server) -> float:
        if not rates[server.name]:
            raise CommandFailed([server.name], 0, "was not measured")
        return rates[server.name].pop(0)

    yield Row(f"{name}: server CPU", "us", [Contender(each.name, lambda each=each: sample(each)) for each in servers], n_runs)  # type: ignore[misc]
    yield Row(f"{name}: rate", "1/s", [Contender(each.name, lambda each=each: seen(each)) for each in servers], n_runs)  # type: ignore[misc]


def _measure(server: Server, load: Sequence[str], seconds: int) -> Measured:
    """Start a server, warm it up, load it, and stop it."""
    port = _free_port()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}", "PYTHONDONTWRITEBYTECODE": "1"}
    with _running(server.argv(port), port, environment) as pid:
        _wrk(port, load, WARM_S)
        before = _cpu_ticks(pid)
        n_requests = _wrk(port, load, seconds)
        ticks = _cpu_ticks(pid) - before
    return Measured(ticks / TICKS_S * 1e6 / n_requests, n_requests / seconds)


@contextlib.contextmanager
def _running(argv: Sequence[str], port: int, environment: Mapping[str, str]) -> Iterator[int]:
    """Run a server in a process group of its own, until the block ends."""
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=APPS.parent,
    )
    try:
        _wait_listening(process, port, argv)
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _wait_listening(process: "subprocess.Popen[bytes]", port: int, argv: Sequence[str]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            _, error = process.communicate()
            raise CommandFailed(argv, process.returncode, error.decode(errors="replace"))
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise CommandFailed(argv, -1, f"not listening after {START_S:g} s")


def _wrk(port: int, load: Sequence[str], seconds: int) -> int:
    """Load a server; return how many requests were answered."""
    argv = ["wrk", "-t1", f"-c{N_CONNECTIONS}", f"-d{seconds}s", *load, f"http://127.0.0.1:{port}/"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds + 30)
    found, errors = _DONE.search(done.stdout), _ERRORS.search(done.stdout)
    if done.returncode != 0 or found is None or errors is not None:
        raise CommandFailed(argv, done.returncode, errors[0] if errors else done.stdout + done.stderr)
    return int(found[1])


def _cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process and all below it, in clock ticks."""
    total, group = 0, str(pid)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if fields[2] == group:  # the process group
                    total += int(fields[11]) + int(fields[12])
    return total


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _install() -> str:
    """Install wrk and the peers; return what could not be had, "" if nothing."""
    try:
        if shutil.which("wrk") is None:
            _quiet(["apt-get", "install", "-y", "--no-install-recommends", "wrk"])
        if not (VENV / "ready").exists():
            _quiet([sys.executable, "-m", "venv", "--clear", str(VENV)])
            _quiet([str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES])
            (VENV / "ready").touch()
        APPS.mkdir(exist_ok=True)
        for name, text in (("http_asgi.py", ASGI), ("http_rsgi.py", RSGI), ("http_aiohttp.py", AIOHTTP), ("http_changing.lua", SCRIPT)):
            (APPS / name).write_text(text, encoding="utf-8")
    except (CommandFailed, OSError) as error:
        return f"peers not installed because {error}"
    return ""


def _quiet(argv: Sequence[str]) -> None:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(argv, -9, f"no end after {INSTALL_S:g} s") from error
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr or done.stdout)


def _ours(kind: str) -> Server:
    return Server(OURS, lambda port: [sys.executable, "-m", "benchmarks.runtime_http", kind, str(port)])


def _granian(interface: str) -> Server:
    app = f"http_{interface}:app"
    options = ["--workers", "1", "--no-ws", "--loop", "uvloop", "--no-access-log", "--working-dir", str(APPS)]
    return Server(
        f"granian {interface}",
        lambda port: [str(VENV / "bin/granian"), "--interface", interface, *options, "--host", "127.0.0.1", "--port", str(port), app],
    )


def _uvicorn() -> Server:
    options = [
        "--loop",
        "uvloop",
        "--http",
        "httptools",
        "--no-access-log",
        "--no-server-header",
        "--log-level",
        "error",
        "--app-dir",
        str(APPS),
    ]
    return Server("uvicorn", lambda port: [str(VENV / "bin/uvicorn"), *options, "--port", str(port), "http_asgi:app"])


def _aiohttp() -> Server:
    return Server("aiohttp", lambda port: [str(VENV / "bin/python"), str(APPS / "http_aiohttp.py"), str(port)])


# -- our server, in its own process --------------------------------------------------------------------------------------------------


def main(kind: str, port: int) -> None:
    """Serve until killed."""

    def function(_: Request) -> Response:
        return Response.json({"message": "Hello, World!"})

    async def coroutine(_: Request) -> Response:
        return Response.json({"message": "Hello, World!"})

    async def serve() -> None:
        world = make_host_world()
        logger = Logger(lambda _: None, world.clock)
        names: dict[str, object] = {}
        exec(compile(ASGI, "asgi", "exec"), names)
        router = Router()
        router.get("/", coroutine if kind == "coroutine" else function)
        handler: Handler = AsgiApplication(names["app"], logger=logger) if kind == "asgi" else router  # type: ignore[arg-type]
        server = HttpServer(world, handler, logger=logger, metrics=Registry())
        await server.listen(TcpAddress("127.0.0.1", port))
        await asyncio.Event().wait()

    loop = new_loop()
    loop.run_until_complete(serve())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
