"""The OCI bundle of a container: its config.json, built as plain data from the record, and the files mounted into it.

Pure functions. Source: OCI runtime specification 1.0.2 (config.md, config-linux.md). The defaults are those users of docker and
podman know: 14 capabilities, masked and read-only paths of /proc and /sys, the default seccomp profile, a device allow-list, and
no-new-privileges always.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from isopod.api.messages import Container, Mount, Resources
from isopod.engine.capabilities import DEFAULT_CAPABILITIES
from isopod.engine.users import ResolvedUser
from isopod.world.kernel import CgroupFacts
from isopod.world.units import CPUS_MAX

Json = dict[str, Any]  # the runtime specification's JSON: nested and open-ended

DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CPU_PERIOD_US: Final = 100_000
PIDS_MAX: Final = 4_194_304
"""The kernel's greatest number of processes."""
SHM_BYTES: Final = 64 << 20
MASKED_PATHS: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READ_ONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_ALLOWED_DEVICES: Final = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),  # null
    ("c", 1, 5, "rwm"),  # zero
    ("c", 1, 7, "rwm"),  # full
    ("c", 1, 8, "rwm"),  # random
    ("c", 1, 9, "rwm"),  # urandom
    ("c", 5, 0, "rwm"),  # tty
    ("c", 5, 2, "rwm"),  # ptmx
    ("c", 136, None, "rwm"),  # pts
)


class BundlePaths(NamedTuple):
    """Where the parts of one container's bundle lie."""

    folder: str
    rootfs: str
    hosts: str
    hostname: str
    resolv_conf: str


class Confinement(NamedTuple):
    """What the kernel shall use."""

    network_namespace: str | None
    """Path of the network namespace; "" shares the host's, None has the runtime make one with loopback only."""
    cgroup: str
    seccomp: Json | None
    cgroups: CgroupFacts


def build_config(record: Container, paths: BundlePaths, user: ResolvedUser, confinement: Confinement) -> Json:
    """Return the config.json of a container.

    Args:
        record: The container.
        paths: Its bundle.
        user: The user its command runs as, looked up in the image.
        confinement: Network namespace, cgroup and profile.
    """
    linux: Json = {
        "namespaces": _namespaces(confinement),
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READ_ONLY_PATHS),
        "resources": build_resources(record.resources, confinement.cgroups),
        "cgroupsPath": confinement.cgroup,
    }
    if confinement.seccomp is not None:
        linux["seccomp"] = confinement.seccomp
    return {
        "ociVersion": "1.0.2",
        "process": build_process(
            command=record.command,
            env=record.env,
            working_dir=record.working_dir,
            user=user,
            terminal=record.terminal,
            hostname=record.hostname,
        ),
        "root": {"path": paths.rootfs, "readonly": False},
        "hostname": record.hostname,
        "mounts": _standard_mounts() + _outermost_first(_identity_mounts(paths) + [_mount(mount) for mount in record.mounts]),
        "linux": linux,
        "annotations": {"io.isopod.container.id": record.id, "io.isopod.container.name": record.name},
    }


def build_process(
    *, command: Sequence[str], env: Mapping[str, str], working_dir: str, user: ResolvedUser, terminal: bool, hostname: str
) -> Json:
    """Return the `process` object, which `exec` needs alone too."""
    capabilities = list(DEFAULT_CAPABILITIES)
    unprivileged = user.uid != 0
    return {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": list(command),
        "env": _environment(env, user, terminal=terminal, hostname=hostname),
        "cwd": working_dir or "/",
        "capabilities": {
            "bounding": capabilities,
            "effective": [] if unprivileged else capabilities,
            "permitted": [] if unprivileged else capabilities,
        },
        "noNewPrivileges": True,
        "oomScoreAdj": 0,
    }


def build_resources(resources: Resources, cgroups: CgroupFacts) -> Json:
    """Return the `resources` object: the device allow-list and the limits.

    On cgroup v1 the swap limit equals the memory limit, so that the limit is one (v2 sets swap to zero by the same number).
    """
    wanted: Json = {"devices": [{"allow": False, "access": "rwm"}, *(_device(*row) for row in _ALLOWED_DEVICES)]}
    if resources.memory_bytes_max is not None:
        wanted["memory"] = {"limit": resources.memory_bytes_max}
        if "memory" in cgroups.controllers:
            wanted["memory"]["swap"] = resources.memory_bytes_max
    if resources.cpus is not None:
        wanted["cpu"] = {"quota": math.ceil(resources.cpus * CPU_PERIOD_US), "period": CPU_PERIOD_US}
    if resources.pids_max is not None:
        wanted["pids"] = {"limit": resources.pids_max}
    return wanted


def build_limits(resources: Resources, cgroups: CgroupFacts) -> Json:
    """Return the `resources` object with which a runtime changes the limits of a container that runs.

    crun 1.8 writes -1 for "none" as a large unsigned number, which the kernel refuses for CPU time and processes; there "none" is more
    than any machine has.
    """
    memory = -1 if resources.memory_bytes_max is None else resources.memory_bytes_max
    quota = math.ceil((CPUS_MAX if resources.cpus is None else resources.cpus) * CPU_PERIOD_US)
    wanted: Json = {"cpu": {"quota": quota, "period": CPU_PERIOD_US}, "memory": {"limit": memory}}
    if "memory" in cgroups.controllers:
        wanted["memory"]["swap"] = memory
    wanted["pids"] = {"limit": PIDS_MAX if resources.pids_max is None else resources.pids_max}
    return wanted


def _environment(env: Mapping[str, str], user: ResolvedUser, *, terminal: bool, hostname: str) -> list[str]:
    lines = [f"{key}={value}" for key, value in env.items()]
    if "PATH" not in env:
        lines.insert(0, DEFAULT_PATH)
    if "HOSTNAME" not in env:
        lines.append(f"HOSTNAME={hostname}")
    if "HOME" not in env:
        lines.append(f"HOME={user.home}")
    if terminal and "TERM" not in env:
        lines.append("TERM=xterm")
    return lines


def _namespaces(confinement: Confinement) -> list[Json]:
    kinds: list[Json] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    if confinement.network_namespace is None:
        kinds.append({"type": "network"})
    elif confinement.network_namespace:
        kinds.append({"type": "network", "path": confinement.network_namespace})
    return kinds


def _device(kind: str, major: int | None, minor: int | None, access: str) -> Json:
    row: Json = {"allow": True, "type": kind, "access": access}
    if major is not None:
        row["major"] = major
    if minor is not None:
        row["minor"] = minor
    return row


def _standard_mounts() -> list[Json]:
    safe = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": safe},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*safe, "mode=1777", f"size={SHM_BYTES}"]},  # noqa: S108
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": safe},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*safe, "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*safe, "relatime", "ro"]},
    ]


def _identity_mounts(paths: BundlePaths) -> list[Json]:
    files = (("/etc/hosts", paths.hosts), ("/etc/hostname", paths.hostname), ("/etc/resolv.conf", paths.resolv_conf))
    return [
        {"destination": inside, "type": "bind", "source": source, "options": ["bind", "rprivate", "nosuid", "nodev"]}
        for inside, source in files
    ]


def _outermost_first(mounts: list[Json]) -> list[Json]:
    """Order mounts by depth, so that none hides another: /x comes before /x/y, and a user's /etc before our /etc/hosts."""
    return sorted(mounts, key=lambda mount: len([part for part in mount["destination"].split("/") if part]))


def _mount(mount: Mount) -> Json:
    if mount.kind == "tmpfs":
        return {"destination": mount.destination, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
    access = "ro" if mount.read_only else "rw"
    return {"destination": mount.destination, "type": "bind", "source": mount.source, "options": ["rbind", "rprivate", access]}
