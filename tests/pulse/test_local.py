"""LocalSource: an isopod node's containers and machines, as pods and figures, whatever becomes of the node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api import usage as u
from isopod.net.rpc import Server
from isopod.pulse.local import LocalSource, figures_of, pod_of
from isopod.pulse.model import Container, LocalContainer, Pod
from isopod.pulse.pods import wanted
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.wire.service import Method
from isopod.world.errors import BugError
from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.node.rig import IMAGE, Rig
from tests.node.vms import sim_rig
from tests.pulse.sources import Running

LIMIT_S = 60.0
RECORD = m.Container(
    id="c" * 64,
    name="web",
    created_at_ns=5,
    updated_at_ns=6,
    image="nginx",
    image_id="i",
    command=("x",),
    working_dir="/",
    user="",
    hostname="web",
    labels={"app": "shop", "tier": "front"},
    status="running",
    started_at_ns=7,
    network=m.Endpoint(network="none"),
)


class Watched(Running):
    """A source, what it told and what it logged."""

    def __init__(self, world: World, socket: str, **told: Any) -> None:
        self.pods: list[dict[str, Pod]] = []
        self.figures: list[tuple[LocalContainer, ...]] = []
        self.log: list[bytes] = []
        told = {"on_pods": self.pods.append, "on_containers": self.figures.append, "interval_s": 0.3, "call_s": 20.0, **told}
        self.source: LocalSource = LocalSource(world, socket, logger=Logger(self.log.append, world.clock, level="debug"), **told)

    def names(self) -> list[str]:
        """Return what runs, as it was told last."""
        return sorted(pod.name for pod in self.pods[-1].values()) if self.pods else []

    def measured(self) -> dict[str, LocalContainer]:
        return {each.pod.name: each for each in self.figures[-1]} if self.figures else {}


# --- a whole node ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("K10", "K17")
async def test_containers_are_pods_and_have_figures(rig: Rig) -> None:
    async with rig:
        watched = Watched(rig.world, rig.config.paths["socket"], pod_labels=("app",))
        async with watched.running():
            await watched.until(lambda: watched.pods == [{}])
            resources = m.Resources(memory_bytes_max=64 << 20, cpus=0.5, pids_max=20)
            record = await rig.run_detached("sleep", "1000", name="web", labels={"app": "shop", "x": "y"}, resources=resources)
            await rig.run_detached("sleep", "1000", name="db")
            await watched.until(lambda: watched.names() == ["db", "web"] and sorted(watched.measured()) == ["db", "web"])
            pod = watched.pods[-1][record.id]
            assert pod._replace(created_ns=0) == Pod(
                record.id,
                "web",
                "isopod",
                source="isopod",
                runtime_handler="container",
                labels=(("app", "shop"),),
                containers=(Container(record.id, "web", IMAGE),),
            )
            found = watched.measured()["web"]
            assert (found.id, found.pod) == (record.id, pod)
            assert (found.memory_limit_bytes, found.cpus, found.processes_max) == (64 << 20, 0.5, 20)
            assert found.started_ns >= pod.created_ns > 0
            assert found.n_processes >= 1
            assert found.memory_bytes > 0
            assert found.cpu_s >= 0
            assert found.details is not None
            assert found.details.working_set_bytes > 0
            assert found.details.n_oom_kills == 0
            assert found.interfaces == (), "it has loopback only"


async def test_a_container_on_a_network_has_its_interface(rig: Rig) -> None:
    async with rig:
        watched = Watched(rig.world, rig.config.paths["socket"])
        async with watched.running():
            await rig.run_detached("sleep", "1000", name="web", network="bridge")
            await watched.until(lambda: "web" in watched.measured() and watched.measured()["web"].interfaces)
            assert [each.name for each in watched.measured()["web"].interfaces] == ["eth0"]


@pytest.mark.host
@pytest.mark.slow
async def test_what_a_container_did_is_counted(host_rig: Rig) -> None:
    """Processor's time under a limit, a disk, packets: against what it was made to do."""
    script = "dd if=/dev/zero of=/big bs=1M count=8 conv=fsync; ping -c 3 -i 0.1 10.88.0.1; while true; do true; done"
    async with host_rig as rig:
        watched = Watched(rig.world, rig.config.paths["socket"])
        async with watched.running():
            limits = m.Resources(cpus=0.2, memory_bytes_max=64 << 20)
            await rig.run_detached("sh", "-c", script, name="busy", network="bridge", resources=limits)

            def done() -> bool:
                found = watched.measured().get("busy")
                return found is not None and found.details is not None and found.details.throttled_s > 0.5

            await watched.until(done)
            found = watched.measured()["busy"]
            assert found.details is not None
            assert 0 < found.details.n_throttled_periods <= found.details.n_periods
            assert found.cpu_s > 0
            assert found.details.cache_bytes >= 8 << 20
            assert found.interfaces[0].sent_packets >= 3
            assert found.interfaces[0].sent_bytes >= 3 * 84
            if _counts_disks():
                assert sum(device.written_bytes for device in found.devices) >= 8 << 20


def _counts_disks() -> bool:
    """Whether this kernel's control groups count what goes to disks: newer ones do not on v1 before a limit is set on a disk."""
    files = [*Path("/sys/fs/cgroup/blkio").glob("blkio.throttle.io_serviced*"), *Path("/sys/fs/cgroup").glob("io.stat")]
    return any(path.read_text().count("\n") > 1 for path in files)


@pytest.mark.row("K10", "T11")
async def test_what_ends_or_is_removed_is_gone_at_once(rig: Rig) -> None:
    async with rig:
        watched = Watched(rig.world, rig.config.paths["socket"], interval_s=3600.0)
        async with watched.running():
            await watched.until(lambda: watched.pods == [{}])
            await rig.run_detached("sleep", "1000", name="one")
            await rig.run_detached("sleep", "1000", name="two")
            await watched.until(lambda: watched.names() == ["one", "two"])
            await rig.remove("one", force=True)
            await watched.until(lambda: watched.names() == ["two"])
            await rig.client.call(methods.CONTAINER_KILL, m.KillContainer(name="two"))
            await watched.until(lambda: watched.names() == [] and watched.measured() == {})


@pytest.mark.row("K10", "K17")
async def test_a_node_that_is_killed_and_comes_back_loses_nothing(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="web")
        watched = Watched(rig.world, rig.config.paths["socket"])
        async with watched.running():
            await watched.until(lambda: watched.names() == ["web"] and "web" in watched.measured())
            n_pods = len(watched.pods)
            await rig.kill()
            await watched.until(lambda: watched.source.statistics().state != "known")
            await watched.until(lambda: watched.source.statistics().n_failed >= 2)
            assert watched.source.statistics().n_pods == 1
            await rig.start()
            await watched.until(lambda: watched.source.statistics().state == "known")
            assert watched.pods[n_pods:] == [], "nothing changed, so nothing is told"
            assert "web" in watched.measured()
            await rig.remove("web", force=True)
            await watched.until(lambda: watched.names() == [])
    assert not any(b'"local.bug"' in line for line in watched.log)


@pytest.mark.row("K10")
async def test_machines_are_pods_too(sim_world: SimWorld, folder: str) -> None:
    async with sim_rig(sim_world, folder) as rig:
        watched = Watched(rig.world, rig.config.paths["socket"])
        async with watched.running():
            record = await rig.run_detached("sleep", "1000", name="machine")
            await watched.until(lambda: "machine" in watched.measured())
            assert watched.pods[-1][record.id].runtime_handler == "vm"
            assert watched.pods[-1][record.id].containers == (Container(record.id, "machine", IMAGE),)


async def test_a_node_that_is_not_there_is_looked_for(world: World, folder: str) -> None:
    watched = Watched(world, f"{folder}/none.sock")
    async with watched.running():
        await watched.until(lambda: watched.source.statistics().n_failed >= 3)
    assert watched.source.statistics().state == "away"
    assert watched.source.statistics().errors == {"not_started": watched.source.statistics().n_failed}
    assert sum(b'"local.failed"' in line for line in watched.log) == 1, "it is said once"
    assert watched.pods == []


# --- a node that misbehaves -----------------------------------------------------------------------------------------------


class FakeNode:
    """The three verbs that are asked for."""

    def __init__(self, world: World, socket: str) -> None:
        self.records: list[m.Container] = [RECORD]
        self.usage: list[u.ContainerUsage] = [u.ContainerUsage(id=RECORD.id, name="web", status="running", memory_bytes=1, cpu_ns=10**9)]
        self.hung: tuple[str, ...] = ()
        self.broken: tuple[str, ...] = ()
        self.n_events = 0
        self.end = asyncio.Event()
        self._world = world
        self._address = UnixAddress(socket)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        handlers: dict[Method[Any, Any], Any] = {
            methods.CONTAINER_EVENTS: self.events,
            methods.CONTAINER_LIST: self.list,
            methods.CONTAINER_STATS: self.stats,
        }
        server = Server(self._world, handlers, logger=Logger(lambda line: None, self._world.clock), metrics=Registry())
        await server.listen(self._address)
        try:
            yield
        finally:
            await server.close()

    async def events(self, call: Any, request: m.EventsRequest) -> m.Empty:
        await self._behave("events")
        await call.send(m.Cursor(position=0))
        for i in range(self.n_events):
            await call.send(m.Event(kind="status", id="x", name="x", at_ns=i))
            await asyncio.sleep(0.001)
        await self.end.wait()
        return m.Empty()

    async def list(self, call: Any, request: m.ListContainers) -> m.ContainerList:
        await self._behave("list")
        return m.ContainerList(containers=tuple(self.records))

    async def stats(self, call: Any, request: u.StatsRequest) -> u.UsageList:
        await self._behave("stats")
        return u.UsageList(containers=tuple(self.usage))

    async def _behave(self, verb: str) -> None:
        if verb in self.hung:
            await asyncio.Event().wait()
        if verb in self.broken:
            raise BugError("a fault of the node")


@pytest.fixture
def fake(world: World, folder: str) -> FakeNode:
    return FakeNode(world, f"{folder}/node.sock")


@pytest.mark.row("K17")
@pytest.mark.parametrize("verb", ["events", "list", "stats"])
async def test_each_call_has_a_deadline_and_each_failure_an_end(world: World, folder: str, fake: FakeNode, verb: str) -> None:
    watched = Watched(world, f"{folder}/node.sock", call_s=0.3)
    async with fake.serving(), watched.running():
        fake.hung = (verb,)
        await watched.until(lambda: watched.source.statistics().errors.get("deadline_exceeded", 0) >= 1)
        fake.hung, fake.broken = (), (verb,)
        await watched.until(lambda: watched.source.statistics().errors.get("bug", 0) >= 1)
        assert watched.pods == []
        fake.broken = ()
        await watched.until(lambda: watched.pods)
    assert watched.names() == ["web"]


@pytest.mark.row("K17")
async def test_a_stream_that_ends_is_opened_again(world: World, folder: str, fake: FakeNode) -> None:
    watched = Watched(world, f"{folder}/node.sock")
    async with fake.serving(), watched.running():
        await watched.until(lambda: watched.pods)
        fake.end.set()
        await watched.until(lambda: watched.source.statistics().errors.get("disconnected", 0) >= 1)
        fake.end.clear()
        n_rounds = watched.source.statistics().n_rounds
        await watched.until(lambda: watched.source.statistics().n_rounds > n_rounds)


@pytest.mark.virtual_time
async def test_many_changes_are_few_rounds(world: World, folder: str, fake: FakeNode) -> None:
    fake.n_events = 2000
    watched = Watched(world, f"{folder}/node.sock", interval_s=3600.0)
    async with fake.serving(), watched.running():
        await asyncio.sleep(10)
    assert 10 <= watched.source.statistics().n_rounds <= 40


@pytest.mark.row("K17")
async def test_a_container_that_cannot_be_measured_keeps_its_figures(world: World, folder: str, fake: FakeNode) -> None:
    usage = fake.usage
    watched = Watched(world, f"{folder}/node.sock", interval_s=0.05)
    async with fake.serving(), watched.running():
        fake.usage = []
        await watched.until(lambda: watched.source.statistics().n_rounds >= 2)
        assert watched.figures[-1] == (), "it never was measured"
        fake.usage = usage
        await watched.until(lambda: watched.figures[-1])
        known = watched.figures[-1]
        assert watched.measured()["web"].cpu_s == 1.0
        fake.usage = [u.ContainerUsage(id=RECORD.id, name="web", status="running")]
        n_rounds = watched.source.statistics().n_rounds
        await watched.until(lambda: watched.source.statistics().n_rounds >= n_rounds + 2)
        assert watched.figures[-1] == known
        fake.records = []
        await watched.until(lambda: watched.figures[-1] == ())


@pytest.mark.row("K17")
async def test_a_receiver_that_fails_does_not_end_the_source(world: World, folder: str, fake: FakeNode) -> None:
    told: list[dict[str, Pod]] = []

    def receive(pods: dict[str, Pod]) -> None:
        told.append(pods)
        if len(told) == 1:
            raise ValueError("a fault of the receiver")

    watched = Watched(world, f"{folder}/node.sock", on_pods=receive)
    async with fake.serving(), watched.running():
        await watched.until(lambda: len(told) == 2)
    assert any(b'"local.bug"' in line and b"a fault of the receiver" in line for line in watched.log)


async def test_the_next_round_waits_until_the_figures_are_taken_in(world: World, folder: str, fake: FakeNode) -> None:
    n_now, n_most, taken = 0, 0, list[int]()

    async def receive(containers: tuple[LocalContainer, ...]) -> None:
        nonlocal n_now, n_most
        n_now += 1
        n_most = max(n_most, n_now)
        await asyncio.sleep(0.2)  # the slowness itself
        n_now -= 1
        taken.append(len(containers))

    fake.n_events = 20
    watched = Watched(world, f"{folder}/node.sock", on_containers=receive, interval_s=0.02)
    async with fake.serving(), watched.running():
        await watched.until(lambda: len(taken) >= 3)
    assert n_most == 1, "one at a time"
    assert set(taken) == {1}


def test_what_is_not_said_is_nothing() -> None:
    pod = pod_of(RECORD, wanted(["tier", "none"], []))
    assert pod.labels == (("tier", "front"),)
    assert figures_of(RECORD, pod, None) is None
    usage = u.ContainerUsage(id=RECORD.id, name="web", status="running", memory_bytes=4096, cpu_ns=1_500_000_000)
    assert figures_of(RECORD, pod, usage) == LocalContainer(RECORD.id, pod, 7, 1.5, 4096, 0, 0)
