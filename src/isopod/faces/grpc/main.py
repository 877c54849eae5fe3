"""What the face's process runs: told by the node on the link, it serves until it is told to stop, or the node is gone.

The node sends the settings, and later "stop"; the face answers the settings once, with where it serves or why it does not.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from isopod.api import messages as m
from isopod.api import methods
from isopod.faces.grpc.certificates import Certificates
from isopod.faces.grpc.machines import MachineCalls, record_of
from isopod.faces.grpc.members import MemberCalls, RaftTestCalls
from isopod.faces.grpc.node import NodeLink
from isopod.faces.grpc.records import VmBook, VmRecord
from isopod.faces.grpc.schema import load_schema
from isopod.faces.grpc.server import GrpcServer, Handlers
from isopod.faces.grpc.settings import FaceSettings, check_listen
from isopod.faces.grpc.tasks import TaskCalls
from isopod.runtime.companion import attend
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError
from isopod.world.shards import Link
from isopod.world.world import World

GRACE_S: Final = 1.0
"""How long calls may take to end by themselves when the face stops."""
AGAIN_S: Final = 1.0
CLUSTER: Final = "blixard.ClusterService"
BLIXARD: Final = "blixard.BlixardService"
RAFT: Final = "blixard.raft.RaftConsensusService"


async def serve(world: World, link: Link) -> None:
    """Be the face's process: an `Entry` of `isopod.world.shards`."""

    def make(message: bytes) -> Face:
        settings = msgspec.json.decode(message, type=FaceSettings)
        logger = Logger(link.write_log, world.clock).bind(part="grpc")
        logger.set_level(settings.log_level)  # type: ignore[arg-type]  # the node's configuration has checked it
        return Face(world, settings, logger)

    await attend(link, make)


class Face:
    """The face itself.

    Args:
        world: Where it runs.
        settings: What it was told.
        logger: Where it reports.
    """

    def __init__(self, world: World, settings: FaceSettings, logger: Logger) -> None:
        self._world = world
        self._settings = settings
        self._logger = logger
        self._node = NodeLink(world, settings, logger)
        store = self._node.store
        self._book = VmBook(self._node, store, self._own_records) if store is not None else None
        self._machines = MachineCalls(self._node, self._book)
        self._tasks = TaskCalls(self._node)
        self._server: GrpcServer | None = None
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Serve; return where.

        Raises:
            IsopodError: It cannot be served there, or nothing was compiled to be served.
        """
        check_listen(self._settings)
        schema = await load_schema(self._world.disk)
        handlers = self.handlers()
        services = (CLUSTER, BLIXARD, RAFT) if self._settings.test_services else (CLUSTER, BLIXARD)
        server = GrpcServer(schema, handlers, self._logger, services=services)
        secured = Certificates(self._settings, self._world.disk, self._logger) if self._settings.is_secured else None
        address = await server.start(self._settings.listen, await secured.open() if secured is not None else None)
        self._server = server
        self._begin(secured)
        self._logger.info("grpc.ready", address=address, secured=self._settings.is_secured)
        return address

    async def stop(self) -> None:
        """Stop serving, let calls end, close the connections to the node."""
        if self._server is not None:
            await self._server.stop(GRACE_S)
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        if self._book is not None:
            await self._book.close()
        await self._node.close()

    def handlers(self) -> Handlers:
        """Return who serves each call: the one table of them."""
        members, machines, tasks = MemberCalls(self._node), self._machines, self._tasks
        table = {
            f"/{CLUSTER}/JoinCluster": members.join_cluster,
            f"/{CLUSTER}/LeaveCluster": members.leave_cluster,
            f"/{CLUSTER}/GetClusterStatus": members.cluster_status,
            f"/{CLUSTER}/SendRaftMessage": members.send_raft_message,
            f"/{CLUSTER}/SubmitTask": tasks.submit_task,
            f"/{CLUSTER}/GetTaskStatus": tasks.task_status,
            f"/{CLUSTER}/CreateVm": machines.create_vm,
            f"/{CLUSTER}/StartVm": machines.start_vm,
            f"/{CLUSTER}/StopVm": machines.stop_vm,
            f"/{CLUSTER}/ListVms": machines.list_vms,
            f"/{CLUSTER}/GetVmStatus": machines.vm_status,
            f"/{CLUSTER}/HealthCheck": members.health_check,
            f"/{BLIXARD}/GetRaftStatus": members.raft_status,
            f"/{BLIXARD}/ProposeTask": tasks.propose_task,
        }
        if self._settings.test_services:
            raft = RaftTestCalls(self._node)
            table |= {
                f"/{RAFT}/SendRaftMessage": raft.send_raft_message,
                f"/{RAFT}/Propose": raft.propose,
                f"/{RAFT}/GetClusterState": raft.cluster_state,
            }
        return table

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, secured: Certificates | None) -> None:
        """Begin what goes on beside the calls."""
        work: dict[str, Callable[[], Awaitable[None]]] = {}
        if secured is not None:
            work["certificates"] = secured.follow
        if self._settings.has_engine:
            work["tasks"] = self._tasks.run
            if self._book is not None:
                self._book.start()
            if self._machines.orders is not None:
                work["orders"] = self._machines.orders.run
        loop = asyncio.get_running_loop()
        self._keeping = [loop.create_task(self._keep(name, each), name=f"grpc {name}") for name, each in work.items()]

    async def _own_records(self) -> list[VmRecord]:
        request = m.ListContainers(all=True, isolation="vm")
        found = await self._node.call(methods.CONTAINER_LIST, request)
        return [record_of(each, self._settings.node_id) for each in found.containers]

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Have work done until cancelled, begun anew when it fails: the node may be away for a moment."""
        while True:
            try:
                await work()
            except Exception as error:  # noqa: BLE001  the root of a task
                self._say(name, error)
            await asyncio.sleep(AGAIN_S)

    def _say(self, name: str, error: Exception) -> None:
        if _is_outside(error):
            self._logger.info("grpc.begins_anew", work=name, why=str(error))
        else:
            self._logger.error("grpc.bug", work=name, error=repr(error), traceback="".join(traceback.format_exception(error)))


def _is_outside(error: BaseException) -> bool:
    """Whether work failed for what the node or the store said, and not for a fault of ours."""
    return all(map(_is_outside, error.exceptions)) if isinstance(error, BaseExceptionGroup) else isinstance(error, IsopodError)
