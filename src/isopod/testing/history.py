"""History: what clients asked of a system and what they were told, in real-time order.

An operation that ended in an error whose effect is unknown (a deadline, a lost connection, a lost leadership) may take effect at any later
time, or never; one that was surely refused took none and is left out. Times are numbers of one counter: in a program of one thread the
order of counting is the real-time order, and two events never have the same number.
"""

from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple


class _Unknown:
    """The type of `UNKNOWN`."""

    def __repr__(self) -> str:
        return "?"


UNKNOWN: Final = _Unknown()
"""The result of an operation whose outcome nobody was told."""


class Operation(NamedTuple):
    """One operation of one client.

    `call` and `result` are the specification's; `returned` is None while (or if for ever) the outcome is unknown.
    """

    client: int
    key: str
    call: Hashable
    result: Hashable
    invoked: int
    returned: int | None

    def __str__(self) -> str:
        until = "..." if self.returned is None else str(self.returned)
        return f"[{self.invoked:>5} {until:>5}] client {self.client}: {self.key} {self.call} -> {self.result}"


class History:
    """Records operations as they begin and end. Not thread-safe."""

    def __init__(self) -> None:
        self._operations: list[Operation | None] = []
        self._now = 0

    def __len__(self) -> int:
        return len(self._operations)

    def invoke(self, client: int, key: str, call: Hashable) -> int:
        """Note that an operation begins; returns its number, to end it with."""
        self._operations.append(Operation(client, key, call, UNKNOWN, self._tick(), None))
        return len(self._operations) - 1

    def succeed(self, number: int, result: Hashable) -> None:
        """Note that an operation was answered."""
        operation = self._operations[number]
        assert operation is not None
        assert operation.returned is None, "an operation ends once"
        self._operations[number] = operation._replace(result=result, returned=self._tick())

    def refuse(self, number: int) -> None:
        """Note that an operation was surely not carried out."""
        operation = self._operations[number]
        assert operation is not None
        assert operation.returned is None, "an operation ends once"
        self._operations[number] = None

    def span(self, number: int) -> tuple[int, int]:
        """Return when an operation that was answered began and ended."""
        operation = self._operations[number]
        assert operation is not None
        assert operation.returned is not None, "it was not answered"
        return operation.invoked, operation.returned

    def operations(self) -> list[Operation]:
        """Return what is known: the refused ones are left out, those without an answer have `UNKNOWN` as their result."""
        return [operation for operation in self._operations if operation is not None]

    def _tick(self) -> int:
        self._now += 1
        return self._now


def by_key(operations: Sequence[Operation]) -> dict[str, list[Operation]]:
    """Return the operations of each key, keys in the order of their first use."""
    found: dict[str, list[Operation]] = {}
    for operation in operations:
        found.setdefault(operation.key, []).append(operation)
    return found
