"""Probe: which tools and kernel features this machine has, found out by trying, each with its reason.

`isopod info` prints what is decided here; nothing else decides it again.
"""

from typing import Final, Literal, NamedTuple

from isopod.api.messages import Probed
from isopod.engine.bundle import Json
from isopod.engine.capabilities import DEFAULT_CAPABILITIES
from isopod.engine.seccomp import DEFAULT_PROFILE, load_profile
from isopod.engine.supervisor import Tools
from isopod.world.errors import ToolMissing
from isopod.world.world import World

RuntimeChoice = Literal["auto", "crun", "runc"]
_TIMEOUT_S: Final = 10.0


class Machine(NamedTuple):
    """What was found."""

    tools: Tools
    seccomp: Json
    cgroup_mode: Probed
    seccomp_profile: Probed


async def probe(world: World, choice: RuntimeChoice) -> Machine:
    """Look at the machine.

    Args:
        world: The machine, its private mount namespace entered.
        choice: Which OCI runtime to use; "auto" takes crun, else runc.

    Raises:
        ToolMissing: A program or file without which no container can run.
    """
    supervisor = world.processes.which("conmon")
    if supervisor is None:
        raise ToolMissing("conmon", "conmon")
    runtime, why = await _runtime(world, choice)
    cgroups = world.kernel.cgroup_facts()
    _check_overlay(world)
    return Machine(
        tools=Tools(runtime=runtime, runtime_why=why, supervisor=supervisor, supervisor_why=await _version(world, supervisor)),
        seccomp=await load_profile(world, DEFAULT_PROFILE, DEFAULT_CAPABILITIES),
        cgroup_mode=Probed(value=cgroups.mode, why=f"{cgroups.why}; can limit {', '.join(cgroups.controllers) or 'nothing'}"),
        seccomp_profile=Probed(value="default", why=DEFAULT_PROFILE),
    )


async def _runtime(world: World, choice: RuntimeChoice) -> tuple[str, str]:
    wanted = ("crun", "runc") if choice == "auto" else (choice,)
    reasons = []
    for name in wanted:
        path = world.processes.which(name)
        if path is None:
            reasons.append(f"{name} is not installed")
            continue
        version = await _version(world, path)
        if not version:
            reasons.append(f"{name} does not run")
            continue
        return path, "; ".join([version, *reasons])
    raise ToolMissing(" or ".join(wanted), wanted[0])


async def _version(world: World, program: str) -> str:
    """Return a program's first line of --version, "" if it does not run."""
    try:
        done = await world.processes.run([program, "--version"], timeout_s=_TIMEOUT_S)
    except OSError:
        return ""
    lines = done.stdout.decode(errors="replace").splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def _check_overlay(world: World) -> None:
    if not world.kernel.overlay_supported():
        raise ToolMissing("the kernel's overlay file system", "a kernel with CONFIG_OVERLAY_FS")
