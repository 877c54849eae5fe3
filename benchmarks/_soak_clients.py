"""The soak's well-behaved clients: `python -m benchmarks._soak_clients FOLDER PORTS SECONDS SEED`. They check every answer.

What they count and what failed goes to standard output as JSON at the end. A failure has the time of its beginning and end, so that the
judge can tell whether the shard it spoke to was killed meanwhile. The same program is what gets killed with SIGKILL in the middle of it.
"""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final
from zlib import crc32

import msgspec

from benchmarks import _soak_shared as s
from isopod.net.http.client import HttpClient
from isopod.net.http.client_messages import ClientLimits
from isopod.net.http.websocket import connect_websocket
from isopod.net.rpc import Client, RpcLimits, connect
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, NotFound
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress, UnixAddress

ANSWER_S: Final = 20.0
"""What is not answered by then failed. The machine is full; the server's own limits are far shorter."""
SESSION_S: Final = 60.0
N_EACH: Final = 3
N_OPERATIONS: Final = 20
FAILURES_MAX: Final = 200
_CRC: Final = crc32(s.PIECE * s.N_PIECES)
_FILE_CRC: Final = crc32(s.PIECE * (s.FILE_BYTES // len(s.PIECE)))


class Failure(msgspec.Struct, frozen=True):
    """Something that did not go as it should, between two points of the monotonic clock."""

    kind: str
    error: str
    began_s: float
    ended_s: float


class Report(msgspec.Struct):
    """What came of it: operations by kind, and failures."""

    done: dict[str, int]
    failures: list[Failure]


class Clients:
    """All sessions of one process.

    Args:
        folder: The server's.
        ports: Where it listens.
        seed: Of what they choose.
    """

    def __init__(self, folder: Path, ports: s.Ports, seed: int) -> None:
        self.world = make_host_world()
        self.folder = folder
        self.ports = ports
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.tls = s.client_tls(folder)

    async def run(self, seconds: float) -> Report:
        """Run sessions of every kind, again and again, for so long."""
        until_s = time.monotonic() + seconds
        sessions = [self.http, self.https, self.http_unix, self.websocket, self.hub, self.rpc_tcp, self.rpc_unix, self.shards]
        await asyncio.gather(*(self._repeat(session, until_s) for session in sessions for _ in range(N_EACH)))
        return Report(dict(self.done), self.failures)

    async def _repeat(self, session: Callable[[], Awaitable[None]], until_s: float) -> None:
        kind = getattr(session, "__name__", "?")
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(SESSION_S):
                    await session()
            except Exception as error:  # noqa: BLE001 - whatever it was, it is told
                if len(self.failures) < FAILURES_MAX:
                    self.failures.append(Failure(kind, f"{type(error).__name__}: {error}", began_s, time.monotonic()))
                await asyncio.sleep(0.2)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def http(self) -> None:
        """Over TCP."""
        await self._http(f"http://127.0.0.1:{self.ports.http}", "http", None)

    async def https(self) -> None:
        """Over TLS."""
        await self._http(f"https://127.0.0.1:{self.ports.https}", "https", None)

    async def http_unix(self) -> None:
        """On the Unix socket."""
        await self._http("http://soak", "http unix", UnixAddress(f"{self.folder}/http.sock"))

    async def _http(self, base: str, kind: str, address: UnixAddress | None) -> None:
        client = HttpClient(self.world, limits=ClientLimits(connect_s=ANSWER_S, first_byte_s=ANSWER_S, total_s=ANSWER_S), tls=self.tls)

        async def get(path: str) -> bytes:
            answer = await client.request("GET", base + path, address=address)
            assert answer.is_success, f"{path}: {answer.status}"
            return await answer.read()

        try:
            for _ in range(N_OPERATIONS):
                choice = self.random.randrange(10)
                if choice < 6:
                    assert await get("/json") == b'{"hello":"world"}'
                elif choice == 6:
                    assert crc32(await get(f"/stream/{s.N_PIECES}")) == _CRC
                elif choice == 7:
                    assert crc32(await get("/static/file.bin")) == _FILE_CRC
                elif choice == 8:
                    answer = await client.request("POST", base + "/upload", body=_pieces(), address=address)
                    assert await answer.json() == {"n_bytes": s.N_PIECES * len(s.PIECE), "crc": _CRC}
                else:
                    assert await get("/wait/20") == b"done"
                self.done[kind] += 1
        finally:
            await client.close()

    async def shards(self) -> None:
        """On connections that are handed out to shards."""
        base = f"http://127.0.0.1:{self.ports.web}"
        client = HttpClient(self.world, limits=ClientLimits(connect_s=ANSWER_S, first_byte_s=ANSWER_S, total_s=ANSWER_S))
        try:
            for number in range(N_OPERATIONS):
                answer = await client.get(base + ("/neighbour" if number % 4 == 0 else "/shard"))
                assert answer.is_success, f"{answer.status} {(await answer.read())[:200]!r}"
                await answer.read()
                self.done["shards"] += 1
        finally:
            await client.close()

    # --- WebSocket ----------------------------------------------------------------------------------------------------

    async def websocket(self) -> None:
        """Echo, on shard 0 and over TLS."""
        secured = self.random.random() < 0.5
        url = f"wss://127.0.0.1:{self.ports.https}/ws" if secured else f"ws://127.0.0.1:{self.ports.http}/ws"
        ws = await connect_websocket(self.world, url, tls=self.tls, timeout_s=ANSWER_S)
        try:
            for _ in range(N_OPERATIONS):
                message = "a" * self.random.choice((1, 100, 20_000, 200_000))
                await ws.send(message)
                async with asyncio.timeout(ANSWER_S):
                    assert await ws.receive() == message
                self.done["websocket"] += 1
        finally:
            await ws.close()

    async def hub(self) -> None:
        """Hear news for a while."""
        ws = await connect_websocket(self.world, f"ws://127.0.0.1:{self.ports.http}/hub", timeout_s=ANSWER_S)
        try:
            for _ in range(N_OPERATIONS):
                async with asyncio.timeout(ANSWER_S):
                    assert str(await ws.receive()).startswith("news ")
                self.done["hub"] += 1
        finally:
            await ws.close()

    # --- RPC ----------------------------------------------------------------------------------------------------------

    async def rpc_tcp(self) -> None:
        """Over TCP with mutual TLS, sometimes compressed."""
        address = TcpAddress("127.0.0.1", self.ports.rpc)
        limits, compression = RpcLimits(heartbeat_s=5.0), self.random.random() < 0.3
        await self._rpc(await connect(self.world, address, tls=self.tls, limits=limits, timeout_s=ANSWER_S, compression=compression))

    async def rpc_unix(self) -> None:
        """On the Unix socket, sometimes in JSON, sometimes in the group for bulk."""
        choice = self.random.randrange(3)
        address = UnixAddress(f"{self.folder}/rpc.sock")
        group, encoding = ("bulk" if choice == 1 else ""), ("json" if choice == 2 else "msgpack")
        await self._rpc(
            await connect(self.world, address, timeout_s=ANSWER_S, group=group, encoding="json" if encoding == "json" else "msgpack")
        )

    async def _rpc(self, client: Client) -> None:
        try:
            for number in range(N_OPERATIONS):
                request = s.Message("a small request", number)
                choice = self.random.randrange(12)
                if choice < 5:
                    calls = (client.call(s.ECHO if each % 2 else s.PLAIN, request, timeout_s=ANSWER_S) for each in range(8))
                    assert await asyncio.gather(*calls) == [request] * 8
                elif choice == 5:
                    await self._stream(client)
                elif choice == 6:
                    await client.notify(s.TICK, request)
                elif choice == 7:
                    await self._expect(NotFound, client, s.FAIL, s.Message("x"))
                elif choice == 8:
                    await self._expect(DeadlineExceeded, client, s.SLOW, s.Message("", 5_000), timeout_s=0.05)
                elif choice == 9:
                    await client.ping(timeout_s=ANSWER_S)
                else:
                    await self._sharded(client, number)
                self.done["rpc"] += 1
        finally:
            await client.close()

    async def _expect(
        self,
        kind: type[Exception],
        client: Client,
        method: Method[s.Message, s.Message],
        request: s.Message,
        *,
        timeout_s: float = ANSWER_S,
    ) -> None:
        try:
            await client.call(method, request, timeout_s=timeout_s)
        except kind:
            return
        raise AssertionError(f"{method.name}: no {kind.__name__}")

    async def _sharded(self, client: Client, number: int) -> None:
        """A call that the server passes on; a failure of it is one of shards."""
        began_s = time.monotonic()
        request = s.Message("to a shard", number)
        try:
            assert await client.call(s.SHARDED, request, timeout_s=ANSWER_S) == request
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told
            if len(self.failures) < FAILURES_MAX:
                self.failures.append(Failure("shards", f"{type(error).__name__}: {error}", began_s, time.monotonic()))

    async def _stream(self, client: Client) -> None:
        n_bytes = check = 0
        async with asyncio.timeout(ANSWER_S), client.open(s.UPPER, s.Message()) as call:

            async def send() -> None:
                for _ in range(s.N_PIECES):
                    await call.send(s.PIECE)
                call.end()

            sending = asyncio.get_running_loop().create_task(send())
            try:
                async for piece in call:
                    n_bytes += len(piece)
                    check = crc32(piece, check)
                assert (await call.reply()).number == n_bytes == s.N_PIECES * len(s.PIECE)
                assert check == _UPPER_CRC
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


_UPPER_CRC: Final = crc32(s.PIECE.upper() * s.N_PIECES)


async def _pieces() -> AsyncIterator[bytes]:
    for _ in range(s.N_PIECES):
        yield s.PIECE


async def main(folder: Path, ports: s.Ports, seconds: float, seed: int) -> None:
    """Run to the end and print the report."""
    report = await Clients(folder, ports, seed).run(seconds)
    print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=s.Ports), float(sys.argv[3]), int(sys.argv[4])))
