"""The soak's misbehaving clients: `python -m benchmarks._soak_bad FOLDER PORTS SECONDS SEED`.

Each scenario is one thing that real peers do to servers: say nothing, stall, read slowly, go away in the middle, talk nonsense, flood. What
comes back is not looked at; the good clients beside them are what must not notice. Every scenario ends by itself within seconds. Sockets
are plain asyncio's, so that nothing here behaves better than it should. How often each ran is printed as JSON at the end.
"""

import asyncio
import os
import random
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import _soak_shared as s
from isopod.net.rpc import Client, connect
from isopod.world.errors import IsopodError
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress, UnixAddress

N_WORKERS: Final = 24
SCENARIO_S: Final = 6.0
PATIENCE_S: Final = 3.0
"""Longer than the server's limits: it is for the server to end what stalls."""
N_PIPELINED: Final = 500
N_PINGS: Final = 2_000
N_OPEN_CALLS: Final = 100
GET: Final = b"GET /json HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE: Final = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n"
HANDSHAKE: Final = (
    b"GET /%s HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PING: Final = b"\x89\x84\0\0\0\0ping"
HALF_MESSAGE: Final = b"\x81\xfe\x10\x00\0\0\0\0" + b"x" * 1000
_LINGER_RESET: Final = struct.pack("ii", 1, 0)


class Peer:
    """One connection.

    Args:
        reader: Of it.
        writer: Of it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, data: bytes) -> None:
        """Send, and wait until it is on its way."""
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self, n_bytes: int = 1 << 16) -> bytes:
        """Receive something."""
        return await self.reader.read(n_bytes)

    async def until_end(self) -> None:
        """Wait for the server to hang up."""
        while await self.reader.read(1 << 16):
            pass

    def cut(self, *, reset: bool = False) -> None:
        """Go without a word; with `reset` the kernel says so."""
        if reset:
            found = self.writer.get_extra_info("socket")
            with suppress(OSError):
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.writer.transport.abort()


class Bad:
    """All scenarios of one process.

    Args:
        folder: The server's.
        ports: Where it listens.
        seed: Of what they choose.
    """

    def __init__(self, folder: Path, ports: s.Ports, seed: int) -> None:
        self.folder = folder
        self.ports = ports
        self.random = random.Random(seed)
        self.world = make_host_world()
        self.tls = s.client_tls(folder)
        self.context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        self.context.load_cert_chain(folder / "client.crt", folder / "client.key")
        self.n_run: Counter[str] = Counter()
        self._peers: dict[int, Peer] = {}
        self._n_peers = 0

    async def run(self, seconds: float) -> None:
        """Run scenarios, chosen by chance, for so long."""
        until_s = time.monotonic() + seconds
        scenarios: list[Callable[[], Awaitable[None]]] = [getattr(self, name) for name in sorted(dir(Bad)) if name.startswith("do_")]
        await asyncio.gather(*(self._work(scenarios, until_s) for _ in range(N_WORKERS)))

    async def _work(self, scenarios: list[Callable[[], Awaitable[None]]], until_s: float) -> None:
        while time.monotonic() < until_s:
            scenario = self.random.choice(scenarios)
            first = self._n_peers
            with suppress(OSError, TimeoutError, EOFError, IsopodError):
                async with asyncio.timeout(SCENARIO_S):
                    await scenario()
            self.n_run[getattr(scenario, "__name__", "?").removeprefix("do_")] += 1
            for number in [each for each in self._peers if each >= first and self._peers[each].writer.transport.is_closing()]:
                self._peers.pop(number, None)
            await asyncio.sleep(0)

    async def peer(self, port: int = 0, *, secured: bool = False) -> Peer:
        """Connect."""
        port = port or self.random.choice((self.ports.http, self.ports.http, self.ports.web))
        context = self.context if secured else None
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1 << 14))
        self._peers[self._n_peers] = peer
        self._n_peers += 1
        asyncio.get_running_loop().call_later(SCENARIO_S + 1, peer.cut)  # whatever becomes of the scenario
        return peer

    # --- saying nothing, and stalling ---------------------------------------------------------------------------------

    async def do_silence(self) -> None:
        """Connect and say nothing: to anything."""
        peer = await self.peer(self.random.choice((self.ports.http, self.ports.https, self.ports.rpc, self.ports.web)))
        await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut()

    async def do_half_head(self) -> None:
        """Half a header, and then nothing."""
        peer = await self.peer()
        await peer.say(GET[: self.random.randrange(1, len(GET) - 1)])
        await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut()

    async def do_dripping_head(self) -> None:
        """One byte after the other."""
        peer = await self.peer()
        for byte in GET * 2:
            await peer.say(bytes((byte,)))
            await asyncio.sleep(0.1)

    async def do_stalled_upload(self) -> None:
        """A body that stops."""
        peer = await self.peer(self.ports.http)
        await peer.say(b"POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n" + s.PIECE)
        await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut(reset=True)

    async def do_slow_reader(self) -> None:
        """Ask for much and take it slowly."""
        peer = await self.peer(self.random.choice((self.ports.http, self.ports.https)), secured=False)
        await peer.say(LARGE)
        for _ in range(20):
            await peer.hear(512)
            await asyncio.sleep(0.1)
        peer.cut()

    async def do_slow_secured_reader(self) -> None:
        """The same over TLS."""
        peer = await self.peer(self.ports.https, secured=True)
        await peer.say(self.random.choice((LARGE, b"GET /static/file.bin HTTP/1.1\r\nhost: x\r\n\r\n" * 4)))
        for _ in range(20):
            await peer.hear(512)
            await asyncio.sleep(0.1)
        peer.cut()

    # --- going away in the middle -------------------------------------------------------------------------------------

    async def do_cut_request(self) -> None:
        """Gone in a header."""
        peer = await self.peer()
        await peer.say(GET[:20])
        peer.cut(reset=self.random.random() < 0.5)

    async def do_cut_waiting(self) -> None:
        """Gone while the handler runs."""
        peer = await self.peer(self.random.choice((self.ports.http, self.ports.https)), secured=False)
        await peer.say(b"GET /wait/2000 HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.02)
        peer.cut(reset=self.random.random() < 0.5)

    async def do_half_closed(self) -> None:
        """Ask, say that there is nothing more, stay."""
        peer = await self.peer(self.ports.http)
        await peer.say(b"GET /wait/3000 HTTP/1.1\r\nhost: x\r\n\r\n")
        peer.writer.write_eof()
        await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut()

    async def do_cut_response(self) -> None:
        """Gone in the middle of an answer."""
        secured = self.random.random() < 0.5
        path = self.random.choice((b"/large", b"/stream/1000", b"/static/file.bin"))
        peer = await self.peer(self.ports.https if secured else self.ports.http, secured=secured)
        await peer.say(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        await peer.hear(30_000)
        peer.cut(reset=self.random.random() < 0.5)

    async def do_cut_upload(self) -> None:
        """Gone in the middle of a body."""
        secured = self.random.random() < 0.5
        peer = await self.peer(self.ports.https if secured else self.ports.http, secured=secured)
        chunked = self.random.random() < 0.5
        head = b"transfer-encoding: chunked\r\n\r\n4000\r\n" if chunked else b"content-length: 4000000\r\n\r\n"
        await peer.say(b"POST /upload HTTP/1.1\r\nhost: x\r\n" + head + s.PIECE)
        peer.cut(reset=self.random.random() < 0.5)

    async def do_cut_tls(self) -> None:
        """Gone in the handshake: after part of a hello, after all of it, or by sending it twice."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with suppress(ssl.SSLWantReadError):
            self.context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
        hello = outgoing.read()
        peer = await self.peer(self.random.choice((self.ports.https, self.ports.rpc)))
        choice = self.random.randrange(3)
        await peer.say(hello[:50] if choice == 0 else hello if choice == 1 else hello * 2)
        if choice:
            await asyncio.wait_for(peer.hear(), 1)
        peer.cut(reset=self.random.random() < 0.5)

    async def do_cut_websocket(self) -> None:
        """Gone in the middle of a message."""
        secured = self.random.random() < 0.5
        peer = await self.peer(self.ports.https if secured else self.ports.http, secured=secured)
        await peer.say(HANDSHAKE % b"ws")
        await peer.hear()
        await peer.say(HALF_MESSAGE)
        peer.cut(reset=self.random.random() < 0.5)

    # --- nonsense and floods ------------------------------------------------------------------------------------------

    async def do_garbage(self) -> None:
        """Random bytes, to anything."""
        peer = await self.peer(self.random.choice((self.ports.http, self.ports.https, self.ports.rpc, self.ports.web)))
        await peer.say(self.random.randbytes(self.random.choice((1, 100, 20_000))))
        await asyncio.wait_for(peer.until_end(), 1)
        peer.cut()

    async def do_garbage_rpc(self) -> None:
        """Random bytes behind a proper beginning."""
        reader, writer = await asyncio.open_unix_connection(f"{self.folder}/rpc.sock")
        peer = Peer(reader, writer)
        asyncio.get_running_loop().call_later(SCENARIO_S + 1, peer.cut)
        begin = self.random.choice(
            (b"ISO1", b"ISO1\0\0\0\x05", b"ISO1\xff\xff\xff\xff", b"{", b'{"versions":[1],"peer":"x"}\n[1,2,3]\n', b"")
        )
        await peer.say(begin + os.urandom(self.random.choice((0, 10, 5_000))))
        if self.random.random() < 0.5:
            await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut()

    async def do_garbage_websocket(self) -> None:
        """Frames that are none."""
        peer = await self.peer(self.ports.http)
        await peer.say(HANDSHAKE % self.random.choice((b"ws", b"hub")))
        await peer.hear()
        await peer.say(os.urandom(200))
        await asyncio.wait_for(peer.until_end(), PATIENCE_S)
        peer.cut()

    async def do_pipelining(self) -> None:
        """Many requests at once, few answers taken."""
        peer = await self.peer()
        await peer.say(GET * N_PIPELINED)
        for _ in range(3):
            await peer.hear(1000)
        await asyncio.sleep(self.random.random())
        peer.cut(reset=self.random.random() < 0.5)

    async def do_pipelined_large(self) -> None:
        """Many large answers asked for, none taken."""
        peer = await self.peer(self.ports.http)
        await peer.say(LARGE * 50)
        await asyncio.sleep(2.5)
        peer.cut()

    async def do_ping_flood(self) -> None:
        """Pings whose pongs nobody reads."""
        peer = await self.peer(self.random.choice((self.ports.http, self.ports.web)))
        await peer.say(HANDSHAKE % b"ws")
        await peer.hear()
        await peer.say(PING * N_PINGS)
        await asyncio.sleep(self.random.random())
        peer.cut()

    async def do_deaf_hub(self) -> None:
        """A member of the hub that reads nothing and answers no ping."""
        peer = await self.peer(self.ports.http)
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await peer.say(HANDSHAKE % b"hub")
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(5)
        peer.cut()

    async def do_deaf_echo(self) -> None:
        """Talk and never listen."""
        peer = await self.peer(self.ports.http)
        await peer.say(HANDSHAKE % b"ws")
        await peer.hear()
        frame = b"\x82\xfe\xff\xff\0\0\0\0" + bytes(65_535)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(200):
                    await peer.say(frame)
        peer.cut()

    # --- RPC ----------------------------------------------------------------------------------------------------------

    async def client(self) -> Client:
        """Connect, over one of both ways."""
        if self.random.random() < 0.5:
            return await connect(self.world, UnixAddress(f"{self.folder}/rpc.sock"))
        return await connect(self.world, TcpAddress("127.0.0.1", self.ports.rpc), tls=self.tls)

    async def do_rpc_open_and_die(self) -> None:
        """Open calls and streams, and go."""
        client = await self.client()
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(client.call(s.SLOW, s.Message("", 5_000))) for _ in range(N_OPEN_CALLS)]
        tasks += [loop.create_task(client.call(s.SHARDED, s.Message("", number))) for number in range(10)]
        with suppress(IsopodError):
            async with client.open(s.UPPER, s.Message()) as call:
                for _ in range(4):
                    await call.send(s.PIECE)
                client.connection.abort()
        client.connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def do_rpc_cancel(self) -> None:
        """Open calls and take them back, streams too."""
        client = await self.client()
        tasks = [asyncio.get_running_loop().create_task(client.call(s.SLOW, s.Message("", 5_000))) for _ in range(N_OPEN_CALLS)]
        await asyncio.sleep(self.random.random() * 0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            async with client.open(s.BULK, s.Message("", s.LARGE_BYTES)) as call:
                await call.receive()
        await client.close()

    async def do_rpc_overrun(self) -> None:
        """Calls that take longer than they may, more of them than may be open."""
        client = await self.client()
        calls = (client.call(s.SLOW, s.Message("", 3_000), timeout_s=0.2) for _ in range(3 * N_OPEN_CALLS))
        await asyncio.gather(*calls, return_exceptions=True)
        await client.close()

    async def do_rpc_deaf(self) -> None:
        """Ask for much, and read nothing of it."""
        client = await self.client()
        transport = client.connection._transport
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(client.call(s.BULK, s.Message("", s.LARGE_BYTES))) for _ in range(4)]
        tasks += [loop.create_task(client.call(s.PLAIN, s.Message("x" * 50_000))) for _ in range(N_OPEN_CALLS)]
        await asyncio.sleep(0)
        if isinstance(transport, asyncio.Transport):
            transport.pause_reading()
        await asyncio.sleep(PATIENCE_S)
        client.connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


async def main(folder: Path, ports: s.Ports, seconds: float, seed: int) -> None:
    """Run to the end and print how often each scenario ran."""
    bad = Bad(folder, ports, seed)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # what becomes of these clients is nobody's business
    await bad.run(seconds)
    print(msgspec.json.encode(bad.n_run).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=s.Ports), float(sys.argv[3]), int(sys.argv[4])))
