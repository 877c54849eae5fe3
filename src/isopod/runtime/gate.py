"""Gate: counts those inside, so that a thing can be closed only when nobody uses it any more.

Every operation on an object with an end (a listener, a store, a node) runs inside its gate; closing the gate refuses newcomers
at once and waits for those inside. It neither cancels nor times out: that is for the one who closes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from isopod.runtime.waiters import Waiters
from isopod.world.errors import WrongState


class Gate:
    """A counter of holders with an end.

    Args:
        name: What it guards; part of the refusal's message.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._n_inside = 0
        self._closed = False
        self._waiters = Waiters()

    @property
    def n_inside(self) -> int:
        """The number of holders now."""
        return self._n_inside

    @property
    def is_closed(self) -> bool:
        """Whether newcomers are refused."""
        return self._closed

    def enter(self) -> None:
        """Go in; `leave` must follow exactly once.

        Raises:
            WrongState: The gate is closed.
        """
        if self._closed:
            raise WrongState("gate", self._name, "closed", "enter")
        self._n_inside += 1

    def try_enter(self) -> bool:
        """Go in if the gate is open, and return whether it was."""
        if self._closed:
            return False
        self._n_inside += 1
        return True

    def leave(self) -> None:
        """Go out.

        Raises:
            RuntimeError: More went out than in.
        """
        if self._n_inside <= 0:
            raise RuntimeError(f"gate {self._name} was left more often than entered")
        self._n_inside -= 1
        if self._closed and self._n_inside == 0:
            self._waiters.wake()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be inside for the length of a `with` block.

        Raises:
            WrongState: The gate is closed.
        """
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def close_nowait(self) -> None:
        """Refuse newcomers from now on."""
        self._closed = True

    async def close(self) -> None:
        """Refuse newcomers and wait until nobody is inside. May be called again, and by several; cancelling leaves it closed."""
        self._closed = True
        while self._n_inside:
            await self._waiters.wait()
