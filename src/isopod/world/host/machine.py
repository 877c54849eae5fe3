"""What the machine says about itself: facts and pressure. Sources: uname(2), proc(5), os-release(5), Documentation/accounting/psi.rst."""

import os
import platform
from collections.abc import Mapping
from typing import Final

from isopod.world.kernel import HostFacts

PRESSURE_KINDS: Final = ("cpu", "io", "memory")
LOAD_NAMES: Final = ("load1", "load5", "load15")


def host_facts() -> HostFacts:
    """Return facts about the machine."""
    names = os.uname()
    return HostFacts(
        hostname=names.nodename,
        kernel=names.release,
        architecture=names.machine,
        n_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        operating_system=_operating_system(),
    )


def pressure() -> Mapping[str, float]:
    """Return the load averages and, where the kernel counts them, the stalled shares in percent ("io_full_avg60")."""
    found = dict(zip(LOAD_NAMES, os.getloadavg(), strict=True))
    for kind in PRESSURE_KINDS:
        try:
            with open(f"/proc/pressure/{kind}", encoding="ascii") as file:
                found.update(parse_pressure(kind, file.read()))
        except OSError:  # not built in (ENOENT) or switched off (EOPNOTSUPP): then there is no figure
            continue
    return found


def parse_pressure(kind: str, text: str) -> dict[str, float]:
    """Return the averages of a /proc/pressure file's text by name ("cpu_some_avg10")."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        scope, *pairs = line.split()
        for name, _, number in (pair.partition("=") for pair in pairs):
            if name.startswith("avg"):
                found[f"{kind}_{scope}_{name}"] = float(number)
    return found


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown"
