"""NodeLink: the face's way to the node it stands before, and what all of its calls need to know.

One connection, made when it is first needed and made again when the node came back; the store's client has one of its own, since it also
repeats writes whose fate is unknown.
"""

from typing import Any, Final, NamedTuple, TypeVar

from isopod.api import messages as m
from isopod.api import methods
from isopod.api.store import StoreClient
from isopod.faces.grpc.settings import FaceSettings
from isopod.net.rpc import ReconnectingClient
from isopod.runtime.logger import Logger
from isopod.wire.service import Method
from isopod.world.errors import InvalidArgument, NotFound
from isopod.world.ids import check_name
from isopod.world.network import UnixAddress
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

CALL_S: Final = 20.0
"""How long a call may take whose client set no deadline."""
START_S: Final = 120.0
"""The same for starting and stopping a machine: an emulated one boots for seconds."""
Fields = dict[str, Any]
"""The fields of a reply, by their names in the protocol: numbers, texts, or the fields of messages inside."""


class Asked(NamedTuple):
    """A request as a handler gets it.

    Args:
        message: A message of the protocol; its class is made at run time.
        metadata: What came with it, by lower-case key.
        left_s: How long the answer may take.
    """

    message: Any
    metadata: dict[str, str]
    left_s: float


class NodeLink:
    """The node. Close after use.

    Args:
        world: Where the face runs.
        settings: What it was told.
        logger: Where it reports.
    """

    def __init__(self, world: World, settings: FaceSettings, logger: Logger) -> None:
        self.world = world
        self.settings = settings
        self.logger = logger
        address = UnixAddress(settings.socket)
        self.client = ReconnectingClient(world, address, peer="isopod-grpc")
        self.store = StoreClient(world, [address]) if settings.is_replicated else None

    @property
    def node_id(self) -> int:
        """The node's id."""
        return self.settings.node_id

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float = CALL_S) -> R:
        """Ask the node. Raises what it raises."""
        return await self.client.call(method, request, timeout_s=timeout_s)

    async def find(self, name: str) -> m.Container | None:
        """Return the record of that very name, None if there is none: beginnings of ids do not count here."""
        if not is_name(name):
            return None
        try:
            found = await self.call(methods.CONTAINER_INSPECT, m.ContainerName(name=name))
        except NotFound:
            return None
        return found if found.name == name else None

    async def close(self) -> None:
        """End the connections."""
        await self.client.close()
        if self.store is not None:
            await self.store.close()


def is_name(text: str) -> bool:
    """Whether anything could be called so."""
    try:
        check_name("name", text)
    except InvalidArgument:
        return False
    return True
