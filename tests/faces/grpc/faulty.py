"""A program: a server whose handlers do what the request's name says: fail with the error of that code, hang, or break."""

import asyncio
import sys
from typing import Any

from isopod.faces.grpc.node import Asked, Fields
from isopod.faces.grpc.schema import load_schema
from isopod.faces.grpc.server import GrpcServer
from isopod.runtime.logger import Logger
from isopod.world.errors import from_code
from isopod.world.host import daemon
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

SERVICE = "blixard.ClusterService"
MESSAGE = "what failed"
HINT = "what to do"


async def get_vm_status(asked: Asked) -> Fields:
    """Do what is asked for."""
    name = asked.message.name
    if name == "hang":
        await asyncio.sleep(3600)
    if name == "break":
        raise ZeroDivisionError("a secret of the inside")
    if name == "huge":
        return {"found": True, "vm_info": {"name": "x" * (5 << 20)}}
    if name == "left":
        return {"found": True, "vm_info": {"node_id": round(asked.left_s * 1000)}}
    if name == "words":
        raise from_code("not_found", 'Grüße\n"%00"\x00\x7f' + "é" * 5000)
    raise from_code(name, MESSAGE, HINT)


async def main() -> None:
    """Serve until standard input ends."""
    world = make_host_world()
    schema = await load_schema(world.disk)
    logger = Logger(daemon.write_stderr, world.clock)
    handlers: dict[str, Any] = {method.path: get_vm_status for method in schema.services[SERVICE]}
    server = GrpcServer(schema, handlers, logger, services=(SERVICE,))
    print(await server.start("127.0.0.1:0"), flush=True)  # noqa: T201 - who starts it reads it
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    await ended.wait()
    await server.stop(0.2)
    world.close()


if __name__ == "__main__":
    new_loop("uvloop" if sys.argv[1:] == ["uvloop"] else "asyncio").run_until_complete(main())
