"""The calls about tasks: a task is a container on this node that runs one command to its end.

There is no scheduler over the nodes of a cluster: the node that is asked takes the task, or says what it lacks. What a task asks for of
processors and memory is its limit and is counted against the machine while it runs; disk is only looked for. The task's record is the
container's, with labels: a task is known for as long as its container is, also after the node or this face was killed. The face ends what
takes longer than it may; while it is down nobody does, and when it is back it does so at once.

Source: TaskSpec, TaskResult and the worker's features of the reference.
"""

import asyncio
import hashlib
from contextlib import suppress
from typing import Final, NamedTuple

from isopod.api import messages as m
from isopod.api import methods
from isopod.faces.grpc.node import CALL_S, START_S, Asked, Fields, NodeLink
from isopod.faces.grpc.statuses import describe
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, IsopodError, NotFound, RefusedError, UsageError

MIB: Final = 1 << 20
GIB: Final = 1 << 30
OUTPUT_BYTES_MAX: Final = 1 << 20
"""Of a task's output the end is told, and of what it wrote to standard error a quarter of that."""
TIMEOUT_S: Final = 300.0
"""Of a task that says nothing about its own."""
TIMEOUT_S_MAX: Final = 30 * 86_400
ID_CHARS_MAX: Final = 256
KEPT_MAX: Final = 256
"""Ended tasks that are remembered; older ones are removed."""
ID_LABEL: Final = "isopod.task"
TIMEOUT_LABEL: Final = "isopod.task.timeout_s"
LATE_LABEL: Final = "isopod.task.late"
"""Set before a task is ended for taking too long: so its record says why."""
_LIVE: Final = ("created", "starting", "running", "paused", "stopping", "restarting")


class Demand(NamedTuple):
    """What a task asks for; 0 for whatever there is."""

    task_id: str
    command: tuple[str, ...]
    cpu_cores: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    features: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S


class Room(NamedTuple):
    """What the node has left."""

    cpu_cores: float
    memory_bytes: int
    disk_bytes: int
    features: tuple[str, ...]


def unfit(demand: Demand, room: Room) -> str:
    """Return what a node lacks for a task, "" for nothing."""
    missing = [feature for feature in demand.features if feature not in room.features]
    if missing:
        return f"it wants {', '.join(missing[:8])}, and has {', '.join(room.features)}"
    if demand.cpu_cores > room.cpu_cores:
        return f"it wants {demand.cpu_cores} processors, and {room.cpu_cores:g} are free"
    for what, wanted, free in (("memory", demand.memory_bytes, room.memory_bytes), ("disk", demand.disk_bytes, room.disk_bytes)):
        if wanted > free:
            return f"it wants {wanted // MIB} MiB of {what}, and {free // MIB} are free"
    return ""


def name_of(task_id: str) -> str:
    """Return the name of a task's container: ids are any text, names are not."""
    return f"task-{hashlib.sha256(task_id.encode()).hexdigest()[:32]}"


class TaskCalls:
    """The handlers. `run` beside them.

    Args:
        node: Whom to ask.
    """

    def __init__(self, node: NodeLink) -> None:
        self._node = node
        self._new: asyncio.Queue[m.Container] = asyncio.Queue()
        self._submitting = asyncio.Lock()
        """Room is counted and taken by one at a time."""

    async def run(self) -> None:
        """See tasks to their end, until cancelled: those that are submitted, and those of before."""
        before = [record for record in await self._all_tasks() if _is_live(record)]
        async with TaskGroup("grpc tasks") as group:
            for record in before:
                group.create_task(self._see_through(record))
            while True:
                group.create_task(self._see_through(await self._new.get()))

    async def submit_task(self, asked: Asked) -> Fields:
        """Take a task if there is room for it. The answer comes once it is on record; it starts at once."""
        request = asked.message
        demand = Demand(
            request.task_id,
            (request.command, *request.args),
            request.cpu_cores,
            request.memory_mb * MIB,
            request.disk_gb * GIB,
            tuple(request.required_features),
            float(request.timeout_secs) or TIMEOUT_S,
        )
        try:
            await self._submit(demand, asked.left_s)
        except IsopodError as error:
            return {"accepted": False, "message": f"Failed to submit task: {describe(error)}"}
        node_id = self._node.node_id
        return {"accepted": True, "message": f"Task {request.task_id} assigned to node {node_id}", "assigned_node": node_id}

    async def propose_task(self, asked: Asked) -> Fields:
        """The same by the other service, with five minutes to run."""
        if not asked.message.HasField("task"):
            raise UsageError("Task is required")
        task = asked.message.task
        if not task.id:
            return {"success": False, "message": "Task ID cannot be empty"}
        demand = Demand(task.id, (task.command, *task.args), task.cpu_cores, task.memory_mb * MIB)
        try:
            await self._submit(demand, asked.left_s)
        except IsopodError as error:
            return {"success": False, "message": f"Failed to submit task: {describe(error)}"}
        return {"success": True, "message": f"Task {task.id} proposed successfully, assigned to node {self._node.node_id}"}

    async def task_status(self, asked: Asked) -> Fields:
        """How far a task is, and how it ended."""
        task_id = asked.message.task_id
        if not self._node.settings.has_engine:
            return {"found": False}
        record = await self._node.find(name_of(task_id))
        if record is None or record.labels.get(ID_LABEL) != task_id:
            return {"found": False}
        status = _status_of(record)
        reply: Fields = {"found": True, "status": status, "execution_time_ms": self._ran_ms(record)}
        if status != "TASK_STATUS_PENDING":
            output, errors = await self._output(record)
            reply["output"] = output
            reply["error"] = _why(record, errors) if status == "TASK_STATUS_FAILED" else ""
        return reply

    # --- submitting ---------------------------------------------------------------------------------------------------

    async def _submit(self, demand: Demand, left_s: float) -> None:
        _check(demand)
        async with asyncio.timeout(left_s), self._submitting:
            tasks = await self._all_tasks()
            why = unfit(demand, await self._room(tasks, demand))
            if why:
                raise RefusedError(f"no suitable worker: this is node {self._node.node_id}: {why}")
            await self._forget_old(tasks)
            try:
                record = await self._node.call(methods.CONTAINER_CREATE, self._spec(demand), timeout_s=CALL_S)
            except AlreadyExists:
                raise AlreadyExists("task", demand.task_id) from None
        self._new.put_nowait(record)

    def _spec(self, demand: Demand) -> m.ContainerSpec:
        limits = m.Resources(memory_bytes_max=demand.memory_bytes or None, cpus=float(demand.cpu_cores) or None)
        return m.ContainerSpec(
            image=self._node.settings.task_image,
            command=demand.command,
            name=name_of(demand.task_id),
            labels={ID_LABEL: demand.task_id, TIMEOUT_LABEL: f"{demand.timeout_s:g}"},
            resources=limits,
            isolation="vm" if "microvm" in demand.features else "container",
        )

    async def _room(self, tasks: list[m.Container], demand: Demand) -> Room:
        """Return what the machine has, less what tasks that have not ended may use."""
        info = await self._node.call(methods.SYSTEM_INFO, m.Empty())
        busy = [record.resources for record in tasks if _is_live(record)]
        disk = 0
        if demand.disk_bytes:
            disk = (await self._node.call(methods.SYSTEM_USAGE, m.Empty())).storage.free_bytes
        return Room(
            info.n_cpus - sum(limits.cpus or 0.0 for limits in busy),
            info.memory_bytes - sum(limits.memory_bytes_max or 0 for limits in busy),
            disk,
            ("container",) if info.accelerator.value == "none" else ("container", "microvm"),
        )

    async def _all_tasks(self) -> list[m.Container]:
        """Return the records of all tasks, newest first."""
        request = m.ListContainers(all=True, labels=(ID_LABEL,))
        return list((await self._node.call(methods.CONTAINER_LIST, request)).containers)

    async def _forget_old(self, tasks: list[m.Container]) -> None:
        ended = [record for record in tasks if not _is_live(record)]
        for record in ended[KEPT_MAX - 1 :]:
            with suppress(NotFound):
                await self._node.call(methods.CONTAINER_REMOVE, m.RemoveContainer(name=record.id))

    # --- seeing through -----------------------------------------------------------------------------------------------

    async def _see_through(self, record: m.Container) -> None:
        """Start a task that was not, and end it when its time is over."""
        try:
            if record.status == "created":
                await self._node.call(methods.CONTAINER_START, m.StartContainer(name=record.id), timeout_s=START_S)
                record = await self._node.call(methods.CONTAINER_INSPECT, m.ContainerName(name=record.id))
            await self._wait(record)
        except IsopodError as error:
            # Why it did not start stands in its record; a lost node ends what it can when it is back.
            self._node.logger.info("grpc.task_left", task=record.labels.get(ID_LABEL, ""), why=error.message)

    async def _wait(self, record: m.Container) -> None:
        timeout_s = float(record.labels.get(TIMEOUT_LABEL, TIMEOUT_S))
        ran_s = (self._node.world.clock.now_ns() - record.started_at_ns) / 1e9 if record.started_at_ns else 0.0
        try:
            await self._node.call(methods.CONTAINER_WAIT, m.ContainerName(name=record.id), timeout_s=max(0.001, timeout_s - ran_s))
        except DeadlineExceeded:
            labels = {LATE_LABEL: f"{timeout_s:g}"}
            await self._node.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name=record.id, labels=labels))
            await self._node.call(methods.CONTAINER_KILL, m.KillContainer(name=record.id))

    # --- telling ------------------------------------------------------------------------------------------------------

    async def _output(self, record: m.Container) -> tuple[str, str]:
        """Return the end of what a task wrote: to standard output, and to standard error."""
        out, err = bytearray(), bytearray()
        async with self._node.client.open(methods.CONTAINER_LOGS, m.LogsRequest(name=record.id), timeout_s=CALL_S) as call:
            async for item in call:
                if isinstance(item, m.Stdout):
                    _append(out, item.data, OUTPUT_BYTES_MAX)
                elif isinstance(item, m.Stderr):
                    _append(err, item.data, OUTPUT_BYTES_MAX // 4)
            await call.reply()
        return out.decode(errors="replace"), err.decode(errors="replace")

    def _ran_ms(self, record: m.Container) -> int:
        if not record.started_at_ns:
            return 0
        ended_at_ns = record.finished_at_ns if record.status not in _LIVE else None
        return max(0, (ended_at_ns or self._node.world.clock.now_ns()) - record.started_at_ns) // 1_000_000


def _check(demand: Demand) -> None:
    """Refuse what no node could run. Raises InvalidArgument."""
    if not 0 < len(demand.task_id) <= ID_CHARS_MAX or "\0" in demand.task_id:
        raise InvalidArgument("task id", demand.task_id[:80], f"want 1 to {ID_CHARS_MAX} characters")
    if not demand.command[0]:
        raise InvalidArgument("command", "", "it is empty")
    if demand.timeout_s > TIMEOUT_S_MAX:
        raise InvalidArgument("timeout_secs", f"{demand.timeout_s:g}", f"want at most {TIMEOUT_S_MAX}")


def _is_live(record: m.Container) -> bool:
    """Whether a task has not ended; one that could not be started has."""
    return record.status in _LIVE and not (record.status == "created" and record.error)


def _status_of(record: m.Container) -> str:
    if record.status in ("created", "starting", "restarting") and not record.error:
        return "TASK_STATUS_PENDING"
    if record.status in ("running", "paused", "stopping"):
        return "TASK_STATUS_RUNNING"
    if record.status == "unknown":
        return "TASK_STATUS_UNKNOWN"
    return "TASK_STATUS_COMPLETED" if record.exit_code == 0 and LATE_LABEL not in record.labels else "TASK_STATUS_FAILED"


def _why(record: m.Container, errors: str) -> str:
    """Return why a task failed: what ended it, then what it wrote to standard error."""
    if LATE_LABEL in record.labels:
        reason = f"it took longer than {record.labels[LATE_LABEL]} s and was ended"
    elif record.oom_killed:
        reason = "it ran out of memory"
    else:
        reason = record.error or f"it ended with exit code {record.exit_code}"
    return f"{reason}\n{errors}" if errors else reason


def _append(tail: bytearray, data: bytes, n_bytes_max: int) -> None:
    tail += data
    if len(tail) > n_bytes_max:
        del tail[: len(tail) - n_bytes_max]
