"""What tests of a container runtime's sources share: a runtime and a World that go together, and a source under watch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from isopod.pulse.cri import CriSource, Pace
from isopod.pulse.model import Pod, SandboxStats
from isopod.runtime.logger import Logger
from isopod.world.world import World
from tests.pulse.fake_cri import Cri, GrpcCri, MemoryCri
from tests.pulse.sources import Running

PACE: Final = Pace(soon_s=0.02, refresh_s=0.2, call_s=10.0, stats_call_s=10.0, look_s=0.1, retry_first_s=0.05, retry_max_s=0.2)
"""Brisk; the deadlines are generous, for a machine under load."""


class Watched(Running):
    """A source, what it told and what it logged."""

    def __init__(self, world: World, cri: Cri, pace: Pace = PACE, *, has_stats: bool = False, **told: Any) -> None:
        self.world = world
        self.rounds: list[dict[str, Pod]] = []
        self.stats: list[SandboxStats | None] = []
        """What was told of containers, with `has_stats`."""
        self.log: list[bytes] = []
        logger = Logger(self.log.append, world.clock, level="debug")
        told.setdefault("open_runtime", cri.open)
        told.setdefault("on_pods", self.rounds.append)
        if has_stats:
            told.setdefault("on_stats", self.stats.append)
        self.source: CriSource = CriSource(world, cri.path, logger=logger, pace=pace, **told)

    @property
    def pods(self) -> dict[str, Pod]:
        """What was told last."""
        return self.rounds[-1] if self.rounds else {}

    async def rounds_more(self, n: int) -> None:
        """Wait for so many rounds, wholly begun after now."""
        wanted = self.source.statistics().n_rounds + n + 1
        await self.until(lambda: self.source.statistics().n_rounds >= wanted)


@pytest.fixture(params=["memory-host", "memory-sim", "grpc"])
def pair(request: pytest.FixtureRequest) -> tuple[World, Cri]:
    """A World and a runtime that is not started yet."""
    is_sim = request.param == "memory-sim"
    world = request.getfixturevalue("sim_world").world if is_sim else request.getfixturevalue("host_world")
    path = f"{request.getfixturevalue('folder')}/cri.sock"
    return world, GrpcCri(path) if request.param == "grpc" else MemoryCri(world, path)


@pytest.fixture
def memory_pair(world: World, folder: str) -> tuple[World, MemoryCri]:
    return world, MemoryCri(world, f"{folder}/cri.sock")


@asynccontextmanager
async def started(cri: Cri) -> AsyncIterator[None]:
    await cri.start()
    try:
        yield
    finally:
        await cri.stop()
