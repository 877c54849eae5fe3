"""What the agent's process beside a node runs: told by the node on the link, it serves until it is told to stop, or the node is gone."""

import asyncio
from collections.abc import Sequence

import msgspec

from isopod.pulse.agent import PulseAgent
from isopod.pulse.settings import PulseSettings
from isopod.runtime.companion import STOP, Outcome
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError
from isopod.world.shards import Link, Part
from isopod.world.world import World


async def serve(world: World, link: Link) -> None:
    """Be the agent's process: an `Entry` of `isopod.world.shards`."""
    told: asyncio.Queue[bytes] = asyncio.Queue()

    def on_message(message: bytes, parts: Sequence[Part]) -> None:
        for part in parts:
            part.close()
        told.put_nowait(message)

    link.start(on_message, lambda: told.put_nowait(STOP))
    message = await told.get()
    if message == STOP:
        return
    settings = msgspec.json.decode(message, type=PulseSettings)
    logger = Logger(link.write_log, world.clock).bind(part="pulse")
    logger.set_level(settings.log_level)
    agent = PulseAgent(world, settings, logger)
    try:
        try:
            address = await agent.start()
        except IsopodError as error:
            link.send(msgspec.json.encode(Outcome(code=error.code, message=error.message, hint=error.hint)))
            await told.get()  # the node has read it
            return
        link.send(msgspec.json.encode(Outcome(address=address)))
        while await told.get() != STOP:
            pass
    finally:
        await agent.stop()
