"""Damage: bits that rot and writes that land elsewhere, on a minority of the nodes, and the operator who puts it right.

What must hold: a node whose journal is damaged refuses to start and names the record's place; it never takes part with a part of what it
knew. So the damage is of the kind that can be seen: a bit of something written, or a write that is missing while later ones are there. A
disk that loses the very last write without a trace is what nobody promises to survive: if power fails right after a misdirected write, the
disk is replaced before the node starts again.

The operator does what the manual says. `isopod journal repair`, if it says that nothing is lost; else the node is taken out on another
member, its folder is set aside, and it joins anew under another id, as a learner first.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from isopod.journal.folder import CURRENT as CURRENT_NAME
from isopod.journal.repair import plan, repair
from isopod.testing.plan import Step
from isopod.testing.rig import FOLDER, RESTART_S, Rig, RigNode
from isopod.testing.waiting import ConditionNotMet, wait_for_condition_with_backoff
from isopod.world.errors import CorruptError, IsopodError, JournalDamaged, NotFound
from isopod.world.world import World

LOG: Final = f"{FOLDER}/raft/log"
CURRENT: Final = f"{LOG}/{CURRENT_NAME}"
VOTERS_MIN: Final = 3
READ_BYTES: Final = 1 << 20
HIT_S: Final = 1.0
"""A node that writes nothing for so long is not hit; another one is, later."""
SEAL_S: Final = 60.0
SEALING_WRITES: Final = 3
"""Later writes that must be durable until a missing one shows."""
NEXT_ID: Final = 100
LEAVE_S: Final = 5.0
RETRY_S: Final = 0.3

_T = TypeVar("_T")
_Order = Callable[[World], Coroutine[Any, Any, _T]]


class Damage:
    """Damages disks and looks after those who refuse to start with them.

    Args:
        rig: On what.
        later: Undoes a fault after its time: given the step and what to do.
        count: Counts a fault that has happened.
        again: Tries a fault once more, later.
    """

    def __init__(
        self,
        rig: Rig,
        *,
        later: Callable[[Step, Callable[[], None]], None],
        count: Callable[[Step], None],
        again: Callable[[Step], None],
    ) -> None:
        self._rig = rig
        self._later = later
        self._count = count
        self._again = again
        rig.mend = self.mend

    # -- faults ----------------------------------------------------------------------------------------------------------------------

    def bit_rot(self, step: Step) -> bool:
        """Flip a bit of a node's journal; its process is killed later, if it has not ended before."""
        node = self._victim(step.node)
        n_bytes = 0 if node is None else _written_bytes(node)
        if node is None or not n_bytes:
            return False
        place = min(n_bytes - 1, int(step.amount * n_bytes))
        node.host.disk.faults.bit_rot(CURRENT, offset=place, n_bytes=1)
        node.wounds.append(f"bit rot at byte {place}")
        node.excuses["damage"] = RESTART_S
        self._later(step, lambda: self._kill(node))
        return True

    def misdirect(self, step: Step) -> bool:
        """Have a node's next write land elsewhere. Counted when it did; tried again with another node if this one writes nothing."""
        node = self._victim(step.node)
        if node is None or node.stray_from is not None:
            return False
        node.stray_from = node.n_strays
        node.host.disk.faults.misdirect_next()
        self._rig.tasks.append(self._rig.loop.create_task(self._see_it_land(node, step)))
        return True

    @property
    def is_possible(self) -> bool:
        """Whether there can be a minority to damage."""
        return self._rig.n_first >= VOTERS_MIN

    @property
    def is_under_way(self) -> bool:
        """Whether a write is still to land elsewhere, or to be missed, or somebody is being replaced."""
        return any(node.stray_from is not None or node.is_in_repair for node in self._rig.nodes)

    def end(self) -> None:
        """Nothing more lands elsewhere; what has landed shows by a loss of power as soon as it can."""
        for node in self._rig.nodes:
            if node.stray_from is not None and not node.has_stray:
                self._aim_well(node)

    def _aim_well(self, node: RigNode) -> None:
        node.host.disk.faults.misdirect_next(times=-1)
        node.stray_from = None

    async def _see_it_land(self, node: RigNode, step: Step) -> None:
        before = node.n_strays
        landed = await self._comes(lambda: node.has_stray or node.stray_from is None, HIT_S)
        if not landed:
            self._aim_well(node)
        if node.n_strays == before:
            self._again(step)
            return
        self._count(step)
        if node.stray_from is None:
            return  # power failed at once, and the disk was replaced
        node.wounds.append("misdirected write")
        node.excuses["damage"] = RESTART_S
        durable = self._rig.watch.n_durable
        sealed_at = durable.get(node.id, 0) + SEALING_WRITES
        await self._comes(lambda: node.stray_from is None or durable.get(node.id, 0) >= sealed_at, SEAL_S)
        if node.stray_from is not None:
            node.stray_from = None
            self._later(step, lambda: self._cut_power(node))

    async def _comes(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        try:
            await wait_for_condition_with_backoff(condition, what="a write", timeout_s=timeout_s, pause_s_max=0.02)
        except ConditionNotMet:
            return False
        return True

    def _victim(self, number: int) -> RigNode | None:
        """Return a node that runs and may be damaged: one that is already, or one more while they are a minority of the voters."""
        rig = self._rig
        wounded = [node for node in rig.nodes if node.wounds or node.is_in_repair or node.stray_from is not None]
        if wounded:
            return next((node for node in wounded if node.is_member and node.is_running), None)
        leader = rig.leader()
        if leader is None or leader.node is None or any(node.is_leaving and not node.is_gone for node in rig.nodes):
            return None
        voters = leader.node.status().voters
        if len(voters) < VOTERS_MIN or any(node.id not in voters for node in rig.nodes[: rig.n_first] if not node.is_gone):
            return None
        fit = [node for node in rig.nodes if node.is_member and node.is_running and not node.is_leaving and node.id in voters]
        wanted = leader if number == 0 else rig.nodes[min(number, len(rig.nodes)) - 1]
        return wanted if wanted in fit else fit[0] if fit else None

    def _kill(self, node: RigNode) -> None:
        if not node.is_in_repair:
            node.kill()
            node.boot_later(RESTART_S)

    def _cut_power(self, node: RigNode) -> None:
        if not node.is_in_repair:
            node.lose_power(RESTART_S)

    # -- the operator ----------------------------------------------------------------------------------------------------------------

    def mend(self, node: RigNode, error: CorruptError | None) -> None:
        """Look after a node that refused to start, or whose disk is known to have lost something (no error)."""
        node.is_in_repair = True
        if node.stray_from is not None and not node.has_stray:
            self._aim_well(node)  # the next node on this disk must not be hit unseen
        node.stray_from = None
        coverage = self._rig.watch.coverage
        if error is None:
            coverage.count("event", "disk replaced unseen")
        else:
            coverage.count("event", "damage refused")
            self._look_at_refusal(node, error)
        self._rig.tasks.append(self._rig.loop.create_task(self._look_after(node, error)))

    def _look_at_refusal(self, node: RigNode, error: CorruptError) -> None:
        """The operator must be told what to do, and of a journal where it is damaged: the file, and the place in it."""
        is_placed = not isinstance(error, JournalDamaged) or (error.path.startswith(FOLDER) and f"at byte {error.offset}" in error.message)
        if not is_placed or not error.hint:
            self._rig.watch.invariants.report("damage is named", f"node {node.id} says {type(error).__name__}: {error.message}")

    async def _look_after(self, node: RigNode, error: CorruptError | None) -> None:
        try:
            await self._put_right(node, error)
        except Exception as failure:  # noqa: BLE001  a task's root
            self._rig.watch.invariants.report("no failure unseen", f"the operator of node {node.id}: {failure!r}")

    async def _put_right(self, node: RigNode, error: CorruptError | None) -> None:
        rig = self._rig
        if isinstance(error, JournalDamaged) and await self._on_machine(node, self._try_repair):
            rig.watch.coverage.count("event", "journal repaired")
            rig.watch.note(f"node {node.id}: its journal is repaired")
        else:
            await self._take_out(node)
            await self._on_machine(node, _set_aside)
            rig.watch.invariants.on_wiped(node.id)
            rig.watch.coverage.count("event", "node replaced")
            rig.watch.note(f"node {node.id}: its folder is set aside, it joins anew")
            node.id += NEXT_ID  # no id is used twice: a log from the beginning on would tell it that it votes
            node.config = node.config._replace(node_id=node.id, peers=(), join=rig.addresses(but=node), token="")
        node.wounds.clear()
        node.excuses.pop("damage", None)
        node.is_in_repair = False
        node.boot()

    async def _try_repair(self, world: World) -> bool:
        """Repair a journal if that loses nothing."""
        if not self._rig.tampering.repairs_always:
            try:
                made = await plan(world, LOG)
            except CorruptError:
                return False  # there is nothing to keep
            if made.way == "nothing" or made.lost_lsns is not None:
                return False
        await repair(world, LOG)
        return True

    async def _take_out(self, node: RigNode) -> None:
        """Have another member remove the node, however long that takes."""
        rig = self._rig
        while True:
            others = [each for each in rig.nodes if each is not node and each.node is not None and each.is_member and each.is_running]
            asked = rig.leader() or (others[0] if others else None)
            if asked is not None and asked.node is not None:
                try:
                    async with asyncio.timeout(2 * LEAVE_S):
                        await asked.inside(asked.node.members.leave(node.id, timeout_s=LEAVE_S))
                    return
                except NotFound:
                    return
                except (IsopodError, TimeoutError, ConditionNotMet) as error:
                    rig.watch.note(f"node {node.id} cannot be taken out yet: {error}")
            await asyncio.sleep(RETRY_S)

    async def _on_machine(self, node: RigNode, order: "_Order[_T]") -> _T:
        """Run something on a node's machine, again until it was done: power may fail meanwhile."""
        while True:
            node.host.power_on()
            handle = node.host.spawn_node(order(node.host.world), name="operator")
            try:
                return await handle.wait()
            except asyncio.CancelledError:
                _raise_if_cancelled()  # else it was the machine that lost power
            except (IsopodError, OSError) as error:
                self._rig.watch.note(f"node {node.id}'s operator: {error}")
            await asyncio.sleep(RETRY_S)


def _raise_if_cancelled() -> None:
    """Go on with a cancellation that is for this task, and not of something that it waited for."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _set_aside(world: World) -> None:
    """Move a node's folder away, durably."""
    disk = world.disk
    parent, _, name = FOLDER.rpartition("/")
    if await disk.stat(FOLDER) is not None:
        n_before = sum(each.startswith(f"{name}.damaged") for each in await disk.list(parent))
        await disk.rename(FOLDER, f"{FOLDER}.damaged{n_before + 1}")
    await disk.sync_directory(parent)


def _written_bytes(node: RigNode) -> int:
    """Return how many bytes of a node's journal are written: what is behind them is reserved."""
    try:
        content = node.host.disk.view.open_file(CURRENT).content
    except OSError:
        return 0
    n_bytes = offset = 0
    while chunk := content.read(offset, READ_BYTES).rstrip(b"\0"):
        n_bytes = offset + len(chunk)
        offset += READ_BYTES
    return n_bytes
