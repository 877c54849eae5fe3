"""Recovery: a new cluster made of what one stopped node holds, when more than half of the voters are lost for good.

    1. the replica is copied aside and opened there as if its node were the only voter: everything in its log counts as decided
    2. what that leaves is written into a new replica, of a new cluster: new id, new incarnation, new authority
    3. the old files are moved into FOLDER/before-CLUSTER, the new ones into their place

What the other voters had agreed on and this one never received is lost; nothing tells how much that is, and the report says so. What this
one received but nobody may have decided counts as decided. No node of the old cluster can talk to the new one: another id, another
authority. So none of them can bring old decisions back, and none must be trusted to be really gone.

Before step 3 nothing of the old is touched; step 3 is begun by a marker, and a crash within it leaves a folder that refuses to start until
`recover` is called once more, which finishes it. Leases are not kept: what hung on one is there without it, as in a backup.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from isopod.cluster.members.backup import is_own, make_backup, read_backup, replace_all
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.credentials import FOLDER as TLS
from isopod.cluster.members.credentials import Bearer, Credentials
from isopod.cluster.members.identity import (
    FILE,
    INCARNATION_BYTES,
    LOCK,
    RECOVERED,
    Identity,
    IdentityFile,
    new_cluster_id,
    read_identity,
    write_identity,
)
from isopod.cluster.members.records import ClusterRecord, MemberRecord
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.replica import FOLDER as RAFT
from isopod.cluster.members.replica import MachineSource
from isopod.cluster.members.roster import Roster
from isopod.cluster.raft.core import ConfState, CoreConfig, RaftCore, open_core
from isopod.cluster.raft.memory import MemoryNetwork
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.store.machine import StoreMachine
from isopod.cluster.store.replica import Replica, ReplicaSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry as Metrics
from isopod.world.errors import NotFound, WrongState, from_os_error
from isopod.world.world import World

COPY: Final = "recovering"
PEERS: Final = "peers.json"
LEAD_S: Final = 30.0
MOVED: Final = (RAFT, TLS, PEERS)
"""Moved before the identity: a folder without one of them refuses to start, a folder without identity beside them too."""


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a recovery does, or did."""

    folder: str
    node_id: int
    old_cluster_id: str
    new_cluster_id: str
    """"" if nothing was done."""
    voters: tuple[int, ...]
    """Of the old cluster, as far as this node knows."""
    index: int
    """The last entry of its log."""
    undecided: int
    """Entries at its end of which this node does not know whether they were decided; they count as decided."""
    revision: int
    n_keys: int
    kept_in: str
    """Where the old files are, or would be."""

    def as_json(self) -> str:
        """Return it as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def as_text(self) -> str:
        """Return it as a person reads it."""
        others = ", ".join(str(node_id) for node_id in self.voters if node_id != self.node_id) or "none"
        facts = [
            f"folder: {self.folder} (node {self.node_id} of cluster {self.old_cluster_id})",
            f"its replica: {self.n_keys} keys at revision {self.revision}, log up to entry {self.index}",
            f"counted as decided: {self.undecided} entries of which this node does not know it",
            f"other voters it knows: {others}",
        ]
        if self.new_cluster_id:
            done = [
                f"done: cluster {self.new_cluster_id} is node {self.node_id} alone; start it as before",
                f"the old files are in {self.kept_in}",
                "the old nodes are refused from now on: empty their data folders, and join them with a new token",
            ]
            return "".join(line + "\n" for line in (*facts, *done))
        plan = [
            "this would make a new cluster of this node alone. LOST would be what the others agreed on and this node never received.",
            f"the old files would be kept in {self.kept_in}; no node of the old cluster would be let in any more",
            "first make sure that no quorum of the old cluster can come back, and that no other node has a longer log (run this there too)",
            "to do it: the same command with --yes",
        ]
        return "".join(line + "\n" for line in (*facts, *plan))


class LonelyCore:
    """A core that stays the only voter, whatever its log says about members. Everything else goes to the real one."""

    def __init__(self, core: RaftCore, own_id: int) -> None:
        self._core = core
        self._conf = ConfState(voters=(own_id,))

    def __getattr__(self, name: str) -> Any:  # whatever the core has
        return getattr(self._core, name)

    def apply_conf_change(self, _: bytes) -> ConfState:
        """Change nothing."""
        return self._conf


async def recover(world: World, folder: str, *, do_it: bool, logger: Logger, metrics: Metrics) -> RecoveryReport:
    """Recover a cluster from one node's folder.

    Args:
        world: The ports.
        folder: The node's data folder; no node may use it.
        do_it: False only looks.
        logger: Where the replica reports.
        metrics: Where it counts.

    Raises:
        AlreadyServing: A node uses the folder.
        NotFound: There is no replica in it.
        CorruptError: The replica is damaged.
        UnavailableError: The disk failed.
    """
    identity = await _find_identity(world, folder)
    file = await IdentityFile.open(world, folder, identity.node_id) if await world.disk.stat(f"{folder}/{FILE}") is not None else None
    try:
        try:
            if await world.disk.stat(f"{folder}/{RECOVERED}/{FILE}") is not None:
                return await _finish(world, folder)
            return await _recover(world, folder, identity, do_it=do_it, logger=logger, metrics=metrics)
        except OSError as error:
            raise from_os_error(error, "recover the replica in", folder) from error
    finally:
        if file is not None:
            file.close()


async def _find_identity(world: World, folder: str) -> Identity:
    ready = await read_identity(world, f"{folder}/{RECOVERED}")
    found = ready if ready is not None else await read_identity(world, folder)
    if found is None or not found.cluster_id:
        raise NotFound("replica in", folder, "name the data folder of a node of a cluster: what --data-dir said")
    return found


async def _recover(world: World, folder: str, identity: Identity, *, do_it: bool, logger: Logger, metrics: Metrics) -> RecoveryReport:
    if not await world.disk.list(f"{folder}/{RAFT}"):
        raise NotFound("replica in", folder, "this node holds none: an agent, or one whose disk was wiped")
    copy = f"{folder}/{COPY}"
    await world.disk.remove_tree(copy)
    try:
        await _copy_tree(world, f"{folder}/{RAFT}", f"{copy}/{RAFT}")
        report, backup, own = await _read_alone(world, folder, identity, logger=logger, metrics=metrics)
        if not do_it:
            return report
        made = await _make_new(world, f"{copy}/{RECOVERED}", report, (backup, own), logger=logger, metrics=metrics)
        await write_identity(world, f"{copy}/{RECOVERED}", made)
        await world.disk.rename(f"{copy}/{RECOVERED}", f"{folder}/{RECOVERED}")
        await world.disk.sync_directory(folder)
        await _move(world, folder, identity.cluster_id)
        return msgspec.structs.replace(report, new_cluster_id=made.cluster_id)
    finally:
        await world.disk.remove_tree(copy)


async def _read_alone(
    world: World, folder: str, identity: Identity, *, logger: Logger, metrics: Metrics
) -> tuple[RecoveryReport, bytes, tuple[MemberRecord | None, ClusterRecord | None]]:
    """Open the copy as its only voter; return what it holds."""
    machine = StoreMachine()

    def alone(config: CoreConfig) -> RaftCore:
        lonely: Any = LonelyCore(open_core(config._replace(conf_state=ConfState(voters=(identity.node_id,)))), identity.node_id)
        core: RaftCore = lonely
        return core

    raft = await _open(world, f"{folder}/{COPY}/{RAFT}", identity, machine, make=alone, logger=logger, metrics=metrics)
    before = raft.status(with_digest=False)
    await raft.start()
    try:
        await raft.wait_leader(timeout_s=LEAD_S)
        await raft.wait_applied(before.last_index, timeout_s=LEAD_S)
        data, info = make_backup(machine, identity.cluster_id, world.clock.now_ns())
    finally:
        await raft.close(hand_over=False)
    entries = machine.keys.entries
    known = Registry(MachineSource(machine), logger)
    report = RecoveryReport(
        folder=folder,
        node_id=identity.node_id,
        old_cluster_id=identity.cluster_id,
        new_cluster_id="",
        voters=tuple(sorted(node_id for node_id, record in known.members.items() if record.role == "voter")),
        index=before.last_index,
        undecided=max(0, before.last_index - before.commit),
        revision=info.revision,
        n_keys=sum(1 for key in entries if not is_own(key)),
        kept_in=f"{folder}/before-{identity.cluster_id}",
    )
    return report, data, (known.members.get(identity.node_id), known.cluster)


async def _make_new(
    world: World,
    folder: str,
    report: RecoveryReport,
    found: tuple[bytes, tuple[MemberRecord | None, ClusterRecord | None]],
    *,
    logger: Logger,
    metrics: Metrics,
) -> Identity:
    """Write the new cluster's files; return its identity."""
    data, (member, cluster) = found
    now_ns = world.clock.now_ns()
    made = Identity(
        node_id=report.node_id,
        incarnation=world.random.token_hex(INCARNATION_BYTES),
        phase="member",
        cluster_id=new_cluster_id(world),
    )
    await world.disk.make_directory(folder)
    if await world.disk.stat(f"{report.folder}/{TLS}") is not None:
        bearer = Bearer(made.cluster_id, "voter", made.node_id, made.incarnation)
        defaults = ClusterConfig(data_dir=folder)
        await Credentials(world, folder, "tls").found(bearer, valid_s=defaults.certificate_s)
    machine = StoreMachine()
    raft = await _open(world, f"{folder}/{RAFT}", made, machine, make=open_core, logger=logger, metrics=metrics, bootstrap=[made.node_id])
    await raft.start()
    store = Replica(world, raft, machine, peers=None, logger=logger, metrics=metrics, settings=ReplicaSettings(check_s=0.0))
    try:
        await raft.wait_leader(timeout_s=LEAD_S)
        await replace_all(store, machine, read_backup(data))
        voters_max = cluster.voters_max if cluster is not None else 5
        new_cluster = ClusterRecord(
            cluster_id=made.cluster_id, founded_at_ns=now_ns, voters_max=voters_max, recovered_from=report.old_cluster_id
        )
        new_member = MemberRecord(
            node_id=made.node_id,
            incarnation=made.incarnation,
            address=member.address if member is not None else "",
            role="voter",
            joined_at_ns=now_ns,
        )
        await Roster(world, store, Registry(MachineSource(machine), logger)).found(new_cluster, new_member, None)
        await raft.make_snapshot()
    finally:
        await store.close()
        await raft.close(hand_over=False)
    return made


async def _finish(world: World, folder: str) -> RecoveryReport:
    """Go on with a recovery that was interrupted while its files were moved."""
    made = await read_identity(world, f"{folder}/{RECOVERED}")
    assert made is not None
    before = [name for name in await world.disk.list(folder) if name.startswith("before-")]
    old = await read_identity(world, folder) if await world.disk.stat(f"{folder}/{FILE}") is not None else None
    old_id = old.cluster_id if old is not None else before[-1].removeprefix("before-") if before else ""
    if not old_id:
        raise WrongState(
            "recovery in", folder, "begun by somebody else", "finish it", hint=f"move {folder}/{RECOVERED}/* into its place by hand"
        )
    await _move(world, folder, old_id)
    return RecoveryReport(
        folder=folder,
        node_id=made.node_id,
        old_cluster_id=old_id,
        new_cluster_id=made.cluster_id,
        voters=(),
        index=0,
        undecided=0,
        revision=0,
        n_keys=0,
        kept_in=f"{folder}/before-{old_id}",
    )


async def _move(world: World, folder: str, old_id: str) -> None:
    """Move the old files away and the new ones into their place, the identity last in both."""
    disk = world.disk
    kept, ready = f"{folder}/before-{old_id}", f"{folder}/{RECOVERED}"
    await disk.make_directory(kept)
    ready_names = await disk.list(ready)
    for name in (*MOVED, FILE):
        is_old = await disk.stat(f"{folder}/{name}") is not None and await disk.stat(f"{kept}/{name}") is None
        if is_old and (name in ready_names or name == PEERS):
            await disk.rename(f"{folder}/{name}", f"{kept}/{name}")
    await disk.sync_directory(kept)
    for name in (*MOVED, FILE):
        if name in ready_names:
            await disk.rename(f"{ready}/{name}", f"{folder}/{name}")
    await disk.sync_directory(folder)
    await disk.remove_tree(ready)


async def _copy_tree(world: World, source: str, target: str) -> None:
    disk = world.disk
    await disk.make_directory(target)
    for name in await disk.list(source):
        found = await disk.stat(f"{source}/{name}")
        if found is None or name == LOCK:
            continue
        if found.is_directory:
            await _copy_tree(world, f"{source}/{name}", f"{target}/{name}")
        else:
            await disk.copy_file(f"{source}/{name}", f"{target}/{name}", mode=found.mode & 0o777)


async def _open(
    world: World,
    folder: str,
    identity: Identity,
    machine: StoreMachine,
    *,
    make: Callable[[CoreConfig], RaftCore],
    logger: Logger,
    metrics: Metrics,
    bootstrap: Sequence[int] | None = None,
) -> RaftNode:
    return await RaftNode.open(
        world,
        folder,
        node_id=identity.node_id,
        cluster_id=identity.cluster_id,
        machine=machine,
        transport=MemoryNetwork().transport(),
        settings=RaftSettings(),
        bootstrap=bootstrap,
        logger=logger,
        metrics=metrics,
        incarnation=identity.incarnation,
        open_core=make,
    )
