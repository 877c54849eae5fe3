"""CriSource: asks the container runtime whose the sandboxes are, again and again, and keeps asking whatever becomes of the runtime.

A round is two lists (pods, and the containers that run). After a wake it asks at once and then at pauses that double, from a tenth of a
second to twenty: a sandbox's folder is there seconds before its runtime lists it, and its containers come later still. A runtime that
is slow is asked less often: within those twenty seconds a pause is nine times as long as the round before it. A round that fails changes
nothing of what is known; the next one begins with a new connection and with v1 of the interface, since a runtime that was restarted may be
another one, after a pause that doubles and varies. An endpoint without a socket costs one look at the file and loads nothing.

How a runtime is spoken to is a `Runtime`, which has one form: grpcio's asyncio client (`cri_client`), on the host. The simulation has no
CRI; what is in this file runs there too.

Rules: every call has a deadline; nothing that a runtime says or does ends `run`.
Source: Kubernetes' Container Runtime Interface, v1 and v1alpha2.
"""

import asyncio
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple, Protocol, TypeVar

from isopod.pulse.model import Pod
from isopod.pulse.pods import ContainerRow, PodRow, Wanted, join, wanted
from isopod.runtime.logger import Logger
from isopod.world.errors import DeadlineExceeded, InvalidArgument, IsopodError, NotStarted, Unsupported
from isopod.world.world import World

T = TypeVar("T")
Api = Literal["v1", "v1alpha2"]
State = Literal["away", "failing", "known"]
APIS: Final[tuple[Api, ...]] = ("v1", "v1alpha2")
PODS_MAX: Final = 20_000
SOCKET_PATH_BYTES_MAX: Final = 107


class Pace(NamedTuple):
    """How often and how long a runtime is asked. Times are in seconds."""

    soon_s: float = 0.1
    """Wakes within so long make one round, and it is the first pause after one."""
    refresh_s: float = 20.0
    """The longest pause between two rounds."""
    call_s: float = 5.0
    """The deadline of each call, connecting included."""
    look_s: float = 1.0
    """How often an endpoint that is not there is looked for, and the shortest pause after a failure that a wake can cut."""
    retry_first_s: float = 0.5
    retry_max_s: float = 30.0
    share: float = 9.0
    """A pause is at least so many times as long as the round before it."""


PACE: Final = Pace()


class RuntimeFacts(NamedTuple):
    """What a runtime says of itself."""

    name: str
    version: str


class Runtime(Protocol):
    """A connection to a runtime that is made when it is first used. Who opened it closes it.

    Every call raises Unsupported if the runtime does not speak that version of the interface, else whatever IsopodError fits.
    """

    async def version(self, api: Api) -> RuntimeFacts:
        """Return what it is."""

    async def pods(self, api: Api, want: Wanted) -> Sequence[PodRow]:
        """Return all sandboxes, with no more of labels and annotations than is wanted."""

    async def containers(self, api: Api) -> Sequence[ContainerRow]:
        """Return the containers that run."""

    async def close(self) -> None:
        """End the connection."""


OpenRuntime = Callable[[World, str], Awaitable[Runtime]]
"""Opens the runtime behind a socket's path."""


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


class CriSource:
    """Tells whose sandboxes are. Run it; cancelling `run` closes the connection.

    Args:
        world: Where the runtime is.
        endpoint: Its socket: a path, with or without "unix://" before it.
        on_pods: Told after every round that changed something; it gets all pods. A pod that is not among them any more is one that the
            runtime has removed.
        logger: Told of the runtime's comings and goings.
        pod_labels: Labels of pods to keep, by name.
        pod_annotations: The same of annotations.
        pace: How often it asks, and for how long.
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
        pod_labels: Sequence[str] = (),
        pod_annotations: Sequence[str] = (),
        pace: Pace = PACE,
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
        )

    async def run(self) -> None:
        """Ask until cancelled."""
        fresh_s = pause_s = self._pace.soon_s / 2  # the first pause is twice this
        try:
            while True:
                self._woken.clear()
                is_known = await self._round()
                pause_s = self._next_pause_s(pause_s) if is_known else fresh_s
                if await self._rest(pause_s if is_known else self._retry_s()):
                    pause_s = fresh_s
        finally:
            await self._disconnect()

    # --- inside -------------------------------------------------------------------------------------------------------

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
        pods = await self._timed("ListPodSandbox", runtime.pods(api, self._want))
        containers = await self._timed("ListContainers", runtime.containers(api))
        found = join(pods, containers, self._want, pods_max=PODS_MAX)
        if found != self._pods or self._known_s is None:
            self._on_pods(dict(found))
            self._pods, self._n_containers = found, sum(len(pod.containers) for pod in found.values())

    async def _agree(self, runtime: Runtime) -> tuple[RuntimeFacts, Api]:
        """Find the newest version of the interface that a runtime speaks."""
        for api in APIS:
            try:
                return await self._timed("Version", runtime.version(api)), api
            except Unsupported:
                self._logger.debug("cri.other_version", endpoint=self.path, api=api)
        raise Unsupported(f"the CRI at {self.path}", f"it answers to none of {' and '.join(APIS)}", "is containerd's cri plugin disabled?")

    async def _timed(self, name: str, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._pace.call_s):
                return await call
        except TimeoutError:
            raise DeadlineExceeded(f"{name} of {self.path}", self._pace.call_s) from None

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
