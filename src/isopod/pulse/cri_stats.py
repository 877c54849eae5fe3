"""StatsRounds: asks a container runtime what each container has used, beside the rounds that ask whose the sandboxes are.

It goes on by itself over the connection that `cri` makes, so that a runtime that counts slowly keeps no label waiting. Rounds come at an
interval, each at its time; containers that have come since bring the next one forward, to no earlier than a quarter of the interval after
the last. After a round it rests nine times as long as that took. Nothing is asked while no sandbox is known whose figures are shown.

A round is one call for all containers. A runtime that asks its shims in turn answers none of it while a single one hangs, and some fail
as a whole because of one container: then, and for as long as some do, it is asked about the sandboxes one by one, `AT_ONCE` at a time, and
only those that hang or fail are without figures.

A round that fails changes nothing at first; after three intervals without one that succeeds it is told that nothing is known any more. A
runtime that does not know the call is asked again over the next connection, not before.

Rules: the call has a deadline; nothing that a runtime says or does ends `run`; the connection is not touched.
Source: ListContainerStats of Kubernetes' Container Runtime Interface.
"""

import asyncio
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal, NamedTuple

from isopod.pulse.cri_runtime import Api, Pace, Runtime, timed
from isopod.pulse.model import ContainerStats, Pod, SandboxStats
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, PeerError, Unsupported
from isopod.world.world import World

StatsState = Literal["unasked", "known", "failing", "unsupported"]
CALL: Final = "ListContainerStats"
KEPT_INTERVALS: Final = 3
"""So long figures are kept that no round confirms."""
EARLY_PART: Final = 0.25
"""Of the interval: what new containers have to wait at least."""
AT_ONCE: Final = 8
IN_VAIN: Final = 32
"""After so many sandboxes of which none could be told of it is the runtime that fails."""
_NO_FIGURES: Final = ContainerStats("")


class Connection(NamedTuple):
    """A runtime that answers, in which version of the interface."""

    runtime: Runtime
    api: Api


class StatsStatistics(NamedTuple):
    """What was asked. Times are of the loop."""

    state: StatsState = "unasked"
    n_containers: int = 0
    """Of how many figures were told last."""
    n_rounds: int = 0
    n_failed: int = 0
    error: str = ""
    """What failed last, "" while nothing does."""
    took_s: float = 0.0
    known_s: float | None = None
    """When a round last succeeded."""


class _Asked:
    """A round in which sandboxes are asked about one by one."""

    def __init__(self, waiting: list[str]) -> None:
        self.waiting = waiting
        self.rows: list[ContainerStats] = []
        self.failures: list[IsopodError] = []


class StatsRounds:
    """Asks what containers have used. Run it until it is cancelled.

    Args:
        world: Whose chance.
        path: The runtime's socket, for messages.
        connection: Returns how the runtime is reached now, None while it is not.
        pods: Returns the pods that are known now, by sandbox.
        is_shown: Whether a sandbox's figures are shown at all.
        on_stats: Told after every round, of all sandboxes that are shown; None says that nothing is known any more.
        logger: Told when it begins to fail, and when it works.
        interval_s: How often it asks.
        pace: For how long, and the rest after it.
    """

    def __init__(
        self,
        world: World,
        path: str,
        *,
        connection: Callable[[], Connection | None],
        pods: Callable[[], Mapping[str, Pod]],
        is_shown: Callable[[str], bool],
        on_stats: Callable[[SandboxStats | None], None],
        logger: Logger,
        interval_s: float,
        pace: Pace,
    ) -> None:
        self._path = path
        self._connection = connection
        self._pods = pods
        self._is_shown = is_shown
        self._on_stats = on_stats
        self._logger = logger
        self._interval_s = interval_s
        self._pace = pace
        self._chance = world.random.stream("pulse.cri_stats")
        self._looked = asyncio.Event()
        self._unable: Runtime | None = None
        """The connection over which the call is not known."""
        self._covered: dict[str, None] = {}
        """The containers that were there in the last round."""
        self._planned_s = 0.0
        """When the next round is due."""
        self._rested_s = 0.0
        """Until when nothing is asked, whatever is due."""
        self._expires_s: float | None = None
        """When it is told that nothing is known any more, None if that is told, or there is nothing to tell."""
        self._n_failed_in_row = 0
        self._is_split = False
        """Whether sandboxes are asked about one by one."""
        self._said = StatsStatistics()

    def look(self) -> None:
        """See whether there is something to ask: the pods or the connection may have changed."""
        self._looked.set()

    def statistics(self) -> StatsStatistics:
        """Return what was asked so far."""
        return self._said

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            self._looked.clear()
            connection = self._connection()
            if connection is not None and connection.runtime is self._unable:
                connection = None
            due_s = self._due_s() if connection is not None else None
            now_s = self._now_s()
            if connection is not None and due_s is not None and due_s <= now_s:
                await self._round(connection)
            elif self._expires_s is not None and self._expires_s <= now_s:
                self._give_up()
            else:
                await self._rest(min((each for each in (due_s, self._expires_s) if each is not None), default=None))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _due_s(self) -> float | None:
        """Return when to ask next, None while nothing is shown."""
        shown = [pod for identifier, pod in self._pods().items() if self._is_shown(identifier)]
        if not any(pod.containers for pod in shown):
            return None
        due_s = self._planned_s
        if any(container.id not in self._covered for pod in shown for container in pod.containers):
            due_s = min(due_s, self._planned_s - self._interval_s * (1 - EARLY_PART))
        return max(due_s, self._rested_s)

    async def _round(self, connection: Connection) -> None:
        """Ask once."""
        begun_s = self._now_s()
        if self._expires_s is None and self._said.known_s is None and not self._n_failed_in_row:
            self._expires_s = begun_s + KEPT_INTERVALS * self._interval_s
        try:
            told = self._joined(await self._rows(connection))
            self._on_stats(told)
        except Exception as error:  # noqa: BLE001  whatever a runtime makes fail here must not end the agent
            self._fail(error, begun_s, connection)
            return
        now_s = self._now_s()
        took_s = now_s - begun_s
        self._rested_s = now_s + self._pace.share * took_s
        self._expires_s = self._rested_s + KEPT_INTERVALS * self._interval_s
        # Each round at its time: a pause that is counted from the end of the last one would drift against the rounds of shims.
        is_late = self._planned_s + self._interval_s <= now_s or begun_s < self._planned_s
        self._planned_s = (begun_s if is_late else self._planned_s) + self._interval_s
        self._n_failed_in_row = 0
        n_containers = sum(len(each) for each in told.values())
        if self._said.state != "known":
            self._logger.info("cri.stats_known", endpoint=self._path, containers=n_containers)
        self._said = self._said._replace(
            state="known", n_containers=n_containers, n_rounds=self._said.n_rounds + 1, error="", took_s=took_s, known_s=now_s
        )

    async def _rows(self, connection: Connection) -> dict[str, ContainerStats]:
        """Return what the runtime says of containers, by their ids."""
        if not self._is_split:
            call = connection.runtime.stats(connection.api)
            try:
                return _by_id(await timed(CALL, self._path, call, self._pace.stats_call_s))
            except Disconnected:
                raise
            except (DeadlineExceeded, PeerError):
                self._is_split = True
        asked = _Asked([identifier for identifier, pod in self._pods().items() if pod.containers and self._is_shown(identifier)])
        self._chance.shuffle(asked.waiting)  # those that hang are seldom all of the first ones then
        try:
            async with asyncio.timeout(self._pace.stats_call_s), TaskGroup("cri stats") as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._ask(asked, connection))
        except TimeoutError:
            asked.failures.append(DeadlineExceeded(f"{CALL} of {self._path}", self._pace.stats_call_s))
        if asked.failures and not asked.rows:
            raise asked.failures[0]
        self._is_split = bool(asked.failures)
        return _by_id(asked.rows)

    async def _ask(self, asked: "_Asked", connection: Connection) -> None:
        """Ask about sandboxes that wait for it until there are none, or it seems in vain."""
        while asked.waiting and (asked.rows or len(asked.failures) < IN_VAIN):
            now = self._connection()
            if now is None or now.runtime is not connection.runtime:
                asked.failures.append(Disconnected(self._path, f"{CALL}: the connection was let go of"))
                return
            call = connection.runtime.stats(connection.api, asked.waiting.pop())
            try:
                asked.rows += await timed(CALL, self._path, call, self._pace.stats_each_s)
            except IsopodError as error:
                asked.failures.append(error)

    def _joined(self, rows: Mapping[str, ContainerStats]) -> SandboxStats:
        """Return what is known of the containers of each sandbox that is shown."""
        told: SandboxStats = {}
        covered: dict[str, None] = {}
        for identifier, pod in self._pods().items():
            if self._is_shown(identifier):
                found = [rows[each.id] for each in pod.containers if each.id in rows]
                told[identifier] = tuple(row for row in found if row[1:-1] != _NO_FIGURES[1:-1])
                covered.update(dict.fromkeys(each.id for each in pod.containers))
        self._covered = covered
        return told

    def _fail(self, error: Exception, begun_s: float, connection: Connection) -> None:
        now_s = self._now_s()
        self._n_failed_in_row += 1
        retry_s = min(self._interval_s, self._pace.retry_max_s, self._pace.retry_first_s * 2.0 ** min(self._n_failed_in_row - 1, 16))
        self._rested_s = now_s + max(retry_s * (1 - 0.5 * self._chance.random()), self._pace.share * (now_s - begun_s))
        self._planned_s = self._rested_s
        is_new = self._said.error != str(error)
        state: StatsState = "failing"
        if isinstance(error, Unsupported):
            self._unable, state = connection.runtime, "unsupported"
            self._expires_s = now_s if self._expires_s is not None else None
        self._said = self._said._replace(
            state=state, n_rounds=self._said.n_rounds + 1, n_failed=self._said.n_failed + 1, error=str(error), took_s=now_s - begun_s
        )
        if not isinstance(error, IsopodError):
            trace = "".join(traceback.format_exception(error))
            self._logger.error("cri.bug", endpoint=self._path, error=repr(error), traceback=trace)
        elif is_new:
            self._logger.warning("cri.stats_failed", endpoint=self._path, code=error.code, why=error.message, hint=error.hint)

    def _give_up(self) -> None:
        """Tell that nothing is known any more."""
        self._expires_s = None
        self._covered = {}
        self._said = self._said._replace(n_containers=0)
        try:
            self._on_stats(None)
        except Exception as error:  # noqa: BLE001  a fault of who is told
            trace = "".join(traceback.format_exception(error))
            self._logger.error("cri.bug", endpoint=self._path, error=repr(error), traceback=trace)

    async def _rest(self, until_s: float | None) -> None:
        """Wait for a moment or a look, whichever comes first."""
        try:
            async with asyncio.timeout_at(until_s):
                await self._looked.wait()
        except TimeoutError:
            pass

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _by_id(rows: Iterable[ContainerStats]) -> dict[str, ContainerStats]:
    """Return what is said of containers that have an id; of two with one id the last counts."""
    return {row.id: row for row in rows if row.id}
