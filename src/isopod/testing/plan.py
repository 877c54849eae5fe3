"""Plan: all that happens to a simulated cluster in one run, decided before it begins.

A plan is a seed (which decides the order of ready tasks, every delay and every identifier), a size, and steps at given virtual times: what
clients ask and which faults occur. Each fault says how long it lasts and is undone by itself, so a plan without one of its steps is a plan
again: that is what shrinking needs. A plan is also a file (JSON), which is how a failing run is kept.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec

from isopod.world.errors import InvalidArgument

VERSION: Final = 1
NODES_MAX: Final = 9
STEPS_MAX: Final = 100_000


class Action(NamedTuple):
    """A kind of step: the class of fault it belongs to ("client" if it is none) and what it does."""

    kind: str
    about: str


ACTIONS: Final[Mapping[str, Action]] = MappingProxyType(
    {
        "put": Action("client", "a client writes `value` under `key`"),
        "get": Action("client", "a client reads `key`"),
        "delete": Action("client", "a client removes `key`"),
        "swap": Action("client", "a client writes `value` under `key` if it still holds what this client saw last"),
        "stale": Action("client", "a client reads `key` as the node that it asks has it"),
        "cached": Action("client", "a client reads `key`, at most `amount` seconds old; clients of an even number keep what they read"),
        "watch": Action("client", "a client watches the prefix `key` from revision `amount` on, 0 for what comes"),
        "lock": Action(
            "client", "a client takes the lock `key` by a lease of `amount` seconds, if nobody has it, and holds it for `lasts_ms`"
        ),
        "lease": Action("client", "a client writes `value` under `key` with a lease of `amount` seconds, and dies"),
        "forget": Action("client", "a client has the store forget all changes but the last ones"),
        "kill": Action("process", "the process of `node` is killed, and started again after `lasts_ms`"),
        "hang": Action("process", "the process of `node` is stopped (SIGSTOP) for `lasts_ms`"),
        "power_cut": Action("power", "`node` loses power and what its disk had not made durable; it boots after `lasts_ms`"),
        "blackout": Action("power", "all nodes lose power; they boot after `lasts_ms`"),
        "isolate": Action("partition", "`node` is cut off from the other nodes, and with `amount` 1 from the clients too, for `lasts_ms`"),
        "split": Action("partition", "the nodes are parted in two groups for `lasts_ms`, `node` says after how many"),
        "one_way": Action("partition", "what `node` sends to `peer` is held back for `lasts_ms`"),
        "reset": Action("connection", "the connections between `node` and `peer` are reset"),
        "garbage": Action("connection", "a stranger sends `node` bytes that are no protocol"),
        "slow_link": Action("link", "all links are slow and lossy by `amount` (0 to 1) for `lasts_ms`"),
        "sync_error": Action("disk", "the next flush of `node` fails, which ends its process; it is started again after `lasts_ms`"),
        "slow_disk": Action("disk", "the disk of `node` takes `amount` seconds more for each operation, for `lasts_ms`"),
        "full_disk": Action("disk", "the disk of `node` is full for `lasts_ms`"),
        "bit_rot": Action(
            "bit rot", "a bit of `node`'s journal flips, `amount` says where (0 to 1); the process is killed after `lasts_ms`"
        ),
        "misdirect": Action(
            "misdirection", "the next write of `node` that becomes durable lands elsewhere; some writes and `lasts_ms` later it loses power"
        ),
        "crash_point": Action("failpoint", "the process of `node` ends at the failpoint `text`; it is started again after `lasts_ms`"),
        "clock_step": Action("clock", "the wall clock of `node` jumps by `amount` seconds"),
        "clock_drift": Action("clock", "the clock of `node` runs wrong by `amount` parts per million for `lasts_ms`"),
        "transfer": Action("leadership", "the leader hands over to `node`"),
        "compact": Action("snapshot", "`node` makes a snapshot and drops the log it covers"),
        "grow": Action("membership", "one more node joins as a learner and is promoted"),
        "leave": Action("membership", "`node` is demoted and removed; a new node may join later"),
    }
)
FAULT_KINDS: Final = tuple(dict.fromkeys(action.kind for action in ACTIONS.values() if action.kind != "client"))
"""The classes of faults, in the order of the table."""


class Step(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One thing that happens. Times in virtual milliseconds since the cluster was ready; nodes count from 1, 0 is the present leader."""

    at_ms: int
    do: str
    node: int = 0
    peer: int = 0
    client: int = 0
    key: str = ""
    value: str = ""
    lasts_ms: int = 0
    amount: float = 0.0
    text: str = ""

    @property
    def kind(self) -> str:
        """The class of fault, or "client"."""
        return ACTIONS[self.do].kind


class Plan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A whole run. `found` says what it showed when it was kept, "" for nothing; `settings` is the scenario's name for node settings."""

    version: int
    scenario: str
    seed: int
    nodes: int
    until_ms: int
    steps: tuple[Step, ...] = ()
    found: str = ""


def encode_plan(plan: Plan) -> bytes:
    """Return a plan as the text of a file: JSON, one step a line."""
    head = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(plan, steps=())), indent=1).decode()
    steps = ",\n".join("  " + msgspec.json.encode(step).decode() for step in plan.steps)
    body = head.removesuffix("\n}")
    return f'{body},\n "steps": [\n{steps}\n ]\n}}\n'.encode() if steps else f"{head}\n".encode()


def decode_plan(data: bytes, name: str = "scenario file") -> Plan:
    """Read a plan.

    Args:
        data: The file's bytes.
        name: For messages.

    Raises:
        InvalidArgument: It is no plan, one of another version, or it asks for what does not exist.
    """
    try:
        plan = msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument("file", name, f"not a scenario file: {error}") from error
    wrong = _fault_of(plan)
    if wrong:
        raise InvalidArgument("scenario file", name, wrong)
    return plan


def _fault_of(plan: Plan) -> str:
    """Return what is wrong with a plan, or ""."""
    if plan.version != VERSION:
        return f"it is of version {plan.version}, this program reads {VERSION}"
    if not 1 <= plan.nodes <= NODES_MAX:
        return f"{plan.nodes} nodes: want 1 to {NODES_MAX}"
    if plan.until_ms < 0 or len(plan.steps) > STEPS_MAX:
        return f"want until_ms >= 0 and at most {STEPS_MAX} steps"
    for step in plan.steps:
        if step.do not in ACTIONS:
            return f"no action is called {step.do!r}: want one of {', '.join(ACTIONS)}"
        if step.at_ms < 0 or step.lasts_ms < 0 or not 0 <= step.node <= NODES_MAX or not 0 <= step.peer <= NODES_MAX:
            return f"a {step.do} at {step.at_ms} ms has a time below 0 or a node outside 0 to {NODES_MAX}"
    return ""
