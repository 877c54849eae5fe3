"""Making control groups and setting their limits, on v1 and on v2: for processes that no OCI runtime starts.

On v1 a group is one folder in each hierarchy that measures, limits or freezes, and a process joins each of them. On v2 it is one folder,
and every folder above it must first hand its controllers down. A group that exists is kept and gets the limits: so they are changed, too.
Sources: Documentation/admin-guide/cgroup-v1/{memory,pids,cgroups}.rst, Documentation/scheduler/sched-bwc.rst, cgroup-v2.rst.
"""

import errno
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from isopod.world.host.cgroups import Layout, group_folder

PERIOD_US: Final = 100_000
JOINED_V1: Final = ("blkio", "cpu", "cpuacct", "freezer", "memory", "pids")
"""A process joins these; cpuset is left out, as its groups take nobody before they were given processors and memory nodes."""
HANDED_DOWN_V2: Final = ("cpu", "io", "memory", "pids")


class Limits(NamedTuple):
    """None: no limit of that kind."""

    cpus: float | None = None
    memory_bytes_max: int | None = None
    pids_max: int | None = None


def create(layout: Layout, cgroup: str, limits: Limits) -> tuple[str, ...]:
    """Make a group, or keep one, with these limits.

    Returns:
        The cgroup.procs files that a process writes itself into.

    Raises:
        OSError: EOPNOTSUPP: nothing here can keep a limit that is asked for. Groups that were made for nothing are gone.
    """
    make = _create_v2 if layout.mode == "v2" else _create_v1
    made: list[str] = []
    try:
        return make(layout, cgroup, limits, made.append)
    except BaseException:
        for folder in reversed(made):
            os.rmdir(folder)
        raise


def _create_v1(layout: Layout, cgroup: str, limits: Limits, made: Callable[[str], None]) -> tuple[str, ...]:
    mounts = {name: mount for name in JOINED_V1 if (mount := layout.mount_of(name)) is not None}
    _check(limits, list(mounts), cgroup)
    hierarchies = dict.fromkeys(mounts.values())
    for mount in hierarchies:
        _make_folder(mount, group_folder(mount, cgroup), made)
    if "memory" in mounts:
        _limit_memory_v1(group_folder(mounts["memory"], cgroup), limits.memory_bytes_max)
    if "cpu" in mounts:
        folder = group_folder(mounts["cpu"], cgroup)
        _write_if_there(folder, "cpu.cfs_period_us", str(PERIOD_US))
        _write_if_there(folder, "cpu.cfs_quota_us", "-1" if limits.cpus is None else str(_quota_us(limits.cpus)))
    if "pids" in mounts:
        _write_if_there(group_folder(mounts["pids"], cgroup), "pids.max", _or_max(limits.pids_max))
    return tuple(f"{group_folder(mount, cgroup)}/cgroup.procs" for mount in hierarchies)


def _limit_memory_v1(folder: str, n_bytes: int | None) -> None:
    """Set the limit, of memory and of memory with swap. The first must never be above the second, so the order depends on what is there."""
    text = "-1" if n_bytes is None else str(n_bytes)
    names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    if not os.path.exists(f"{folder}/{names[1]}"):
        names.pop()
    try:
        for name in names:
            _write(folder, name, text)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for name in reversed(names):
            _write(folder, name, text)


def _create_v2(layout: Layout, cgroup: str, limits: Limits, made: Callable[[str], None]) -> tuple[str, ...]:
    root = layout.unified or ""
    folder = group_folder(root, cgroup)
    _check(limits, layout.controllers, cgroup)
    _make_folder(root, os.path.dirname(folder), made)
    for above in _folders_between(root, os.path.dirname(folder)):
        _hand_down(above)
    _make_folder(root, folder, made)
    wanted: Mapping[str, str] = {
        "memory.max": _or_max(limits.memory_bytes_max),
        "memory.swap.max": _or_max(None if limits.memory_bytes_max is None else 0),
        "cpu.max": f"{_or_max(None if limits.cpus is None else _quota_us(limits.cpus))} {PERIOD_US}",
        "pids.max": _or_max(limits.pids_max),
    }
    for name, text in wanted.items():
        _write_if_there(folder, name, text)
    return (f"{folder}/cgroup.procs",)


def _hand_down(folder: str) -> None:
    """Let the groups inside a folder have its controllers."""
    here = _read(folder, "cgroup.controllers").split()
    given = _read(folder, "cgroup.subtree_control").split()
    missing = [name for name in HANDED_DOWN_V2 if name in here and name not in given]
    if missing:
        _write(folder, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))


def _check(limits: Limits, controllers: Sequence[str], cgroup: str) -> None:
    asked = {"cpu": limits.cpus, "memory": limits.memory_bytes_max, "pids": limits.pids_max}
    for controller, value in asked.items():
        if value is not None and controller not in controllers:
            raise OSError(errno.EOPNOTSUPP, f"the kernel's {controller} controller is not mounted here", cgroup)


def _make_folder(root: str, folder: str, made: Callable[[str], None]) -> None:
    for path in _folders_between(root, folder)[1:]:
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            continue
        made(path)


def _folders_between(root: str, folder: str) -> list[str]:
    """Return the folders from `root` down to `folder`, both included."""
    found = [folder]
    while len(found[-1]) > len(root.rstrip("/")) + 1 and found[-1].rstrip("/") != root.rstrip("/"):
        found.append(os.path.dirname(found[-1]))
    return found[::-1]


def _quota_us(cpus: float) -> int:
    return math.ceil(cpus * PERIOD_US)


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)


def _read(folder: str, name: str) -> str:
    with open(f"{folder}/{name}", encoding="ascii") as file:
        return file.read()


def _write(folder: str, name: str, text: str) -> None:
    with open(f"{folder}/{name}", "w", encoding="ascii") as file:
        file.write(text)


def _write_if_there(folder: str, name: str, text: str) -> None:
    """Write to a file that a kernel without that feature does not have; that it is wanted was checked before."""
    if os.path.exists(f"{folder}/{name}"):
        _write(folder, name, text)
