"""What clients believed of leases and locks, and whether they were right.

A lock is a key that hangs on a lease, written only if it is not there; its holder may believe in it for the lease's time from when the last
answered request to keep it alive was sent (`isopod.api.store.holding`). What must hold: no two clients believe at the same time, a later
holder has a higher revision (which is what others are fenced with), and a key is not gone before its holder stopped believing or let go.

The store counts a lease's time by its leader's clock. Where a leader's clock runs too fast a lease ends sooner by as much, and nothing that
measures time can prevent that: so how wrong clocks run has to be told.
"""

from collections.abc import Sequence
from typing import NamedTuple

from isopod.testing.truth import Truth


class Hold(NamedTuple):
    """A client's belief that a key is there by its lease.

    Args:
        client: Whose.
        key: Which; a lock if `excludes`.
        revision: The one that wrote it.
        began_ns: When the client knew that it is there.
        asked_ns: When the last answered request that promised more time was sent.
        ttl_s: The lease's time, counted from there.
        ended_ns: When the client began to let go; 0 if it never did.
        excludes: Whether nobody else may believe the same of the same key.
    """

    client: int
    key: str
    revision: int
    began_ns: int
    asked_ns: int
    ttl_s: float
    ended_ns: int = 0
    excludes: bool = True

    def until_ns(self, drift: float) -> int:
        """Return until when the key must be there, if a leader's clock runs too fast by that share at most."""
        promised = self.asked_ns + int(self.ttl_s * 1e9 / (1 + drift))
        return min(promised, self.ended_ns) if self.ended_ns else promised

    def __str__(self) -> str:
        return f"client {self.client}, which has {self.key} by revision {self.revision}"


def lease_violations(holds: Sequence[Hold], truth: Truth, *, drift: float = 0.0) -> list[str]:
    """Return where a belief was wrong, in words.

    Args:
        holds: Of all clients.
        truth: What the store held.
        drift: By which share of the time a clock may run too fast.
    """
    return [*_let_go_early(holds, truth, drift), *_held_twice(holds, drift)]


def _let_go_early(holds: Sequence[Hold], truth: Truth, drift: float) -> list[str]:
    found = []
    for hold in holds:
        written = truth.at(hold.key, hold.revision)
        if written is None or written.mod_revision != hold.revision:
            found.append(f"{hold}, was told so and it is not")
            continue
        end = truth.next_change(hold.key, hold.revision)
        if end is not None and truth.known_ns(end.mod_revision) < hold.until_ns(drift):
            gone_s, until_s = truth.known_ns(end.mod_revision) / 1e9, hold.until_ns(drift) / 1e9
            found.append(f"{hold}, lost it at {gone_s:.6f} s and could believe in it until {until_s:.6f} s")
    return found


def _held_twice(holds: Sequence[Hold], drift: float) -> list[str]:
    found = []
    by_key: dict[str, list[Hold]] = {}
    for hold in sorted(holds, key=lambda each: each.began_ns):
        if hold.excludes:
            by_key.setdefault(hold.key, []).append(hold)
    for each in by_key.values():
        longest = each[0]
        for hold in each[1:]:
            if hold.began_ns < longest.until_ns(drift):
                found.append(f"{hold}, believed so while {longest}, did")
            if hold.revision <= longest.revision:
                found.append(f"{hold}, came after {longest}")
            if hold.until_ns(drift) > longest.until_ns(drift):
                longest = hold
    return found
