"""What a container runtime is to those who ask it: its calls, how often they are made, and their deadline. No more than that.

Rules: a call that is made goes through `timed`, so that it has an end whatever the runtime does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol, TypeVar

from isopod.pulse.model import ContainerStats
from isopod.pulse.pods import ContainerRow, PodRow, Wanted
from isopod.world.errors import DeadlineExceeded
from isopod.world.world import World

T = TypeVar("T")
Api = Literal["v1", "v1alpha2"]
APIS: Final[tuple[Api, ...]] = ("v1", "v1alpha2")


class Pace(NamedTuple):
    """How often and how long a runtime is asked. Times are in seconds."""

    soon_s: float = 0.1
    """Wakes within so long make one round, and it is the first pause after one."""
    refresh_s: float = 20.0
    """The longest pause between two rounds."""
    call_s: float = 5.0
    """The deadline of each call but one, connecting included."""
    stats_call_s: float = 20.0
    """The deadline of the one that asks what all containers use: a runtime may ask each sandbox's agent in turn for that."""
    stats_each_s: float = 2.0
    """The same of one that asks about a single sandbox."""
    look_s: float = 1.0
    """How often an endpoint that is not there is looked for, and the shortest pause after a failure that a wake can cut."""
    retry_first_s: float = 0.5
    retry_max_s: float = 30.0
    share: float = 9.0
    """A pause is at least so many times as long as the round before it."""


PACE: Final = Pace()


class RuntimeFacts(NamedTuple):
    """What a runtime says of itself."""

    name: str
    version: str


class Runtime(Protocol):
    """A connection to a runtime that is made when it is first used. Who opened it closes it.

    Every call raises Unsupported if the runtime does not speak that version of the interface, or does not know the call, else whatever
    IsopodError fits.
    """

    async def version(self, api: Api) -> RuntimeFacts:
        """Return what it is."""

    async def pods(self, api: Api, want: Wanted) -> Sequence[PodRow]:
        """Return all sandboxes, with no more of labels and annotations than is wanted."""

    async def containers(self, api: Api) -> Sequence[ContainerRow]:
        """Return the containers that run."""

    async def stats(self, api: Api, sandbox: str = "") -> Sequence[ContainerStats]:
        """Return what containers have used: all of them, or those of one sandbox."""

    async def close(self) -> None:
        """End the connection."""


OpenRuntime = Callable[[World, str], Awaitable[Runtime]]
"""Opens the runtime behind a socket's path."""


async def timed(name: str, path: str, call: Awaitable[T], call_s: float) -> T:
    """Return what a call returns.

    Args:
        name: The call.
        path: Whose it is, for the message.
        call: Under way.
        call_s: How long it may take.

    Raises:
        DeadlineExceeded: It takes longer.
    """
    try:
        async with asyncio.timeout(call_s):
            return await call
    except TimeoutError:
        raise DeadlineExceeded(f"{name} of {path}", call_s) from None
