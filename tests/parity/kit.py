"""What the parity suite shares: a logger that keeps its lines, shards, waiting for a condition."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Home, Registry
from isopod.runtime.shards import SmpConfig, SmpService
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.parity import program

LOOPBACK: Final = TcpAddress("127.0.0.1", 0)
WAIT_S: Final = 20.0


def keeping(world: World, lines: list[dict[str, Any]] | None = None) -> Logger:
    """Return a logger whose lines go into a list."""
    kept: list[dict[str, Any]] = [] if lines is None else lines
    return Logger(lambda line: kept.append(msgspec.json.decode(line)), world.clock)


@asynccontextmanager
async def shards(
    world: World, n_shards: int, *services: Callable[..., Any], lines: list[dict[str, Any]] | None = None, **settings: Any
) -> AsyncIterator[SmpService]:
    """Run shards for the length of a block."""
    config = SmpConfig(n_shards=n_shards, pin="none", **settings)
    chosen: Sequence[Callable[..., Any]] = services or (program.serve,)
    folder = settings.get("metrics_folder")
    metrics = Registry(Home(world.pages, folder, shard=0) if folder else None)
    service = SmpService(world, config, logger=keeping(world, lines), metrics=metrics, services=chosen)
    try:
        async with service:
            yield service
    finally:
        metrics.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what cannot be awaited."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)
