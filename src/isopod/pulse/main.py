"""What the agent's process beside a node runs: told by the node on the link, it serves until it is told to stop, or the node is gone."""

import msgspec

from isopod.pulse.agent import PulseAgent
from isopod.pulse.settings import Given
from isopod.runtime.companion import attend
from isopod.runtime.logger import Logger
from isopod.world.shards import Link
from isopod.world.world import World


async def serve(world: World, link: Link) -> None:
    """Be the agent's process: an `Entry` of `isopod.world.shards`."""

    def make(message: bytes) -> PulseAgent:
        told = msgspec.json.decode(message, type=Given)
        settings = told.settings
        logger = Logger(link.write_log, world.clock).bind(part="pulse")
        logger.set_level(settings.log_level)
        return PulseAgent(world, settings, logger, origins=told.origins)

    await attend(link, make)
