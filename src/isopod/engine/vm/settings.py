"""Settings: what virtual machines are run with, as the engine is told."""

from typing import Literal, NamedTuple

STOP_TIMEOUT_S = 5.0


class VmSetup(NamedTuple):
    """The settings of one instance. Folders are absolute."""

    guest: str
    """The guest's files."""
    state: str
    """Templates, and what was found out about the machine."""
    bundles: str
    exits: str
    cgroup_root: str
    """Name of the instance's top control group."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    templates_max: int = 8
    template_bytes_max: int = 4 << 30
    monitor_root: str = ""
    """Where each machine serves its metrics, at ID/shim-monitor.sock; "" for nowhere."""
    boot_timeout_s: float = 60.0
    silent_timeout_s: float = 60.0
    stop_timeout_s: float = STOP_TIMEOUT_S
    log_bytes_max: int = 64 << 20
    console_bytes_max: int = 1 << 20

    def bundle(self, identifier: str) -> str:
        """The folder of a machine that runs: its sockets."""
        return f"{self.bundles}/{identifier}"

    def exit_file(self, identifier: str) -> str:
        """Where its shim writes how it ended."""
        return f"{self.exits}/{identifier}"

    def cgroup(self, identifier: str) -> str:
        """Its control group, below each hierarchy's root."""
        return f"/{self.cgroup_root}/{identifier}"

    def monitor(self, identifier: str) -> str:
        """The socket of its metrics, "" for none."""
        return f"{self.monitor_root}/{identifier}/shim-monitor.sock" if self.monitor_root else ""
