"""Faults: what each action of a plan does to a rig, and how it ends.

Each fault is undone by itself after its time, and all of them at the end of a run's first phase (`end_all`). Faults of one kind that
overlap do not end each other. A fault that would have no effect (killing what does not run) is not counted.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from isopod.testing.damage import Damage
from isopod.testing.operations import Operations
from isopod.testing.plan import Step
from isopod.testing.rig import PORT, RESTART_S, Rig, RigNode
from isopod.testing.waiting import wait_for_condition_with_backoff
from isopod.world.network import TcpAddress
from isopod.world.sim.fabric import LinkQuality

_GOOD: Final = LinkQuality()
_GARBAGE_BYTES: Final = 4096
TRIES_MAX: Final = 60
RETRY_S: Final = 0.1
LATE_S: Final = 30.0
DAMAGE: Final = ("bit_rot", "misdirect")
DAMAGE_TRIES_MAX: Final = 120
"""One damaged node is replaced before another one is damaged, which takes some seconds."""


class Faults:
    """Carries out the faults of a plan.

    Args:
        rig: On what.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._operations = Operations(rig)
        self._damage = Damage(rig, later=self._later, count=self._count, again=self._try_later)
        self._cuts: dict[tuple[str, str], int] = {}
        self._n_slow = 0
        self._n_started = 0
        self._is_over = False
        self._left: list[Step] = []
        self._endings: dict[int, tuple[asyncio.TimerHandle, Callable[[], None]]] = {}
        self._chance = rig.cluster.random.stream("faults")
        self._do: dict[str, Callable[[Step], bool]] = {
            "kill": self._kill,
            "hang": self._hang,
            "power_cut": self._power_cut,
            "blackout": self._blackout,
            "isolate": self._isolate,
            "split": self._split,
            "one_way": self._one_way,
            "reset": self._reset,
            "garbage": self._garbage,
            "slow_link": self._slow_link,
            "sync_error": self._sync_error,
            "slow_disk": self._slow_disk,
            "full_disk": self._full_disk,
            "bit_rot": self._damage.bit_rot,
            "misdirect": self._damage.misdirect,
            "crash_point": self._crash_point,
            "clock_step": self._clock_step,
            "clock_drift": self._clock_drift,
            "transfer": self._transfer,
            "compact": self._compact,
            "grow": self._grow,
            "leave": self._leave,
        }

    def begin(self, step: Step, n_tries: int | None = None) -> None:
        """Let a fault happen now; if there is nothing it could happen to (no node runs), a little later."""
        if n_tries is None:
            n_tries = DAMAGE_TRIES_MAX if step.do in DAMAGE else TRIES_MAX
        if self._do[step.do](step):
            self._rig.watch.note(f"fault {step.do} node {step.node} peer {step.peer} lasts {step.lasts_ms} ms, {step.amount:g} {step.text}")
            if step.do != "misdirect":
                self._count(step)
        elif n_tries > 1:
            self._try_later(step, n_tries - 1)
        elif step.do in DAMAGE:
            self._leave_for_later(step)

    def _count(self, step: Step) -> None:
        self._rig.watch.coverage.count("fault", step.do)
        self._rig.watch.coverage.count("fault class", step.kind)

    def _try_later(self, step: Step, n_tries: int = DAMAGE_TRIES_MAX) -> None:
        self._rig.loop.call_later(RETRY_S, self._again, step, n_tries)

    def _again(self, step: Step, n_tries: int) -> None:
        if not self._is_over:
            self.begin(step, n_tries)
        elif step.do in DAMAGE:
            self._leave_for_later(step)

    def _leave_for_later(self, step: Step) -> None:
        if self._damage.is_possible:
            self._left.append(step)

    async def catch_up(self, busy: Callable[[], None]) -> bool:
        """Have a damage happen that found no time for it: somebody was being replaced all along. Only of kinds that did not happen at all.

        Args:
            busy: Has something written.

        Returns:
            Whether there was any.

        Raises:
            ConditionNotMet: It did not happen, or who was damaged did not come back.
        """
        seen = self._rig.watch.coverage
        left = {step.do: step for step in reversed(self._left) if not seen.get("fault", step.do)}
        for step in left.values():
            await self._make_happen(step, busy)
        return bool(left)

    async def _make_happen(self, step: Step, busy: Callable[[], None]) -> None:
        await self._until(lambda: self._do[step.do](step))
        if step.do != "misdirect":
            self._count(step)
        await self._until(lambda: self._rig.watch.coverage.get("fault", step.do) > 0, busy)
        await self._until(lambda: not self._damage.is_under_way, busy)

    async def _until(self, condition: Callable[[], bool], busy: Callable[[], None] = lambda: None) -> None:
        def met() -> bool:
            busy()
            return condition()

        await wait_for_condition_with_backoff(met, what="the damage", timeout_s=LATE_S, pause_s_max=RETRY_S)

    def end_all(self) -> None:
        """Undo whatever lasts: the network is whole, disks and clocks are good, nothing hangs."""
        self._is_over = True
        self._damage.end()
        endings, self._endings = self._endings, {}
        for timer, undo in endings.values():
            timer.cancel()
            undo()
        for node in self._rig.nodes:
            node.host.failpoints.clear()

    def _later(self, step: Step, undo: Callable[[], None]) -> None:
        """Undo a fault when its time is over."""
        self._n_started += 1
        number = self._n_started

        def end() -> None:
            del self._endings[number]
            undo()

        if self._is_over:
            undo()
        else:
            self._endings[number] = (self._rig.loop.call_later(step.lasts_ms / 1000, end), undo)

    def _node(self, number: int) -> RigNode | None:
        """Return the node of a step, 0 is the leader; if it is not there another one: a fault of a plan should happen."""
        rig = self._rig
        found = rig.leader() if number == 0 else rig.nodes[number - 1] if number <= len(rig.nodes) else None
        if found is None or found.is_gone:
            left = [node for node in rig.nodes if not node.is_gone]
            found = next((node for node in left if node.is_running), left[0] if left else None)
        return found

    def _running(self, number: int) -> RigNode | None:
        """Return a node that runs: the one that was asked for, else the next one."""
        first = self._node(number)
        if first is not None and first.is_running:
            return first
        nodes = self._rig.nodes
        start = max(0, number - 1)
        return next((node for node in (*nodes[start:], *nodes[:start]) if node.is_running), None)

    # -- processes and power -----------------------------------------------------------------------------------------------------------

    def _kill(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None:
            return False
        node.kill()
        node.boot_later(step.lasts_ms / 1000)
        return True

    def _hang(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None or node.handle is None or node.handle.is_hung:
            return False
        handle = node.handle
        handle.hang()
        self._later(step, handle.resume)
        return True

    def _power_cut(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None:
            return False
        node.lose_power(step.lasts_ms / 1000)
        return True

    def _blackout(self, step: Step) -> bool:
        for node in self._rig.nodes:
            if not node.is_gone:
                node.lose_power(step.lasts_ms / 1000)
        return True

    def _crash_point(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None:
            return False
        node.host.failpoints.set(step.text, f"nth({max(1, int(step.amount))}):panic")
        node.excuses["failpoint"] = step.lasts_ms / 1000
        self._later(step, lambda: self._forgive(node, step.text))
        return True

    def _forgive(self, node: RigNode, point: str) -> None:
        node.host.failpoints.set(point, "off")
        if not node.host.failpoints.armed_names():
            node.excuses.pop("failpoint", None)

    # -- network -------------------------------------------------------------------------------------------------------------------------

    def _names(self, *, with_clients: bool) -> list[str]:
        nodes = [node.host.name for node in self._rig.nodes]
        return [*nodes, self._rig.client_host.name] if with_clients else nodes

    def _cut(self, step: Step, pairs: list[tuple[str, str]]) -> bool:
        fabric = self._rig.cluster.fabric
        for pair in pairs:
            self._cuts[pair] = self._cuts.get(pair, 0) + 1
            fabric.cut(*pair)
        self._later(step, lambda: self._mend(pairs))
        return bool(pairs)

    def _mend(self, pairs: list[tuple[str, str]]) -> None:
        fabric = self._rig.cluster.fabric
        for pair in pairs:
            self._cuts[pair] -= 1
        for a, b in dict.fromkeys(tuple(sorted(pair)) for pair in pairs):
            left = [pair for pair in ((a, b), (b, a)) if self._cuts.get(pair)]
            fabric.heal(a, b)
            for pair in left:
                fabric.cut(*pair)

    def _isolate(self, step: Step) -> bool:
        node = self._node(step.node)
        if node is None:
            return False
        own = node.host.name
        self._rig.watch.coverage.count("event", "leader isolated" if node is self._rig.leader() else "follower isolated")
        return self._cut(
            step, [pair for other in self._names(with_clients=step.amount >= 1) if other != own for pair in ((own, other), (other, own))]
        )

    def _split(self, step: Step) -> bool:
        names = [node.host.name for node in self._rig.nodes]
        left, right = names[: step.node], names[step.node :]
        return self._cut(step, [pair for a in left for b in right for pair in ((a, b), (b, a))])

    def _one_way(self, step: Step) -> bool:
        node, peer = self._pair(step)
        return self._cut(step, [(node.host.name, peer.host.name)])

    def _reset(self, step: Step) -> bool:
        """Reset the connections of two nodes; if there are none, those of the first pair that has some."""
        first, second = self._pair(step)
        names = [node.host.name for node in self._rig.nodes]
        pairs = [(first.host.name, second.host.name), *((a, b) for a in names for b in names if a < b)]
        return any(self._rig.cluster.fabric.reset(a, b) > 0 for a, b in pairs)

    def _pair(self, step: Step) -> tuple[RigNode, RigNode]:
        """Return two different nodes, those of the step if they are."""
        nodes = self._rig.nodes
        first = self._node(step.node) or nodes[0]
        second = self._node(step.peer)
        if second is None or second is first:
            second = nodes[(nodes.index(first) + 1) % len(nodes)]
        return first, second

    def _slow_link(self, step: Step) -> bool:
        share = step.amount
        quality = LinkQuality((0.0002, 0.002 + 0.1 * share), loss=share / 2, duplication=share / 2, reordering=share / 2)
        self._n_slow += 1
        self._rig.cluster.fabric.set_all(quality)
        self._later(step, self._fast_link)
        return True

    def _fast_link(self) -> None:
        self._n_slow -= 1
        if not self._n_slow:
            self._rig.cluster.fabric.set_all(_GOOD)

    def _garbage(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None:
            return False
        data = b"\xff\xff\xff\xff" + self._chance.randbytes(_GARBAGE_BYTES)
        self._rig.client_host.spawn_node(self._talk_nonsense(node, data), name="stranger")
        return True

    async def _talk_nonsense(self, node: RigNode, data: bytes) -> None:
        try:
            transport, _ = await self._rig.client_host.world.network.connect(TcpAddress(node.host.address, PORT), asyncio.Protocol)
        except OSError:
            return
        assert isinstance(transport, asyncio.Transport)
        transport.write(data)
        await asyncio.sleep(1.0)
        transport.abort()

    # -- disks and clocks ----------------------------------------------------------------------------------------------------------------

    def _sync_error(self, step: Step) -> bool:
        node = self._running(step.node)
        if node is None:
            return False
        node.excuses["sync error"] = step.lasts_ms / 1000  # until it has happened
        node.n_sync_errors += 1
        node.host.disk.faults.fail_next("sync")
        return True

    def _slow_disk(self, step: Step) -> bool:
        node = self._node(step.node)
        if node is None:
            return False
        faults = node.host.disk.faults
        faults.delay_s = (0.0, step.amount)
        self._later(step, lambda: setattr(faults, "delay_s", (0.0, 0.0)))
        return True

    def _full_disk(self, step: Step) -> bool:
        node = self._node(step.node)
        if node is None:
            return False
        disk = node.host.disk
        capacity = disk.capacity_bytes
        node.excuses["full disk"] = RESTART_S
        disk.capacity_bytes = disk.used_bytes

        def free() -> None:
            disk.capacity_bytes = max(capacity, disk.capacity_bytes)
            node.excuses.pop("full disk", None)

        self._later(step, free)
        return True

    def _clock_step(self, step: Step) -> bool:
        node = self._node(step.node)
        if node is None:
            return False
        node.host.clock.step_ns(round(step.amount * 1e9))
        return True

    def _clock_drift(self, step: Step) -> bool:
        node = self._node(step.node)
        if node is None:
            return False
        node.host.clock.drift_ppm = step.amount
        self._later(step, lambda: setattr(node.host.clock, "drift_ppm", 0.0))
        return True

    # -- the cluster's own operations ----------------------------------------------------------------------------------------------------

    def _transfer(self, step: Step) -> bool:
        return self._operations.begin("transfer", step.node)

    def _compact(self, step: Step) -> bool:
        return self._operations.begin("compact", step.node)

    def _grow(self, _step: Step) -> bool:
        return self._operations.begin("grow", 0)

    def _leave(self, step: Step) -> bool:
        return self._operations.begin("leave", step.node)
