"""LocalSource: isopod's own node as a source: its containers and machines as pods, and their figures.

It is a client of `isopod.api` and knows nothing of the engine. A round is a list and the figures of what runs. Rounds come at an interval,
and soon after every change that the node's stream of events tells of (changes within `SOON_S` make one round), so that what was removed
is gone at once. The stream is opened before the first round: nothing falls between them.

A node that is away, is restarted, or hangs is connected to again, after pauses that double; what was told stays as it is. A container that
cannot be measured at the moment keeps its last figures while the node lists it, and one that never could be is not told of.

Not here: figures from inside of machines. A machine's are those of its monitor's control group, as the node measures them.

Rules: every call has a deadline; nothing that a node says or does ends `run`.
"""

import asyncio
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from isopod.api import messages as m
from isopod.api import methods
from isopod.api import usage as u
from isopod.api.client import open_client
from isopod.net.rpc import Client
from isopod.pulse.model import Container, LocalContainer, LocalDetails, LocalDevice, LocalInterface, Pod
from isopod.pulse.pods import Wanted, allowed, wanted
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import maybe_yield
from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, NotStarted
from isopod.world.world import World

State = Literal["away", "failing", "known"]
NAMESPACE: Final = "isopod"
INTERVAL_S: Final = 10.0
SOON_S: Final = 0.1
CALL_S: Final = 5.0
"""The deadline of each call, and of connecting."""
RETRY_FIRST_S: Final = 0.2
RETRY_MAX_S: Final = 5.0
SHARE: Final = 9
"""However many changes are told, a round is followed by a rest of so many times its length."""
CONTAINERS_MAX: Final = 20_000
KINDS: Final[tuple[m.EventKind, ...]] = ("created", "deleted", "status", "resources", "labels")
"""Changes that make a round."""


class LocalStatistics(NamedTuple):
    """What a source has done. Times are of the loop."""

    state: State
    """"away": nobody listens at the node's socket; "failing": the last round failed; "known": it did not."""
    n_pods: int
    n_rounds: int
    n_failed: int
    errors: Mapping[str, int]
    """Failures by the code of their error."""
    error: str
    """What failed last, "" while nothing does."""
    took_s: float
    known_s: float | None
    """When a round last succeeded."""


class LocalSource:
    """Tells of a node's containers and machines. Run it; cancelling `run` closes the connection.

    Args:
        world: Where the node is.
        node_socket: Its socket's path.
        on_pods: Told after every round that changed something; it gets all that run, by their ids.
        on_containers: Told after every round; it gets the figures of all that could be measured. The next round waits for it.
        logger: Told of the node's comings and goings.
        pod_labels: Labels of containers to keep, by name.
        interval_s: How often figures are asked for.
        call_s: The deadline of each call.
    """

    def __init__(
        self,
        world: World,
        node_socket: str,
        *,
        on_pods: Callable[[dict[str, Pod]], None],
        on_containers: Callable[[tuple[LocalContainer, ...]], Awaitable[None] | None],
        logger: Logger,
        pod_labels: Sequence[str] = (),
        interval_s: float = INTERVAL_S,
        call_s: float = CALL_S,
    ) -> None:
        self._world = world
        self._socket = node_socket
        self._on_pods = on_pods
        self._on_containers = on_containers
        self._logger = logger
        self._want = wanted(pod_labels, ())
        self._interval_s = interval_s
        self._call_s = call_s
        self._chance = world.random.stream("pulse.local")
        self._state: State = "away"
        self._pods: dict[str, Pod] = {}
        self._figures: dict[str, LocalContainer] = {}
        self._n_rounds = 0
        self._n_failed = 0
        self._n_failed_in_row = 0
        self._errors: Counter[str] = Counter()
        self._error = ""
        self._took_s = 0.0
        self._known_s: float | None = None

    def statistics(self) -> LocalStatistics:
        """Return what has been done so far."""
        return LocalStatistics(
            state=self._state,
            n_pods=len(self._pods),
            n_rounds=self._n_rounds,
            n_failed=self._n_failed,
            errors=dict(self._errors),
            error=self._error,
            took_s=self._took_s,
            known_s=self._known_s,
        )

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            try:
                async with open_client(self._world, socket=self._socket, timeout_s=self._call_s) as client:
                    await self._follow(client)
            except Exception as error:  # noqa: BLE001  whatever a node makes fail here must not end the agent
                self._fail(error)
            full_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(self._n_failed_in_row - 1, 16))
            await asyncio.sleep(full_s * (1 - 0.5 * self._chance.random()))

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _follow(self, client: Client) -> None:
        """Ask over one connection until it fails."""
        async with client.open(methods.CONTAINER_EVENTS, m.EventsRequest(kinds=KINDS)) as events:
            try:
                async with asyncio.timeout(self._call_s):
                    await _next(events, self._socket)  # where they begin
            except TimeoutError:
                raise DeadlineExceeded(f"the events of {self._socket}", self._call_s) from None
            while True:
                await self._round(client)
                try:
                    async with asyncio.timeout(self._interval_s):
                        await _next(events, self._socket)
                except TimeoutError:
                    continue
                await self._let_pass(events)

    async def _let_pass(self, events: Any) -> None:  # a call with streams
        """Take the events of a moment: they are one change."""
        try:
            async with asyncio.timeout(max(SOON_S, min(self._interval_s, SHARE * self._took_s))):
                while True:
                    await _next(events, self._socket)
        except TimeoutError:
            pass

    async def _round(self, client: Client) -> None:
        begun_s = self._now_s()
        listed = await client.call(methods.CONTAINER_LIST, m.ListContainers(limit=CONTAINERS_MAX), timeout_s=self._call_s)
        used = await client.call(methods.CONTAINER_STATS, u.StatsRequest(figures=True), timeout_s=self._call_s)
        usage = {each.id: each for each in used.containers}
        pods = {record.id: pod_of(record, self._want) for record in listed.containers}
        figures: dict[str, LocalContainer] = {}
        for record in listed.containers:
            await maybe_yield()
            found = figures_of(record, pods[record.id], usage.get(record.id))
            known = self._figures.get(record.id)
            if found is None and known is not None:
                found = known._replace(pod=pods[record.id])
            if found is not None:
                figures[record.id] = found
        if pods != self._pods or self._known_s is None:
            self._on_pods(dict(pods))
        self._pods, self._figures = pods, figures
        taking = self._on_containers(tuple(figures.values()))
        if taking is not None:
            await taking
        self._took_s, self._known_s = self._now_s() - begun_s, self._now_s()
        self._n_rounds += 1
        if self._state != "known":
            self._state, self._error, self._n_failed_in_row = "known", "", 0
            self._logger.info("local.known", socket=self._socket, containers=len(pods))

    def _fail(self, error: Exception) -> None:
        self._n_failed += 1
        self._n_failed_in_row += 1
        code = error.code if isinstance(error, IsopodError) else "bug"
        self._errors[code] += 1
        is_new, self._error = self._error != str(error), str(error)
        self._state = "away" if isinstance(error, NotStarted) else "failing"
        if not isinstance(error, IsopodError):
            trace = "".join(traceback.format_exception(error))
            self._logger.error("local.bug", socket=self._socket, error=repr(error), traceback=trace)
        elif is_new:
            self._logger.warning("local.failed", socket=self._socket, code=code, why=error.message, hint=error.hint, kept=len(self._pods))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def pod_of(record: m.Container, want: Wanted) -> Pod:
    """Return a container or a machine as a pod of one."""
    return Pod(
        uid=record.id,
        name=record.name,
        namespace=NAMESPACE,
        source="isopod",
        runtime_handler=record.isolation,
        created_ns=record.created_at_ns,
        labels=allowed(record.labels.items(), want.labels),
        containers=(Container(record.id, record.name, record.image),),
    )


def figures_of(record: m.Container, pod: Pod, usage: u.ContainerUsage | None) -> LocalContainer | None:
    """Return a container's figures; None if it cannot be measured now."""
    if usage is None or usage.cpu_ns is None or usage.memory_bytes is None:
        return None
    more = usage.figures
    return LocalContainer(
        id=record.id,
        pod=pod,
        started_ns=record.started_at_ns or 0,
        cpu_s=usage.cpu_ns / 1e9,
        memory_bytes=usage.memory_bytes,
        memory_limit_bytes=usage.memory_bytes_max or 0,
        n_processes=usage.n_pids or 0,
        cpus=usage.cpus or 0.0,
        processes_max=usage.pids_max or 0,
        interfaces=tuple(_interface(each) for each in more.interfaces) if more is not None else (),
        devices=tuple(_device(each) for each in more.devices) if more is not None else (),
        details=_details(more) if more is not None else None,
    )


def _details(found: u.UsageFigures) -> LocalDetails:
    return LocalDetails(
        working_set_bytes=found.working_set_bytes,
        rss_bytes=found.rss_bytes,
        cache_bytes=found.cache_bytes,
        swap_bytes=found.swap_bytes,
        n_oom_kills=found.oom_kills,
        n_periods=found.cpu_periods,
        n_throttled_periods=found.cpu_throttled_periods,
        throttled_s=found.cpu_throttled_ns / 1e9,
    )


def _interface(found: u.InterfaceUsage) -> LocalInterface:
    return LocalInterface(
        name=found.name,
        received_bytes=found.received_bytes,
        received_packets=found.received_packets,
        sent_bytes=found.sent_bytes,
        sent_packets=found.sent_packets,
        receive_errors=found.receive_errors,
        receive_drops=found.receive_drops,
        send_errors=found.send_errors,
        send_drops=found.send_drops,
    )


def _device(found: u.DeviceUsage) -> LocalDevice:
    return LocalDevice(found.name, found.read_bytes, found.written_bytes, found.reads, found.writes)


async def _next(events: Any, socket: str) -> None:
    """Wait for the next event. Raises Disconnected if there will be none."""
    if await events.receive() is None:
        raise Disconnected(socket, "the node ended its stream of events")
