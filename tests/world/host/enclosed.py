"""Tests of the real kernel, enclosed: a process with a mount and a network namespace of its own, so that nothing can leak.

The process's mount namespace takes the part of the host: its mounts are shared among themselves, as systemd makes them, and cut off
from the machine's. Run as a program it runs one body of kernel_bodies.py on the host World.
"""

import os
import subprocess
import sys
from typing import Final

from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.host.world import make_host_world
from tests.world.kernel_bodies import BODIES

ROOT: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
TIMEOUT_S: Final = 50.0
_SHARE: Final = 'mount --make-rshared / && exec "$@"'


def run_enclosed(module: str, *arguments: str) -> None:
    """Run a module as a program, enclosed; its failure fails the test with what it said."""
    command = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _SHARE, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main(kind: LoopKind, name: str, folder: str) -> None:
    """Run one body."""
    world = make_host_world()
    loop = new_loop(kind)
    try:
        loop.run_until_complete(BODIES[name](world, folder))
    finally:
        loop.close()
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
