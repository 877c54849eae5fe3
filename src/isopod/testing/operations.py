"""Operations of the cluster itself, as an administrator would begin them: hand-over, snapshot, growing, leaving.

They may be refused (no leader, another change under way, too few voters): that is no violation. What they must not do is break anything.
"""

from collections.abc import Callable, Coroutine
from typing import Final

from isopod.testing.rig import PORT, Rig, RigNode
from isopod.testing.waiting import ConditionNotMet, wait_for_condition_with_backoff
from isopod.world.errors import IsopodError, NotFound

NODES_ADDED_MAX: Final = 4
VOTERS_LEFT_MIN: Final = 3
TIMEOUT_S: Final = 5.0
JOIN_S: Final = 20.0


class Operations:
    """Begins operations and counts how they end.

    Args:
        rig: On what.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._n_added = 0
        self._do: dict[str, Callable[[RigNode], Coroutine[None, None, None]]] = {
            "transfer": self._transfer,
            "compact": self._compact,
            "grow": self._grow,
            "leave": self._leave,
        }

    def begin(self, what: str, number: int) -> bool:
        """Begin an operation on a node (0: the leader); return whether it could be begun."""
        rig = self._rig
        asked = rig.nodes[number - 1] if 0 < number <= len(rig.nodes) else rig.leader()
        if asked is None or asked.is_gone or asked.node is None:
            asked = next((node for node in rig.nodes if node.node is not None and not node.is_gone), None)
        if asked is None or (what == "grow" and self._n_added >= NODES_ADDED_MAX):
            return False
        node = asked
        rig.tasks.append(rig.loop.create_task(self._try(what, self._do[what](node))))
        return True

    async def _try(self, what: str, coro: Coroutine[None, None, None]) -> None:
        watch = self._rig.watch
        try:
            await coro
        except (IsopodError, ConditionNotMet) as error:
            watch.coverage.count("event", f"{what} refused")
            watch.note(f"{what}: {error}")
        else:
            watch.coverage.count("event", f"{what} done")

    async def _transfer(self, node: RigNode) -> None:
        """Hand leadership to a node; asked of whoever leads."""
        leader = self._rig.leader()
        if leader is None or leader.node is None:
            raise ConditionNotMet("nobody leads")
        to = 0 if leader is node else node.id
        await leader.inside(leader.node.members.transfer(to, timeout_s=TIMEOUT_S))

    async def _compact(self, node: RigNode) -> None:
        """Make a snapshot, which drops the log that it covers but for what followers may still need."""
        assert node.node is not None
        await node.inside(node.node.raft.make_snapshot())

    async def _grow(self, _node: RigNode) -> None:
        """Start one more node, which joins by the others and votes as soon as it has caught up."""
        rig = self._rig
        self._n_added += 1
        host = rig.cluster.add_host()
        join = tuple(f"{each.host.address}:{PORT}" for each in rig.nodes if not each.is_gone)
        new = rig.add(len(rig.cluster.hosts), host, join=join)
        new.boot()
        await wait_for_condition_with_backoff(lambda: new.is_member, what=f"node {new.id} joined", timeout_s=JOIN_S, pause_s_max=0.1)

    async def _leave(self, node: RigNode) -> None:
        """Take a node out for good, if enough others stay; asked of another node."""
        rig = self._rig
        staying = [each for each in rig.nodes if each is not node and not each.is_gone and each.node is not None]
        known = [each for each in rig.nodes[: rig.n_first] if each is not node and not each.is_leaving]
        is_whole = not any(each.wounds or each.is_in_repair or each.stray_from is not None for each in rig.nodes)
        if len(staying) < VOTERS_LEFT_MIN or not known or not is_whole:
            raise ConditionNotMet("too few would stay, or none that clients know")
        asked = next((each for each in staying if each.is_member and each.is_running), None)
        if asked is None or asked.node is None:
            raise ConditionNotMet("nobody is there to be asked")
        node.is_leaving = True
        try:
            await asked.inside(asked.node.members.leave(node.id, timeout_s=TIMEOUT_S))
        except NotFound:
            node.is_leaving = False  # it was about to join
            raise
        node.is_gone = True
        rig.watch.note(f"node {node.id} has left")
        node.kill()
