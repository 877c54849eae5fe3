"""A node as the face sees one, without an engine: its verbs over RPC, machines that are records, and a store that agrees at once."""

import asyncio
from types import SimpleNamespace
from typing import Any, Self

import msgspec

from isopod.api import cluster as c
from isopod.api import messages as m
from isopod.api import methods
from isopod.cluster.store.service import handlers as store_handlers
from isopod.faces.grpc.machines import MachineCalls, record_of
from isopod.faces.grpc.node import Asked, NodeLink
from isopod.faces.grpc.records import VmBook, VmRecord
from isopod.faces.grpc.settings import FaceSettings
from isopod.faces.grpc.tasks import TaskCalls
from isopod.net.rpc import Server
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import AlreadyExists, InvalidArgument, IsopodError, NotFound, WrongState
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog

GIB = 1 << 30
TEXTS = ("version", "socket", "root", "run_root", "hostname", "operating_system", "kernel", "architecture", "event_loop")
PROBED = ("cgroup_mode", "runtime", "supervisor", "accelerator", "storage_driver", "network_driver", "seccomp_profile")
FACTS: dict[str, Any] = {**dict.fromkeys(TEXTS, "fake"), **dict.fromkeys(PROBED, m.Probed(value="fake", why=""))}
COUNTS: dict[str, Any] = dict.fromkeys(("pid", "started_at_ns", "containers", "containers_running", "images"), 1)
INFO = m.NodeInfo(paths={}, n_cpus=4, memory_bytes=8 * GIB, **FACTS, **COUNTS)


def asked(left_s: float = 10.0, metadata: dict[str, str] | None = None, **fields: Any) -> Asked:
    """Return a request as a handler gets it."""
    return Asked(SimpleNamespace(**fields), metadata or {}, left_s)


class FakeNode:
    """An async context in which it serves.

    Args:
        world: Where.
        folder: Where its socket goes.
        log: The store of the cluster it is in; None for none.
        number: Its id.
    """

    def __init__(self, world: World, folder: str, *, log: FakeLog | None = None, number: int = 1) -> None:
        self.world = world
        self.number = number
        self.socket = f"{folder}/n{number}.sock"
        self.containers: dict[str, m.Container] = {}
        self.failures: dict[str, IsopodError] = {}
        """What a verb fails with, by its name; it does nothing then."""
        self.late_failures: dict[str, IsopodError] = {}
        """The same, after it has done it."""
        self.health: dict[int, c.Health] = {}
        self.status_why = ""
        self.info_cluster: m.ClusterFacts | None = None
        self.free_bytes = 10 * GIB
        self.start_s = 0.0
        self.n_starts = 0
        self.lines: list[bytes] = []
        self.logger = Logger(self.lines.append, world.clock, level="debug")
        self._log = log
        self._changed: list[asyncio.Event] = []
        self._n_made = 0
        self._server: Server | None = None

    async def __aenter__(self) -> Self:
        await self.serve()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def serve(self) -> None:
        table: dict[Any, Any] = {
            methods.SYSTEM_INFO: self._info,
            methods.SYSTEM_USAGE: self._usage,
            methods.CONTAINER_CREATE: self._create,
            methods.CONTAINER_START: self._start,
            methods.CONTAINER_STOP: self._stop,
            methods.CONTAINER_LIST: self._list,
            methods.CONTAINER_INSPECT: self._inspect,
            methods.CONTAINER_REMOVE: self._remove,
            methods.CONTAINER_EVENTS: self._events,
            c.STATUS: self._status,
        }
        if self._log is not None:
            table |= dict(store_handlers(self._log.replicas[self.number]))
        self._server = Server(self.world, table, logger=self.logger, metrics=Registry())
        await self._server.listen(UnixAddress(self.socket))

    async def end(self) -> None:
        assert self._server is not None
        await self._server.close()

    def settings(self, **told: Any) -> FaceSettings:
        return FaceSettings(listen="127.0.0.1:0", socket=self.socket, node_id=self.number, is_replicated=self._log is not None, **told)

    def change(self, name: str, **fields: Any) -> None:
        """Have something become of a container, as the engine would write it down."""
        self.containers[name] = msgspec.structs.replace(self.containers[name], **fields)
        self._tell()

    def make(self, name: str, **fields: Any) -> None:
        """Have a machine come by another door."""
        self.containers[name] = container(name, f"id-{name}", **fields)
        self._tell()

    def forget(self, name: str) -> None:
        del self.containers[name]
        self._tell()

    # --- verbs --------------------------------------------------------------------------------------------------------

    async def _info(self, *_: Any) -> m.NodeInfo:
        self._fail("system.info")
        return msgspec.structs.replace(INFO, cluster=self.info_cluster)

    async def _usage(self, *_: Any) -> m.SystemUsage:
        nothing = m.LimitSums(memory_bytes=0, memory_unlimited=0, cpus=0.0, cpus_unlimited=0, pids=0, pids_unlimited=0)
        return m.SystemUsage(
            containers=0,
            by_status={},
            limits_running=nothing,
            limits_all=nothing,
            measured=m.MeasuredSums(memory_bytes=0, cpu_ns=0, pids=0, unmeasured=0),
            storage=m.StorageSums(images_bytes=0, containers_bytes=0, metadata_bytes=0, free_bytes=self.free_bytes),
        )

    async def _create(self, _: Any, spec: m.ContainerSpec) -> m.Container:
        self._fail("container.create")
        if spec.name in self.containers:
            raise AlreadyExists("container", spec.name)
        if spec.vm.vcpus is not None and spec.vm.vcpus > 255:
            raise InvalidArgument("vcpus", spec.vm.vcpus, "want at most 255")
        self._n_made += 1
        made = container(
            spec.name,
            f"id{self._n_made}-{self.number}",
            isolation=spec.isolation,
            image=spec.image,
            command=spec.command,
            labels=spec.labels,
            resources=spec.resources,
            vm=m.VmSettings(
                driver="qemu",
                vcpus=spec.vm.vcpus or 1,
                memory_bytes=spec.vm.memory_bytes or 256 << 20,
                disk_bytes=GIB,
                config=spec.vm.config,
            ),
        )
        self.containers[spec.name] = made
        self._tell()
        if error := self.late_failures.pop("container.create", None):
            raise error
        return made

    async def _start(self, _: Any, request: m.StartContainer) -> m.Ran:
        record = self._get(request.name)
        self.n_starts += 1
        await asyncio.sleep(self.start_s)
        if record.status == "running":
            raise WrongState("container", record.name, "running", "start it")
        self._fail("container.start")
        self.change(record.name, status="running", started_at_ns=self.world.clock.now_ns())
        return m.Ran(id=record.id, name=record.name)

    async def _stop(self, _: Any, request: m.StopContainer) -> m.Container:
        record = self._get(request.name)
        self._fail("container.stop")
        self.change(record.name, status="exited", exit_code=143)
        return self.containers[record.name]

    async def _list(self, _: Any, request: m.ListContainers) -> m.ContainerList:
        found = [each for each in self.containers.values() if request.isolation in (None, each.isolation)]
        found = [each for each in found if all(label in each.labels for label in request.labels)]
        return m.ContainerList(containers=tuple(reversed(found)))

    async def _inspect(self, _: Any, request: m.ContainerName) -> m.Container:
        return self._get(request.name)

    async def _remove(self, _: Any, request: m.RemoveContainer) -> m.Empty:
        self.forget(self._get(request.name).name)
        return m.Empty()

    async def _events(self, call: Any, _: m.EventsRequest) -> m.Empty:
        changed = asyncio.Event()
        self._changed.append(changed)
        try:
            while True:
                await changed.wait()
                changed.clear()
                await call.send(m.Event(kind="status", id="", name="", at_ns=0))
        finally:
            self._changed.remove(changed)

    async def _status(self, *_: Any) -> c.ClusterStatus:
        if self._log is None:
            raise WrongState("node", "at this socket", "in no cluster", "do that")
        return c.ClusterStatus(
            cluster_id="c",
            node_id=self.number,
            state="leader" if self._log.leader == self.number else "follower",
            leader_id=self._log.leader,
            leader_address="10.0.0.1:7000",
            term=self._log.term,
            commit=0,
            applied=0,
            digest="",
            voters=tuple(self._log.rafts),
            learners=(),
            voters_max=5,
            failures_survived=0,
            nodes=tuple(self._entry(number) for number in self._log.rafts),
            why=self.status_why,
        )

    def _entry(self, number: int) -> c.ClusterNodeEntry:
        assert self._log is not None
        return c.ClusterNodeEntry(
            id=number,
            address=f"10.0.0.{number}:7000",
            role="voter",
            state="leader" if self._log.leader == number else "follower",
            health=self.health.get(number, "alive"),
            wanted_role="voter",
            incarnation="",
            version="",
            joined_at_ns=0,
            is_leaving=False,
            entries_behind=None,
            silent_s=None,
        )

    def _get(self, name: str) -> m.Container:
        found = [each for each in self.containers.values() if name in (each.name, each.id) or each.id.startswith(name)]
        if not found:
            raise NotFound("container", name)
        return found[0]

    def _fail(self, verb: str) -> None:
        if error := self.failures.get(verb):
            raise error

    def _tell(self) -> None:
        for changed in self._changed:
            changed.set()


def container(name: str, identifier: str, **fields: Any) -> m.Container:
    """Return the record of a machine."""
    given = {
        "isolation": "vm",
        "image": "isopod/busybox",
        "command": (),
        "vm": m.VmSettings(driver="qemu", vcpus=2, memory_bytes=512 << 20, disk_bytes=GIB),
        **fields,
    }
    return m.Container(
        id=identifier,
        name=name,
        created_at_ns=1,
        updated_at_ns=1,
        image_id="",
        working_dir="/",
        user="",
        hostname=name,
        network=m.Endpoint(network="bridge"),
        **given,
    )


class Desk:
    """The face's calls before a fake node, without gRPC: an async context.

    Args:
        node: The node.
        takes_orders: Whether other nodes may have it start and stop machines.
        told: More of the settings.
    """

    def __init__(self, node: FakeNode, *, takes_orders: bool = True, **told: Any) -> None:
        self.link = NodeLink(node.world, node.settings(**told), node.logger)
        store = self.link.store
        self.book = VmBook(self.link, store, self.own) if store is not None else None
        self.machines = MachineCalls(self.link, self.book)
        self.tasks = TaskCalls(self.link)
        self.takes_orders = takes_orders
        self.running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.book is not None:
            self.book.start()
        if self.takes_orders and self.machines.orders is not None:
            self.running = asyncio.get_running_loop().create_task(self.machines.orders.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        if self.book is not None:
            await self.book.close()
        await self.link.close()

    async def own(self) -> list[VmRecord]:
        found = await self.link.call(methods.CONTAINER_LIST, m.ListContainers(all=True, isolation="vm"))
        return [record_of(each, self.link.node_id) for each in found.containers]

    async def listed(self) -> list[tuple[str, int, str]]:
        """Return name, node and state of every machine, as ListVms says."""
        reply = await self.machines.list_vms(asked())
        return [(vm["name"], vm["node_id"], vm["state"].removeprefix("VM_STATE_")) for vm in reply["vms"]]
