"""microvm.nix: machines that a flake describes, run by the runner that Nix builds of it.

A configuration is one of: a flake's folder (or reference) with an attribute, "/srv/vms#web", by default the machine's own name; a NixOS
module in a file, "/srv/web.nix", which is wrapped into a flake that is made here; a runner's folder, which is used as it is. The runner's
bin/microvm-run is started in the machine's state folder, with the console as its stdio and no agent; bin/microvm-shutdown ends it.

Rules, those of microvm.nix's host module: FOLDER/ID/microvm is the machine's folder (volumes and sockets lie there, and go with it),
`current` the runner that was built last, `booted` the one that runs; both are roots of Nix's garbage collector. A start takes `current`,
and builds it only if there is none or the configuration is another one; `update` builds it anew. The runner's taps are made here, on one
bridge, and removed by `clear`. Names that users chose are checked here and go to programs as arguments.
Source: microvm.nix, lib/runner.nix and nixos-modules/host (July 2025).
"""

import asyncio
import re
from typing import Final, NamedTuple

import msgspec

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers import nix_build
from isopod.engine.vm.drivers.nix_build import NixSettings, OnLine
from isopod.engine.vm.drivers.nix_runner import FindPid, Runner, RunnerControl, pid_by_shim, read_runner
from isopod.engine.vm.drivers.programs import version
from isopod.engine.vm.machine import Control, DriverCheck, MachineSpec, Plan
from isopod.world.errors import InvalidArgument, KernelError, RuntimeFailed, Unsupported, from_os_error
from isopod.world.world import World

NAME: Final = "microvm-nix"
MICROVM_INPUT: Final = "github:astro/microvm.nix"
ATTRIBUTE: Final = "config.microvm.declaredRunner"
SYSTEM: Final = "x86_64-linux"
_STATE_FILE: Final = "state.json"
_MODULE_BYTES_MAX: Final = 1 << 20
_ID: Final = re.compile(r"[A-Za-z0-9]{1,64}")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_REFERENCE: Final = re.compile(r"[a-z][a-z0-9+.]*:\S+")
_PATH: Final = re.compile(r"[A-Za-z0-9/._+~@-]+")
_FLAKE: Final = """\
{{
  inputs.microvm.url = "{microvm}";
  inputs.nixpkgs.follows = "microvm/nixpkgs";
  outputs = {{ self, microvm, nixpkgs }}: {{
    nixosConfigurations."{name}" = nixpkgs.lib.nixosSystem {{
      system = "{system}";
      modules = [ microvm.nixosModules.microvm {{ networking.hostName = nixpkgs.lib.mkDefault "{host}"; }} ./module.nix ];
    }};
  }};
}}
"""


class NixDriverSettings(NamedTuple):
    """How microVMs of Nix are kept.

    Args:
        folder: Absolute and durable: a folder for each machine's id, of which `microvm` is the driver's. Who removes a machine removes its.
        bridge: Where the runners' taps are ports; "" refuses runners with taps.
        microvm: The flake of microvm.nix that plain modules are wrapped with; the user's flake registry may pin it.
        nix: How Nix is used.
    """

    folder: str
    bridge: str = ""
    microvm: str = MICROVM_INPUT
    nix: NixSettings = NixSettings()


class NixState(msgspec.Struct, frozen=True):
    """What a machine's folder knows.

    Attributes:
        config: What `current` was built of.
        current: The runner that was built last.
        booted: The runner that was started last, "" if none was.
        taps: Taps that were made for it.
    """

    config: str
    current: str
    booted: str = ""
    taps: tuple[str, ...] = ()

    @property
    def is_outdated(self) -> bool:
        """Whether a restart would run something else than what was started."""
        return bool(self.booted) and self.booted != self.current


class NixDriver:
    """Builds and plans machines described in Nix.

    Args:
        world: The machine.
        settings: Where and how.
        on_line: Told of the progress of builds.
        find_pid: Finds the process of a machine that runs.
    """

    def __init__(
        self, world: World, settings: NixDriverSettings, *, on_line: OnLine | None = None, find_pid: FindPid = pid_by_shim
    ) -> None:
        self._world = world
        self._settings = settings
        self._on_line = on_line
        self._find_pid = find_pid
        self._locks: dict[str, asyncio.Lock] = {}

    @property
    def name(self) -> str:
        """What `--driver` calls it."""
        return NAME

    async def check(self) -> DriverCheck:
        """Say whether it can build. A runner's folder needs no Nix."""
        nix = self._world.processes.which("nix")
        if nix is None:
            return DriverCheck(usable=True, why="runners' folders only: nix is not installed (apt-get install nix-bin)")
        told = await version(self._world, [nix])
        return DriverCheck(usable=bool(told), why=told or f"{nix} does not run")

    async def plan(self, spec: MachineSpec) -> Plan:
        """Build what is not built yet, make the taps, and return how to start the runner.

        Raises:
            InvalidArgument: The name or the configuration makes no sense.
            Unsupported: The runner needs what is not made here.
            RuntimeFailed: Nix failed, or what it built is no runner.
            ToolMissing: Nix is needed and missing.
            UnavailableError: The disk or the kernel failed.
        """
        async with self._lock(spec.id):
            state = await self._load(spec)
            if state is None or state.config != spec.config:
                state = await self._build(spec, state)
            runner = await read_runner(self._world, state.current, name=spec.name)
            await self._keep_booted(spec, state)
            state = msgspec.structs.replace(state, booted=state.current)
            await self._save_taps(spec, state, await self._make_taps(runner, state))
        return Plan(
            argv=(f"{runner.path}/bin/microvm-run",),
            env=dict(ENVIRONMENT),
            cwd=self.folder(spec),
            files=(),
            console="stdio",
            agent="none",
            own_network=False,
            stop_argv=runner.stop_argv,
        )

    async def connect(self, spec: MachineSpec) -> Control:
        """Return what steers a machine that was started by the plan. Raises RuntimeFailed if there is none."""
        state = await self._load(spec)
        if state is None or not state.booted:
            raise RuntimeFailed("connect to", spec.name, "no runner was started in its folder")
        runner = await read_runner(self._world, state.booted, name=spec.name)
        return RunnerControl(self._world, runner, spec, cwd=self.folder(spec), find_pid=self._find_pid)

    async def update(self, spec: MachineSpec) -> NixState:
        """Build a machine's configuration anew, whatever runs. Raises as `plan`."""
        async with self._lock(spec.id):
            return await self._build(spec, await self._load(spec))

    async def describe(self, spec: MachineSpec) -> NixState | None:
        """Return what is built and what runs, None if nothing was built. Raises RuntimeFailed, UnavailableError."""
        return await self._load(spec)

    async def clear(self, spec: MachineSpec) -> None:
        """Remove the taps that were made for a machine; the folder stays. Raises UnavailableError."""
        async with self._lock(spec.id):
            state = await self._load(spec)
            if state is None or not state.taps:
                return
            for tap in state.taps:
                await self._delete_tap(tap)
            await self._save(spec, msgspec.structs.replace(state, taps=()))

    def folder(self, spec: MachineSpec) -> str:
        """Return a machine's folder. Raises InvalidArgument if what names it could lead elsewhere."""
        if not _ID.fullmatch(spec.id):
            raise InvalidArgument("machine", spec.id, "its id wants letters and digits, at most 64")
        if not _NAME.fullmatch(spec.name):
            raise InvalidArgument("name", spec.name, "want letters, digits, _, - and ., at most 63")
        return f"{self._settings.folder}/{spec.id}/microvm"

    # --- building -------------------------------------------------------------------------------------------------------

    async def _build(self, spec: MachineSpec, before: NixState | None) -> NixState:
        folder, name, config = self.folder(spec), spec.name, spec.config
        try:
            await self._world.disk.make_directory(folder, mode=0o755)
            installable = await self._installable(spec)
        except OSError as error:
            raise from_os_error(error, "prepare", folder) from error
        if installable is None:
            path = config
        else:
            path = await nix_build.build(
                self._world,
                installable,
                f"{folder}/current",
                name=name,
                log=f"{folder}/build.log",
                settings=self._settings.nix,
                on_line=self._on_line,
            )
        await read_runner(self._world, path, name=name)
        state = NixState(config, path) if before is None else msgspec.structs.replace(before, config=config, current=path)
        await self._save(spec, state)
        return state

    async def _installable(self, spec: MachineSpec) -> str | None:
        """Return what Nix shall build for a configuration, None if that is a runner already."""
        name, config = spec.name, spec.config
        where, mark, attribute = config.partition("#")
        attribute = attribute or name
        if not _NAME.fullmatch(attribute):
            raise InvalidArgument("configuration", config, "the name behind # wants letters, digits, _, - and .")
        suffix = f'#nixosConfigurations."{attribute}".{ATTRIBUTE}'
        if _REFERENCE.fullmatch(where):
            return where + suffix
        if not where.startswith("/") or "\0" in where:
            raise InvalidArgument("configuration", config, "want an absolute path, or a flake's reference", "a unit? --driver systemd")
        disk = self._world.disk
        if await disk.stat(f"{where}/flake.nix") is not None:
            return _flake(where) + suffix
        if not mark and await disk.stat(f"{where}/bin/microvm-run") is not None:
            return None
        found = await disk.stat(where)
        if found is None or found.is_directory or mark:
            why = "there is nothing" if found is None else "it is no flake (flake.nix), no module and no runner (bin/microvm-run)"
            raise InvalidArgument("configuration", config, why)
        return f'{_flake(await self._wrap(spec, where))}#nixosConfigurations."{name}".{ATTRIBUTE}'

    async def _wrap(self, spec: MachineSpec, module: str) -> str:
        """Write the flake around a module and return its folder."""
        folder, name = f"{self.folder(spec)}/flake", spec.name
        disk = self._world.disk
        await disk.make_directory(folder, mode=0o755)
        microvm = self._settings.microvm.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
        text = _FLAKE.format(microvm=microvm, name=name, host=name.replace(".", "-").replace("_", "-"), system=SYSTEM)
        await disk.write(f"{folder}/module.nix", await disk.read(module, n_bytes_max=_MODULE_BYTES_MAX), mode=0o644)
        await disk.write(f"{folder}/flake.nix", text.encode(), mode=0o644)
        return folder

    async def _keep_booted(self, spec: MachineSpec, state: NixState) -> None:
        """Protect what is about to run from the garbage collector, also when `current` becomes another."""
        if state.current == state.config:
            return  # the user's own runner
        link = f"{self.folder(spec)}/booted"
        await nix_build.keep(self._world, state.current, link, name=spec.name, settings=self._settings.nix)

    # --- taps -----------------------------------------------------------------------------------------------------------

    async def _make_taps(self, runner: Runner, state: NixState) -> tuple[str, ...]:
        """Make the runner's taps and return those that are ours; one that exists is somebody's, and left alone."""
        if runner.taps and not self._settings.bridge:
            raise Unsupported(
                "a runner with taps", "no bridge is set for them", "set the bridge of microvm-nix, or make them user interfaces"
            )
        made: list[str] = []
        try:
            for tap in runner.taps:
                if await self._make_tap(tap):
                    made.append(tap)
        except BaseException:
            for tap in made:
                await self._delete_tap(tap)
            raise
        return tuple(tap for tap in runner.taps if tap in made or tap in state.taps)

    async def _make_tap(self, tap: str) -> bool:
        """Make a tap; return False if there is one of that name."""
        try:
            await self._world.kernel.create_tap(tap, bridge=self._settings.bridge)
        except FileExistsError:
            return False
        except OSError as error:
            raise from_os_error(error, "make the tap", tap) from error
        return True

    async def _save_taps(self, spec: MachineSpec, state: NixState, taps: tuple[str, ...]) -> None:
        """Note what was made, so that `clear` finds it; what cannot be noted is removed at once."""
        try:
            await self._save(spec, msgspec.structs.replace(state, taps=taps))
        except BaseException:
            for tap in taps:
                if tap not in state.taps:
                    await self._delete_tap(tap)
            raise

    async def _delete_tap(self, tap: str) -> None:
        try:
            await self._world.kernel.delete_link(tap)
        except OSError as error:
            raise KernelError("remove the tap", tap, error.errno or 0) from error

    # --- the folder -----------------------------------------------------------------------------------------------------

    def _lock(self, identifier: str) -> asyncio.Lock:
        return self._locks.setdefault(identifier, asyncio.Lock())

    async def _load(self, spec: MachineSpec) -> NixState | None:
        path = f"{self.folder(spec)}/{_STATE_FILE}"
        try:
            return msgspec.json.decode(await self._world.disk.read(path, n_bytes_max=1 << 20), type=NixState)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise RuntimeFailed("read the state of", spec.name, f"{path} is damaged: {error}") from error
        except OSError as error:
            raise from_os_error(error, "read", path) from error

    async def _save(self, spec: MachineSpec, state: NixState) -> None:
        path = f"{self.folder(spec)}/{_STATE_FILE}"
        try:
            await self._world.disk.write_atomic(path, msgspec.json.encode(state), mode=0o644)
        except OSError as error:
            raise from_os_error(error, "write", path) from error


def _flake(folder: str) -> str:
    """Return the reference of a flake's folder. Raises InvalidArgument for a path that Nix cannot take in one."""
    if not _PATH.fullmatch(folder):
        raise InvalidArgument(
            "path", folder, "Nix takes only letters, digits and / . _ + - ~ @ in a flake's path", "move it, or link to it"
        )
    return f"path:{folder}"
