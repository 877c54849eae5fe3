"""GrpcFace: the face as the node sees it. Nothing here imports grpcio."""

from typing import Final

import msgspec

from isopod.faces.grpc.settings import FaceSettings, check_listen
from isopod.runtime.companion import Companion
from isopod.runtime.logger import Logger
from isopod.world.world import World

ENTRY: Final = "isopod.faces.grpc.main:serve"


class GrpcFace(Companion):
    """Start it once, and stop it.

    Args:
        world: Where the process is started.
        settings: What it is told.
        logger: Where its comings and goings are reported.
        entry: What it runs.
    """

    def __init__(self, world: World, settings: FaceSettings, logger: Logger, *, entry: str = ENTRY) -> None:
        super().__init__(world, logger, entry=entry, told=msgspec.json.encode(settings), word="grpc")
        self._settings = settings

    async def start(self) -> None:
        """Start it; return when it serves.

        Raises:
            InvalidArgument: It may not listen there.
            IsopodError: It says that it cannot.
        """
        check_listen(self._settings)
        await super().start()
