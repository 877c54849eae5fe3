"""Shares: folders and files of the host inside a virtual machine, each served by a virtiofsd of its own.

A virtiofsd lives as long as its machine: it ends when the VMM lets go of its socket. It gets a mount namespace in which its folder in the
bundle shows the shared folder, or one file alone, read-only where that is asked for: what the guest may not change it cannot even
by mounting again, and on the host nothing is mounted. Its socket and its folder have short names in the bundle, and its arguments name the
bundle, by which a later daemon finds it.
Sources: virtiofsd of QEMU 7.2, mount(8), unshare(1).
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from isopod.api.messages import Mount
from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.machine import Share
from isopod.world.errors import DeadlineExceeded, ToolMissing, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

PROGRAM: Final = "/usr/lib/qemu/virtiofsd"
TMPFS_BYTES: Final = 64 << 20
SOCKET_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 5.0
_SIGKILL: Final = 9
_FOLDER: Final = 'mount --bind -- "$1" "$2"'
_FILE: Final = 'mount -t tmpfs -o size=4k tmpfs "$2" && : >"$2/$4" && mount --bind -- "$1" "$2/$4"'
_SERVE: Final = f'exec {PROGRAM} "--socket-path=$3" -o "source=$2" -o cache=auto -o xattr'


class SharePlan(NamedTuple):
    """One mount that is shared."""

    share: Share
    source: str
    place: str
    """Its folder in the bundle."""
    file: str
    """The name of the one file that is shared, "" for a folder."""


async def plan_shares(world: World, mounts: Sequence[Mount], bundle: str) -> tuple[SharePlan, ...]:
    """Return what is to be served.

    Args:
        world: Where the sources are.
        mounts: A sandbox's mounts; only those of kind "bind" are shared.
        bundle: Its bundle.
    """
    plans = []
    for number, mount in enumerate(mount for mount in mounts if mount.kind == "bind"):
        found = await world.disk.stat(mount.source)
        file = "" if found is None or found.is_directory else mount.source.rpartition("/")[2]
        share = Share(tag=f"share{number}", socket=f"fs{number}.sock", read_only=mount.read_only)
        plans.append(SharePlan(share, mount.source, f"{bundle}/share{number}", file))
    return tuple(plans)


def guest_mounts(mounts: Sequence[Mount], plans: Sequence[SharePlan]) -> list[dict[str, Any]]:
    """Return the mounts of a sandbox in the words of the guest's `configure`, in their order."""
    rest = iter(plans)
    found: list[dict[str, Any]] = []
    for mount in mounts:
        entry: dict[str, Any] = {"path": mount.destination, "read_only": mount.read_only, "file": None, "n_bytes": None}
        if mount.kind == "bind":
            plan = next(rest)
            entry |= {"kind": "virtiofs", "tag": plan.share.tag, "file": plan.file or None}
        else:
            entry |= {"kind": "tmpfs", "tag": "", "n_bytes": TMPFS_BYTES}
        found.append(entry)
    return found


async def serve(world: World, plan: SharePlan, bundle: str) -> None:
    """Start the server of a share, and return when it listens.

    Args:
        world: Where.
        plan: The share.
        bundle: The machine's bundle, in which the VMM runs.

    Raises:
        ToolMissing, DeadlineExceeded, UnavailableError: As they say; `end` removes what was started.
    """
    unshare = world.processes.which("unshare")
    if unshare is None:
        raise ToolMissing("unshare", "util-linux")
    if await world.disk.stat(PROGRAM) is None:
        raise ToolMissing("virtiofsd", "qemu-system-common")
    socket = f"{bundle}/{plan.share.socket}"
    try:
        await world.disk.make_directory(plan.place)
        async with world.disk.watch(bundle) as changes, asyncio.timeout(SOCKET_TIMEOUT_S):
            await world.processes.spawn(
                [unshare, "--mount", "--", "/bin/sh", "-c", _script(plan), *_words(plan)], env=ENVIRONMENT, cwd=bundle
            )
            if await world.disk.stat(socket) is None:
                async for _ in changes:
                    if await world.disk.stat(socket) is not None:
                        return
    except TimeoutError as error:
        raise DeadlineExceeded(f"sharing {plan.source}", SOCKET_TIMEOUT_S) from error
    except OSError as error:
        raise from_os_error(error, "share", plan.source) from error


def servers(world: World, bundles: str) -> list[tuple[str, ProcessIdentity]]:
    """Return (id, process) of every virtiofsd of this instance, ordered by pid."""
    try:
        found = world.processes.find(PROGRAM)
    except OSError:
        return []
    rows = []
    for identity, argv in found:
        for word in argv:
            path = word.removeprefix("source=")
            if path != word and path.startswith(f"{bundles}/"):
                rows.append((path.removeprefix(f"{bundles}/").partition("/")[0], identity))
    return rows


async def end(world: World, bundles: str, identifier: str) -> None:
    """End every virtiofsd of a machine, and wait until they are gone.

    Raises:
        TimeoutError: One stays.
    """
    ours = [identity for owner, identity in servers(world, bundles) if owner == identifier]
    for identity in ours:
        world.processes.signal_group(identity, _SIGKILL)
    async with asyncio.timeout(END_TIMEOUT_S):
        for identity in ours:
            await world.processes.wait_gone(identity)


def _script(plan: SharePlan) -> str:
    steps = [_FILE if plan.file else _FOLDER]
    if plan.share.read_only:
        steps.append(f'mount -o remount,bind,ro -- "$2{"/$4" if plan.file else ""}"')
    return " && ".join([*steps, _SERVE])


def _words(plan: SharePlan) -> tuple[str, ...]:
    return ("sh", plan.source, plan.place, plan.share.socket, plan.file)
