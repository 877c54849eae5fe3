"""Our RPC: a server under test (`python -m benchmarks._rpc_ours serve FOLDER`) and its load (`... load ADDRESS WHAT N SECONDS PID`)."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from benchmarks import _rpc_load
from isopod.net.rpc import Call, Client, Server, connect
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.wire.service import Method
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import Address, TcpAddress, UnixAddress


class Message(msgspec.Struct, frozen=True):
    """A small request and reply."""

    text: str = ""
    number: int = 0


ECHO: Final = Method("bench.echo", Message, Message)
PLAIN: Final = Method("bench.plain", Message, Message)
BULK: Final = Method("bench.bulk", Message, Message, receives=bytes)
PIECE: Final = bytes(64 << 10)
BULK_BYTES: Final = 16 << 20


async def echo(_call: Call[Any, Any], request: Message) -> Message:
    """A coroutine that does not wait."""
    return request


def plain(_call: Call[Any, Any], request: Message) -> Message:
    """A function."""
    return request


async def bulk(call: Call[Any, bytes], request: Message) -> Message:
    """Stream `number` bytes."""
    for _ in range(request.number // len(PIECE)):
        await call.send(PIECE)
    return request


async def serve(folder: str) -> None:
    """Serve on a Unix socket and a TCP port until killed; print the port."""
    world = make_host_world()
    server = Server(world, [(ECHO, echo), (PLAIN, plain), (BULK, bulk)], logger=Logger(lambda _: None, world.clock), metrics=Registry())
    await server.listen(UnixAddress(f"{folder}/ours.sock"))
    listener = await server.listen(TcpAddress("127.0.0.1", 0), plaintext=True)
    assert isinstance(listener.address, TcpAddress)
    print(listener.address.port, flush=True)
    await asyncio.Event().wait()


async def load(address: str, what: str, n_at_once: int, rest: Sequence[str]) -> None:
    """Put load on a server: `what` is echo, plain or bulk; `rest` the seconds and the server's pid."""
    client = await connect(make_host_world(), _address(address), plaintext=True)
    request = Message("hello, world", 7)
    method = PLAIN if what == "plain" else ECHO

    async def call() -> int:
        await client.call(method, request)
        return 1

    act = call if what != "bulk" else lambda: _take_bulk(client)
    await _rpc_load.run(act, n_at_once=n_at_once, for_s=float(rest[0]), pid=int(rest[1]))
    await client.close()


async def _take_bulk(client: Client) -> int:
    n_bytes = 0
    async with client.open(BULK, Message("", BULK_BYTES)) as call:
        while (item := await call.receive()) is not None:
            n_bytes += len(item)
    return n_bytes


def _address(text: str) -> Address:
    return UnixAddress(text) if text.startswith("/") else TcpAddress("127.0.0.1", int(text))


if __name__ == "__main__":
    todo = serve(sys.argv[2]) if sys.argv[1] == "serve" else load(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:])
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(todo)
