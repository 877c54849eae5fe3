"""grpcio's asyncio API as the RPC benchmark's peer, in a virtual environment of its own; same verbs as `_rpc_ours`.

Generic handlers with identity serialisers: no protobuf code runs, which is the best case for it. "echo" hands on bytes as they are; "plain"
decodes and encodes the message with msgspec on both ends, as ours does. It chooses its own threads; that is its way to be fast.
"""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _rpc_load

GRPC: Final = "grpc"  # installed for the benchmark only: nothing else may depend on it
PIECE: Final = bytes(64 << 10)
BULK_BYTES: Final = 16 << 20


async def serve(folder: str) -> None:
    """Serve on a Unix socket and a TCP port until killed; print the port."""
    grpc = importlib.import_module(GRPC)
    msgpack = importlib.import_module("msgspec").msgpack

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    async def plain(request: bytes, _context: Any) -> bytes:
        packed: bytes = msgpack.encode(msgpack.decode(request))
        return packed

    async def bulk(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for _ in range(BULK_BYTES // len(PIECE)):
            yield PIECE

    handlers = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "plain": grpc.unary_unary_rpc_method_handler(plain),
        "bulk": grpc.unary_stream_rpc_method_handler(bulk),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    server.add_insecure_port(f"unix:{folder}/grpc.sock")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


async def load(address: str, what: str, n_at_once: int, rest: Sequence[str]) -> None:
    """Put load on a server, as `_rpc_ours.load`."""
    grpc = importlib.import_module(GRPC)
    msgpack = importlib.import_module("msgspec").msgpack
    target = f"unix:{address}" if address.startswith("/") else f"127.0.0.1:{address}"
    message = {"text": "hello, world", "number": 7}
    packed = msgpack.encode(message)
    async with grpc.aio.insecure_channel(target) as channel:
        ask = channel.unary_unary(f"/bench/{what}")
        stream = channel.unary_stream("/bench/bulk")

        async def call() -> int:
            if what == "plain":
                msgpack.decode(await ask(msgpack.encode(message)))
            else:
                await ask(packed)
            return 1

        async def take_bulk() -> int:
            n_bytes = 0
            async for piece in stream(b""):
                n_bytes += len(piece)
            return n_bytes

        act = take_bulk if what == "bulk" else call
        await _rpc_load.run(act, n_at_once=n_at_once, for_s=float(rest[0]), pid=int(rest[1]))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[2]) if sys.argv[1] == "serve" else load(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]))
