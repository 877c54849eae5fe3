"""A small store's history, for tests of what compares answers with it: two keys, a lease that ends, changes that are forgotten.

revision 1 at 1 s   a = x
revision 2 at 2 s   b = y
revision 3 at 3 s   a = z
revision 4 at 4 s   lock = mine, by a lease
revision 5 at 6 s   lock is gone
revision 6 at 7 s   b is deleted; changes up to 2 were forgotten just before
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from isopod.api.store import messages as m
from isopod.api.store.messages import Command, Entry
from isopod.testing.truth import Truth, truth_of

S = 1_000_000_000
"""A second in nanoseconds."""
A_FIRST = Entry("a", b"x", 1, 1, 1)
B_FIRST = Entry("b", b"y", 2, 2, 1)
A_LAST = Entry("a", b"z", 1, 3, 2)
LOCK = Entry("lock", b"mine", 4, 4, 1, 1)
LOCK_GONE = Entry("lock", b"", 0, 5, 0)
B_GONE = Entry("b", b"", 0, 6, 0)
ALL = [A_FIRST, B_FIRST, A_LAST, LOCK, LOCK_GONE, B_GONE]


@dataclass(frozen=True)
class Batch:
    """What is applied at one index."""

    index: int
    term: int
    stamp_ns: int
    commands: Sequence[bytes]


def batch(index: int, *ops: m.Op) -> Batch:
    return Batch(index, 1, index * S, (msgspec.msgpack.encode(Command(m.LEVEL, 0, 0, 0, list(ops))),))


def history() -> Truth:
    """Return it."""
    return truth_of(
        [
            (batch(1, m.Put("a", b"x")), 1 * S),
            (batch(2, m.Put("b", b"y")), 2 * S),
            (batch(3, m.Put("a", b"z")), 3 * S),
            (batch(4, m.LeaseGrant(2000), m.Put("lock", b"mine", 1)), 4 * S),
            (batch(5, m.LeaseExpire((1,))), 6 * S),
            (batch(6, m.Compact(2), m.Delete("b")), 7 * S),
        ]
    )
