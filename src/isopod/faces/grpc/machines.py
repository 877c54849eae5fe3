"""The calls about virtual machines: each is a container of isolation "vm" on this node.

In a cluster the record of every machine is also kept in the replicated store (`records`), so that each node lists all of them, and a name
is given once. A machine is started and stopped by its own node, which is asked through the store too (`orders`).
"""

from typing import Final

import msgspec

from isopod.api import cluster as c
from isopod.api import messages as m
from isopod.api import methods
from isopod.faces.grpc.node import Asked, Fields, NodeLink, is_name
from isopod.faces.grpc.orders import Order, Verb, VmOrders
from isopod.faces.grpc.records import VmBook, VmRecord
from isopod.faces.grpc.statuses import describe, is_answer
from isopod.world.errors import InvalidArgument, IsopodError, NotFound
from isopod.world.ids import check_name

MIB: Final = 1 << 20
STOP_S: Final = 10.0
"""How long a machine may take to go down by itself."""
_STATES: Final[dict[m.Status, str]] = {
    "created": "VM_STATE_CREATED",
    "starting": "VM_STATE_STARTING",
    "restarting": "VM_STATE_STARTING",
    "running": "VM_STATE_RUNNING",
    "paused": "VM_STATE_RUNNING",
    "stopping": "VM_STATE_STOPPING",
    "removing": "VM_STATE_STOPPING",
    "exited": "VM_STATE_STOPPED",
    "unknown": "VM_STATE_UNKNOWN",
}
_STOPPED_CODES: Final = (None, 0, 130, 137, 143)
"""Exit codes of what ended by itself, or because it was told to (by SIGINT, SIGKILL, SIGTERM)."""


def vm_state(record: m.Container) -> str:
    """Return the protocol's state of a machine: FAILED is one that could not start, broke, or whose command failed."""
    has_failed = record.error or record.oom_killed or record.exit_code not in _STOPPED_CODES
    return "VM_STATE_FAILED" if record.status == "exited" and has_failed else _STATES[record.status]


def record_of(record: m.Container, node_id: int) -> VmRecord:
    """Return what is kept of a machine in the replicated store."""
    vm = record.vm
    return VmRecord(
        name=record.name,
        node_id=node_id,
        vm_id=record.id,
        state=vm_state(record),
        vcpus=vm.vcpus if vm is not None else 0,
        memory_mb=vm.memory_bytes // MIB if vm is not None else 0,
        config=vm.config if vm is not None else "",
        why=record.error,
    )


class MachineCalls:
    """The handlers.

    Args:
        node: Whom to ask.
        book: The records of all nodes' machines; None for a node that holds no store.
    """

    def __init__(self, node: NodeLink, book: VmBook | None) -> None:
        self._node = node
        self._book = book
        self.orders = VmOrders(node, node.store, self.do) if node.store is not None else None
        """What this node has others do, and they it; to be run by whoever runs the face."""

    async def create_vm(self, asked: Asked) -> Fields:
        """Make one; it is not started."""
        if not asked.message.name:
            return {"success": False, "message": "VM name cannot be empty"}
        spec = self._spec(asked)
        try:
            made = await self._create(spec, asked.left_s)
        except IsopodError as error:
            if is_answer(error):
                return {"success": False, "message": describe(error)}
            raise
        return {"success": True, "message": f"VM '{made.name}' created successfully", "vm_id": made.id}

    async def start_vm(self, asked: Asked) -> Fields:
        """Start one. The answer comes when it runs, or says why it does not."""
        return await self._command(asked, "start")

    async def stop_vm(self, asked: Asked) -> Fields:
        """Stop one: asked to go down, then ended. The answer comes when it is gone."""
        return await self._command(asked, "stop")

    async def list_vms(self, asked: Asked) -> Fields:
        """All machines: this node's as they are, the others' as their nodes wrote them down."""
        records = await self._local(asked.left_s) + await self._others(asked.left_s)
        return {"vms": [_info(record) for record in sorted(records, key=lambda record: (record.name, record.node_id))]}

    async def vm_status(self, asked: Asked) -> Fields:
        """One machine."""
        record = await self._find(asked.message.name, asked.left_s)
        return {"found": False} if record is None else {"found": True, "vm_info": _info(record)}

    async def do(self, order: Order) -> None:
        """Start or stop a machine of this node.

        Raises:
            NotFound: It has none of that name.
            IsopodError: Why it cannot be started or stopped.
        """
        found = await self._find_local(order.name)
        if found is None:
            raise _not_found(order.name)
        if order.verb == "start":
            await self._node.call(methods.CONTAINER_START, m.StartContainer(name=found.id), timeout_s=order.within_s)
        else:
            stop = m.StopContainer(name=found.id, timeout_s=max(0.0, min(STOP_S, order.within_s - 1.0)))
            await self._node.call(methods.CONTAINER_STOP, stop, timeout_s=order.within_s)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _spec(self, asked: Asked) -> m.ContainerSpec:
        """Return what a request asks for. InvalidArgument if it makes no sense."""
        request, settings = asked.message, self._node.settings
        name = check_name("VM name", request.name)
        vm = m.VmOptions(
            vcpus=request.vcpus or None,
            memory_bytes=request.memory_mb * MIB if request.memory_mb else None,
            config=request.config_path,
        )
        if request.config_path:
            return m.ContainerSpec(image="", name=name, isolation="vm", vm=vm)
        return m.ContainerSpec(image=settings.vm_image, command=settings.vm_command, name=name, isolation="vm", vm=vm)

    async def _create(self, spec: m.ContainerSpec, left_s: float) -> m.Container:
        book = self._book
        if book is None:
            return await self._node.call(methods.CONTAINER_CREATE, spec, timeout_s=left_s)
        claimed = VmRecord(name=spec.name, node_id=self._node.node_id, state="VM_STATE_CREATED", config=spec.vm.config)
        async with book.claim(claimed, timeout_s=left_s):
            return await self._node.call(methods.CONTAINER_CREATE, spec, timeout_s=left_s)

    async def _command(self, asked: Asked, verb: Verb) -> Fields:
        name = asked.message.name
        if not name:
            raise InvalidArgument("VM name", "", "it is empty")
        order = Order(name=name, verb=verb, within_s=asked.left_s)
        try:
            if await self._find_local(name) is None:
                await self._order(order)
            else:
                await self.do(order)
        except IsopodError as error:
            if is_answer(error):
                return {"success": False, "message": describe(error)}
            raise
        return {"success": True, "message": f"VM '{name}' {verb} command sent"}

    async def _order(self, order: Order) -> None:
        """Have it done by the node that has the machine."""
        found = await self._book.find(order.name, timeout_s=order.within_s) if self._book is not None and is_name(order.name) else None
        if found is None or found.node_id == self._node.node_id or self.orders is None:
            raise _not_found(order.name)
        await self.orders.give(found.node_id, order)

    async def _find(self, name: str, left_s: float) -> VmRecord | None:
        found = await self._find_local(name)
        if found is not None:
            return record_of(found, self._node.node_id)
        others = await self._others(left_s) if is_name(name) else []
        return next((record for record in others if record.name == name), None)

    async def _find_local(self, name: str) -> m.Container | None:
        if not self._node.settings.has_engine:
            return None
        found = await self._node.find(name)
        return found if found is not None and found.isolation == "vm" else None

    async def _local(self, left_s: float) -> list[VmRecord]:
        if not self._node.settings.has_engine:
            return []
        request = m.ListContainers(all=True, isolation="vm")
        found = await self._node.call(methods.CONTAINER_LIST, request, timeout_s=left_s)
        return [record_of(each, self._node.node_id) for each in found.containers]

    async def _others(self, left_s: float) -> list[VmRecord]:
        """Return the other nodes' machines; the state of one whose node is gone or not heard of is not known."""
        if self._book is None:
            return []
        found = await self._book.others(timeout_s=left_s)
        if not found:
            return []
        status = await self._node.call(c.STATUS, c.StatusRequest(), timeout_s=left_s)
        well = {node.id: node.health != "failed" for node in status.nodes}
        lost = {"state": "VM_STATE_UNKNOWN"}
        return [each if well.get(each.node_id) else msgspec.structs.replace(each, **lost) for each in found]


def _not_found(name: str) -> NotFound:
    return NotFound("VM", name[:80], "see ListVms, or: isopod vm list")


def _info(record: VmRecord) -> Fields:
    return {
        "name": record.name,
        "state": record.state,
        "node_id": record.node_id,
        "vcpus": record.vcpus,
        "memory_mb": record.memory_mb,
    }
