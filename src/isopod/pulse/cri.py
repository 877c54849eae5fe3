"""CriSource: asks the container runtime whose the sandboxes are, again and again, and keeps asking whatever becomes of the runtime.

A round is two lists (pods, and the containers that run). After a wake it asks at once and then at pauses that double, from a tenth of a
second to twenty: a sandbox's folder is there seconds before its runtime lists it, and its containers come later still. A runtime that
is slow is asked less often: within those twenty seconds a pause is nine times as long as the round before it. A round that fails changes
nothing of what is known; the next one begins with a new connection and with v1 of the interface, since a runtime that was restarted may be
another one, after a pause that doubles and varies. An endpoint without a socket costs one look at the file and loads nothing.

What containers use is asked beside these rounds (`cri_stats`), over the same connection.

How a runtime is spoken to is a `Runtime` (`cri_runtime`), which has one form: grpcio's asyncio client (`cri_client`), on the host. The
simulation has no CRI; what is in this file runs there too.

Rules: every call has a deadline; nothing that a runtime says or does ends `run`.
Source: Kubernetes' Container Runtime Interface, v1 and v1alpha2.
"""

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from isopod.pulse.cri_runtime import APIS, PACE, Api, OpenRuntime, Pace, Runtime, RuntimeFacts, timed
from isopod.pulse.cri_stats import Connection, StatsRounds, StatsStatistics
from isopod.pulse.model import Pod, SandboxStats
from isopod.pulse.pods import join, wanted
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import InvalidArgument, IsopodError, NotStarted, Unsupported
from isopod.world.world import World

__all__ = [
    "APIS",
    "PACE",
    "PODS_MAX",
    "Api",
    "CriSource",
    "CriStatistics",
    "OpenRuntime",
    "Pace",
    "Runtime",
    "RuntimeFacts",
    "open_by_grpc",
    "socket_path",
]

State = Literal["away", "failing", "known"]
PODS_MAX: Final = 20_000
SOCKET_PATH_BYTES_MAX: Final = 107


class CriStatistics(NamedTuple):
    """What a source has done. Times are of the loop."""

    state: State
    """"away": there is no socket; "failing": the last round failed; "known": it did not."""
    api: str
    runtime: str
    """The runtime's name and version, "" before it said them."""
    n_pods: int
    n_containers: int
    n_rounds: int
    n_failed: int
    errors: Mapping[str, int]
    """Failed rounds by the code of their error."""
    error: str
    """What failed last, "" while nothing does."""
    took_s: float
    known_s: float | None
    """When a round last succeeded."""
    stats: StatsStatistics = StatsStatistics()
    """Of the rounds that ask what containers use."""


class CriSource:
    """Tells whose sandboxes are. Run it; cancelling `run` closes the connection.

    Args:
        world: Where the runtime is.
        endpoint: Its socket: a path, with or without "unix://" before it.
        on_pods: Told after every round that changed something; it gets all pods. A pod that is not among them any more is one that the
            runtime has removed.
        on_stats: Told what containers have used (`cri_stats`), None once that is not known any more; without it nobody asks for that.
        logger: Told of the runtime's comings and goings.
        pod_labels: Labels of pods to keep, by name.
        pod_annotations: The same of annotations.
        pace: How often it asks, and for how long.
        stats_interval_s: How often it asks what containers use.
        is_shown: Of which sandboxes; of those alone it is told.
        open_runtime: How to connect.

    Raises:
        InvalidArgument: The endpoint is no local socket's path.
    """

    def __init__(
        self,
        world: World,
        endpoint: str,
        *,
        on_pods: Callable[[dict[str, Pod]], None],
        logger: Logger,
        on_stats: Callable[[SandboxStats | None], None] | None = None,
        pod_labels: Sequence[str] = (),
        pod_annotations: Sequence[str] = (),
        pace: Pace = PACE,
        stats_interval_s: float = 60.0,
        is_shown: Callable[[str], bool] = lambda _: True,
        open_runtime: OpenRuntime | None = None,
    ) -> None:
        self.path = socket_path(endpoint)
        self._world = world
        self._on_pods = on_pods
        self._logger = logger
        self._want = wanted(pod_labels, pod_annotations)
        self._pace = pace
        self._open = open_runtime or open_by_grpc
        self._chance = world.random.stream("pulse.cri")
        self._woken = asyncio.Event()
        self._runtime: Runtime | None = None
        self._api: Api | None = None
        self._facts: RuntimeFacts | None = None
        self._state: State = "away"
        self._pods: dict[str, Pod] = {}
        self._n_containers = 0
        self._n_rounds = 0
        self._n_failed = 0
        self._n_failed_in_row = 0
        self._errors: Counter[str] = Counter()
        self._error = ""
        self._took_s = 0.0
        self._known_s: float | None = None
        self._stats = (
            StatsRounds(
                world,
                self.path,
                connection=self._connection,
                pods=lambda: self._pods,
                is_shown=is_shown,
                on_stats=on_stats,
                logger=logger,
                interval_s=stats_interval_s,
                pace=pace,
            )
            if on_stats is not None
            else None
        )

    def wake(self) -> None:
        """Ask soon: there is a sandbox of which nothing is known yet."""
        self._woken.set()

    def statistics(self) -> CriStatistics:
        """Return what has been done so far."""
        facts = self._facts
        return CriStatistics(
            state=self._state,
            api=self._api or "",
            runtime=f"{facts.name} {facts.version}" if facts is not None else "",
            n_pods=len(self._pods),
            n_containers=self._n_containers,
            n_rounds=self._n_rounds,
            n_failed=self._n_failed,
            errors=dict(self._errors),
            error=self._error,
            took_s=self._took_s,
            known_s=self._known_s,
            stats=StatsStatistics() if self._stats is None else self._stats.statistics(),
        )

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            async with TaskGroup("cri") as group:
                if self._stats is not None:
                    group.create_task(self._stats.run(), name="cri stats")
                await self._follow()
        finally:
            await self._disconnect()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Ask whose the sandboxes are until cancelled."""
        fresh_s = pause_s = self._pace.soon_s / 2  # the first pause is twice this
        while True:
            self._woken.clear()
            is_known = await self._round()
            if self._stats is not None:
                self._stats.look()
            pause_s = self._next_pause_s(pause_s) if is_known else fresh_s
            if await self._rest(pause_s if is_known else self._retry_s()):
                pause_s = fresh_s

    def _connection(self) -> Connection | None:
        """Return how the runtime is reached, None while it does not answer."""
        return None if self._runtime is None or self._api is None or self._state != "known" else Connection(self._runtime, self._api)

    async def _round(self) -> bool:
        """Ask once; return whether the answer is there."""
        begun_s = self._now_s()
        try:
            if await self._world.disk.stat(self.path) is None:
                raise NotStarted(self.path, "no such socket", "is the container runtime running there?")
            await self._ask()
        except Exception as error:  # noqa: BLE001  whatever a runtime makes fail here must not end the agent
            await self._disconnect()
            self._fail(error, begun_s)
            return False
        self._took_s = self._now_s() - begun_s
        self._n_rounds += 1
        self._known_s = self._now_s()
        if self._state != "known":
            self._state, self._error, self._n_failed_in_row = "known", "", 0
            facts = self._facts or RuntimeFacts("", "")
            self._logger.info(
                "cri.known", endpoint=self.path, api=self._api, runtime=facts.name, version=facts.version, pods=len(self._pods)
            )
        return True

    async def _ask(self) -> None:
        if self._runtime is None:
            self._runtime = await self._open(self._world, self.path)
        runtime = self._runtime
        if self._api is None:
            self._facts, self._api = await self._agree(runtime)
        api = self._api
        pods = await timed("ListPodSandbox", self.path, runtime.pods(api, self._want), self._pace.call_s)
        containers = await timed("ListContainers", self.path, runtime.containers(api), self._pace.call_s)
        found = join(pods, containers, self._want, pods_max=PODS_MAX)
        if found != self._pods or self._known_s is None:
            self._on_pods(dict(found))
            self._pods, self._n_containers = found, sum(len(pod.containers) for pod in found.values())

    async def _agree(self, runtime: Runtime) -> tuple[RuntimeFacts, Api]:
        """Find the newest version of the interface that a runtime speaks."""
        for api in APIS:
            try:
                return await timed("Version", self.path, runtime.version(api), self._pace.call_s), api
            except Unsupported:
                self._logger.debug("cri.other_version", endpoint=self.path, api=api)
        raise Unsupported(f"the CRI at {self.path}", f"it answers to none of {' and '.join(APIS)}", "is containerd's cri plugin disabled?")

    def _fail(self, error: Exception, begun_s: float) -> None:
        self._took_s = self._now_s() - begun_s
        self._n_rounds += 1
        self._n_failed += 1
        self._n_failed_in_row += 1
        code = error.code if isinstance(error, IsopodError) else "bug"
        self._errors[code] += 1
        is_new, self._error = self._error != str(error), str(error)
        self._state = "away" if isinstance(error, NotStarted) else "failing"
        if not isinstance(error, IsopodError):
            trace = "".join(traceback.format_exception(error))
            self._logger.error("cri.bug", endpoint=self.path, error=repr(error), traceback=trace)
        elif is_new:
            self._logger.warning("cri.failed", endpoint=self.path, code=code, why=error.message, hint=error.hint, kept=len(self._pods))

    def _next_pause_s(self, pause_s: float) -> float:
        """Return how long to rest after a round that succeeded: twice as long as before it."""
        return min(self._pace.refresh_s, max(2 * pause_s, self._pace.share * self._took_s))

    def _retry_s(self) -> float:
        if self._state == "away":
            return self._pace.look_s
        full_s = min(self._pace.retry_max_s, self._pace.retry_first_s * 2.0 ** min(self._n_failed_in_row - 1, 16))
        return full_s * (1 - 0.5 * self._chance.random())

    async def _rest(self, pause_s: float) -> bool:
        """Wait; return whether a wake cut it short, which it does, but not below what the runtime can bear."""
        begun_s = self._now_s()
        try:
            async with asyncio.timeout(pause_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        least_s = self._pace.share * self._took_s if self._state == "known" else self._pace.look_s
        await asyncio.sleep(max(self._pace.soon_s, begun_s + min(pause_s, least_s) - self._now_s()))
        return True

    async def _disconnect(self) -> None:
        runtime, self._runtime, self._api = self._runtime, None, None
        if runtime is not None:
            try:
                async with asyncio.timeout(self._pace.call_s):
                    await runtime.close()
            except Exception as error:  # noqa: BLE001  what is let go of cannot be mended
                self._logger.debug("cri.close_failed", endpoint=self.path, why=repr(error))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def socket_path(endpoint: str) -> str:
    """Return the path of the socket that an endpoint names.

    Args:
        endpoint: "unix:///run/x.sock", "unix:/run/x.sock" or "/run/x.sock".

    Raises:
        InvalidArgument: It names none: another scheme (tcp), a relative path, one too long for a socket.
    """
    path = endpoint.removeprefix("unix:")
    if path.startswith("//") and path != endpoint:
        path = path[2:]
    scheme, colon, _ = path.partition("://")
    if colon:
        raise InvalidArgument("runtime endpoint", endpoint, f"{scheme} is not spoken: a runtime is asked by a local socket", _HINT)
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument("runtime endpoint", endpoint, "want an absolute path", _HINT)
    if len(path.encode()) > SOCKET_PATH_BYTES_MAX:
        raise InvalidArgument("runtime endpoint", endpoint, f"a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes")
    return path


async def open_by_grpc(world: World, path: str) -> Runtime:
    """Open a runtime by grpcio, which is loaded now and not before: 15 MB that an agent without a runtime does not pay."""
    from isopod.pulse import cri_client  # noqa: PLC0415

    return await cri_client.open_runtime(world.disk, path)


_HINT: Final = "for example unix:///run/containerd/containerd.sock; none for no runtime"
