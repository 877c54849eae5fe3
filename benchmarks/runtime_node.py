"""A node that has nothing to do, what it costs to look at it, and what a second shard costs under a load from outside.

The node is a real one, `isopod node` with data, sockets and prefix of its own, in a corner of the machine that takes everything with it
(`_arena`). Its CPU is read from the scheduler's own count of nanoseconds, of all its threads and shards; PSS counts shared pages by
their share. A scrape is `GET /metrics` on the telemetry socket, on one connection, its CPU that of the node.

The second shard: small JSON over HTTP, connections handed out by shard 0, wrk beside it; its peer is the same program with one shard. On a
machine with two processors server and generator share them, so the rate says nothing; CPU per request is what is compared.
"""

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import _arena, runtime_http
from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row
from isopod.net.http.messages import Response
from isopod.net.http.router import Router
from isopod.net.http.server import HttpServer
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards import Smp, SmpConfig, SmpService
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress

FOLDER: Final = Path("/tmp/isopod-bench-node")
IDLE_S: Final = 10.0
SETTLE_S: Final = 3.0
START_S: Final = 60.0
STOP_S: Final = 20.0
N_SCRAPES: Final = 50
N_SHARDS: Final = (1, 2)
LOAD_S: Final = 5


class Measured(msgspec.Struct, frozen=True):
    """What one node showed."""

    idle_percent: float
    pss_mib: float
    scrape_us: float


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the measurements.

    Args:
        quick: Each once.
    """
    n_runs = 1 if quick else 3
    for n_shards in N_SHARDS:
        name = f"node, {n_shards} shard{'s' * (n_shards > 1)}"
        seen: list[Measured] = []
        yield Row(f"{name}: idle CPU over {IDLE_S:g} s", "%", [Contender(OURS, partial(_idle_percent, n_shards, seen))], n_runs)
        yield Row(f"{name}: PSS", "MiB", [Contender(OURS, partial(_median, seen, "pss_mib"))], 1)
        yield Row(f"{name}: one scrape, CPU", "us", [Contender(OURS, partial(_median, seen, "scrape_us"))], 1)
    failure = runtime_http._install()
    if failure:
        print(f"two shards under wrk: not measured because {failure}", file=sys.stderr)
        return
    contenders = [Contender(who, partial(_loaded_us, n_shards, 1 if quick else LOAD_S)) for who, n_shards in ((OURS, 2), ("one shard", 1))]
    yield Row("HTTP handed out to two shards, CPU", "us", contenders, 1 if quick else 5)


def _idle_percent(n_shards: int, seen: list[Measured]) -> float:
    with tempfile.NamedTemporaryFile(prefix="isopod-bench-") as told:
        status = _arena.run_inside("benchmarks.runtime_node", ["node", str(n_shards), told.name], FOLDER)
        if status != 0:
            raise CommandFailed(["runtime_node", "node"], status, "see above")
        seen.append(msgspec.json.decode(Path(told.name).read_bytes(), type=Measured))
    return seen[-1].idle_percent


def _median(seen: Sequence[Measured], field: str) -> float:
    if not seen:
        raise CommandFailed(["runtime_node", "node"], 1, "the node was not measured")
    return statistics.median(float(getattr(each, field)) for each in seen)


# -- inside the arena --------------------------------------------------------------------------------------------------


def _measure_node(n_shards: int, target: Path) -> None:
    """Start a node, look at it while it is idle, scrape it, stop it."""
    _arena.prepare()
    FOLDER.mkdir(parents=True, exist_ok=True)
    endpoint = FOLDER / "telemetry.sock"
    places = {"ISOPOD_ROOT": f"{FOLDER}/data", "ISOPOD_RUN_ROOT": f"{FOLDER}/run", "ISOPOD_PREFIX": _arena.CGROUP_WORD}
    argv = [str(PROJECT / ".venv/bin/isopod"), "node", "--telemetry", f"unix:{endpoint}", "--shards", str(n_shards)]
    with (FOLDER / "node.log").open("wb") as log:
        node = subprocess.Popen(argv, env=os.environ | places, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_up(node, endpoint)
        _scrape(endpoint, 3)
        time.sleep(SETTLE_S)
        before_ns, began_s = _cpu_ns(node.pid), time.monotonic()
        time.sleep(IDLE_S)
        used_ns, took_s = _cpu_ns(node.pid) - before_ns, time.monotonic() - began_s
        pss_mib = sum(_pss_bytes(pid) for pid in _family(node.pid)) / (1 << 20)
        before_ns = _cpu_ns(node.pid)
        _scrape(endpoint, N_SCRAPES)
        scrape_us = (_cpu_ns(node.pid) - before_ns) / N_SCRAPES / 1000
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(STOP_S)
    target.write_bytes(msgspec.json.encode(Measured(used_ns / took_s / 1e7, pss_mib, scrape_us)))


def _wait_up(node: "subprocess.Popen[bytes]", endpoint: Path) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        if node.poll() is not None:
            break
        with contextlib.suppress(OSError):
            _scrape(endpoint, 1)
            return
        time.sleep(0.1)
    raise CommandFailed(["isopod", "node"], node.poll() or -1, (FOLDER / "node.log").read_text(encoding="utf-8", errors="replace"))


def _scrape(endpoint: Path, count: int) -> None:
    connection = http.client.HTTPConnection("node", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(endpoint))
        for _ in range(count):
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK or not answer.read():
                raise CommandFailed(["GET", "/metrics"], answer.status)
    finally:
        connection.close()


def _family(pid: int) -> list[int]:
    """Return a process and its children: shards, each of which is the leader of a session of its own."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def _cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads of a node and its shards."""
    total = 0
    for each in _family(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
    return total


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# -- shards under a load from outside ----------------------------------------------------------------------------------


def _loaded_us(n_shards: int, seconds: int) -> float:
    port = runtime_http._free_port()
    argv = [sys.executable, "-m", "benchmarks.runtime_node", "serve", str(n_shards), str(port)]
    with runtime_http._running(argv, port, os.environ | {"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"}) as pid:
        runtime_http._wrk(port, (), 1)
        before_ns = _cpu_ns(pid)
        n_requests = runtime_http._wrk(port, (), seconds)
        return (_cpu_ns(pid) - before_ns) / n_requests / 1000


async def service(smp: Smp) -> Callable[[], object]:
    """What every shard serves."""
    router = Router()
    router.get("/", lambda _: Response.json({"message": "Hello, World!"}))
    server = HttpServer(smp.world, router, logger=smp.logger, metrics=smp.metrics)
    smp.serve_connections("web", server.factory("web"))
    return server.close


async def _serve(n_shards: int, port: int) -> None:
    """Serve until killed."""
    world = make_host_world()
    shards = SmpService(
        world,
        SmpConfig(n_shards=n_shards),
        logger=Logger(lambda _: None, world.clock),
        metrics=Registry(),
        services=["benchmarks.runtime_node:service"],
    )
    async with shards:
        await shards.listen(TcpAddress("127.0.0.1", port), "web")
        await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "node":
        _measure_node(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_serve(int(sys.argv[2]), int(sys.argv[3])))
