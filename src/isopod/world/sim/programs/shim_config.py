"""shim.json, as far as the simulated shim understands it."""

from typing import Literal

import msgspec


class PlannedFile(msgspec.Struct):
    """A descriptor of the monitor."""

    kind: Literal["listen", "console", "agent", "tap"]
    path: str = ""
    name: str = ""


class ShimConfig(msgspec.Struct):
    """shim.json, as far as it is understood here."""

    version: int
    id: str
    argv: list[str]
    files: list[PlannedFile]
    console: Literal["socket", "stdio"]
    agent: Literal["socket", "none"]
    log: str
    log_bytes_max: int
    console_log: str
    console_bytes_max: int
    exit_file: str
    end_file: str
    socket: str
    boot_timeout_s: float
    silent_timeout_s: float
    stop_timeout_s: float
    env: dict[str, str] = {}
    cwd: str = "/"
    own_network: bool = False
    cgroup_procs: list[str] = []
    monitor_socket: str | None = None
    stop_argv: list[str] | None = None
