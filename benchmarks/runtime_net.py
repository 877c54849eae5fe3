"""Networking: CPU per echoed message, and of TLS.

Each server is a process of its own; its CPU is read from /proc before and after a fixed number of messages sent by the same C program
(echo_epoll.c, compiled here with gcc), which is also the floor: one thread, level-triggered epoll. For TLS both ends are in one process,
since the load generator speaks none: the figure is the CPU of a message there and back, encrypted and decrypted twice.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, spawn, wait
from isopod.net.ca import Authority, Subject
from isopod.net.tcp import Connection, TcpServer
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import ClientTls, ServerTls, TcpAddress, TlsMaterial

SOURCE: Final = PROJECT / "benchmarks" / "echo_epoll.c"
N_CONNECTIONS: Final = 32
N_TLS_CONNECTIONS: Final = 16
LOAD_DEADLINE_S: Final = 120
SMALL_BYTES: Final = 64
LARGE_BYTES: Final = 16 << 10


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the measurements."""
    n_small, n_large, n_runs = (10_000, 3_000, 3) if quick else (60_000, 20_000, 7)
    with tempfile.TemporaryDirectory(prefix="isopod-bench-") as folder:
        program = _compile(Path(folder))

        def echo(kind: str, n_bytes: int, n_messages: int) -> Contender:
            names = {"isopod": OURS, "isopod-handler": OURS, "c": "C epoll", "asyncio": "asyncio", "streams": "asyncio streams"}
            return Contender(names[kind], lambda: _echo_us(program, kind, n_bytes, n_messages))

        yield Row("echo 64 B, server CPU", "us", [echo(kind, SMALL_BYTES, n_small) for kind in ("isopod", "c", "asyncio")], n_runs)
        yield Row("echo 16 KiB, server CPU", "us", [echo(kind, LARGE_BYTES, n_large) for kind in ("isopod", "c", "asyncio")], n_runs)
        yield Row(
            "echo 64 B by await, server CPU",
            "us",
            [echo(kind, SMALL_BYTES, n_small // 2) for kind in ("isopod-handler", "streams")],
            n_runs,
        )
        for size, n_messages in ((SMALL_BYTES, n_small // 40), (LARGE_BYTES, n_large // 40)):
            yield Row(f"TLS echo {size} B, CPU of both ends", "us", [_tls(kind, size, n_messages) for kind in _TLS_PEERS], n_runs)


_TLS_PEERS: Final = {"tls-isopod": OURS, "tls-uvloop": "uvloop's TLS", "tls-asyncio": "asyncio's TLS"}


def _compile(folder: Path) -> str:
    program = folder / "echo_epoll"
    subprocess.run(["gcc", "-O2", "-o", str(program), str(SOURCE)], check=True, timeout=LOAD_DEADLINE_S)
    return str(program)


def _echo_us(program: str, kind: str, n_bytes: int, n_messages: int) -> float:
    """Return the server's CPU for one message, in microseconds."""
    argv = [program, "serve"] if kind == "c" else [sys.executable, "-m", "benchmarks.runtime_net", kind]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=PROJECT, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().decode().strip()
            if not port:
                raise CommandFailed(argv, server.wait(), "it told no port")
            load = [program, "load", port, str(N_CONNECTIONS), str(n_bytes)]
            _run([*load, str(n_messages // 10)])  # warm
            before_us = _cpu_us(server.pid)
            _run([*load, str(n_messages)])
            return (_cpu_us(server.pid) - before_us) / n_messages
        finally:
            server.kill()


def _run(argv: list[str]) -> None:
    wait(argv, spawn(argv))


def _cpu_us(pid: int) -> float:
    """Return how long a process has run on a CPU (its main thread: the servers have one)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1000


def _tls(kind: str, n_bytes: int, n_messages: int) -> Contender:
    argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.runtime_net", kind, str(n_bytes), str(n_messages)]

    def sample() -> float:
        done = subprocess.run(argv, check=False, capture_output=True, cwd=PROJECT, timeout=LOAD_DEADLINE_S)
        if done.returncode != 0:
            raise CommandFailed(argv, done.returncode, done.stderr.decode())
        return float(done.stdout)

    return Contender(_TLS_PEERS[kind], sample)


# -- the processes ---------------------------------------------------------------------------------------------------------------------


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.write = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        self.write(data)


class _Asker(asyncio.Protocol):
    """Sends messages one after the other and waits for each to come back."""

    def __init__(self, n_bytes: int, n_messages: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._message = bytes(n_bytes)
        self._n_left = n_messages
        self._n_got = 0

    def start(self, transport: asyncio.Transport) -> None:
        self._write = transport.write
        self._write(self._message)

    def data_received(self, data: bytes) -> None:
        self._n_got += len(data)
        if self._n_got < len(self._message):
            return
        self._n_got -= len(self._message)
        self._n_left -= 1
        if self._n_left:
            self._write(self._message)
        else:
            self.done.set_result(None)


async def _serve(kind: str) -> None:
    async def by_handler(connection: Connection) -> None:
        while data := await connection.read():
            connection.write(data)
            await connection.drain()

    async def by_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    where = TcpAddress("127.0.0.1", 0)
    if kind == "isopod":
        listener = await make_host_world().network.listen(where, _Echo)
        port = listener.address[1]  # type: ignore[misc]  # it is a TcpAddress
    elif kind == "isopod-handler":
        listener = await TcpServer(make_host_world(), by_handler).listen(where)
        port = listener.address[1]  # type: ignore[misc]  # as above
    else:
        make: Callable[[], asyncio.BaseProtocol] = _Echo
        if kind == "streams":
            server = await asyncio.start_server(by_streams, *where)
        else:
            server = await asyncio.get_running_loop().create_server(make, *where)
        port = server.sockets[0].getsockname()[1]
    print(port, flush=True)
    await asyncio.Event().wait()


async def _ask_tls(kind: str, n_bytes: int, n_messages: int) -> float:
    """Return the process's CPU for one message there and back, in microseconds."""
    world = make_host_world()
    authority = Authority.create(world, "benchmark")
    issued = authority.issue(Subject("localhost", addresses=("127.0.0.1",)))
    served = ServerTls(TlsMaterial(issued.certificate, issued.key))
    trusted = ClientTls(TlsMaterial(authorities=authority.certificate))
    loop = asyncio.get_running_loop()
    made: list[tuple[asyncio.Transport, _Asker]] = []
    if kind == "tls-isopod":
        listener = await world.network.listen(TcpAddress("127.0.0.1", 0), _Echo, tls=served)
        for _ in range(N_TLS_CONNECTIONS):
            found = await world.network.connect(listener.address, lambda: _Asker(n_bytes, n_messages), tls=trusted)
            made.append(cast("tuple[asyncio.Transport, _Asker]", found))
    else:
        server = await loop.create_server(_Echo, "127.0.0.1", 0, ssl=served.context)
        port = server.sockets[0].getsockname()[1]
        for _ in range(N_TLS_CONNECTIONS):
            made.append(await loop.create_connection(lambda: _Asker(n_bytes, n_messages), "127.0.0.1", port, ssl=trusted.context))
    began = time.process_time()
    for transport, asker in made:
        asker.start(transport)
    async with asyncio.timeout(LOAD_DEADLINE_S):
        await asyncio.gather(*(asker.done for _, asker in made))
    return (time.process_time() - began) * 1e6 / n_messages / N_TLS_CONNECTIONS


def main(argv: list[str]) -> None:
    """Be one of the measured processes."""
    kind = argv[0]
    loop = new_loop("asyncio" if kind in ("asyncio", "streams", "tls-asyncio") else "uvloop")
    if kind.startswith("tls"):
        print(loop.run_until_complete(_ask_tls(kind, int(argv[1]), int(argv[2]))), flush=True)
        os._exit(0)  # connections and listeners end with the process
    loop.run_until_complete(_serve(kind))


if __name__ == "__main__":
    main(sys.argv[1:])
