"""VmFaults: what a test may let go wrong with simulated microVMs. Everything is off in the beginning.

A fault belongs to one start of a machine: `next` gives it to the machines that start next, `rates` to any by a seeded chance.

Legal faults of the guest:

- `panic_at_boot`, `panic_later`: its kernel panics before the agent speaks, or `after_s` seconds after it did.
- `no_hello`: it boots, and its agent never speaks. `slow_boot`: the boot takes `slow_boot_s` longer.
- `silent`: `after_s` seconds after the agent spoke the whole guest stands still, its processor busy; nothing is answered any more.
- `floods_console`: a driver writes megabytes to the console, without end.
- `breaks_frames`: the agent sends what is no frame. `false_streams`: it sends output on streams that nobody opened. `over_credit`: it sends
  output as if it had been granted any amount.
- `ignores_poweroff`: the agent agrees to power off, and goes on.
- `small_disk`: the file system of its own files has next to no room, as after a guest that filled it. `read_only`: that file system turns
  read-only `after_s` seconds after the start, as ext4 does after an error.

Legal faults of the monitor (QEMU):

- `no_memory`: it ends at once, the guest's memory cannot be had (so it does too when all guests together want more than the machine has).
- `dies`: it is killed `after_s` seconds after its start. `dies_migrating`: it is killed amid a snapshot, half of which is there.
- `qmp_slow`: each answer takes `qmp_slow_s`. `qmp_silent`: there is none. `qmp_errors`: every command but the negotiation fails.
  `qmp_garbage`: what it answers is no JSON. `migration_fails`: a snapshot ends as failed.

`kvm` says what /dev/kvm of the machine is: absent, working, or there and useless, so that a guest under it never comes up. A damaged
snapshot needs no switch: see `DiskFaults.bit_rot`. What the disk loses at a power cut is the disk's: what a guest has synced is durable.
"""

import random
from collections.abc import Callable
from typing import Final, Literal

Fault = Literal[
    "panic_at_boot",
    "panic_later",
    "no_hello",
    "slow_boot",
    "silent",
    "floods_console",
    "breaks_frames",
    "false_streams",
    "over_credit",
    "ignores_poweroff",
    "small_disk",
    "read_only",
    "no_memory",
    "dies",
    "dies_migrating",
    "qmp_slow",
    "qmp_silent",
    "qmp_errors",
    "qmp_garbage",
    "migration_fails",
]
Kvm = Literal["absent", "works", "hangs"]
FAULTS: Final[tuple[Fault, ...]] = (
    *("panic_at_boot", "panic_later", "no_hello", "slow_boot", "silent", "floods_console", "breaks_frames", "false_streams", "over_credit"),
    *("ignores_poweroff", "small_disk", "read_only", "no_memory", "dies", "dies_migrating"),
    *("qmp_slow", "qmp_silent", "qmp_errors", "qmp_garbage", "migration_fails"),
)


class VmFaults:
    """The switches, and how often each fault was given to a machine.

    Args:
        chance: A stream that nothing else draws from.
        show_kvm: Makes /dev/kvm, or takes it away.
    """

    def __init__(self, chance: random.Random, show_kvm: Callable[[bool], None]) -> None:
        self._kvm: Kvm = "absent"
        self._show_kvm = show_kvm
        self.rates: dict[Fault, float] = {}
        """The chance of each fault at each start."""
        self.after_s: tuple[float, float] = (0.5, 3.0)
        """Bounds of when a later fault comes."""
        self.slow_boot_s = 20.0
        self.qmp_slow_s = 2.0
        self.counts: dict[Fault, int] = {}
        self._chance = chance
        self._next: dict[Fault, int] = {}

    @property
    def kvm(self) -> Kvm:
        """What /dev/kvm is."""
        return self._kvm

    @kvm.setter
    def kvm(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._show_kvm(kvm != "absent")

    def next(self, fault: Fault, *, times: int = 1) -> None:
        """Give a fault to the machines that start next."""
        self._next[fault] = self._next.get(fault, 0) + times

    def clear(self) -> None:
        """Switch everything off for machines that start from now on."""
        self._next.clear()
        self.rates.clear()

    def draw(self) -> "Drawn":
        """Draw what goes wrong with a machine that starts now."""
        found: list[Fault] = []
        for fault in FAULTS:
            if self._next.get(fault, 0):
                self._next[fault] -= 1
                found.append(fault)
            elif (rate := self.rates.get(fault, 0.0)) and self._chance.random() < rate:
                found.append(fault)
        for fault in found:
            self.counts[fault] = self.counts.get(fault, 0) + 1
        return Drawn(self, tuple(found), self._chance)


class Drawn:
    """What goes wrong with one machine.

    Args:
        faults: Where it was drawn.
        names: The faults.
        chance: For their instants.
    """

    def __init__(self, faults: VmFaults, names: tuple[Fault, ...], chance: random.Random) -> None:
        self.names = names
        self.slow_boot_s = faults.slow_boot_s if "slow_boot" in names else 0.0
        self.qmp_slow_s = faults.qmp_slow_s if "qmp_slow" in names else 0.0
        self.after_s = chance.uniform(*faults.after_s) if names else 0.0

    def __contains__(self, fault: Fault) -> bool:
        """Whether it has that fault."""
        return fault in self.names
