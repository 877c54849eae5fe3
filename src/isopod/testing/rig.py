"""Rig: a cluster of real nodes on simulated machines, and how one of them is started, killed, and started again.

The nodes are `isopod.cluster.member.ClusterNode`, the same that `isopod node` runs; only the World under them is simulated, and the parts
through which `isopod.testing.observe` looks are handed in. A node is a process on its machine. When it ends by itself and no fault explains
it, that is a violation; when one does (a failed flush ends a node, as it must), it is started again later.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple, TypeVar

from isopod.cluster.member import ClusterNode, ClusterParts
from isopod.cluster.members.config import ClusterConfig, PeerSpec
from isopod.cluster.raft.core import CoreConfig, RaftCore, open_core
from isopod.cluster.raft.ports import StateMachine
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.store.machine import StoreMachine
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.testing.observe import ObservedCore, ObservedMachine, Watch
from isopod.testing.waiting import ConditionNotMet
from isopod.world.errors import CorruptError
from isopod.world.sim.cluster import SimCluster
from isopod.world.sim.sim_host import NodeHandle, SimHost
from isopod.world.world import World

_T = TypeVar("_T")
PORT: Final = 7000
FOLDER: Final = "/var/lib/isopod/cluster"
SECRET: Final = "simulated-cluster-secret-0001"  # noqa: S105  simulated
RESTART_S: Final = 0.5


def _same_core(core: RaftCore, _config: CoreConfig) -> RaftCore:
    return core


def _same_config(config: CoreConfig) -> CoreConfig:
    return config


def _same_world(world: World) -> World:
    return world


def _store_machine(_world: World) -> StateMachine:
    return StoreMachine()


class Tampering(NamedTuple):
    """Where a test may put something broken between a node and its parts, to see whether the checkers find it. Nothing by default.

    Args:
        world: Wraps a machine's World.
        core_config: Changes what a core is opened with.
        core: Wraps a core; what it hides is seen by the checkers, who look below it.
        machine: Makes the state machine of a machine's World.
        parts: Changes the remaining parts.
        repairs_always: Whether the operator repairs a damaged journal whatever that loses.
    """

    world: Callable[[World], World] = _same_world
    core_config: Callable[[CoreConfig], CoreConfig] = _same_config
    core: Callable[[RaftCore, CoreConfig], RaftCore] = _same_core
    machine: Callable[[World], StateMachine] = _store_machine
    parts: Callable[[ClusterParts], ClusterParts] = lambda parts: parts
    repairs_always: bool = False


class RigNode:
    """One node: its machine, its process if it runs, and the object inside.

    Args:
        rig: Whose.
        node_id: Its id.
        host: Its machine.
        config: What it is told at every start.
    """

    def __init__(self, rig: "Rig", node_id: int, host: SimHost, config: ClusterConfig) -> None:
        self.rig = rig
        self.id = node_id
        self.host: Final = host
        self.config = config
        self.handle: NodeHandle[None] | None = None
        self.node: ClusterNode | None = None
        self.machine: ObservedMachine | None = None
        self.excuses: dict[str, float] = {}
        """Faults that may end the process, and after how many seconds it is started again."""
        self.n_sync_errors = 0
        """How many flushes were told to fail."""
        self.is_leaving = False
        """Whether it was asked to leave: then it may be told that it is no member any more."""
        self.is_gone = False
        """Whether it left the cluster for good."""
        self.wounds: list[str] = []
        """What its disk keeps damaged."""
        self.stray_from: int | None = None
        """While its next write is to land elsewhere, and until enough was written after it: how many had before."""
        self.is_in_repair = False
        """Whether the operator has it."""
        self._restart: asyncio.TimerHandle | None = None
        self._context = contextvars.copy_context()

    @property
    def is_member(self) -> bool:
        """Whether it says that it is a member."""
        return self.node is not None and self.is_running and self.node.status().state in ("leader", "follower", "learner")

    @property
    def is_running(self) -> bool:
        """Whether its process lives (also if it hangs)."""
        return self.handle is not None and self.handle.is_alive

    @property
    def n_strays(self) -> int:
        """How many of its writes have landed elsewhere."""
        return self.host.disk.faults.counts.get("misdirected", 0)

    @property
    def has_stray(self) -> bool:
        """Whether a write is missing that nothing written later would show to be missing."""
        return self.stray_from is not None and self.n_strays > self.stray_from

    def lose_power(self, back_s: float) -> None:
        """Lose power now, and boot in a while; if the disk would come back as one that forgot without a trace, it is replaced before."""
        has_stray = self.has_stray
        self.host.power_off()
        if has_stray and not self.is_in_repair:
            self.rig.mend(self, None)
        else:
            self.boot_later(back_s)

    def boot(self) -> None:
        """Start its process, unless it runs, is gone, or the operator has it."""
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self.is_running or self.is_gone or self.is_in_repair:
            return
        self.node = None
        self.host.power_on()
        self.rig.watch.note(f"node {self.id} boots")
        self.handle = self.host.spawn_node(self._live(), name=f"node{self.id}")
        self.rig.tasks.append(self.rig.loop.create_task(self._look_after(self.handle)))

    def boot_later(self, seconds: float) -> None:
        """Start its process in a while; a later call replaces an earlier one."""
        if self._restart is not None:
            self._restart.cancel()
        self._restart = self.rig.loop.call_later(seconds, self.boot)

    def kill(self) -> None:
        """End its process at once."""
        if self.handle is not None:
            self.rig.watch.note(f"node {self.id} is killed")
            self.handle.kill()

    async def _live(self) -> None:
        """Be the node: what runs inside its process."""
        tampering = self.rig.tampering
        world = tampering.world(self.host.world)
        logger = Logger(self.rig.log, clock=world.clock, level="warning")
        node = ClusterNode(world, self.config, logger, Registry(), parts=tampering.parts(self._parts()))
        self._context = contextvars.copy_context()
        await node.start()
        self.node = node
        await node.failed

    async def inside(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do something as the node's own process: by its machine's clock, and only as long as it lives.

        Raises:
            ConditionNotMet: It was killed meanwhile.
        """
        try:
            return await self.rig.loop.create_task(work, context=self._context)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ConditionNotMet(f"node {self.id} was killed") from None

    def _parts(self) -> ClusterParts:
        tampering, watch = self.rig.tampering, self.rig.watch

        def core(config: CoreConfig) -> RaftCore:
            changed = tampering.core_config(config)
            return tampering.core(ObservedCore(open_core(changed), changed, watch), changed)

        def machine() -> StateMachine:
            self.machine = ObservedMachine(tampering.machine(self.host.world), self.id, watch)
            return self.machine

        return ClusterParts(open_core=core, machine=machine)

    async def _look_after(self, handle: NodeHandle[None]) -> None:
        """See the process end; say so if nothing explains it, and start it again if something does."""
        why = ""
        try:
            await handle.wait()
        except asyncio.CancelledError:
            why = handle.aborted or ""
            if not why:
                if self.handle is handle:
                    self.node = None
                return  # killed: whoever did it starts it again
        except CorruptError as error:
            if self.wounds:
                self.node = None
                self.rig.watch.note(f"node {self.id} refused: {error}")
                self.rig.mend(self, error)
                return
            why = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001  whatever ends a node is looked at
            why = f"{type(error).__name__}: {error}"
        else:
            why = "it ended by itself"
        self.node = None
        self.rig.node_ended(self, why)


class Rig:
    """All nodes of a run. Use `close` at the end.

    Args:
        seed: Decides everything.
        n_nodes: Voters.
        watch: Where everything is reported.
        raft: Settings of Raft.
        tampering: What is broken on purpose.
        n_events_max: Bound on the loop's steps.
    """

    def __init__(
        self,
        seed: int,
        n_nodes: int,
        watch: Watch,
        *,
        raft: RaftSettings,
        tampering: Tampering = Tampering(),  # noqa: B008  an immutable tuple
        n_events_max: int,
    ) -> None:
        self.cluster: Final = SimCluster(seed, n_nodes + 1, n_events_max=n_events_max)
        self.loop: Final = self.cluster.loop
        self.watch = watch
        self.tampering = tampering
        self.tasks: list[asyncio.Task[None]] = []
        self.client_host: Final = self.cluster.hosts[n_nodes]
        self.n_first: Final = n_nodes
        """The first so many nodes are those that clients know."""
        self.nodes: list[RigNode] = []
        self.mend: Callable[[RigNode, CorruptError | None], None] = self._nobody_mends
        """Takes a node that refused to start because of damage, or whose disk lost something without a trace (no error)."""
        self._raft = raft
        self._reported: dict[tuple[int, str], None] = {}
        peers = tuple(PeerSpec(number + 1, f"{host.address}:{PORT}") for number, host in enumerate(self.cluster.hosts[:n_nodes]))
        for number in range(n_nodes):
            self.add(number + 1, self.cluster.hosts[number], peers=peers, token=SECRET if n_nodes > 1 else "")

    def add(self, node_id: int, host: SimHost, *, peers: tuple[PeerSpec, ...] = (), token: str = "", join: tuple[str, ...] = ()) -> RigNode:
        """Add a node, which is not started yet: a first one with its `peers`, or one that will `join` by members."""
        config = ClusterConfig(
            data_dir=FOLDER,
            node_id=node_id,
            bind=f"{host.address}:{PORT}",
            peers=peers,
            join=join,
            token=token,
            security="plaintext",
            voters_max=7,
            raft=self._raft,
        )
        host.disk.faults.keeps_unsynced = True
        node = RigNode(self, node_id, host, config)
        self.nodes.append(node)
        return node

    def log(self, line: bytes) -> None:
        """Take a line of a node's log."""
        self.watch.note(line.decode("utf-8", "replace").rstrip())

    def node_ended(self, node: RigNode, why: str) -> None:
        """A node's process ended by itself."""
        self.watch.note(f"node {node.id} ended: {why}")
        if node.is_leaving and "IdentityConflict" in why:
            node.is_gone = True
            return
        pause_s = max(node.excuses.values(), default=RESTART_S)
        if node.excuses and "panicked" not in why:
            if node.host.disk.faults.counts.get("sync_error", 0) >= node.n_sync_errors:
                node.excuses.pop("sync error", None)
            self.watch.coverage.count("event", "node ended itself")
        elif (node.id, why) not in self._reported:
            self._reported[node.id, why] = None
            self.watch.invariants.report("no node ends by itself", f"node {node.id}: {why}")
        node.boot_later(pause_s)

    def _nobody_mends(self, node: RigNode, error: CorruptError | None) -> None:
        self.watch.invariants.report("no node ends by itself", f"node {node.id}: {error}")

    def addresses(self, *, but: RigNode | None = None) -> tuple[str, ...]:
        """Return where all nodes listen that have not left, without one of them."""
        return tuple(f"{node.host.address}:{PORT}" for node in self.nodes if node is not but and not node.is_gone)

    def leader(self) -> RigNode | None:
        """Return the node that leads the newest term among those that run and answer."""
        found: RigNode | None = None
        newest = 0
        for node in self.nodes:
            if node.node is not None and node.is_running and node.handle is not None and not node.handle.is_hung:
                status = node.node.status()
                if status.state == "leader" and status.term > newest:
                    found, newest = node, status.term
        return found

    def has_formed(self) -> bool:
        """Return whether every node is a member and one of them leads."""
        return self.leader() is not None and all(node.node is not None and node.is_member for node in self.nodes)

    def boot_all(self) -> None:
        """Start every node that does not run."""
        for node in self.nodes:
            node.boot()

    def agree(self) -> bool:
        """Return whether all members have applied the same index, which is all that is committed, and those of the beginning vote."""
        self._see_who_left()
        leader = self.leader()
        voters = leader.node.status().voters if leader is not None and leader.node is not None else ()
        if any(node.id not in voters for node in self.nodes[: self.n_first] if not node.is_gone):
            return False  # one that came back after damage has not caught up
        statuses = [node.node.status() if node.node is not None else None for node in self.nodes if not node.is_gone]
        return None not in statuses and len({status.applied for status in statuses if status is not None}) == 1

    def _see_who_left(self) -> None:
        """Take note of nodes that were asked to leave, and whose removal took longer than the one who asked."""
        leader = self.leader()
        if leader is None or leader.node is None:
            return
        status = leader.node.status()
        for node in self.nodes:
            if node.is_leaving and not node.is_gone and node.id not in (*status.voters, *status.learners):
                node.is_gone = True
                node.kill()

    def look_at_states(self) -> None:
        """Tell the checkers the state of every member."""
        for node in self.nodes:
            if node.machine is not None and node.is_running:
                node.machine.look()

    def stop_looking(self) -> None:
        """Nothing that ends from now on is a violation."""
        for task in self.tasks:
            task.cancel()

    def describe(self) -> str:
        """Return the state of every node in a few words."""
        words = []
        for node in self.nodes:
            if node.node is None:
                words.append(f"node {node.id}: {'starting' if node.is_running else 'down'}")
            else:
                status = node.node.status()
                where = f"term {status.term} commit {status.commit} applied {status.applied}"
                words.append(f"node {node.id}: {status.state} {where} {status.why}".rstrip())
        return "; ".join(words)
