"""Programs of the simulated machine: the supervisor, the OCI runtime, and the commands that run in containers."""

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.conmon import conmon
from isopod.world.sim.programs.runtime import crun, runc


def install(machine: Machine) -> None:
    """Put every simulated program where Debian puts the real one."""
    machine.processes.install("/usr/bin/conmon", conmon)
    machine.processes.install("/usr/bin/crun", crun)
    machine.processes.install("/usr/sbin/runc", runc)
