"""Clients of a simulated cluster: each asks one thing at a time, and writes down what it asked and was told.

A client is a process of its own on a machine of its own; what is asked of it while it still waits for an answer is done afterwards. An
answer, a refusal that says nothing was done, and everything else (a deadline, a lost connection: nobody knows) are told apart.

Beside the history of each key the store's revision is noted, which is one number for all keys: what is asked after an answer was given must
not see, or write, an older revision. That is cheap and holds across keys, where the search of `isopod.testing.linearize` looks at one.
"""

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Final, NamedTuple

from isopod.api.store.messages import Condition, Page, Txn, TxnResult
from isopod.api.store.messages import Delete as DeleteOp
from isopod.api.store.messages import Get as GetOp
from isopod.api.store.messages import Put as PutOp
from isopod.api.store.operations import StoreOperations
from isopod.testing.asides import Asides
from isopod.testing.history import History
from isopod.testing.plan import Step
from isopod.testing.specifications import Delete, Get, Put, Seen, Swap
from isopod.world.errors import InvalidArgument, IsopodError, NotStarted

TIMEOUT_S: Final = 5.0
NOT_DONE: Final = (InvalidArgument, NotStarted)
"""Errors that say: the request was not begun."""


class Glance(NamedTuple):
    """What revision an answered operation saw or made, and when it was under way."""

    invoked: int
    returned: int
    revision: int
    wrote: bool


class Client:
    """One client.

    Args:
        number: Who it is.
        history: Where it writes down what it asked.
        asides: What it does beside plain operations.
    """

    def __init__(self, number: int, history: History, asides: Asides) -> None:
        self.number: Final = number
        self.asides: Final = asides
        self.glances: list[Glance] = []
        self.n_answered = self.n_unknown = self.n_refused = 0
        self.errors: dict[str, int] = {}
        """How often each error came, by its code."""
        self._history = history
        self._store: StoreOperations | None = None
        self._waiting: deque[Step] = deque()
        self._wake = asyncio.Event()
        self._last_seen: dict[str, str | None] = {}
        self._is_idle = True

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return self._is_idle and not self._waiting

    def ask(self, step: Step) -> None:
        """Do this next, after what was asked before."""
        self._waiting.append(step)
        self._wake.set()

    async def run(self, store: StoreOperations) -> None:
        """Do what is asked, until cancelled."""
        self._store = store
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                self._is_idle = False
                step = self._waiting.popleft()
                await (self._do_aside(step) if self.asides.can(step.do) else self._do(step))
                self._is_idle = True

    async def _do_aside(self, step: Step) -> None:
        assert self._store is not None, "it runs"
        try:
            await self.asides.do(self._store, step)
        except NOT_DONE as error:
            self.n_refused += 1
            self._count(error)
        except IsopodError as error:
            self.n_unknown += 1
            self._count(error)
        else:
            self.n_answered += 1

    async def _do(self, step: Step) -> None:
        call = self._call(step)
        begun = self._history.invoke(self.number, step.key, call)
        try:
            result, revision, wrote = await self._carry_out(step.key, call)
        except NOT_DONE as error:
            self._history.refuse(begun)
            self.n_refused += 1
            self._count(error)
        except IsopodError as error:
            self.n_unknown += 1
            self._count(error)
        else:
            self._history.succeed(begun, result)
            self.n_answered += 1
            invoked, returned = self._history.span(begun)
            self.glances.append(Glance(invoked, returned, revision, wrote))
            self.asides.acknowledge(revision)

    def _call(self, step: Step) -> Put | Get | Delete | Swap:
        match step.do:
            case "put":
                return Put(step.value)
            case "delete":
                return Delete()
            case "swap":
                return Swap(self._last_seen.get(step.key), step.value)
        return Get()

    async def _carry_out(self, key: str, call: Put | Get | Delete | Swap) -> tuple[Hashable, int, bool]:
        """Return the answer in the specification's terms, the revision, and whether it wrote."""
        store = self._store
        assert store is not None, "it runs"
        match call:
            case Put(value):
                done = await store.txn(Txn((), (PutOp(key, value.encode()), GetOp(key))), timeout_s=TIMEOUT_S)
                self._last_seen[key] = value
                return _version_of(done), done.revision, True
            case Delete():
                done = await store.txn(Txn((Condition(key, "version", ">", 0),), (DeleteOp(key),)), timeout_s=TIMEOUT_S)
                self._last_seen[key] = None
                return done.succeeded, done.revision, done.succeeded
            case Swap(expected, value):
                done = await store.txn(Txn((_condition(key, expected),), (PutOp(key, value.encode()),)), timeout_s=TIMEOUT_S)
                if done.succeeded:
                    self._last_seen[key] = value
                return done.succeeded, done.revision, done.succeeded
        found = await store.get(key, timeout_s=TIMEOUT_S)
        entry = found.entry
        seen = Seen(None, 0) if entry is None else Seen(entry.value.decode(), entry.version)
        self._last_seen[key] = seen.value
        return seen, found.revision, False

    def _count(self, error: IsopodError) -> None:
        self.errors[error.code] = self.errors.get(error.code, 0) + 1


def revision_violations(glances: list[Glance]) -> list[str]:
    """Return where revisions contradict real time, in words.

    Args:
        glances: Of all clients, in any order.
    """
    found = []
    answered = sorted(glances, key=lambda glance: glance.returned)
    newest = newest_write = 0
    place = 0
    for glance in sorted(glances, key=lambda each: each.invoked):
        while place < len(answered) and answered[place].returned < glance.invoked:
            newest = max(newest, answered[place].revision)
            newest_write = max(newest_write, answered[place].revision if answered[place].wrote else 0)
            place += 1
        if glance.revision < newest:
            found.append(f"an operation begun at {glance.invoked} saw revision {glance.revision}, one answered before had {newest}")
        elif glance.wrote and glance.revision <= newest_write:
            found.append(f"a write begun at {glance.invoked} made revision {glance.revision}, one answered before had made {newest_write}")
    return found


def _condition(key: str, expected: str | None) -> Condition:
    if expected is None:
        return Condition(key, "version", "=", 0)
    return Condition(key, "value", "=", value=expected.encode())


def _version_of(done: TxnResult) -> int:
    page = done.results[-1]
    assert isinstance(page, Page)
    return page.entries[0].version
