"""Bundles for the simulated runtime and supervisor: a root file system, a configuration, and how to call the programs."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from isopod.world.processes import Completed, Process
from isopod.world.sim import SimWorld

APPLETS = (
    "sh",
    "true",
    "cat",
    "sleep",
    "echo",
    "ls",
    "tail",
    "id",
    "pwd",
    "hostname",
    "env",
    "stty",
    "tty",
    "head",
    "wc",
    "dd",
    "kill",
    "touch",
    "yes",
    "grep",
)
ROOT = "/run/runtime"


def furnish(sim: SimWorld) -> None:
    """Make /bundle/rootfs."""
    view = sim.machine.view
    for folder in ("bin", "dev", "proc", "etc", "tmp"):
        view.make_folders(f"/bundle/rootfs/{folder}", 0o755)
    view.write("/bundle/rootfs/bin/busybox", b"\x7fELF", 0o755)
    view.write("/bundle/rootfs/etc/notes", b"not a program\n", 0o644)
    for name in APPLETS:
        view.symlink("busybox", f"/bundle/rootfs/bin/{name}")
    for folder in ("/exits", ROOT):
        view.make_folders(folder)


def configure(sim: SimWorld, *args: str, terminal: bool = False, resources: Mapping[str, Any] | None = None, **process: Any) -> None:
    """Write /bundle/config.json."""
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": args, "env": ["PATH=/bin"], "cwd": "/", "terminal": terminal, "user": {"uid": 0, "gid": 0}, **process},
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}], "cgroupsPath": "/t/c1", "resources": resources or {}},
    }
    sim.machine.view.write("/bundle/config.json", json.dumps(config).encode())


async def crun(sim: SimWorld, *arguments: str, program: str = "crun") -> Completed:
    """Run the runtime."""
    path = sim.world.processes.which(program)
    assert path is not None
    return await sim.world.processes.run([path, "--root", ROOT, *arguments])


async def create(sim: SimWorld, *command: str, **options: Any) -> None:
    """Create c1 with that command, its stdio /dev/null (it would keep ours open)."""
    configure(sim, *command, **options)
    argv = ["/usr/bin/crun", "--root", ROOT, "create", "--bundle", "/bundle", "--pid-file", "/bundle/pid", "c1"]
    runtime = await sim.world.processes.spawn(argv, env={})
    assert await runtime.wait() == 0


async def create_failing(sim: SimWorld, *command: str) -> Completed:
    """Create c1 with a command that must be refused."""
    configure(sim, *command)
    return await crun(sim, "create", "--bundle", "/bundle", "c1")


async def state(sim: SimWorld) -> str:
    """Return the state of c1."""
    return str(json.loads((await crun(sim, "state", "c1")).stdout)["status"])


class Supervised:
    """conmon for c1, or for a session in it."""

    def __init__(self, sim: SimWorld, process: Process) -> None:
        self.sim = sim
        self.process = process

    async def message(self, pipe: str = "_OCI_SYNCPIPE") -> dict[str, Any] | None:
        """Return the next message of a pipe."""
        data = await self.process.pipes[pipe].read()
        return json.loads(data) if data else None

    async def go(self) -> None:
        """Write the start pipe."""
        await self.process.pipes["_OCI_STARTPIPE"].write(b"\0")


async def supervise(sim: SimWorld, *flags: str, log: str = "/log", exec_spec: Mapping[str, Any] | None = None) -> Supervised:
    """Spawn conmon; it waits for `go`."""
    folder = "/bundle" if exec_spec is None else "/bundle/session"
    argv = ["/usr/bin/conmon", "--api-version", "1", "--sync", "-c", "c1", "-u", "c1", "-n", "name", "-r", "/usr/bin/crun"]
    argv += ["--runtime-arg", "--root", "--runtime-arg", ROOT, "-b", folder, "-p", f"{folder}/pid", "--full-attach"]
    pipes: dict[str, Any] = {"_OCI_SYNCPIPE": "read", "_OCI_STARTPIPE": "write"}
    if exec_spec is None:
        argv += ["--exit-dir", "/exits", "-l", f"k8s-file:{log}", *flags]
    else:
        sim.machine.view.make_folders(folder)
        sim.machine.view.write(f"{folder}/process.json", json.dumps(exec_spec).encode())
        argv += ["--exec", "--exec-attach", "--exec-process-spec", f"{folder}/process.json", "--exit-dir", folder, "-l", "none", *flags]
        pipes["_OCI_ATTACHPIPE"] = "read"
    return Supervised(sim, await sim.world.processes.spawn(argv, env={"PATH": "/usr/bin"}, pipes=pipes))


async def started(sim: SimWorld, command: Sequence[str], *flags: str, **options: Any) -> Supervised:
    """Supervise and start c1."""
    configure(sim, *command, **options)
    supervised = await supervise(sim, *flags)
    await supervised.go()
    message = await supervised.message()
    assert message is not None
    assert message["data"] > 0, message
    assert (await crun(sim, "start", "c1")).returncode == 0
    return supervised


async def receive_all(connection: Any) -> bytes:
    """Return all packets up to the end, each as it came, joined."""
    parts = []
    while packet := await connection.receive():
        parts.append(packet)
    return b"".join(parts)


async def receive_until(connection: Any, text: bytes) -> bytes:
    """Return what came on stdout up to a text."""
    seen = b""
    async with asyncio.timeout(30):
        while text not in seen:
            packet = await connection.receive()
            assert packet, seen
            seen += packet[1:]
    return seen
