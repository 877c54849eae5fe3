"""What stands in for the face's process in tests of who starts it."""

import asyncio
from collections.abc import Sequence

import msgspec

from isopod.faces.grpc.settings import FaceSettings
from isopod.runtime.companion import STOP, Outcome
from isopod.world.shards import Link, Part
from isopod.world.world import World


async def obeys(world: World, link: Link) -> None:
    """Serve at the address that was asked for, until told to stop."""
    told: asyncio.Queue[bytes] = asyncio.Queue()

    def on_message(message: bytes, parts: Sequence[Part]) -> None:
        told.put_nowait(message)

    link.start(on_message, lambda: told.put_nowait(STOP))
    settings = msgspec.json.decode(await told.get(), type=FaceSettings)
    link.send(msgspec.json.encode(Outcome(address=settings.listen)))
    while await told.get() != STOP:
        pass


async def refuses(world: World, link: Link) -> None:
    """Say that the address is taken."""
    told: asyncio.Queue[bytes] = asyncio.Queue()
    link.start(lambda message, _: told.put_nowait(message), lambda: told.put_nowait(STOP))
    await told.get()
    link.send(msgspec.json.encode(Outcome(code="unavailable", message="Address A already in use", hint="another one")))
    await told.get()


async def dies(world: World, link: Link) -> None:
    """End before a word."""
    link.start(lambda *_: None, lambda: None)


async def hangs(world: World, link: Link) -> None:
    """Serve, and not hear what it is told."""
    heard = asyncio.Event()
    link.start(lambda *_: heard.set(), lambda: None)
    await heard.wait()
    link.send(msgspec.json.encode(Outcome(address="here")))
    await asyncio.sleep(3600)


async def says_nothing(world: World, link: Link) -> None:
    """Never say whether it serves."""
    link.start(lambda *_: None, lambda: None)
    await asyncio.sleep(3600)
