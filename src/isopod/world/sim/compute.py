"""The simulation's `Compute`: the function runs in the loop, a seeded delay later."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class SimCompute:
    """`Compute` in virtual time."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """See `Compute.run`."""
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)
