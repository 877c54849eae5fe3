"""The life cycle of a sandbox as one table: state x event -> state. What is not in the table is refused.

The diagram in `docs/architecture.md` is drawn from this table. The references' names are mapped onto it here and nowhere else.

Rules: a record's `status` changes only through `advance`. "starting", "stopping" and "removing" are steps of a running operation;
after the daemon died in one of them, the next start decides by what it finds (`isopod.engine.adoption`).
"""

from typing import Final, Literal

from isopod.api.messages import Status
from isopod.world.errors import WrongState

Event = Literal["start", "started", "failed", "stop", "exited", "lost", "pause", "resume", "remove"]

TABLE: Final[dict[tuple[Status, Event], Status]] = {
    ("created", "start"): "starting",
    ("created", "remove"): "removing",
    ("starting", "started"): "running",
    ("starting", "failed"): "exited",
    ("starting", "exited"): "exited",
    ("starting", "lost"): "unknown",
    ("running", "stop"): "stopping",
    ("running", "pause"): "paused",
    ("running", "exited"): "exited",
    ("running", "lost"): "unknown",
    ("paused", "resume"): "running",
    ("paused", "stop"): "stopping",
    ("paused", "exited"): "exited",
    ("paused", "lost"): "unknown",
    ("stopping", "stop"): "stopping",
    ("stopping", "exited"): "exited",
    ("stopping", "lost"): "unknown",
    ("restarting", "start"): "starting",
    ("restarting", "remove"): "removing",
    ("exited", "start"): "starting",
    ("exited", "remove"): "removing",
    ("unknown", "start"): "starting",
    ("unknown", "remove"): "removing",
    ("removing", "remove"): "removing",
}

LIVE: Final[tuple[Status, ...]] = ("starting", "running", "paused", "stopping")
"""States in which processes may exist."""

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
    "resume": "resume it",
}
_HINTS: Final[dict[tuple[Status, Event], str]] = {
    ("running", "start"): "use `isopod exec` to run one more command in it",
    ("running", "remove"): "stop it first, or use `isopod rm -f`",
    ("paused", "remove"): "stop it first, or use `isopod rm -f`",
    ("created", "stop"): "it was never started",
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
