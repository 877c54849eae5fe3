"""One short run as a program: prints its digest. Arguments: the seed, and what leaks into the simulation from outside ("" for nothing).

Each leak is what careless code would do: ask the machine's clock, draw from the machine's chance, or go through a set of texts in its
order. The proof of determinism must notice each.
"""

import asyncio
import dataclasses
import random
import sys
import time

from isopod.testing.rig import Tampering
from isopod.testing.scenarios import make_plan, scenario
from isopod.testing.simulation import run_plan
from isopod.world.world import World
from tests.sim.mutations import Wrapper


class RealClock(Wrapper):
    """Tells the machine's time."""

    def now_ns(self) -> int:
        return time.time_ns()


class RealChance(Wrapper):
    """Draws from the machine's chance."""

    def stream(self, name: str) -> random.Random:
        return random.SystemRandom()


async def first() -> None:
    await asyncio.sleep(0)


async def second() -> None:
    await asyncio.sleep(0)


async def third() -> None:
    await asyncio.sleep(0)


WORK = {"first": first, "second": second, "third": third}


def clock(world: World) -> World:
    return dataclasses.replace(world, clock=RealClock(world.clock))


def chance(world: World) -> World:
    return dataclasses.replace(world, random=RealChance(world.random))


def unordered(world: World) -> World:
    """Start tasks in the order of a set."""
    for name in frozenset(WORK):
        asyncio.get_running_loop().create_task(WORK[name]())
    return world


LEAKS = {
    "": Tampering(),
    "clock": Tampering(world=clock),
    "random": Tampering(world=chance),
    "set": Tampering(world=unordered),
}


def digest(seed: int, leak: str) -> str:
    source = scenario("crashes")._replace(fault_every_s=0.7)
    return run_plan(make_plan(source, seed, run_s=1.5), tampering=LEAKS[leak]).digest


if __name__ == "__main__":
    sys.stdout.write(digest(int(sys.argv[1]), sys.argv[2]))
