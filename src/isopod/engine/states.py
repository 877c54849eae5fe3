"""The life cycle of a sandbox as one table: state x event -> state. What is not in the table is refused.

The diagram in `docs/architecture.md` is drawn from this table. The references' names are mapped onto it here and nowhere else.

Rules: a record's `status` changes only through `advance`. "starting", "stopping" and "removing" are steps of a running operation;
after the daemon died in one of them, the next start decides by what it finds (`isopod.engine.adoption`).
"""

from typing import Final, Literal, get_args

from isopod.api.messages import Status
from isopod.world.errors import InvalidArgument, WrongState

Event = Literal["start", "started", "failed", "undone", "found", "stop", "exited", "restart", "lost", "pause", "resume", "remove"]
"""What happens to a sandbox. "undone": a start that a dead daemon left half done is taken back; "found": a new daemon finds it running;
"restart": it ended and is to be started again at once."""

TABLE: Final[dict[tuple[Status, Event], Status]] = {
    ("created", "start"): "starting",
    ("created", "remove"): "removing",
    ("starting", "started"): "running",
    ("starting", "failed"): "exited",
    ("starting", "undone"): "created",
    ("starting", "found"): "running",
    ("starting", "exited"): "exited",
    ("starting", "lost"): "unknown",
    ("running", "stop"): "stopping",
    ("running", "restart"): "restarting",
    ("running", "pause"): "paused",
    ("running", "exited"): "exited",
    ("running", "lost"): "unknown",
    ("paused", "resume"): "running",
    ("paused", "found"): "running",
    ("paused", "stop"): "stopping",
    ("paused", "exited"): "exited",
    ("paused", "lost"): "unknown",
    ("stopping", "stop"): "stopping",
    ("stopping", "found"): "running",
    ("stopping", "restart"): "restarting",
    ("stopping", "exited"): "exited",
    ("stopping", "lost"): "unknown",
    ("restarting", "start"): "starting",
    ("restarting", "failed"): "exited",
    ("restarting", "remove"): "removing",
    ("exited", "start"): "starting",
    ("exited", "remove"): "removing",
    ("unknown", "start"): "starting",
    ("unknown", "remove"): "removing",
    ("removing", "remove"): "removing",
}

_STEPS: Final[dict[tuple[Status, Status], None]] = {(before, after): None for (before, _), after in TABLE.items()}

LIVE: Final[tuple[Status, ...]] = ("starting", "running", "paused", "stopping")
"""States in which processes may exist."""

STATUSES: Final[tuple[Status, ...]] = get_args(Status)

RTAIN_NAMES: Final[dict[str, Status]] = {
    "Creating": "created",
    "Created": "created",
    "Running": "running",
    "Paused": "paused",
    "Restarting": "restarting",
    "Removing": "removing",
    "Exited": "exited",
    "Stopped": "exited",
    "Dead": "unknown",
}
"""The reference engine's state names, in both of its spellings, and ours."""

_WANTED: Final[dict[Event, str]] = {
    "start": "start it",
    "stop": "stop it",
    "remove": "remove it",
    "pause": "pause it",
    "resume": "unpause it",
}
_HINTS: Final[dict[tuple[Status, Event], str]] = {
    ("running", "start"): "use `isopod exec` to run one more command in it",
    ("running", "remove"): "stop it first, or use `isopod rm -f`",
    ("paused", "remove"): "stop it first, or use `isopod rm -f`",
    ("created", "stop"): "it was never started",
    ("created", "pause"): "start it first",
    ("exited", "pause"): "start it first",
    ("paused", "pause"): "`isopod unpause` lets it go on",
    ("paused", "start"): "`isopod unpause` lets it go on",
    ("running", "resume"): "only a paused one can be unpaused",
}


def advance(name: str, status: Status, event: Event) -> Status:
    """Return the state that follows.

    Args:
        name: The sandbox's name, for the error.
        status: Its state now.
        event: What happened or is asked for.

    Raises:
        WrongState: The table has no such transition.
    """
    after = TABLE.get((status, event))
    if after is None:
        raise WrongState("container", name, status, _WANTED.get(event, event), hint=_HINTS.get((status, event), ""))
    return after


def check_step(name: str, before: Status, after: Status) -> None:
    """Check that some event leads from one state to another; staying in a state is no step.

    Args:
        name: The sandbox's name, for the error.
        before: Its state now.
        after: The state it is to have.

    Raises:
        WrongState: Nothing in the table leads there.
    """
    if before != after and (before, after) not in _STEPS:
        raise WrongState("container", name, before, f"become {after}")


def parse_status(text: str) -> Status:
    """Return the state that a user names, by our names in any case or by the reference's.

    Raises:
        InvalidArgument: There is no such state.
    """
    found = next((status for status in STATUSES if status == text.lower()), None) or RTAIN_NAMES.get(text.capitalize())
    if found is None:
        raise InvalidArgument("status", text, f"want one of {', '.join(STATUSES)}")
    return found
