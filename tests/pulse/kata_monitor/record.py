"""Record what a kata-monitor answers to all scenes, for the test that compares the agent with it.

    python -m tests.pulse.kata_monitor.record --binary PATH [--out FOLDER] [--scene NAME]

Wants root, for mounts that nobody else sees. What is written holds names, labels, figures of our own samples, codes and header fields; of
kata-monitor's sentences there are digests only.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World
from tests.pulse.kata_monitor.monitor import Monitor, missing, version
from tests.pulse.kata_monitor.scenes import DATA, SCENES, Scene
from tests.pulse.kata_monitor.seen import Recording
from tests.pulse.kata_monitor.stage import Stage

OUT: Final = DATA / "kata_monitor"


def main(words: Sequence[str] | None = None) -> None:
    """Run the binary over each scene."""
    options = parse(words)
    why = missing()
    if why:
        sys.exit(why)
    with asyncio.Runner(loop_factory=lambda: new_loop("uvloop")) as runner:
        for scene in SCENES:
            if options.scene in ("", scene.name):
                recording = runner.run(_run(options.binary, scene))
                write(Path(options.out) / f"{scene.name}.json", recording)
                sys.stdout.write(f"{scene.name}: {len(recording.seen)} answers, {len(recording.families)} families\n")


async def record(world: World, binary: str, scene: Scene, folder: str) -> Recording:
    """Return what a kata-monitor answers to a scene.

    Args:
        world: The host's.
        binary: The program.
        scene: What it sees, and is asked.
        folder: An empty one, whose path is short: sockets lie in it.
    """
    async with Stage(world, scene, folder) as stage, Monitor(world, binary, scene, stage=stage, folder=folder) as monitor:
        seen, families = await monitor.asker.see(scene)
    return Recording(version(binary), scene.name, seen, dict(sorted(families.items())))


def write(path: Path, recording: Recording) -> None:
    """Write a recording, a value a line, so that changes can be read."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(recording), indent=1) + b"\n")


def read(scene: Scene) -> Recording:
    """Return what was recorded of a scene."""
    return msgspec.json.decode((OUT / f"{scene.name}.json").read_bytes(), type=Recording)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Record what a kata-monitor answers.")
    parser.add_argument("--binary", required=True)
    parser.add_argument("--out", default=str(OUT))
    parser.add_argument("--scene", choices=[scene.name for scene in SCENES], default="")
    return parser.parse_args(words)


async def _run(binary: str, scene: Scene) -> Recording:
    world = make_host_world()
    try:
        with tempfile.TemporaryDirectory(prefix="isopod-") as folder:
            return await record(world, binary, scene, folder)
    finally:
        world.close()


if __name__ == "__main__":
    main()
