"""A seeded run of three nodes under faults, watched by checks that hold at every step."""

import asyncio
import random
from contextlib import suppress
from typing import Any

from isopod.cluster.raft.ports import Applied, LeaderChanged, RaftEvent
from isopod.world.errors import IsopodError
from isopod.world.sim.fabric import LinkQuality
from tests.cluster.raft.sim_support import Running, SimNodes

FAULTS = tuple("kill power isolate one_way split hang reset slow_link slow_disk clock lossy transfer snapshot crowd".split())


class Watch:
    """One leader per term; at each index the same entry everywhere and for ever; nothing acknowledged is lost."""

    def __init__(self) -> None:
        self.leaders: dict[int, int] = {}
        self.entries: dict[int, tuple[int, bytes]] = {}
        self.acknowledged: list[bytes] = []
        self.n_events = 0
        self.n_reads = 0
        self.violations: list[str] = []

    def watch(self, running: Running) -> None:
        node_id = running.node.node_id
        running.node.subscribe(lambda event: self._on_event(node_id, event))

    def _on_event(self, node_id: int, event: RaftEvent) -> None:
        self.n_events += 1
        if isinstance(event, LeaderChanged) and event.is_self and self.leaders.setdefault(event.term, node_id) != node_id:
            self.violations.append(f"two leaders in term {event.term}: {node_id} and {self.leaders[event.term]}")
        if isinstance(event, Applied):
            seen = self.entries.setdefault(event.index, (event.term, event.data))
            if seen != (event.term, event.data):
                self.violations.append(f"node {node_id} applied another entry {event.index}")


class Chaos:
    """Drives one seed: faults come and heal, clients propose, then everything heals and all must be equal."""

    def __init__(self, seed: int, *, duration_s: float = 20.0, settings: Any = None) -> None:
        self.sim = SimNodes(seed, 3) if settings is None else SimNodes(seed, 3, settings=settings)
        self.chance = random.Random(seed)
        self.duration_s = duration_s
        self.watch = Watch()
        self.n_faults: dict[str, int] = {}
        self._n_commands = 0
        self._watched: dict[int, Running] = {}

    def run(self) -> None:
        try:
            self.sim.cluster.run(self._run())
        finally:
            self.sim.close()

    async def _run(self) -> None:
        sim = self.sim
        for host in sim.cluster.hosts:
            host.disk.faults.keeps_unsynced = True  # a power cut leaves a part of what was not synced, torn at sectors
        sim.start()
        clients = [asyncio.ensure_future(self._client(number)) for number in range(3)]
        clients += [asyncio.ensure_future(self._reader(node_id)) for node_id in (1, 2, 3)]
        watcher = asyncio.ensure_future(self._watch_new())
        ends_at = sim.loop.time() + self.duration_s
        while sim.loop.time() < ends_at:
            await asyncio.sleep(self.chance.uniform(0.1, 1.5))
            await self._fault(self.chance.choice(FAULTS))
        self._heal()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await sim.wait(lambda: len(sim.running) == 3, 60.0)
        leader = await sim.wait_leader(60.0)
        await self._finish()
        values = await sim.equal(60.0)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        missing = [command for command in self.watch.acknowledged if command not in values]
        assert not missing, f"acknowledged and lost: {missing[:5]}"
        assert len(values) == len(set(values)), "a command was applied twice"
        assert not self.watch.violations, self.watch.violations[:3]
        assert leader is not None

    async def _finish(self) -> None:
        """Liveness: with all faults healed a command goes through soon."""
        async with asyncio.timeout(60.0):
            while True:
                leader = self.sim.leader()
                if leader is not None:
                    try:
                        await leader.node.propose(b"last", timeout_s=5.0)
                    except IsopodError:
                        pass
                    else:
                        return
                await asyncio.sleep(0.05)

    async def _client(self, number: int, *, n_max: int = 1 << 30) -> None:
        for _ in range(n_max):
            await asyncio.sleep(self.chance.uniform(0.0, 0.05))
            leader = self.sim.leader()
            if leader is None:
                continue
            self._n_commands += 1
            command = b"%d-%d" % (number, self._n_commands)
            try:
                await leader.node.propose(command, timeout_s=2.0)
            except (IsopodError, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
            else:
                self.watch.acknowledged.append(command)

    async def _reader(self, node_id: int) -> None:
        """Read on one node: what was acknowledged anywhere before must be there."""
        while True:
            await asyncio.sleep(self.chance.uniform(0.0, 0.2))
            running = self.sim.running.get(node_id)
            if running is None:
                continue
            before = self.watch.acknowledged[-20:]
            try:
                await running.node.read_barrier(timeout_s=1.0)
            except (IsopodError, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                continue
            seen = running.machine.values()[-2000:]
            self.watch.n_reads += 1
            if any(command not in seen for command in before):
                self.watch.violations.append(f"a stale read on node {node_id}")

    async def _watch_new(self) -> None:
        while True:
            for node_id, running in self.sim.running.items():
                if self._watched.get(node_id) is not running:
                    self._watched[node_id] = running
                    self.watch.watch(running)
            await asyncio.sleep(0.001)

    async def _fault(self, kind: str) -> None:
        sim = self.sim
        self.n_faults[kind] = self.n_faults.get(kind, 0) + 1
        node_id = self.chance.choice((1, 2, 3))
        host, other = sim.host(node_id), sim.host(1 + node_id % 3)
        pause_s = self.chance.uniform(0.05, 2.5)
        if kind in {"kill", "power"}:
            if node_id in sim.handles:
                (sim.kill if kind == "kill" else sim.power_cut)(node_id)
                await asyncio.sleep(pause_s)
                sim.start(node_id)
            return
        match kind:
            case "lossy":
                host.failpoints.set("network.before_send", "20%error")
                other.failpoints.set("raft.before_send", "10%error")
            case "transfer" | "snapshot":
                await self._operate(kind)
                return
            case "crowd":
                await asyncio.gather(*(self._client(10 + number, n_max=50) for number in range(10)))
                return
            case "isolate":
                sim.fabric.isolate(host)
            case "one_way":
                sim.fabric.cut(host, other)
            case "split":
                sim.fabric.partition([[host], [other]])
            case "reset":
                sim.fabric.reset(host, other)
            case "slow_link":
                sim.fabric.set_link(host, other, LinkQuality(latency_s=(0.001, 0.08), loss=0.1))
            case "hang":
                if node_id in sim.handles:
                    sim.handles[node_id].hang()
            case "slow_disk":
                host.disk.faults.delay_s = (0.01, 0.1)
            case "clock":
                host.clock.step_ns(self.chance.randrange(-3600, 3600) * 1_000_000_000)
        await asyncio.sleep(pause_s)
        self._heal()

    async def _operate(self, kind: str) -> None:
        leader = self.sim.leader()
        with suppress(IsopodError, asyncio.CancelledError):
            if leader is not None and kind == "transfer":
                await leader.node.transfer_leadership(timeout_s=1.0)
            elif leader is not None:
                await leader.node.make_snapshot()

    def _heal(self) -> None:
        sim = self.sim
        sim.fabric.heal()
        sim.fabric.set_all(LinkQuality())
        for handle in sim.handles.values():
            if handle.is_hung:
                handle.resume()
        for host in sim.cluster.hosts:
            host.disk.faults.delay_s = (0.0, 0.0)
            host.failpoints.clear()
