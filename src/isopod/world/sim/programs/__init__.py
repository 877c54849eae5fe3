"""Programs of the simulated machine: supervisors, the OCI runtime, QEMU and what surrounds it, and the commands that run in both."""

from typing import Final

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.conmon import conmon
from isopod.world.sim.programs.copier import copier
from isopod.world.sim.programs.cp import cp
from isopod.world.sim.programs.guest_agent import AGENT
from isopod.world.sim.programs.guest_world import RELEASE
from isopod.world.sim.programs.mke2fs import mke2fs
from isopod.world.sim.programs.qemu import qemu
from isopod.world.sim.programs.runtime import crun, runc
from isopod.world.sim.programs.shim import shim
from isopod.world.sim.programs.virtiofsd import PROGRAM as VIRTIOFSD
from isopod.world.sim.programs.virtiofsd import unshare, virtiofsd

GUEST_FOLDER: Final = "/usr/share/isopod/guest"
"""Where the guest's kernel, its initial file system and the shim are: what a node is told as its setting `guest`."""


def install(machine: Machine) -> None:
    """Put every simulated program where Debian puts the real one, and isopod's own beside the guest's files."""
    machine.processes.install("/usr/bin/conmon", conmon)
    machine.processes.install("/usr/bin/crun", crun)
    machine.processes.install("/usr/sbin/runc", runc)
    machine.processes.install("/usr/bin/qemu-system-x86_64", qemu)
    machine.processes.install("/usr/sbin/mke2fs", mke2fs)
    machine.processes.install("/usr/bin/cp", cp)
    machine.processes.install("/usr/bin/unshare", unshare)
    machine.processes.install("/usr/lib/isopod/copier", copier)
    machine.processes.install(VIRTIOFSD, virtiofsd)
    machine.processes.install(f"{GUEST_FOLDER}/isopod-shim", shim)
    for name in ("vmlinux", "initrd.img"):
        machine.view.write(f"{GUEST_FOLDER}/{name}", f"simulated {name}\n".encode(), 0o644)
    facts = f'{{"kernel":"{RELEASE}","agent":"{AGENT}","digest":"{"0" * 64}"}}'
    machine.view.write(f"{GUEST_FOLDER}/guest.json", facts.encode(), 0o644)
