"""Sequential specifications: what one copy of a thing, used by one client at a time, would answer.

A specification is a pure function: `step(state, call, result)` returns the next state if the thing may answer `result`, else None. The
result `UNKNOWN` stands for whatever it would have answered. States and calls are hashable. Here: a register with a version and conditions,
which is one key of the replicated store.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from isopod.testing.history import UNKNOWN, Operation

State = TypeVar("State", bound=Hashable)


class Specification(Protocol[State]):
    """What may be answered when."""

    def initial(self) -> State:
        """Return the state before the first operation."""

    def step(self, state: State, call: Hashable, result: Hashable) -> State | None:
        """Return the state after `call` was answered with `result`; None if that answer is not possible."""

    def droppable(self, operation: Operation, rest: Sequence[Operation]) -> bool:
        """Return whether a history that is right stays right without this operation: then it may be left out of an explanation."""


class Put(NamedTuple):
    """Write a value. Result: the key's version, 1 after its creation."""

    value: str


class Get(NamedTuple):
    """Read. Result: `Seen`."""


class Delete(NamedTuple):
    """Remove. Result: whether it existed."""


class Swap(NamedTuple):
    """Write a value if the present one is `expected` (None: if there is none). Result: whether it was."""

    expected: str | None
    value: str


class Seen(NamedTuple):
    """What a read found: the value (None: no such key) and its version (0: no such key)."""

    value: str | None
    version: int


class Register:
    """One key of a store: a value and how often it was written since its creation.

    The version makes a write that was applied twice visible, even if nobody read between the two.
    """

    def initial(self) -> Seen:
        """Return the state of a key that does not exist."""
        return Seen(None, 0)

    def step(self, state: Seen, call: Hashable, result: Hashable) -> Seen | None:
        """See `Specification.step`."""
        answer, after = _act(state, call)
        return after if result is UNKNOWN or result == answer else None

    def droppable(self, operation: Operation, rest: Sequence[Operation]) -> bool:
        """A read changes nothing. A write counts versions, so it may matter to any read after it."""
        return isinstance(operation.call, Get)


def _act(state: Seen, call: Hashable) -> tuple[Hashable, Seen]:
    match call:
        case Get():
            return state, state
        case Put(value):
            after = Seen(value, state.version + 1)
            return after.version, after
        case Delete():
            return state.version > 0, Seen(None, 0)
        case Swap(expected, value):
            return (True, Seen(value, state.version + 1)) if state.value == expected else (False, state)
    raise TypeError(f"a register knows no {call!r}")
