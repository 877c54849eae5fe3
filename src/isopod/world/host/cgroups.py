"""Control groups on v1, on v2, and where both are mounted.

What is mounted is probed, never assumed: `find_layout` is a pure function over mountinfo, /proc/cgroups and cgroup.controllers.
Paths of groups are relative to each hierarchy's mount. Sources: cgroups(7), Documentation/admin-guide/cgroup-v1, cgroup-v2.rst.

cgroup v1 tells nobody when a group becomes empty (release_agent is a program run by the kernel, one for a whole hierarchy), so
`kill` and `delete` look again with a growing pause, under a deadline: the only waiting by polling in the host World.
"""

import asyncio
import errno
import os
import signal
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from isopod import _core
from isopod.world.host.mountinfo import Mount, read_own
from isopod.world.kernel import CgroupFacts, CgroupMode, CgroupUsage

KILL_DEADLINE_S: Final = 5.0
DELETE_DEADLINE_S: Final = 1.0
_PAUSE_S_FIRST: Final = 0.001
_PAUSE_S_MAX: Final = 0.05
RUNTIMES_UNIFIED: Final = "/sys/fs/cgroup/unified"
"""Where crun expects the unified hierarchy beside v1 controllers. Hidden from it, it makes plain folders there, and leaves them."""
LIMITING: Final = ("blkio", "cpu", "cpuset", "hugetlb", "io", "memory", "pids")
"""Controllers that can limit a container."""


class Layout(NamedTuple):
    """Where control groups are mounted. In "v1" and "hybrid" the controllers are looked for in `v1` only."""

    mode: CgroupMode
    v1: tuple[tuple[str, str], ...]
    """(controller or "name=...", mount), sorted."""
    unified: str | None
    controllers: tuple[str, ...]
    why: str
    hidden: str | None = None
    """Where a tmpfs covers the unified hierarchy (see `mountspace`): what runtimes leave there is removed with the group."""

    def hierarchies(self) -> tuple[str, ...]:
        """Return every mounted hierarchy once, sorted."""
        return tuple(sorted(dict.fromkeys([mount for _, mount in self.v1] + ([self.unified] if self.unified else []))))

    def mount_of(self, controller: str) -> str | None:
        """Return the v1 hierarchy of a controller, None if it has none."""
        return dict(self.v1).get(controller)


def find_layout(mounts: Iterable[Mount], enabled_v1: Sequence[str], unified_controllers: Sequence[str]) -> Layout:
    """Return the layout that the machine's own words describe.

    Args:
        mounts: All mounts.
        enabled_v1: The enabled controllers that /proc/cgroups names.
        unified_controllers: The words of cgroup.controllers at the unified hierarchy's root, none if there is none.
    """
    v1: dict[str, str] = {}
    unified: str | None = None
    hidden: str | None = None
    for mount in mounts:
        if mount.kind == "cgroup2":
            unified = unified or mount.target
        elif mount.kind == "tmpfs" and mount.target == RUNTIMES_UNIFIED:
            hidden = mount.target
        elif mount.kind == "cgroup":
            for option in mount.super_options:
                if option in enabled_v1 or option.startswith("name="):
                    v1.setdefault(option, mount.target)
    named = tuple(sorted(controller for controller in v1 if not controller.startswith("name=")))
    mode: CgroupMode = ("hybrid" if unified else "v1") if named else ("v2" if unified else "v1")
    found = unified_controllers if mode == "v2" else named
    controllers = tuple(sorted(controller for controller in found if controller in LIMITING))
    return Layout(mode, tuple(sorted(v1.items())), unified, controllers, _explain(mode, named, unified, unified_controllers), hidden)


def parse_proc_cgroups(text: str) -> tuple[str, ...]:
    """Return the enabled controllers that a /proc/cgroups text names."""
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return tuple(row[0] for row in rows if row[3] == "1")


def parse_counter(text: str, key: str) -> int | None:
    """Return the number after `key` in a "key number" file (memory.events, memory.oom_control, cpu.stat), None if it is not there."""
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if name == key:
            return int(number)
    return None


def read_layout() -> Layout:
    """Probe this process's mount namespace."""
    mounts = read_own()
    unified = next((mount.target for mount in mounts if mount.kind == "cgroup2"), None)
    words = (read_text(unified, "cgroup.controllers") or "") if unified else ""
    return find_layout(mounts, parse_proc_cgroups(read_text("/proc", "cgroups") or ""), words.split())


def facts(layout: Layout) -> CgroupFacts:
    """Return what `isopod info` says."""
    return CgroupFacts(layout.mode, layout.controllers, layout.why)


def usage(layout: Layout, cgroup: str) -> CgroupUsage:
    """Return the measured use of a group."""
    if layout.mode == "v2":
        return _usage_v2(group_folder(layout.unified or "", cgroup))
    memory, cpuacct, pids = (_group(layout, controller, cgroup) for controller in ("memory", "cpuacct", "pids"))
    return CgroupUsage(
        memory_bytes=_number(read_text(memory, "memory.usage_in_bytes")),
        n_oom_kills=parse_counter(read_text(memory, "memory.oom_control") or "", "oom_kill"),
        cpu_usage_ns=_number(read_text(cpuacct, "cpuacct.usage")),
        n_pids=_number(read_text(pids, "pids.current")),
    )


async def kill(layout: Layout, cgroup: str) -> None:
    """Kill all processes at and below a group in every hierarchy, and wait until they are gone.

    Raises:
        OSError: EBUSY: some were still there after 5 s.
    """
    deadline = asyncio.get_running_loop().time() + KILL_DEADLINE_S
    pause_s = _PAUSE_S_FIRST
    while pids := _kill_once(layout, cgroup):
        if asyncio.get_running_loop().time() > deadline:
            raise OSError(errno.EBUSY, f"processes survived SIGKILL: {pids[:8]}", cgroup)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSE_S_MAX)


async def delete(layout: Layout, cgroup: str) -> None:
    """Remove a group and those below it from every hierarchy. A process that is just ending may keep it busy for a moment.

    Raises:
        OSError: EBUSY: it was not empty after 1 s.
    """
    deadline = asyncio.get_running_loop().time() + DELETE_DEADLINE_S
    for hierarchy in layout.hierarchies():
        pause_s = _PAUSE_S_FIRST
        while busy := _remove_tree(group_folder(hierarchy, cgroup)):
            if asyncio.get_running_loop().time() > deadline:
                raise busy
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)
    if layout.hidden is not None:
        _core.remove_tree(group_folder(layout.hidden, cgroup))


def groups(layout: Layout, prefix: str) -> tuple[str, ...]:
    """Return the groups ("/NAME", "/NAME/CHILD") at and below those tops of any hierarchy whose name begins with `prefix`, sorted."""
    found: dict[str, None] = {}
    for hierarchy in layout.hierarchies():
        with os.scandir(hierarchy) as entries:
            tops = [entry.path for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]
        for top in tops:
            found.update({path.removeprefix(hierarchy.rstrip("/")): None for path, _, _ in os.walk(top)})
    return tuple(sorted(found))


def group_folder(mount: str, cgroup: str) -> str:
    """Return the folder of a group. The root itself is refused (EINVAL): killing or removing it is never meant."""
    relative = os.path.normpath(cgroup.strip("/") or ".")
    if relative == "." or relative.split("/")[0] == "..":
        raise OSError(errno.EINVAL, "not the path of a group below the root", cgroup)
    return os.path.join(mount, relative)


def _explain(mode: CgroupMode, named: Sequence[str], unified: str | None, unified_controllers: Sequence[str]) -> str:
    if mode == "v2":
        return f"one cgroup2 hierarchy at {unified} with {' '.join(unified_controllers) or 'no controllers'}"
    if not named:
        return "no cgroup file system with controllers is mounted"
    beside = f" beside a cgroup2 hierarchy at {unified}" if unified else " and no cgroup2 hierarchy"
    return f"v1 controllers {' '.join(named)}{beside}"


def _usage_v2(folder: str) -> CgroupUsage:
    micros = parse_counter(read_text(folder, "cpu.stat") or "", "usage_usec")
    return CgroupUsage(
        memory_bytes=_number(read_text(folder, "memory.current")),
        n_oom_kills=parse_counter(read_text(folder, "memory.events") or "", "oom_kill"),
        cpu_usage_ns=None if micros is None else micros * 1000,
        n_pids=_number(read_text(folder, "pids.current")),
    )


def _kill_once(layout: Layout, cgroup: str) -> list[int]:
    """Send SIGKILL to whatever is there; return who was. On v1 a frozen process dies only once it is thawed."""
    pids: dict[int, None] = {}
    freezer = _group(layout, "freezer", cgroup)
    if freezer is not None:
        _write_text(freezer, "freezer.state", "THAWED")
    for hierarchy in layout.hierarchies():
        folder = group_folder(hierarchy, cgroup)
        if hierarchy == layout.unified and _write_text(folder, "cgroup.kill", "1"):
            pids.update(dict.fromkeys(_pids_below(folder)))
            continue
        for pid in _pids_below(folder):
            pids[pid] = None
            _kill_quietly(pid)
    return list(pids)


def _pids_below(folder: str) -> list[int]:
    pids: list[int] = []
    for path, _, _ in os.walk(folder):
        pids += [int(line) for line in (read_text(path, "cgroup.procs") or "").split() if line != "0"]
    return pids


def _kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _remove_tree(folder: str) -> OSError | None:
    """Remove a group and those below it; return the EBUSY that stood against it."""
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return error
    return None


def _group(layout: Layout, controller: str, cgroup: str) -> str | None:
    mount = layout.mount_of(controller)
    return None if mount is None else group_folder(mount, cgroup)


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def read_text(folder: str | None, name: str) -> str | None:
    """Return a file's text; None if it, its folder or (ENODEV) its group is gone."""
    if folder is None:
        return None
    try:
        with open(os.path.join(folder, name), encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None


def _write_text(folder: str, name: str, text: str) -> bool:
    """Write to an existing file; False if it is not there."""
    try:
        with open(os.path.join(folder, name), "r+", encoding="ascii") as file:
            file.write(text)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return False
    return True
