"""`vm update`: a machine's configuration built anew, through a whole node. On the host a stand-in for Nix builds it."""

import asyncio
import os
from typing import Final

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api.machines import VmBuild, VmConsole
from isopod.world.errors import InvalidArgument, NotFound, ToolMissing, Unsupported, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.node.rig import HostBackend, collect
from tests.node.vms import HOST_GUEST, VmRig, sim_rig

pytestmark = pytest.mark.row("B11")
STARTS_S: Final = 60.0
RUN: Final = """\
#!/bin/bash
echo "this is $(basename "$(dirname "$(dirname "$0")")")"
exec sleep 600
"""
SHUTDOWN: Final = """\
#!/bin/bash
kill -TERM "$MAINPID"
"""
NIX: Final = """\
#!/bin/bash
while [ $# -gt 0 ]; do
    case $1 in
        --version) echo "nix 0 (a test's)"; exit ;;
        --out-link) link=$2 ;;
    esac
    last=$1
    shift
done
flake=${last#path:}
flake=${flake%%#*}
[ -e "$flake/built" ] || { echo "error: $flake does not evaluate" >&2; exit 1; }
built=$(readlink -f "$flake/built")
ln -sfn "$built" "$link"
echo "[{\\"outputs\\":{\\"out\\":\\"$built\\"}}]"
"""
NIX_STORE: Final = """\
#!/bin/bash
ln -sfn "$5" "$2"  # --add-root LINK --indirect --realise PATH
"""


def write(path: str, text: str) -> None:
    """Write a program."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o755)


def build(flake: str, folder: str, name: str) -> str:
    """Make a runner of that name what a flake builds, and return its folder."""
    write(f"{folder}/{name}/bin/microvm-run", RUN)
    write(f"{folder}/{name}/bin/microvm-shutdown", SHUTDOWN)
    write(f"{flake}/flake.nix", "{}\n")
    if os.path.lexists(f"{flake}/built"):
        os.unlink(f"{flake}/built")
    os.symlink(f"{folder}/{name}", f"{flake}/built")
    return f"{folder}/{name}"


async def update(rig: VmRig, name: str) -> VmBuild:
    """Build a machine anew."""
    return await rig.client.call(methods.VM_UPDATE, m.ContainerName(name=name), timeout_s=STARTS_S)


async def create(rig: VmRig, name: str, config: str) -> None:
    """Create a machine of a configuration."""
    spec = m.ContainerSpec(image="", name=name, isolation="vm", network="none", vm=m.VmOptions(config=config))
    await rig.client.call(methods.CONTAINER_CREATE, spec)


async def wait_for_console(rig: VmRig, name: str, text: str) -> None:
    """Return when a machine's console says something."""
    async with asyncio.timeout(STARTS_S):
        while True:
            async with rig.client.open(methods.VM_CONSOLE, VmConsole(name=name, follow=False)) as call:
                if text in (await collect(call, None)).stdout.decode():
                    return
            await asyncio.sleep(0.05)  # its console is no stream that tells when it has more; the deadline bounds the asking


async def test_what_is_built_of_nothing_is_refused(sim_world: SimWorld, folder: str) -> None:
    async with sim_rig(sim_world, folder) as rig:
        await rig.run_detached("sleep", "1000", name="box", isolation="container", vm=m.VmOptions())
        with pytest.raises(WrongState, match="no virtual machine"):
            await update(rig, "box")
        await rig.run_detached("sleep", "1000", name="imaged")
        with pytest.raises(Unsupported, match="machine of driver qemu"):
            await update(rig, "imaged")
        with pytest.raises(NotFound):
            await update(rig, "nobody")


async def test_a_runner_s_folder_is_what_it_is_and_a_flake_wants_nix(sim_world: SimWorld, folder: str) -> None:
    async with sim_rig(sim_world, folder) as rig:
        await sim_world.world.disk.make_directory("/srv/runner/bin")
        await sim_world.world.disk.write("/srv/runner/bin/microvm-run", b"#!/bin/sh\n", mode=0o755)
        await create(rig, "ready", "/srv/runner")
        built = await update(rig, "ready")
        assert (built.container.name, built.runner, built.booted, built.is_outdated) == ("ready", "/srv/runner", "", False)
        await create(rig, "absent", "/srv/nothing")
        with pytest.raises(InvalidArgument, match="there is nothing"):
            await update(rig, "absent")
        await sim_world.world.disk.make_directory("/srv/flake")
        await sim_world.world.disk.write("/srv/flake/flake.nix", b"{}")
        await create(rig, "flaky", "/srv/flake")
        with pytest.raises(ToolMissing, match="nix"):
            await update(rig, "flaky")
        assert (await rig.inspect("flaky")).status == "created"


@pytest.mark.host
async def test_what_runs_goes_on_and_a_restart_takes_what_was_built(host_world: World, folder: str) -> None:
    if not os.path.exists(f"{HOST_GUEST}/isopod-shim"):
        pytest.skip(f"there is no {HOST_GUEST}/isopod-shim (make setup-vm)")
    write(f"{folder}/bin/nix", NIX)
    write(f"{folder}/bin/nix-store", NIX_STORE)
    backend = HostBackend(host_world, folder)
    backend.more_environment = {"ISOPOD_VM_MONITOR_ROOT": f"{folder}/sbs", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    flake = f"{folder}/flake"
    async with VmRig(backend, "isopodu") as rig:
        one = build(flake, folder, "one")
        record = await rig.run_detached(image="", name="web", vm=m.VmOptions(config=flake))
        await wait_for_console(rig, "web", "this is one")
        same = await update(rig, "web")
        assert (same.runner, same.booted, same.is_outdated) == (one, one, False)
        two = build(flake, folder, "two")
        changed = await update(rig, "web")
        assert (changed.runner, changed.booted, changed.is_outdated) == (two, one, True)
        assert (changed.container.status, changed.container.pid) == ("running", record.pid)
        os.unlink(f"{flake}/built")
        with pytest.raises(Exception, match="does not evaluate"):
            await update(rig, "web")
        await rig.client.call(methods.CONTAINER_RESTART, m.RestartContainer(name="web", timeout_s=5.0), timeout_s=STARTS_S)
        await wait_for_console(rig, "web", "this is two")
        assert os.readlink(f"{folder}/root/containers/{record.id}/microvm/booted") == two
