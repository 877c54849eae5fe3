"""Compute: the port to processors beside the loop's: for functions that take tens of milliseconds, and would hold everybody meanwhile.

Only for functions without effects, of which nobody can tell where they ran, and which let go of the interpreter (a password's hash). On the
host they run in a thread of a bounded pool, in the simulation in the loop, a little later.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Compute(Protocol):
    """Processors beside the loop's."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run a function without effects and return its result; what it raises is raised. Cancelled, this ends when the function does."""
