"""The arena: a corner of the machine in which engines run side by side, and which takes everything with it when it ends.

Own mount, network and process namespaces. The unified cgroup hierarchy is unmounted in it where v1 controllers are in use, because
crun refuses a mixture: so every peer can use crun. Bridges and packet filters are made in its network namespace, so the host's stay as
they are. Ending its first process kills all that was started in it, daemons and supervisors too; then empty cgroups are swept.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

INSIDE: Final = "ISOPOD_BENCH_INSIDE"
CGROUP_WORD: Final = "isoben"
"""Begins the names of all cgroups in the arena, and is the prefix of the nodes."""
_CGROUPS: Final = Path("/sys/fs/cgroup")


def run_inside(module: str, arguments: Sequence[str], folder: Path) -> int:
    """Run `python -m module arguments` inside a new arena and return its exit code.

    Args:
        module: A module whose `main` sees `INSIDE` in its environment.
        arguments: Its arguments.
        folder: Where engines keep their data; emptied before and after.
    """
    _empty(folder)
    init = shutil.which("tini")
    argv = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    argv += [*([init, "-s", "-g", "--"] if init else []), sys.executable, "-m", module, *arguments]
    try:
        return subprocess.run(argv, env=os.environ | {INSIDE: str(folder)}, check=False).returncode
    finally:
        _sweep_cgroups()
        _empty(folder)


def prepare() -> None:
    """Called first inside the arena: loopback up, no unified hierarchy beside v1 controllers."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if (_CGROUPS / "memory").is_dir() and os.path.ismount(_CGROUPS / "unified"):
        subprocess.run(["umount", "--lazy", str(_CGROUPS / "unified")], check=True)
    # Names of network namespaces, and lock files that engines keep in fixed places, stay inside.
    for place in ("/run/netns", "/run/lock"):
        os.makedirs(place, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)


def _sweep_cgroups() -> None:
    """Remove the empty cgroups of the arena's engines, deepest first: all of them are made below groups whose name says so."""
    ours = [Path(folder) for folder, _, _ in os.walk(_CGROUPS) if CGROUP_WORD in folder]
    for folder in sorted(ours, key=lambda path: len(path.parts), reverse=True):
        try:
            folder.rmdir()
        except OSError as error:
            print(f"cgroup left: {folder}: {error}", file=sys.stderr)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
