"""Real nodes under faults that are drawn by chance, for as long as one likes.

    python -m tests.cluster.real.chaos [SECONDS] [SEED]

Round after round on one cluster: clients work, up to two faults at a time come and go, everything is undone, and what the clients were told
is checked as in the tests. Faults are those of the tests: kill -9, SIGSTOP, partitions by nftables, slow, silent and resetting lines,
full disks. The seed decides which and how long; what the machine makes of it is different each time. Needs root.
"""

import asyncio
import random
import sys
import time
from collections.abc import Callable
from typing import Final

from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World
from tests.cluster.real.load import Load
from tests.cluster.real.rig import Rig

SECONDS: Final = 120.0
FAULTS_OF_A_ROUND: Final = 4
LASTS_S: Final = (0.3, 3.0)
PAUSE_S: Final = (0.0, 1.0)
PROGRESS_S: Final = 60.0
PAD_BYTES: Final = 8 << 10
"""Values are so large that a log uses up what it has allocated while its disk is full."""
Fault = tuple[str, Callable[[], None], Callable[[], None]]
"""What it is called, what does it, and what undoes it."""


def draw(rig: Rig, chance: random.Random) -> Fault:
    """Return a fault."""
    number = chance.choice(list(rig.nodes))
    node, lab = rig.nodes[number], rig.lab
    other = number % len(rig.nodes) + 1

    def start() -> None:
        if not node.is_running:
            node.start()

    def pause() -> None:
        if node.is_running:
            node.pause()

    def heal() -> None:
        lab.heal(number)

    def flow() -> None:
        rig.proxy("delay 0 0")

    def kill_all() -> None:
        for each in rig.nodes.values():
            each.kill()

    def start_all() -> None:
        for each in rig.nodes.values():
            if not each.is_running:
                each.start()

    faults: list[Fault] = [
        (f"kill {number}", node.kill, start),
        ("kill all", kill_all, start_all),
        (f"stop {number}", pause, node.resume),
        (f"cut off {number}", lambda: lab.cut(number), heal),
        (f"mute {number}", lambda: lab.cut(number, hears=True), heal),
        (f"deafen {number}", lambda: lab.cut(number, speaks=True), heal),
        (f"cut between {number} and {other}", lambda: lab.cut(number, others=[other]), heal),
        ("delay", lambda: rig.proxy("delay 10 80"), flow),
        ("reset", lambda: rig.proxy("cut"), flow),
        ("stall", lambda: rig.proxy("stall"), flow),
        (f"fill the disk of {number}", lambda: _ignore(lab.fill(number, node.folder)), lambda: lab.make_room(number, node.folder)),
    ]
    return chance.choice(faults)


async def one(rig: Rig, chance: random.Random) -> None:
    """Have one fault after the other, for a while."""
    for _ in range(FAULTS_OF_A_ROUND):
        what, do, undo = draw(rig, chance)
        lasts_s = chance.uniform(*LASTS_S)
        say(f"    {what} for {lasts_s:.1f} s")
        do()
        await asyncio.sleep(lasts_s)
        undo()
        await asyncio.sleep(chance.uniform(*PAUSE_S))


async def run(world: World, seconds: float, seed: int) -> None:
    """Run rounds until the time is over; raises what the first wrong one says."""
    rig = Rig(small_disks_mb=160, proxied=True)
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    n_rounds = n_answered = n_unknown = 0
    worst_s = 0.0
    try:
        await rig.wait_ready(world)
        while time.monotonic() < until:
            n_rounds += 1
            say(f"round {n_rounds}")
            async with Load(world, rig, seed=chance.getrandbits(32), pad_bytes=PAD_BYTES) as load:
                await asyncio.gather(one(rig, chance), one(rig, chance))
                rig.undo()
                resumed_s = await load.progress(within_s=PROGRESS_S)
                said = await load.finish()
            worst_s = max(worst_s, resumed_s)
            n_answered += said.n_answered
            n_unknown += said.n_unknown
            say(f"  linearizable, equal; {said}; 20 writes {resumed_s:.2f} s after the last fault")
    finally:
        rig.close()
    say(f"{n_rounds} rounds, {n_answered} operations answered, {n_unknown} of unknown outcome; at worst {worst_s:.2f} s; nothing is wrong")


def main(argv: list[str]) -> None:
    """Do as the arguments say."""
    seconds = float(argv[0]) if argv else SECONDS
    seed = int(argv[1]) if len(argv) > 1 else random.SystemRandom().getrandbits(32)
    say(f"seed {seed}")
    world = make_host_world()
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(run(world, seconds, seed))
    finally:
        world.close()


def say(text: str) -> None:
    """Tell whoever waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _ignore(_: object) -> None:
    """Have nothing to say."""


if __name__ == "__main__":
    main(sys.argv[1:])
