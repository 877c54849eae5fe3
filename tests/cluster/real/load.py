"""Clients of real nodes, everything they were told, and what must be true of it.

They are the simulation's clients with the simulation's checks. One client is tied to each node, also to one that is cut off from the rest
or does not answer: what such a node answers must be true as well. The others go wherever the store answers; they show whether it does.
"""

import asyncio
import random
import time
from typing import Final, NamedTuple, Self

from isopod.api.store import StoreClient
from isopod.testing import wait_for_condition_with_backoff
from isopod.testing.asides import Asides
from isopod.testing.clients import Client, revision_violations
from isopod.testing.history import History
from isopod.testing.linearize import Verdict, check_linearizable
from isopod.testing.plan import Step
from isopod.testing.specifications import Register
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.real.rig import Rig

N_ROAMING: Final = 3
N_KEYS: Final = 5
PACE_S: Final = 0.03
"""Who has been answered is asked the next thing after this, at most 33 times a second."""
SAMPLE_S: Final = 0.5
WHAT: Final = ("get", "put", "swap", "delete")
WEIGHTS: Final = (8, 7, 4, 1)
QUIET_S: Final = 30.0


class Said(NamedTuple):
    """What a load came to."""

    n_answered: int
    n_unknown: int
    n_refused: int
    errors: dict[str, int]


class Load:
    """Clients that are busy from entering until `finish`. Use in `async with`.

    Args:
        world: The host's.
        rig: Whose nodes.
        seed: Draws what is asked.
        pad_bytes: How much longer values are than they need to be.
    """

    def __init__(self, world: World, rig: Rig, *, seed: int, pad_bytes: int = 0) -> None:
        self.history: Final = History()
        self._world = world
        self._rig = rig
        self._draw = random.Random(seed)
        self._pad = "." * pad_bytes
        self._keys: Final = [f"real-{seed}-{time.monotonic_ns()}/{number}" for number in range(N_KEYS)]
        addresses = [UnixAddress(node.socket) for node in rig.nodes.values()]
        self._roaming: Final = [_client(100 + number, self.history) for number in range(N_ROAMING)]
        self._tied: Final = {number: _client(number, self.history) for number in rig.nodes}
        self._ways: Final = {client.number: [*addresses[client.number % 3 :], *addresses[: client.number % 3]] for client in self._roaming}
        self._ways.update({number: [UnixAddress(rig.nodes[number].socket)] for number in self._tied})
        self._stores: list[StoreClient] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._n_asked = 0
        self._is_asking = True
        self._digests: dict[int, dict[str, int]] = {}
        self._leaders: dict[int, dict[int, None]] = {}

    @property
    def clients(self) -> list[Client]:
        """All of them."""
        return [*self._roaming, *self._tied.values()]

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for client in self.clients:
            store = StoreClient(self._world, self._ways[client.number])
            self._stores.append(store)
            self._tasks.append(loop.create_task(client.run(store), name=f"client {client.number}"))
        self._tasks.append(loop.create_task(self._ask(), name="asking"))
        self._tasks.append(loop.create_task(self._observe(), name="observing"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for store in self._stores:
            await store.close()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    # --- while it runs ------------------------------------------------------------------------------------------------

    async def progress(self, n: int = 20, *, within_s: float) -> float:
        """Wait until the roaming clients were answered `n` more writes; return how many seconds that took.

        Raises:
            AssertionError: Not in time.
        """
        before, began = self._n_written(), time.monotonic()
        await self._rig.until(lambda: self._n_written() >= before + n, f"{n} more writes are answered", within_s)
        return time.monotonic() - began

    async def answers_of(self, number: int, n: int = 5, *, within_s: float) -> None:
        """Wait until the client that is tied to a node got answers again."""
        client = self._tied[number]
        before = client.n_answered
        await self._rig.until(lambda: client.n_answered >= before + n, f"node {number} answers its client", within_s)

    # --- and in the end -----------------------------------------------------------------------------------------------

    async def finish(self) -> Said:
        """Undo all faults, ask nothing more but what every node holds in the end, and check what was said.

        Raises:
            AssertionError: Something contradicts something.
        """
        self._rig.undo()
        await self._rig.wait_ready(self._world)
        self._is_asking = False
        await self._quiet()
        for client in self._tied.values():
            for key in self._keys:
                client.ask(Step(0, "get", key=key))
        unanswered = {number: client.n_unknown + client.n_refused for number, client in self._tied.items()}
        await self._quiet()
        assert {number: client.n_unknown + client.n_refused for number, client in self._tied.items()} == unanswered, "each node answers"
        await self._rig.wait_equal(self._world)
        self.check()
        return self.said()

    def check(self) -> None:
        """Check what was said so far."""
        finding = check_linearizable(self.history.operations(), Register())
        assert finding.verdict is Verdict.LINEARIZABLE, finding.explain()
        assert revision_violations([glance for client in self.clients for glance in client.glances]) == []
        assert {index: digests for index, digests in self._digests.items() if len(digests) > 1} == {}, "equal states at equal index"
        assert {term: list(leaders) for term, leaders in self._leaders.items() if len(leaders) > 1} == {}, "one leader a term"

    def said(self) -> Said:
        """Return how operations ended."""
        errors: dict[str, int] = {}
        for client in self.clients:
            for code, n in client.errors.items():
                errors[code] = errors.get(code, 0) + n
        clients = self.clients
        n_answered = sum(client.n_answered for client in clients)
        return Said(n_answered, sum(client.n_unknown for client in clients), sum(client.n_refused for client in clients), errors)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _n_written(self) -> int:
        return sum(glance.wrote for client in self._roaming for glance in client.glances)

    async def _quiet(self) -> None:
        idle = "all clients have their answers"
        await wait_for_condition_with_backoff(lambda: all(client.is_idle for client in self.clients), what=idle, timeout_s=QUIET_S)

    async def _ask(self) -> None:
        """Keep every client busy."""
        while self._is_asking:
            for client in self.clients:
                if client.is_idle:
                    [do] = self._draw.choices(WHAT, WEIGHTS)
                    self._n_asked += 1
                    client.ask(Step(0, do, key=self._draw.choice(self._keys), value=f"{client.number}:{self._n_asked}{self._pad}"))
            await asyncio.sleep(PACE_S)

    async def _observe(self) -> None:
        """Note what nodes say of themselves: who leads which term, and what is the state at which index."""
        while True:
            for status in await self._rig.statuses(self._world):
                if status is None:
                    continue
                if status.digest:
                    self._digests.setdefault(status.applied, {})[status.digest] = status.node_id
                if status.state == "leader":
                    self._leaders.setdefault(status.term, {})[status.node_id] = None
            await asyncio.sleep(SAMPLE_S)


def _client(number: int, history: History) -> Client:
    return Client(number, history, Asides(number, time.monotonic_ns))
