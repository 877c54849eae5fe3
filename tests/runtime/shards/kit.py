"""Starting shards in tests."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards import Smp, SmpConfig, SmpService
from isopod.world.world import World
from tests.runtime.shards import program


class Rig:
    """A running service, and what it said."""

    def __init__(self, service: SmpService, smp: Smp, lines: list[dict[str, Any]], metrics: Registry) -> None:
        self.service = service
        self.smp = smp
        self.lines = lines
        self.metrics = metrics


@asynccontextmanager
async def shards(
    world: World, n_shards: int, *, services: Any = (program.serve,), on_event: Any = None, **settings: Any
) -> AsyncIterator[Rig]:
    """Run shards for the length of a block; nothing may be left of them after it."""
    lines: list[dict[str, Any]] = []
    metrics = Registry()
    logger = Logger(lambda line: lines.append(msgspec.json.decode(line)), world.clock, level="debug")
    config = SmpConfig(n_shards=n_shards, pin="none", **settings)
    before = open_files() if world.name == "host" else []
    service = SmpService(world, config, logger=logger, metrics=metrics, services=services, on_event=on_event)
    try:
        async with service as smp:
            yield Rig(service, smp, lines, metrics)
    finally:
        if world.name == "host":
            await _until_closed(before)


async def _until_closed(before: list[str]) -> None:
    """Wait until no more descriptors are open than before: the loops close some a turn later."""
    for _ in range(100):
        if len(open_files()) <= len(before):
            return
        await asyncio.sleep(0.01)
    assert open_files() == before


def open_files() -> list[str]:
    """Return what our descriptors are."""
    found = []
    for fd in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            what = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the folder's own
            continue
        if what != os.devnull:  # libuv keeps one for the day that there are no descriptors
            found.append(f"{fd} {what}")
    return found
