"""Deliberate mutations: bugs that real systems have had, each put between a node and one of its parts. The checkers must find each.

None of them is in the product, and none can be switched on there: a test hands `Tampering` to the rig, which hands wrapped parts to the
nodes. Each class says which bug it is, and where such a bug was met.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from heapq import heappush
from typing import Any, NamedTuple

import msgspec

from isopod.api.store.messages import Command
from isopod.cluster.raft.core import ConfState, CoreConfig, Ready
from isopod.cluster.raft.ports import StateMachine
from isopod.cluster.store.hub import WatchHub
from isopod.cluster.store.lessor import Lessor
from isopod.cluster.store.machine import StoreMachine
from isopod.testing.rig import Tampering
from isopod.testing.scenarios import Scenario, scenario
from isopod.world.disk import Data, DataFile
from isopod.world.world import World


class Wrapper:
    """Hands everything on to what it wraps."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


# --- the core -----------------------------------------------------------------------------------------------------------


class ForgetsHardState(Wrapper):
    """Term and vote are not written down: after a restart a node votes again in a term in which it has voted."""

    def ready(self) -> Ready | None:
        ready: Ready | None = self._wrapped.ready()
        return None if ready is None else ready._replace(hard_state=b"")


class SendsBeforeItIsDurable(Wrapper):
    """Votes and acknowledgements leave before what they promise is on disk (etcd-io/etcd#10166: a lost tail after it was acknowledged)."""

    def ready(self) -> Ready | None:
        ready: Ready | None = self._wrapped.ready()
        if ready is None:
            return None
        return ready._replace(messages=[*ready.messages, *ready.persisted_messages], persisted_messages=[])


class ReadsWithoutBarrier(Wrapper):
    """Whoever is asked answers reads from what it knows to be committed, without asking whether others know more (tikv/tikv#9239)."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self._asked: list[bytes] = []

    def read_index(self, context: bytes) -> None:
        self._asked.append(context)

    def ready(self) -> Ready | None:
        ready: Ready | None = self._wrapped.ready()
        if not self._asked:
            return ready
        commit = self._wrapped.status().commit
        states = [(context, commit) for context in self._asked]
        self._asked.clear()
        if ready is None:
            ready = Ready(0, None, b"", b"", 0, 0, False, [], [], [], None, [], [])
        return ready._replace(read_states=[*ready.read_states, *states])

    def on_persisted(self, number: int) -> None:
        if number:
            self._wrapped.on_persisted(number)


def forget_members(config: CoreConfig) -> CoreConfig:
    """Open a core that has a log without its members."""
    return config._replace(conf_state=ConfState()) if config.records else config


def forget_members_of_snapshot(config: CoreConfig) -> CoreConfig:
    """Open a core that begins with a snapshot of its own without the members that the snapshot names."""
    return config._replace(conf_state=ConfState()) if config.snapshot_index > 1 else config


# --- the disk -----------------------------------------------------------------------------------------------------------


class LyingFile(Wrapper):
    """A file whose durable writes only reach the page cache."""

    async def write_durable(self, offset: int, data: Data) -> None:
        await self._wrapped.write_at(offset, data)


class LyingDisk(Wrapper):
    """Acknowledges before the flush."""

    async def open_file(self, *args: Any, **options: Any) -> DataFile:
        return LyingFile(await self._wrapped.open_file(*args, **options))


class ForgetsNames(Wrapper):
    """Makes files durable, but not the folders that name them: after a power cut a new or renamed file may be gone or the old one."""

    async def sync_directory(self, path: str) -> None:
        await asyncio.sleep(0)


# --- the machine --------------------------------------------------------------------------------------------------------

_decode = msgspec.msgpack.Decoder(Command).decode
_encode = msgspec.msgpack.Encoder().encode


class ForgetsSessions(StoreMachine):
    """Does not look whether a command came before: one that a client sent again is applied again."""

    def _apply(self, data: bytes) -> bytes:
        command = _decode(data)
        return super()._apply(_encode(msgspec.structs.replace(command, session=0)))


class TrustsItsOwnClock(StoreMachine):
    """Takes the time from its own machine instead of the log: leases and sessions end at other times on other nodes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def apply(self, batch: Any) -> list[bytes]:
        return super().apply(batch._replace(stamp_ns=self._world.clock.now_ns()))


class LeavesOneOut(StoreMachine):
    """After a restart from a snapshot the first entry counts as applied, which it is not: the index was kept apart from the state."""

    _is_restored = False

    def restore(self, data: bytes) -> None:
        super().restore(data)
        self._is_restored = self.index > 1

    def apply(self, batch: Any) -> list[bytes]:
        if not self._is_restored:
            return super().apply(batch)
        self._is_restored = False
        before = self.snapshot()
        results = super().apply(batch)
        super().restore(before)
        return results


class Hasty:
    """The leases' clock, told of half the time that a lease was granted (a unit mixed up on its way)."""

    def __init__(self, lessor: Any) -> None:
        self._lessor = lessor

    def on_changes(self, changes: Sequence[Any]) -> None:
        known = dict(self._lessor._ends)
        self._lessor.on_changes(changes)
        now = asyncio.get_running_loop().time()
        for number, end in list(self._lessor._ends.items()):
            if number not in known:
                self._lessor._ends[number] = sooner = now + (end - now) / 2
                heappush(self._lessor._heap, (sooner, number))
                self._lessor._arm()

    def on_restored(self) -> None:
        self._lessor.on_restored()


class HalvesLeases(StoreMachine):
    """Ends leases after half of their time."""

    def listen(self, listener: Any) -> None:
        super().listen(Hasty(listener) if isinstance(listener, Lessor) else listener)

    def unlisten(self, listener: Any) -> None:
        self._listeners = [each for each in self._listeners if each is not listener and getattr(each, "_lessor", None) is not listener]


class Deaf:
    """A listener that is not told of every seventh change of a client's key."""

    def __init__(self, listener: Any) -> None:
        self._listener = listener

    def on_changes(self, changes: Sequence[Any]) -> None:
        self._listener.on_changes([each for each in changes if each.mod_revision % 7 or not each.key.startswith("key")])

    def on_restored(self) -> None:
        self._listener.on_restored()


class DoesNotTellAll(StoreMachine):
    """Loses changes on their way to watchers: a queue that is emptied while it is filled (etcd-io/etcd#11495)."""

    def listen(self, listener: Any) -> None:
        super().listen(Deaf(listener) if isinstance(listener, WatchHub) else listener)

    def unlisten(self, listener: Any) -> None:
        self._listeners = [each for each in self._listeners if each is not listener and getattr(each, "_listener", None) is not listener]


class Mutation(NamedTuple):
    """One of them: what is broken, and a scenario in which it should show within `n_seeds` seeds.

    `first_seed` only saves time: it is one that found it once. `rule` is what must find it, "" for any.
    """

    name: str
    about: str
    tampering: Tampering
    source: Scenario
    n_seeds: int = 10
    first_seed: int = 1
    rule: str = ""


def _on_core(wrap: Callable[[Any], Any]) -> Tampering:
    return Tampering(core=lambda core, _config: wrap(core))


def _on_disk(wrap: Callable[[Any], Any]) -> Tampering:
    return Tampering(world=lambda world: dataclasses.replace(world, disk=wrap(world.disk)))


def _forgets_sessions(_world: World) -> StateMachine:
    return ForgetsSessions()


def _leaves_one_out(_world: World) -> StateMachine:
    return LeavesOneOut()


def _halves_leases(_world: World) -> StateMachine:
    return HalvesLeases()


def _does_not_tell_all(_world: World) -> StateMachine:
    return DoesNotTellAll()


POWER = scenario("crashes")._replace(
    faults={"blackout": 2, "power_cut": 4, "slow_disk": 2, "kill": 1},
    must=("blackout", "power_cut", "slow_disk"),
    fault_every_s=0.7,
    asides_per_s=0.0,
)
"""Power fails often, and disks are slow, so that much is under way when it does."""
SLOW_POWER = POWER._replace(faults={"blackout": 4, "power_cut": 4, "slow_disk": 6}, operations_per_s=80.0, fault_every_s=0.4)
"""The same, worse."""
DEPOSED = scenario("partitions")._replace(
    faults={"isolate": 4, "one_way": 3, "split": 2, "hang": 2, "slow_link": 3}, operations_per_s=150.0, keys=2, nodes=3, fault_every_s=0.8
)
"""Leaders lose touch while clients of theirs go on reading."""
RESTARTS = scenario("snapshots")
NAMES = RESTARTS._replace(faults={"power_cut": 4, "blackout": 2, "compact": 3}, must=("power_cut", "blackout"), fault_every_s=0.7)
"""Power fails while snapshots are made."""
LOSSY = scenario("partitions")._replace(
    faults={"reset": 4, "kill": 2, "slow_link": 3, "isolate": 2},
    must=("reset", "kill"),
    operations_per_s=120.0,
    keys=2,
    nodes=3,
    fault_every_s=0.5,
)
"""Answers are lost, so commands are sent again."""
ONLOOKERS = scenario("onlookers")
AGES = ONLOOKERS._replace(faults={"isolate": 4, "one_way": 3, "split": 2}, must=("isolate", "split"), asides_per_s=60.0)
"""Nodes lose touch while they are read from."""

MUTATIONS: Sequence[Mutation] = (
    Mutation("acknowledge before the flush", "write_durable returns when the page cache has it", _on_disk(LyingDisk), POWER),
    Mutation("hard state not written", "term and vote are forgotten by a restart", _on_core(ForgetsHardState), scenario("crashes")),
    Mutation(
        "members forgotten", "a core is opened without its ConfState", Tampering(core_config=forget_members), scenario("crashes"), 10, 5
    ),
    Mutation(
        "sent before durable", "votes and acknowledgements leave before the flush", _on_core(SendsBeforeItIsDurable), SLOW_POWER, 40, 38
    ),
    Mutation("read without barrier", "who is asked answers reads by itself", _on_core(ReadsWithoutBarrier), DEPOSED, 20),
    Mutation("sessions off", "a repeated command is applied again", Tampering(machine=_forgets_sessions), LOSSY, 20),
    Mutation(
        "snapshot without members",
        "a snapshot is opened without its ConfState",
        Tampering(core_config=forget_members_of_snapshot),
        RESTARTS,
        20,
        13,
    ),
    Mutation("names not flushed", "a folder is not flushed after a file in it was made or renamed", _on_disk(ForgetsNames), NAMES, 40, 4),
    Mutation("own clock", "the machine asks its own clock instead of the log", Tampering(machine=TrustsItsOwnClock), scenario("clocks")),
    Mutation(
        "damage repaired away",
        "a damaged log is cut, and its node goes on as if it had promised nothing else",
        Tampering(repairs_always=True),
        scenario("damage"),
        rule="durable log",
    ),
    Mutation(
        "age of reads", "a read says that it is new, by a proof that proves nothing", _on_core(ReadsWithoutBarrier), AGES, 20, rule="reads"
    ),
    Mutation(
        "change not told", "changes are lost on their way to watchers", Tampering(machine=_does_not_tell_all), ONLOOKERS, rule="watches"
    ),
    Mutation("half a lease", "leases end after half of their time", Tampering(machine=_halves_leases), ONLOOKERS, rule="leases"),
    Mutation("entry left out", "after a restart an entry counts as applied that is not", Tampering(machine=_leaves_one_out), RESTARTS),
)
