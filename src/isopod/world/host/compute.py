"""The host's `Compute`: threads for calls that take long."""

from collections.abc import Callable
from typing import TypeVar

from isopod.world.host.workers import Workers

T = TypeVar("T")


class HostCompute:
    """`Compute` by the World's threads.

    Args:
        workers: They.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """See `Compute.run`."""
        return await self._workers.bulk(function, *args)
