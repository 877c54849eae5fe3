"""systemd: machines that a unit runs, microvm@NAME of microvm.nix's host module mostly. systemd keeps them; here they are steered.

What is started is `systemctl start --wait`, which lasts as long as the unit does: its end is the machine's. The unit's console is the
journal's, and it has no agent. Unlike every other machine this one does not end with its shim: `stop_argv` ends it.
Rules: a unit's name is checked, and stands behind "--".
Source: systemctl(1): is-active, show, start --wait; systemd.unit(5) on names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.programs import located, version
from isopod.engine.vm.machine import Control, DriverCheck, MachineSpec, MachineStatus, Plan
from isopod.world.errors import DeadlineExceeded, InvalidArgument, NotFound, RuntimeFailed, UnavailableError
from isopod.world.processes import Completed
from isopod.world.world import World

NAME: Final = "systemd"
TEMPLATE: Final = "microvm@"
CALL_TIMEOUT_S: Final = 15.0
STOP_TIMEOUT_S: Final = 160.0
"""A little more than the host module's TimeoutStopSec, after which systemd kills by itself."""
_HOW_TO_GET: Final = "it is for machines whose init is systemd"
_UNIT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.\\-]*(@[A-Za-z0-9:_.\\-]+)?")
_UNIT_CHARS_MAX: Final = 200
_WORDS_MAX: Final = 600

UNIT_STATES: Final[Mapping[str, MachineStatus]] = {
    "active": "running",
    "reloading": "running",
    "refreshing": "running",
    "activating": "unknown",
    "maintenance": "unknown",
    "deactivating": "shutdown",
    "inactive": "shutdown",
    "failed": "shutdown",
}
"""systemd's word for a unit, and ours. `failed` ended too: why is what `describe` says."""


class UnitState(NamedTuple):
    """What systemd says of a unit.

    Args:
        active: Its state: "active", "failed", ...
        sub: The finer one: "running", "auto-restart", ...
        result: "success", or how it failed: "exit-code", "timeout", "signal", ...
        main_pid: Its first process, 0 if it has none.
        exit_status: Of the first process, when it ended.
    """

    active: str
    sub: str
    result: str
    main_pid: int
    exit_status: int

    @property
    def why(self) -> str:
        """Why it failed, in words; "" if it did not."""
        if self.active != "failed" and self.result in ("", "success"):
            return ""
        return f"the unit is {self.active} ({self.result or 'no result'}), its process ended with status {self.exit_status}"


class SystemdDriver:
    """Starts and stops units.

    Args:
        world: The machine.
        command: systemctl, and arguments before all others ("--user").
    """

    def __init__(self, world: World, *, command: Sequence[str] = ("systemctl",)) -> None:
        self._world = world
        self._command = tuple(command)

    @property
    def name(self) -> str:
        """What `--driver` calls it."""
        return NAME

    async def check(self) -> DriverCheck:
        """Say whether systemd runs here."""
        found = self._world.processes.which(self._command[0])
        if found is None:
            return DriverCheck(usable=False, why=f"{self._command[0]} is not installed: this machine has no systemd")
        command = (found, *self._command[1:])
        told = await version(self._world, command)
        done = await _run(self._world, [*command, "is-system-running"], "ask for the state of", "systemd")
        state = done.stdout.decode(errors="replace").strip()
        if state in ("", "offline", "unknown"):
            return DriverCheck(usable=False, why=f"{told or found}, but systemd is not this machine's init")
        return DriverCheck(usable=True, why=f"{told or found}, {state}")

    async def plan(self, spec: MachineSpec) -> Plan:
        """Return how to start a unit.

        Raises:
            InvalidArgument: The configuration is no unit's name.
            NotFound: systemd knows no such unit.
            Unsupported: There is no systemctl.
            RuntimeFailed: systemd refused.
        """
        command = located(self._world, self._command, _HOW_TO_GET)
        unit = unit_name(spec)
        done = await _run(self._world, [*command, "show", "--property=LoadState", "--", unit], "look at", unit)
        if done.returncode != 0:
            raise RuntimeFailed("look at", unit, _why(done))
        load = _properties(done.stdout).get("LoadState", "")
        if load != "loaded":
            raise NotFound("unit", unit, f"systemd says it is {load or 'unknown'}: is microvm.nix's host module in use?")
        return Plan(
            argv=(*command, "start", "--wait", "--", unit),
            env=dict(ENVIRONMENT),
            cwd="/",
            files=(),
            console="stdio",
            agent="none",
            own_network=False,
            stop_argv=(*command, "stop", "--", unit),
        )

    async def connect(self, spec: MachineSpec) -> Control:
        """Return what steers a unit. Raises InvalidArgument, Unsupported."""
        return self.control(spec)

    def control(self, spec: MachineSpec) -> "UnitControl":
        """Do as `connect`, with `UnitControl.describe` in sight."""
        return UnitControl(self._world, located(self._world, self._command, _HOW_TO_GET), unit_name(spec), name=spec.name)


class UnitControl:
    """Steers one unit.

    Args:
        world: The machine.
        command: systemctl.
        unit: The unit's name.
        name: The machine's name, for errors.
    """

    def __init__(self, world: World, command: Sequence[str], unit: str, *, name: str) -> None:
        self._world = world
        self._command = tuple(command)
        self._unit = unit
        self._name = name

    async def boot(self) -> None:
        """Nothing: the plan's command starts it."""

    async def pause(self) -> None:
        """Refused."""
        raise self._impossible("pause")

    async def resume(self) -> None:
        """Refused."""
        raise self._impossible("resume")

    async def snapshot(self, folder: str) -> None:
        """Refused."""
        raise self._impossible("snapshot")

    async def power_button(self) -> None:
        """Stop the unit the way it wants to be stopped, and return when it is."""
        await self._do("stop", "--", self._unit, timeout_s=STOP_TIMEOUT_S)

    async def quit(self) -> None:
        """Kill what the unit runs."""
        if UNIT_STATES.get((await self.describe()).active, "unknown") != "shutdown":
            await self._do("kill", "--signal=SIGKILL", "--", self._unit)

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Change nothing: its sizes stand in its configuration."""
        wanted = (("vcpus", vcpus), ("memory", memory_bytes))
        return tuple(f"{what}: change the configuration of {self._unit} and restart it" for what, value in wanted if value is not None)

    async def status(self) -> MachineStatus:
        """Say what the unit does."""
        return UNIT_STATES.get((await self.describe()).active, "unknown")

    async def describe(self) -> UnitState:
        """Return what systemd says of the unit. Raises RuntimeFailed, UnavailableError."""
        done = await self._do("show", "--property=ActiveState,SubState,Result,MainPID,ExecMainStatus", "--", self._unit)
        said = _properties(done.stdout)
        numbers = [int(said[key]) if said.get(key, "").isdecimal() else 0 for key in ("MainPID", "ExecMainStatus")]
        return UnitState(said.get("ActiveState", ""), said.get("SubState", ""), said.get("Result", ""), *numbers)

    def close(self) -> None:
        """Let go: nothing is held."""

    async def _do(self, verb: str, *arguments: str, timeout_s: float = CALL_TIMEOUT_S) -> Completed:
        done = await _run(self._world, [*self._command, verb, *arguments], verb, self._name, timeout_s=timeout_s)
        if done.returncode != 0:
            raise RuntimeFailed(verb, self._name, _why(done))
        return done

    def _impossible(self, action: str) -> RuntimeFailed:
        return RuntimeFailed(action, self._name, f"systemd has no way to do that to {self._unit}")


def unit_name(spec: MachineSpec) -> str:
    """Return the unit of a machine: its configuration, "microvm@NAME" for a bare name or for none.

    Raises:
        InvalidArgument: It is no unit's name.
    """
    given = spec.config or spec.name
    name = given.removesuffix(".service")
    if not _UNIT.fullmatch(name) or len(name) > _UNIT_CHARS_MAX:
        raise InvalidArgument("unit", given, "want NAME or microvm@NAME: letters, digits and : _ . - behind the first")
    return f"{name if '@' in name else TEMPLATE + name}.service"


async def _run(world: World, argv: Sequence[str], action: str, target: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Completed:
    try:
        return await world.processes.run(argv, env=ENVIRONMENT, timeout_s=timeout_s)
    except DeadlineExceeded as error:
        raise UnavailableError(f"{action} {target}: systemctl did not answer within {timeout_s:g} s") from error
    except OSError as error:
        raise RuntimeFailed(action, target, f"systemctl: {error.strerror}") from error


def _properties(output: bytes) -> dict[str, str]:
    pairs = (line.partition("=") for line in output.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, mark, value in pairs if mark}


def _why(done: Completed) -> str:
    line = " ".join(done.stderr.decode("utf-8", "replace").split())
    return line[:_WORDS_MAX] or f"systemctl ended with status {done.returncode}"
