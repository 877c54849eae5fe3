"""The Python client: the contract's methods as calls on one connection.

    async with open_client(world) as client:
        for container in (await client.call(methods.CONTAINER_LIST, ListContainers(all=True))).containers: ...

Every method of `isopod.api.methods` is called through `call` (one answer) or `open` (streams). This is the SDK's first form: it connects
to the daemon's socket and adds nothing to `isopod.net.rpc` but the address.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from isopod.net.rpc import Client, connect
from isopod.world.network import UnixAddress
from isopod.world.paths import resolve
from isopod.world.world import World


@asynccontextmanager
async def open_client(world: World, *, socket: str = "", timeout_s: float = 5.0) -> AsyncIterator[Client]:
    """Connect to a node for the length of the context.

    Args:
        world: Where to connect from.
        socket: The daemon's socket, "" for the default place.
        timeout_s: How long connecting may take.

    Raises:
        Disconnected: Nobody listens there.
    """
    client = await connect(world, UnixAddress(socket or resolve({})["socket"]), peer="isopod-sdk", timeout_s=timeout_s)
    try:
        yield client
    finally:
        await client.close()
