"""What a simulated monitor gives its guest, as the monitor's arguments say it."""

from typing import NamedTuple

from isopod.world.sim.pipes import ReadEnd, Sink


class Drive(NamedTuple):
    """A disk."""

    path: str
    serial: str
    read_only: bool


class ShareDevice(NamedTuple):
    """A shared folder: its tag, and the socket of the daemon that serves it."""

    tag: str
    socket: str


class Wire(NamedTuple):
    """Both directions of a socket pair, as one side has them."""

    incoming: ReadEnd
    outgoing: Sink


class Hardware(NamedTuple):
    """A machine as the guest finds it."""

    memory_bytes: int
    n_cpus: int
    accelerator: str
    kernel: str
    initrd: str
    cmdline: tuple[str, ...]
    drives: tuple[Drive, ...]
    macs: tuple[str, ...]
    shares: tuple[ShareDevice, ...]
    has_agent_port: bool

    def shape(self) -> list[object]:
        """Return what a snapshot's machine and the one that goes on from it must have in common."""
        disks = [[each.serial, each.read_only] for each in self.drives]
        return [self.memory_bytes, self.n_cpus, disks, len(self.macs), [each.tag for each in self.shares], self.has_agent_port]

    def drive(self, serial: str) -> Drive | None:
        """Return the disk of that serial."""
        return next((each for each in self.drives if each.serial == serial), None)
