"""Real nodes: the installed `isopod node` as the README starts it, each in a network namespace of its own, and what is done to them.

A rig outlives one test, since forming a cluster takes seconds; `restore` undoes every fault and starts what is not there any more.
Questions are asked on the nodes' own sockets, which no partition between nodes reaches.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from isopod.api.cluster import STATUS, ClusterStatus, StatusRequest
from isopod.net.rpc import connect
from isopod.testing import wait_for_condition_with_backoff
from isopod.wire.service import Method
from isopod.world.errors import IsopodError
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.real import lab
from tests.cluster.real.lab import HUB, Lab

Q = TypeVar("Q")
R = TypeVar("R")
PORT: Final = 7000
SECRET: Final = "a-secret-of-these-tests-0123456789"
ROOT: Final = Path(__file__).parents[3]
PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; "
    "sys.exit(main(sys.argv[2:], site_packages=sys.argv[1]))"
)
COMMAND: Final = (sys.executable, "-I", "-S", "-c", PROGRAM, str(ROOT / "src"), str(Path(msgspec.__file__).parents[1]))
"""The installed command, which is an isolated interpreter that is told where the packages are; of this source, wherever it is tested."""
READY_S: Final = 60.0
ASK_S: Final = 2.0
Condition = Callable[[], bool | Awaitable[bool]]
PROXY_LINES: Final = (b"ready\n", b"done\n")


class Node:
    """One node: its process, its folder, its faults."""

    def __init__(self, rig: "Rig", number: int) -> None:
        self.number = number
        self.folder: Final = rig.folder / f"n{number}"
        self.folder.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.n_starts = 0
        self._rig = rig
        self._is_paused = False

    @property
    def socket(self) -> str:
        """Where it serves its users."""
        return self._rig.lab.path(self.number, self.folder / "isopod.sock")

    @property
    def is_running(self) -> bool:
        """Whether there is a process, stopped or not."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it, for the first time or again: always the same line."""
        argv = [*COMMAND, "node", "--role", "control", "--id", str(self.number), "--bind", f"{lab.address(self.number)}:{PORT}"]
        argv += [*self._rig.advertise(self.number), "--data-dir", str(self.folder), *self._rig.words(self.number)]
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "ISOPOD_CLUSTER_TOKEN": SECRET}
        with open(self._rig.folder / f"n{self.number}.log", "ab") as log:
            self.process = subprocess.Popen(self._rig.lab.argv(self.number, argv), stdin=subprocess.DEVNULL, stderr=log, env=env)
        self.n_starts += 1

    def kill(self) -> None:
        """Kill it, as `kill -9` does."""
        if self.process is not None:
            lab.end(self.process)
        self._is_paused = False

    def pause(self) -> None:
        """Stop its process; it hears and says nothing, and does not know."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self._is_paused = True

    def resume(self) -> None:
        """Let it go on; also if it does."""
        if self._is_paused and self.process is not None:
            self.process.send_signal(signal.SIGCONT)
        self._is_paused = False

    def log(self) -> str:
        """Return what it logged."""
        return (self._rig.folder / f"n{self.number}.log").read_text(errors="replace")


class Rig:
    """A cluster of real nodes. `close` when done.

    Args:
        n: How many.
        small_disks_mb: The size of each node's own file system; 0 for folders on the machine's.
        proxied: Whether nodes reach each other through a proxy that can be told to hold back what passes.
    """

    def __init__(self, n: int = 3, *, small_disks_mb: int = 0, proxied: bool = False) -> None:
        self.folder: Final = Path(os.path.realpath(tempfile.mkdtemp(prefix="isopod-real-")))
        self.nodes: Final[dict[int, Node]] = {}
        self._proxied = proxied
        self._proxy: subprocess.Popen[bytes] | None = None
        self._small_disks_mb = small_disks_mb
        self.spare: Node | None = None
        """One more, which is not started and belongs to nothing."""
        try:
            self.lab: Final = Lab(n + 1)
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        try:
            for number in range(1, n + 1):
                self.nodes[number] = Node(self, number)
                if small_disks_mb:
                    self.lab.mount_small_disk(number, self.nodes[number].folder, small_disks_mb)
            self.spare = Node(self, n + 1)
            if proxied:
                self._start_proxy()
            for node in self.nodes.values():
                node.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill what runs, and leave nothing."""
        for node in (*self.nodes.values(), self.spare):
            if node is not None:
                node.kill()
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.communicate()
        self.lab.close()
        shutil.rmtree(self.folder)

    # --- the line -----------------------------------------------------------------------------------------------------

    def words(self, number: int) -> list[str]:
        """Return the part of the line that is the same for all; the spare one joins the first."""
        where = lab.proxy_address if self._proxied else lab.address
        if number not in self.nodes:
            return ["--join", f"{where(1)}:{PORT}"]
        return [word for number in self.nodes for word in ("--peer", f"{number}:{where(number)}:{PORT}")] if len(self.nodes) > 1 else []

    def advertise(self, number: int) -> list[str]:
        """Return what a node says of where it is reached, if that is elsewhere."""
        return ["--advertise", f"{lab.proxy_address(number)}:{PORT}"] if self._proxied else []

    # --- looking ------------------------------------------------------------------------------------------------------

    async def status(self, world: World, number: int) -> ClusterStatus | None:
        """Return what a node says of the cluster, None if it does not answer."""
        node = self.nodes.get(number, self.spare)
        assert node is not None
        if not node.is_running:
            return None
        try:
            return await self.ask(world, node, STATUS, StatusRequest())
        except IsopodError:
            return None

    async def ask(self, world: World, node: Node, method: Method[Q, R], request: Q, *, timeout_s: float = ASK_S) -> R:
        """Ask a node on its socket. Raises what it answers, or that it does not."""
        client = await connect(world, UnixAddress(node.socket), timeout_s=ASK_S)
        try:
            return await client.call(method, request, timeout_s=timeout_s)
        finally:
            await client.close()

    async def statuses(self, world: World, numbers: Sequence[int] = ()) -> list[ClusterStatus | None]:
        """Return what nodes say, all of them unless told otherwise."""
        return await asyncio.gather(*(self.status(world, number) for number in numbers or self.nodes))

    async def leader_of(self, world: World, numbers: Sequence[int] = ()) -> int:
        """Return the leader that these nodes agree on and that is one of them, 0 if there is none."""
        found = await self.statuses(world, numbers)
        said = {(each.leader_id, each.term) if each is not None else (0, 0) for each in found}
        leader = next(iter(said))[0] if len(said) == 1 else 0
        return leader if leader in (numbers or tuple(self.nodes)) else 0

    async def wait_leader(self, world: World, numbers: Sequence[int] = (), *, not_node: int = 0, timeout_s: float = 30.0) -> int:
        """Wait until these nodes agree on a leader among them, and return it."""
        found = 0

        async def is_led() -> bool:
            nonlocal found
            found = await self.leader_of(world, numbers)
            return found not in {0, not_node}

        await self.until(is_led, f"nodes {tuple(numbers or self.nodes)} have a leader", timeout_s)
        return found

    async def wait_ready(self, world: World) -> int:
        """Wait until all nodes run, vote and agree; return the leader."""
        voters = tuple(self.nodes)

        async def is_ready() -> bool:
            found = await self.statuses(world)
            return all(each is not None and each.voters == voters for each in found)

        await self.until(is_ready, "all nodes vote", READY_S)
        return await self.wait_leader(world, timeout_s=READY_S)

    async def wait_equal(self, world: World) -> ClusterStatus:
        """Wait until all nodes have applied the same, and return what one of them says; their digests are equal then.

        Raises:
            AssertionError: At one index two digests differ.
        """
        found: list[ClusterStatus] = []

        async def is_equal() -> bool:
            nonlocal found
            found = [each for each in await self.statuses(world) if each is not None]
            return len(found) == len(self.nodes) and len({(each.applied, each.leader_id) for each in found}) == 1

        await self.until(is_equal, "all nodes have applied the same", READY_S)
        assert len({each.digest for each in found}) == 1, found
        return found[0]

    async def until(self, condition: Condition, what: str, timeout_s: float) -> None:
        """Wait for a condition, with the nodes' last words if it does not come."""
        try:
            await wait_for_condition_with_backoff(condition, what=what, timeout_s=timeout_s, pause_s=0.02, pause_s_max=0.2)
        except AssertionError as error:
            logs = "".join(f"--- node {node.number}\n{node.log()[-3000:]}" for node in self.nodes.values())
            raise AssertionError(f"{error}\n{logs}") from None

    # --- undoing ------------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Undo every fault, and start what does not run."""
        for node in self.nodes.values():
            node.resume()
            self.lab.heal(node.number)
            if self._small_disks_mb:
                self.lab.make_room(node.number, node.folder)
            if not node.is_running:
                node.start()
        if self._proxied:
            self.proxy("delay 0 0")

    # --- the proxy ----------------------------------------------------------------------------------------------------

    def proxy(self, command: str) -> None:
        """Tell the proxy what to do; it does when this returns."""
        assert self._proxy is not None
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(command.encode() + b"\n")
        self._proxy.stdin.flush()
        self._expect(PROXY_LINES[1])

    def _start_proxy(self) -> None:
        routes = [f"{lab.proxy_address(number)}:{PORT}={lab.address(number)}:{PORT}" for number in self.nodes]
        argv = self.lab.argv(HUB, [sys.executable, "-m", "tests.cluster.real.proxy", *routes])
        # From where it can be imported: entering a namespace of mounts goes to its root.
        argv[argv.index("--") : argv.index("--")] = [f"--wd={ROOT}"]
        with open(self.folder / "proxy.log", "ab") as log:
            self._proxy = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
        self._expect(PROXY_LINES[0])

    def _expect(self, line: bytes) -> None:
        assert self._proxy is not None
        assert self._proxy.stdout is not None
        said = self._proxy.stdout.readline()
        assert said == line, (said, (self.folder / "proxy.log").read_text())
