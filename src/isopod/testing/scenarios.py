"""Scenarios: which faults a run may have, and how a plan is drawn from a seed.

A scenario is data: how many nodes, how many clients that ask how often, and the weight of each fault. Only what Raft promises to survive
may occur: crashes of any number of nodes whose disks keep what they flushed, loss and delay of anything on the network, wrong clocks. What
it does not promise is left out: a node that lies (byzantine), a disk that loses the last it had flushed without a trace, or a frame changed
on its way, which TCP and TLS refuse. A disk may damage what it keeps (bit rot, misdirected writes), on a minority of nodes at once, as long
as the damage can be seen: the node must see it.

The weights of "everything" follow the reference's randomized tester (start .10, stop .10, restart .05, client .30, partition .05, heal .05,
clock jump .02, clock drift .03, drop .10, duplicate .05, reorder .05, byzantine .05): starting, stopping and restarting are here kills and
hangs that end by themselves; loss, duplication and reordering are one bad network; the share of lies goes to disks and power.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from isopod.testing.plan import VERSION, Plan, Step
from isopod.world.errors import InvalidArgument
from isopod.world.sim.random import SimRandom

DEFAULT_SEED: Final = 12345
DEFAULT_SCENARIO: Final = "everything"


_T = TypeVar("_T")


class Chance(Protocol):
    """What is needed of a stream of chance."""

    def random(self) -> float:
        """Return a number from 0 to 1."""

    def randrange(self, stop: int, /) -> int:
        """Return a whole number from 0 on, below `stop`."""

    def expovariate(self, lambd: float) -> float:
        """Return a pause between events of that rate."""

    def choices(self, population: Sequence[_T], weights: Sequence[float]) -> list[_T]:
        """Return one of them in a list, drawn by their weights."""


class Scenario(NamedTuple):
    """What may happen.

    Args:
        name: How it is asked for.
        about: One line.
        faults: Weights by action; empty for none.
        nodes: How many voters, unless said otherwise.
        clients: How many clients.
        operations_per_s: What they ask together, in a virtual second.
        keys: How many keys they share.
        run_s: For how many virtual seconds faults and clients go on.
        fault_every_s: The mean pause between two faults.
        must: Faults that occur at least once, at a drawn time.
        snapshot_entries: A snapshot is made after so many entries; few of them make snapshots and compaction ordinary.
        asides_per_s: What further clients do beside plain operations in a virtual second: stale and cached reads, locks, leases; with
            them two watch.
    """

    name: str
    about: str
    faults: Mapping[str, float] = MappingProxyType({})
    nodes: int = 3
    clients: int = 4
    operations_per_s: float = 40.0
    keys: int = 5
    run_s: float = 12.0
    fault_every_s: float = 1.5
    must: tuple[str, ...] = ()
    snapshot_entries: int = 100_000
    asides_per_s: float = 0.0


_EVERYTHING: Final[Mapping[str, float]] = MappingProxyType(
    {
        "kill": 0.20,
        "hang": 0.05,
        "isolate": 0.04,
        "split": 0.03,
        "one_way": 0.03,
        "slow_link": 0.15,
        "reset": 0.05,
        "garbage": 0.01,
        "clock_step": 0.02,
        "clock_drift": 0.03,
        "power_cut": 0.05,
        "blackout": 0.01,
        "sync_error": 0.02,
        "slow_disk": 0.02,
        "full_disk": 0.02,
        "bit_rot": 0.01,
        "misdirect": 0.01,
        "crash_point": 0.06,
        "transfer": 0.04,
        "compact": 0.04,
        "grow": 0.02,
        "leave": 0.01,
    }
)

_ASIDES_PER_S: Final = 6.0
_DAMAGE: Final = ("bit_rot", "misdirect")

SCENARIOS: Final = (
    Scenario("idle", "three nodes and nobody who asks anything", clients=0, operations_per_s=0.0, run_s=60.0),
    Scenario("load", "clients and no faults", operations_per_s=100.0),
    Scenario(
        "partitions",
        "nodes are cut off, also in one direction only, connections break, links are slow and lossy",
        {"isolate": 3, "split": 2, "one_way": 2, "reset": 1, "slow_link": 2, "garbage": 0.5},
        nodes=5,
        must=("isolate", "split", "one_way"),
        asides_per_s=_ASIDES_PER_S,
    ),
    Scenario(
        "crashes",
        "processes are killed and stopped, machines lose power",
        {"kill": 3, "hang": 1, "power_cut": 3, "blackout": 1, "crash_point": 3},
        must=("kill", "power_cut"),
        asides_per_s=_ASIDES_PER_S,
    ),
    Scenario(
        "disks",
        "disks fail to flush, are slow or full, and lose what was not flushed",
        {"sync_error": 3, "slow_disk": 2, "full_disk": 2, "power_cut": 3},
        must=("sync_error", "full_disk", "power_cut"),
    ),
    Scenario(
        "damage",
        "bits rot in journals and writes land elsewhere: nodes refuse to start, and come back without what they had",
        {"bit_rot": 3, "misdirect": 3, "kill": 1, "power_cut": 1, "isolate": 1},
        run_s=15.0,
        must=("bit_rot", "misdirect"),
        snapshot_entries=150,
    ),
    Scenario(
        "clocks",
        "wall clocks jump by up to an hour and run wrong, while leaders change",
        {"clock_step": 3, "clock_drift": 3, "kill": 1, "isolate": 1},
        must=("clock_step", "clock_drift"),
        asides_per_s=_ASIDES_PER_S,
    ),
    Scenario(
        "members",
        "nodes join and leave while others fail",
        {"grow": 3, "leave": 3, "kill": 1, "isolate": 1, "transfer": 1},
        run_s=20.0,
        fault_every_s=3.0,
        must=("grow", "leave"),
    ),
    Scenario(
        "transfers",
        "leadership is handed over again and again, also while nodes fail",
        {"transfer": 6, "kill": 1, "isolate": 1, "hang": 1},
        fault_every_s=0.8,
        must=("transfer",),
    ),
    Scenario(
        "snapshots",
        "few entries make a snapshot, so nodes that were away catch up by one",
        {"kill": 2, "isolate": 3, "power_cut": 2, "compact": 3, "crash_point": 2, "slow_link": 1},
        operations_per_s=80.0,
        snapshot_entries=40,
        must=("compact", "isolate", "power_cut"),
    ),
    Scenario(
        "onlookers",
        "stale and cached reads, watches, locks and leases, while leaders change and nodes are away",
        {"kill": 2, "isolate": 3, "split": 1, "hang": 1, "transfer": 2, "compact": 1, "slow_link": 1, "clock_drift": 1},
        operations_per_s=20.0,
        fault_every_s=1.0,
        must=("kill", "isolate", "transfer"),
        snapshot_entries=60,
        asides_per_s=30.0,
    ),
    Scenario(
        "everything",
        "all faults together, weighted as real life and the reference have them",
        _EVERYTHING,
        nodes=3,
        run_s=12.0,
        fault_every_s=0.8,
        must=(
            "kill",
            "power_cut",
            "isolate",
            "reset",
            "garbage",
            "slow_link",
            "sync_error",
            "crash_point",
            "clock_step",
            "transfer",
            "compact",
            "grow",
            *_DAMAGE,
        ),
        snapshot_entries=150,
        asides_per_s=_ASIDES_PER_S,
    ),
)
"""All scenarios, the simple ones first."""


def scenario(name: str) -> Scenario:
    """Return the scenario of that name.

    Raises:
        InvalidArgument: There is none.
    """
    for each in SCENARIOS:
        if each.name == name:
            return each
    raise InvalidArgument("scenario", name, "there is no such one", f"want one of {', '.join(each.name for each in SCENARIOS)}")


def make_plan(source: Scenario, seed: int, *, nodes: int | None = None, run_s: float | None = None) -> Plan:
    """Draw a plan: the same for the same arguments, in any process.

    Args:
        source: What may happen.
        seed: Decides the plan, and later the run.
        nodes: How many voters, None for the scenario's number.
        run_s: For how many virtual seconds, None for the scenario's number.
    """
    size = source.nodes if nodes is None else nodes
    until_ms = round((source.run_s if run_s is None else run_s) * 1000)
    chance = SimRandom(seed).stream(f"plan {source.name}")
    steps = [*_client_steps(source, chance, until_ms), *_fault_steps(source, chance, size, until_ms)]
    if source.asides_per_s:
        steps += _aside_steps(source, SimRandom(seed).stream(f"asides {source.name}"), until_ms)
    steps.sort(key=lambda step: step.at_ms)
    return Plan(version=VERSION, scenario=source.name, seed=seed, nodes=size, until_ms=until_ms, steps=tuple(steps))


def _client_steps(source: Scenario, chance: Chance, until_ms: int) -> list[Step]:
    steps: list[Step] = []
    if not source.operations_per_s or not source.clients:
        return steps
    at_s = chance.expovariate(source.operations_per_s)
    while at_s * 1000 < until_ms:
        client = 1 + chance.randrange(source.clients)
        do = chance.choices(("put", "get", "swap", "delete"), (4, 4, 2, 1))[0]
        if client > 1 and client == source.clients:
            do = "get"  # who never writes is never told who leads, and goes on reading where it began: from a follower
        key = f"key{chance.randrange(source.keys)}"
        value = f"v{len(steps)}" if do in ("put", "swap") else ""
        steps.append(Step(at_ms=int(at_s * 1000), do=do, client=client, key=key, value=value))
        at_s += chance.expovariate(source.operations_per_s)
    return steps


_LOCKS: Final = 2
_LEASE_TTL_S: Final = (1.0, 1.0, 1.5, 2.0)
_AGES_S: Final = (0.1, 0.5, 1.0, 3.0)


def _aside_steps(source: Scenario, chance: Chance, until_ms: int) -> list[Step]:
    """Draw what six further clients do: two read (one of them is tied to a node, one keeps what it reads), two watch, two lock."""
    pinned, keeping, watching, late, one, other = range(source.clients + 1, source.clients + 7)
    steps = [
        Step(at_ms=0, do="watch", client=watching, key=""),
        Step(at_ms=until_ms // 2, do="watch", client=late, key="key", amount=1.0),
        Step(at_ms=until_ms // 3, do="forget", client=late, key="key0"),
    ]
    at_s = chance.expovariate(source.asides_per_s)
    while at_s * 1000 < until_ms:
        do = chance.choices(("stale", "cached", "lock", "lease"), (4, 4, 1, 0.5))[0]
        share, lasts_ms = chance.random(), round(100 + 2400 * chance.random() ** 3)
        step = Step(at_ms=int(at_s * 1000), do=do)
        if do in ("stale", "cached"):
            client = pinned if share < 1 / 2 else keeping
            age_s = _AGES_S[chance.randrange(len(_AGES_S))] if do == "cached" else 0.0
            steps.append(msgspec.structs.replace(step, client=client, key=f"key{chance.randrange(max(1, source.keys))}", amount=age_s))
        else:
            key = f"lock{chance.randrange(_LOCKS)}" if do == "lock" else f"lease{len(steps)}"
            ttl_s = _LEASE_TTL_S[chance.randrange(len(_LEASE_TTL_S))]
            client, value = one if share < 1 / 2 else other, f"v{len(steps)}"
            steps.append(
                msgspec.structs.replace(step, client=client, key=key, value=value, amount=ttl_s, lasts_ms=lasts_ms if do == "lock" else 0)
            )
        at_s += chance.expovariate(source.asides_per_s)
    return steps


def _fault_steps(source: Scenario, chance: Chance, nodes: int, until_ms: int) -> list[Step]:
    if not source.faults:
        return []
    steps = [_fault(name, _drawn_ms(name, chance, until_ms), chance, nodes) for name in source.must]
    names, weights = list(source.faults), list(source.faults.values())
    at_ms = chance.expovariate(1 / source.fault_every_s) * 1000
    while at_ms < until_ms:
        steps.append(_fault(chance.choices(names, weights)[0], int(at_ms), chance, nodes))
        at_ms += chance.expovariate(1 / source.fault_every_s) * 1000
    return steps


_WHEN: Final[Mapping[str, tuple[int, int]]] = MappingProxyType({"misdirect": (0, 1), "bit_rot": (1, 3), "grow": (0, 6), "transfer": (0, 6)})
"""In tenths of the run: when what must occur is begun. One damaged node has to be replaced before another one is damaged."""
_WHEN_OTHERS: Final = (0, 8)
"""Early enough that one that finds nothing to happen to can be tried again."""
CRASH_POINTS: Final = (
    "journal.before_write",
    "journal.after_write",
    "journal.before_rotate",
    "journal.after_rotate",
    "journal.before_snapshot",
    "journal.after_snapshot_rename",
    "journal.before_compact",
)


_TAKES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "isolate": ("node", "amount", "lasts_ms"),
        "split": ("group", "lasts_ms"),
        "one_way": ("node", "peer", "lasts_ms"),
        "reset": ("node", "peer"),
        "slow_link": ("amount", "lasts_ms"),
        "blackout": ("lasts_ms",),
        "slow_disk": ("node", "amount", "lasts_ms"),
        "bit_rot": ("node", "amount", "lasts_ms"),
        "clock_step": ("node", "amount"),
        "clock_drift": ("node", "amount", "lasts_ms"),
        "crash_point": ("node", "amount", "text", "lasts_ms"),
        "transfer": ("node",),
        "garbage": ("node",),
        "compact": ("node",),
        "leave": ("node",),
        "grow": (),
    }
)
"""What each fault is told; the others are told which node and how long."""
_CRASH_HITS: Final = 5


def _drawn_ms(name: str, chance: Chance, until_ms: int) -> int:
    begin, end = _WHEN.get(name, _WHEN_OTHERS)
    return until_ms * begin // 10 + chance.randrange(max(1, until_ms * (end - begin) // 10))


def _fault(name: str, at_ms: int, chance: Chance, nodes: int) -> Step:
    """Draw one fault of that kind. The draws are the same in number for every kind, so that one more weight changes little."""
    node, peer, share = chance.randrange(nodes + 1), 1 + chance.randrange(nodes), chance.random()
    lasts_ms = round(200 + 2800 * chance.random() ** 2)
    takes = _TAKES.get(name, ("node", "lasts_ms"))
    if "group" in takes:
        node = 1 + chance.randrange(max(1, nodes - 1))
    return Step(
        at_ms=at_ms,
        do=name,
        node=node if "node" in takes or "group" in takes else 0,
        peer=peer if "peer" in takes else 0,
        lasts_ms=lasts_ms if "lasts_ms" in takes else 0,
        amount=_amount(name, share) if "amount" in takes else 0.0,
        text=CRASH_POINTS[int(share * len(CRASH_POINTS))] if "text" in takes else "",
    )


def _amount(name: str, share: float) -> float:
    """Return how much, in the unit of the fault, for a share between 0 and 1."""
    match name:
        case "isolate":
            return float(share < 1 / 2)
        case "slow_link":
            return round(0.02 + 0.3 * share, 3)
        case "slow_disk":
            return round(0.005 + 0.1 * share, 4)
        case "clock_step":
            return round((2 * share - 1) ** 3 * 3600, 3)
        case "clock_drift":
            return round((2 * share - 1) * 200_000)
        case "bit_rot":
            return round(share, 4)
    return 1 + int(share * 100) % _CRASH_HITS
