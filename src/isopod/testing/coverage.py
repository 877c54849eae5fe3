"""Coverage: what a run, or a thousand of them, has really exercised.

A seed that found nothing says something only if it also says what happened in it: which faults, which failpoints, which states, which
messages, how many elections and snapshots. Counts are kept by group and name, in the order of their first sight; reports sort them.
"""

from collections.abc import Iterable
from typing import Final

from isopod.testing.plan import FAULT_KINDS

_KINDS: Final = (
    *("Hup", "Beat", "Propose", "Append", "AppendResponse", "RequestVote", "RequestVoteResponse", "Snapshot", "Heartbeat"),
    *("HeartbeatResponse", "Unreachable", "SnapStatus", "CheckQuorum", "TransferLeader", "TimeoutNow", "ReadIndex", "ReadIndexResp"),
    *("RequestPreVote", "RequestPreVoteResponse"),
)
"""Kinds of messages between cores, by their number in the protocol buffer of raft-rs."""
GROUPS: Final = ("fault class", "fault", "failpoint", "event", "role", "message", "refused message", "operation", "aside", "client error")


class Coverage:
    """Counts of what happened."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._messages: dict[int, int] = {}

    def count(self, group: str, name: str, n: int = 1) -> None:
        """Note that something happened `n` times."""
        key = (group, name)
        self._counts[key] = self._counts.get(key, 0) + n

    def message(self, data: bytes) -> None:
        """Count a message by its kind, the first field of its protocol buffer."""
        kind = data[1] if len(data) > 1 and data[0] == 8 else 0
        self._messages[kind] = self._messages.get(kind, 0) + 1

    def add(self, other: "Coverage") -> None:
        """Add another run's counts."""
        for key, n in other._counts.items():
            self._counts[key] = self._counts.get(key, 0) + n
        for kind, n in other._messages.items():
            self._messages[kind] = self._messages.get(kind, 0) + n

    def get(self, group: str, name: str) -> int:
        """Return how often something happened."""
        return self.table().get(group, {}).get(name, 0)

    def table(self) -> dict[str, dict[str, int]]:
        """Return all counts by group, names sorted."""
        counts = dict(self._counts)
        for kind, n in self._messages.items():
            counts["message", _KINDS[kind] if kind < len(_KINDS) else str(kind)] = n
        groups = {group: {name: n for (own, name), n in sorted(counts.items()) if own == group} for group in GROUPS}
        return {group: names for group, names in groups.items() if names}

    def missing_fault_classes(self, wanted: Iterable[str] = FAULT_KINDS) -> list[str]:
        """Return the classes of faults of which none occurred."""
        return [kind for kind in wanted if not self._counts.get(("fault class", kind))]
