"""Rig: a whole node for tests, on either World, driven through its socket as a client drives it.

On the host the node is a process of its own, in a network namespace of its own: `kill` is a real kill -9, and whatever a failing test
leaves behind ends with the rig. In the simulation the node is an owner of tasks. The bodies of tests do not know which it is.
"""

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from isopod.api import messages as m
from isopod.api import methods
from isopod.net.rpc import Client, connect
from isopod.runtime.config import NodeConfig, load_config
from isopod.world.errors import PeerError
from isopod.world.network import UnixAddress
from isopod.world.world import World

IMAGE = "isopod/busybox"
APPLETS = (
    *("sh", "true", "false", "echo", "cat", "sleep", "ls", "touch", "env", "pwd", "id", "hostname", "ip", "ping", "mount", "dd", "kill"),
    *(
        "grep",
        "head",
        "tail",
        "wc",
        "tr",
        "seq",
        "stty",
        "tty",
        "mkdir",
        "rm",
        "chmod",
        "mknod",
        "test",
        "stat",
        "readlink",
        "yes",
        "awk",
        "uname",
    ),
    *("nproc", "date", "sync"),
)
START_TIMEOUT_S = 60.0
BUSYBOX = "/bin/busybox"
PROGRAMS = ("conmon", "crun", "runc", "isopod-shim", "qemu-system-x86_64", "virtiofsd")
"""What runs beside a node on the host."""


class Result(NamedTuple):
    """What an attached command did."""

    exit_code: int | None
    stdout: bytes
    stderr: bytes


class Backend(Protocol):
    """The part of a rig that differs between the Worlds."""

    world: World
    folder: str

    async def launch(self, config: NodeConfig) -> None:
        """Start a node."""

    async def kill(self) -> None:
        """End it as kill -9 does."""

    async def stop(self) -> None:
        """End it as SIGTERM does."""

    def is_running(self) -> bool:
        """Whether the node has not ended."""

    def log(self) -> str:
        """Return what the nodes logged."""

    async def leaks(self, config: NodeConfig) -> Sequence[str]:
        """Return what a stopped node left in the kernel."""

    def close(self) -> None:
        """End whatever still runs."""


class Rig:
    """An async context in which a node runs; at its end all containers are removed, the node stops, and nothing may be left.

    Args:
        backend: Which World.
        prefix: The instance's prefix.
    """

    def __init__(self, backend: Backend, prefix: str) -> None:
        self.backend = backend
        self.world = backend.world
        self.folder = backend.folder
        self.flags = {
            "--root": f"{backend.folder}/root",
            "--run-root": f"{backend.folder}/run",
            "--prefix": prefix,
            "--default-subnet": "10.88.0.0/24",
            "--pool-size": "2",
        }
        self.environment: dict[str, str] = {}
        """Settings that have no flag; in the simulation only."""
        self._client: Client | None = None

    @property
    def config(self) -> NodeConfig:
        """What the node is told."""
        return load_config(flags=self.flags, environment=self.environment)

    @property
    def client(self) -> Client:
        """The connection to the running node."""
        assert self._client is not None
        return self._client

    async def __aenter__(self) -> Self:
        """Start the node and give it the starter image."""
        await self.world.disk.make_directory(self.folder)
        await self.start()
        await self.import_image(IMAGE, starter_tar())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove all containers, stop, and look for leaks; after a failure only clean up."""
        try:
            if error is not None:
                print(self.backend.log())  # noqa: T201 - pytest shows it with the failure
            else:
                await self.empty()
                await self.stop()
                assert list(await self.backend.leaks(self.config)) == []
        finally:
            if self._client is not None:
                await self._client.close()
            self.backend.close()

    async def start(self) -> None:
        """Start the node and connect."""
        await self.backend.launch(self.config)
        self._client = await self.connect()

    async def connect(self) -> Client:
        """Connect once more."""
        address = UnixAddress(self.config.paths["socket"])
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    return await connect(self.world, address, peer="test", timeout_s=5.0)
                except PeerError:
                    assert self.backend.is_running(), self.backend.log()
                    # A socket that begins to listen gives no event; the deadline above bounds the asking.
                    await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """kill -9 the node."""
        await self.backend.kill()
        await self._disconnect()

    async def stop(self) -> None:
        """Stop the node in good order."""
        await self._disconnect()
        await self.backend.stop()

    async def restart(self) -> None:
        """Stop and start."""
        await self.stop()
        await self.start()

    async def empty(self) -> None:
        """Remove all containers."""
        for record in (await self.client.call(methods.CONTAINER_LIST, m.ListContainers(all=True))).containers:
            await self.client.call(methods.CONTAINER_REMOVE, m.RemoveContainer(name=record.id, force=True))

    async def import_image(self, name: str, tar: bytes) -> m.Image:
        """Import a root file system."""
        async with self.client.open(methods.IMAGE_IMPORT, m.ImportImage(name=name)) as call:
            for start in range(0, len(tar), 1 << 18):
                await call.send(m.Chunk(data=tar[start : start + (1 << 18)]))
            call.end()
            return await call.reply()

    async def run(self, *command: str, stdin: bytes | None = None, image: str = IMAGE, **spec: Any) -> Result:
        """Run an attached container to its end."""
        spec.setdefault("network", "none")
        wanted = m.ContainerSpec(image=image, command=command, stdin_open=stdin is not None, **spec)
        async with self.client.open(methods.CONTAINER_RUN, m.RunContainer(spec=wanted)) as call:
            return await collect(call, stdin)

    async def run_detached(self, *command: str, image: str = IMAGE, **spec: Any) -> m.Container:
        """Start a container in the background and return its record."""
        spec.setdefault("network", "none")
        wanted = m.RunContainer(spec=m.ContainerSpec(image=image, command=command, **spec), attach=False)
        async with self.client.open(methods.CONTAINER_RUN, wanted) as call:
            return await self.inspect((await call.reply()).id)

    async def exec(self, name: str, *command: str, stdin: bytes | None = None, **options: Any) -> Result:
        """Run one more command in a container."""
        request = m.ExecContainer(name=name, command=command, stdin_open=stdin is not None, **options)
        async with self.client.open(methods.CONTAINER_EXEC, request) as call:
            return await collect(call, stdin)

    async def logs(self, name: str, **options: Any) -> Result:
        """Read a container's log."""
        async with self.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name=name, **options)) as call:
            return await collect(call, None)

    async def inspect(self, name: str) -> m.Container:
        """Return a container's record."""
        return await self.client.call(methods.CONTAINER_INSPECT, m.ContainerName(name=name))

    async def list(self) -> Sequence[m.Container]:
        """Return all containers, oldest first."""
        reply = await self.client.call(methods.CONTAINER_LIST, m.ListContainers(all=True))
        return sorted(reply.containers, key=lambda record: record.created_at_ns)

    async def wait(self, name: str) -> m.Ran:
        """Return how a container ended."""
        return await self.client.call(methods.CONTAINER_WAIT, m.ContainerName(name=name))

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a container."""
        await self.client.call(methods.CONTAINER_REMOVE, m.RemoveContainer(name=name, force=force))

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


async def collect(call: Any, stdin: bytes | None) -> Result:
    """Feed an attached call and gather what it sends."""
    if stdin is not None:
        await call.send(m.Stdin(data=stdin))
        await call.send(m.StdinEnd())
    out, err = bytearray(), bytearray()
    async for item in call:
        if isinstance(item, m.Stdout):
            out += item.data
        elif isinstance(item, m.Stderr):
            err += item.data
    reply = await call.reply()
    return Result(getattr(reply, "exit_code", None), bytes(out), bytes(err))


def starter_tar() -> bytes:
    """Return the tar of a small root file system around busybox."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder in ("bin", "etc", "tmp", "root", "proc", "sys", "dev", "home"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(info)
        with open(BUSYBOX, "rb") as file:
            _add(tar, "bin/busybox", file.read(), 0o755)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n", 0o644)
        _add(tar, "etc/group", b"root:x:0:\nuser:x:1000:\nextra:x:2000:user\n", 0o644)
        _add(tar, "etc/notes", b"not a program\n", 0o644)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    tar.addfile(info, io.BytesIO(data))


class HostBackend:
    """A node as a process, in a network namespace that lives as long as the backend."""

    def __init__(self, world: World, folder: str) -> None:
        self.world = world
        self.folder = folder
        self.more_flags: list[str] = []
        self.more_environment: dict[str, str] = {}
        self._node: subprocess.Popen[bytes] | None = None
        self._mounts_before: list[str] = []
        self._log = open(f"{folder}/node.log", "ab")  # noqa: SIM115 - closed in `close`
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()

    @property
    def enter(self) -> list[str]:
        """What runs a command in the node's network namespace, before that command."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    @property
    def pid(self) -> int:
        """The node's pid."""
        assert self._node is not None
        return self._node.pid

    def log(self) -> str:
        """Return what the node logged."""
        with open(f"{self.folder}/node.log", encoding="utf-8") as file:
            return file.read()

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._node is not None and self._node.poll() is None

    def inside(self, *argv: str) -> str:
        """Run a command in the node's network namespace."""
        command = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    async def launch(self, config: NodeConfig) -> None:
        """Start a node; its log goes to node.log."""
        if self._node is None:
            self._mounts_before = _mounts_below(self.folder)
        flags = ["--root", config.paths["root"], "--run-root", config.paths["run_root"], "--prefix", config.prefix]
        flags += ["--default-subnet", config.default_subnet, "--pool-size", str(config.pool_size)]
        flags += ["--runtime", config.runtime, "--event-loop", config.event_loop, "--shards", str(config.shards)]
        flags += ["--socket-group", config.socket_group]
        flags += self.more_flags
        if config.telemetry:
            flags += ["--telemetry", config.telemetry]
        program = "import sys; from isopod.node.main import main; sys.exit(main(sys.argv[1:]))"
        argv = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", sys.executable, "-c", program, *flags]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("src"))}
        env |= self.more_environment
        self._node = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=self._log)

    async def kill(self) -> None:
        """kill -9."""
        assert self._node is not None
        self._node.kill()
        self._node.wait(30)

    async def stop(self) -> None:
        """SIGTERM; the node must end with 0."""
        assert self._node is not None
        self._node.send_signal(signal.SIGTERM)
        code = await asyncio.get_running_loop().run_in_executor(None, self._node.wait, 60)
        assert code == 0, self.log()

    async def leaks(self, config: NodeConfig) -> Sequence[str]:
        """Look through the kernel."""
        found = [f"mount {target}" for target in self._mounts()]
        links = json.loads(self.inside("ip", "-j", "link"))
        found += [f"link {link['ifname']}" for link in links if link["ifname"] != "lo"]
        found += [f"table {line}" for line in self.inside("nft", "list", "tables").splitlines()]
        found += [f"cgroup {path}" for path in _cgroups(config.prefix)]
        found += [f"process {pid}" for pid in self._processes()]
        return found

    def close(self) -> None:
        """End the node, its containers, and its namespaces."""
        if self._node is not None and self._node.poll() is None:
            self._node.kill()
            self._node.wait(30)
        for pid in self._processes():
            for child in _children(pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.kill()
        self._holder.communicate()
        self._log.close()
        for target in sorted(self._mounts(), reverse=True):
            subprocess.run(["umount", "-l", target], check=False, capture_output=True, timeout=30)
        for path in sorted(_cgroups("isopodt"), key=len, reverse=True):
            with suppress(OSError):
                os.rmdir(path)
        shutil.rmtree(f"{self.folder}/run", ignore_errors=True)

    def _mounts(self) -> list[str]:
        """Return what is mounted below our folder and was not before the node came."""
        return [target for target in _mounts_below(self.folder) if target not in self._mounts_before]

    def _processes(self) -> list[int]:
        """Return the pids of supervisors and runtimes that work in our folder."""
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            words = _read(f"/proc/{pid}/cmdline").split("\0")
            if words and os.path.basename(words[0]) in PROGRAMS and any(word.startswith(self.folder) for word in words):
                found.append(pid)
        return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    return [int(word) for word in _read(f"/proc/{pid}/task/{pid}/children").split()]


def _mounts_below(folder: str) -> list[str]:
    return [line.split()[4] for line in _read("/proc/self/mountinfo").splitlines() if line.split()[4].startswith(folder)]


def _cgroups(prefix: str) -> list[str]:
    """Return the control groups of an instance in every hierarchy."""
    found = []
    # Below /sys/fs/cgroup lie the hierarchies of v1, or it is the only one itself.
    for top in ("/sys/fs/cgroup", *(f"/sys/fs/cgroup/{name}" for name in sorted(os.listdir("/sys/fs/cgroup")))):
        if os.path.isdir(top) and not os.path.islink(top):
            tops = [name for name in sorted(os.listdir(top)) if name.startswith(prefix)]
            found += [path for name in tops for path, _, _ in os.walk(f"{top}/{name}")]
    return found


class SimBackend:
    """A node as an owner of tasks in the simulation.

    Args:
        sim: The simulation.
        folder: A folder on its disk.
    """

    def __init__(self, sim: Any, folder: str) -> None:
        self.sim = sim
        self.world: World = sim.world
        self.folder = folder
        self._handle: Any = None
        self._node: Any = None
        self._log: list[bytes] = []

    def log(self) -> str:
        """Return what the nodes logged."""
        return b"".join(self._log).decode()

    async def launch(self, config: NodeConfig) -> None:
        """Start a node."""
        from isopod.node.node import Node, pin_of
        from isopod.node.system import NodeFacts
        from isopod.runtime.logger import Logger

        ending = asyncio.Event()

        async def serve() -> None:
            await self.world.disk.make_directory(f"{config.paths['run_root']}/ns")
            await self.world.kernel.prepare(pin_of(config))
            logger = Logger(self._log.append, self.world.clock, level="debug")
            node = Node(self.world, config, logger, NodeFacts(started_at_ns=self.world.clock.now_ns(), event_loop="sim", core="sim"))
            await node.start()
            await ending.wait()
            await node.stop("SIGTERM")

        self._ending = ending
        self._handle = self.sim.spawn_node(serve())

    def is_running(self) -> bool:
        """Whether its main task goes on."""
        return not self._handle.done()

    async def kill(self) -> None:
        """End the owner."""
        self._handle.kill()

    async def stop(self) -> None:
        """Ask it to stop and wait."""
        self._ending.set()
        await self._handle.wait()

    async def leaks(self, config: NodeConfig) -> Sequence[str]:
        """Ask the simulated kernel."""
        inventory = await self.world.kernel.inventory(config.prefix, [self.folder])
        return [f"{kind} {name}" for kind, names in inventory._asdict().items() for name in names]

    def close(self) -> None:
        """End it."""
        if self._handle is not None:
            self._handle.kill()
