"""Resolver: names to addresses with a cache, asking once for all who ask at the same time.

What is asked is a `Source`: the machine's resolver (`world.network.resolve`, which tells no time to live) or a `DnsClient`'s `lookup`.
Names that do not exist are remembered too, briefly; failures of the resolver are not. A caller who gives up disturbs nobody: the question
goes on for the others, within its own time limit.
"""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.world.errors import DeadlineExceeded, Exhausted, IsopodError, NotFound, UnavailableError
from isopod.world.world import World

_NO_SUCH_NAME: Final = "no such name"
"""How the Network port says that a name does not exist (`OSError.filename`)."""


class ResolverLimits(msgspec.Struct, frozen=True):
    """Bounds and times, in seconds.

    Args:
        n_entries_max: Names kept; the one unused for longest goes first.
        n_asking_max: Names asked for at the same time.
        ttl_s: How long an answer is kept whose source tells no time.
        ttl_s_max: How long any answer is kept.
        negative_s: How long "no such name" is kept at most.
        attempt_s: How long one attempt may take.
        n_attempts: How many there are.
    """

    n_entries_max: int = 10_000
    n_asking_max: int = 256
    ttl_s: float = 30.0
    ttl_s_max: float = 3600.0
    negative_s: float = 5.0
    attempt_s: float = 5.0
    n_attempts: int = 3


class Lookup(NamedTuple):
    """A source's answer: numeric addresses (none: there is no such name), and how long it may be kept; None if the source does not know."""

    addresses: tuple[str, ...]
    ttl_s: float | None = None


Source = Callable[[str], Awaitable[Lookup]]
"""Asks once. Raises OSError or an error of the tree if it cannot tell."""


class ResolverStatistics(NamedTuple):
    """Counts since the beginning, and what is kept now."""

    n_hits: int
    n_negative_hits: int
    n_joined: int
    """Questions that were already being asked for somebody else."""
    n_misses: int
    n_errors: int
    n_timeouts: int
    n_entries: int


class _Entry(NamedTuple):
    addresses: tuple[str, ...]
    ends_at_ns: int


class Resolver:
    """Resolves names. Who made it closes it.

    Args:
        world: The ports.
        source: Who is asked; None for the machine's resolver.
        limits: Bounds.
        prefer_ipv4: Give IPv4 addresses first; otherwise the source's order stays.
    """

    def __init__(
        self, world: World, *, source: Source | None = None, limits: ResolverLimits | None = None, prefer_ipv4: bool = True
    ) -> None:
        self._world = world
        self._source = source or self._ask_machine
        self._limits = limits or ResolverLimits()
        self._prefer_ipv4 = prefer_ipv4
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._asking: dict[str, asyncio.Task[tuple[str, ...]]] = {}
        self._counts = dict.fromkeys(("hits", "negative_hits", "joined", "misses", "errors", "timeouts"), 0)

    async def resolve(self, host: str) -> tuple[str, ...]:
        """Return a name's numeric addresses, at least one, the best first; a numeric address is its own.

        Raises:
            NotFound: There is no such name.
            DeadlineExceeded: No answer in time, in any attempt.
            UnavailableError: The source failed.
            Exhausted: Too many names are being asked for.
        """
        numeric = _numeric(host)
        if numeric:
            return (numeric,)
        name = host.lower().removesuffix(".")
        found = self._cached(name)
        if found is None:
            found = await self._join(name)
        if not found:
            raise NotFound("host name", host, "check the spelling, and the machine's name servers")
        return found

    async def resolve_one(self, host: str) -> str:
        """Return a name's best address. Raises as `resolve`."""
        return (await self.resolve(host))[0]

    async def resolve_many(self, hosts: Iterable[str]) -> Mapping[str, tuple[str, ...] | IsopodError]:
        """Resolve several names at once.

        Returns:
            For each name its addresses, or why there are none.
        """
        names = list(dict.fromkeys(hosts))
        found = await asyncio.gather(*(self._settle(name) for name in names))
        return dict(zip(names, found, strict=True))

    async def preload(self, hosts: Iterable[str]) -> int:
        """Resolve names so that later questions find them; failures are not told.

        Returns:
            How many are known now.
        """
        found = await self.resolve_many(hosts)
        return sum(not isinstance(each, IsopodError) for each in found.values())

    def clear(self, host: str | None = None) -> None:
        """Forget one name, or all. Questions being asked go on."""
        if host is None:
            self._entries.clear()
        else:
            self._entries.pop(host.lower().removesuffix("."), None)

    def statistics(self) -> ResolverStatistics:
        """Return the counts."""
        return ResolverStatistics(
            self._counts["hits"],
            self._counts["negative_hits"],
            self._counts["joined"],
            self._counts["misses"],
            self._counts["errors"],
            self._counts["timeouts"],
            len(self._entries),
        )

    async def close(self) -> None:
        """Give up what is being asked; who waits for it gets `CancelledError`."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def _settle(self, host: str) -> tuple[str, ...] | IsopodError:
        try:
            return await self.resolve(host)
        except IsopodError as error:
            return error

    def _cached(self, name: str) -> tuple[str, ...] | None:
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.ends_at_ns <= self._world.clock.monotonic_ns():
            del self._entries[name]
            return None
        self._entries.move_to_end(name)
        self._counts["hits" if entry.addresses else "negative_hits"] += 1
        return entry.addresses

    async def _join(self, name: str) -> tuple[str, ...]:
        task = self._asking.get(name)
        if task is not None:
            self._counts["joined"] += 1
        else:
            if len(self._asking) >= self._limits.n_asking_max:
                raise Exhausted("name look-ups", f"{self._limits.n_asking_max} are under way", "try again later")
            self._counts["misses"] += 1
            task = asyncio.get_running_loop().create_task(self._ask(name), name=f"resolve-{name}")
            self._asking[name] = task
            task.add_done_callback(lambda done: self._on_answered(name, done))
        return await asyncio.shield(task)

    def _on_answered(self, name: str, task: "asyncio.Task[tuple[str, ...]]") -> None:
        del self._asking[name]
        if not task.cancelled():
            task.exception()  # seen: all who asked may have left

    async def _ask(self, name: str) -> tuple[str, ...]:
        failure: IsopodError | None = None
        for _ in range(self._limits.n_attempts):
            try:
                async with asyncio.timeout(self._limits.attempt_s):
                    found = await self._source(name)
            except TimeoutError:
                self._counts["timeouts"] += 1
                failure = DeadlineExceeded(f"resolving {name}", self._limits.attempt_s)
            except OSError as error:
                failure = UnavailableError(f"cannot resolve {name}: {error.strerror or error}")
            except IsopodError as error:
                failure = error
            else:
                return self._keep(name, found)
        self._counts["errors"] += 1
        assert failure is not None
        raise failure

    def _keep(self, name: str, found: Lookup) -> tuple[str, ...]:
        limits = self._limits
        ttl_s = limits.ttl_s if found.ttl_s is None else found.ttl_s
        if not found.addresses:
            ttl_s = limits.negative_s if found.ttl_s is None else min(ttl_s, limits.negative_s)
        addresses = _ordered(found.addresses) if self._prefer_ipv4 else found.addresses
        kept_s = min(ttl_s, limits.ttl_s_max)
        if kept_s > 0:
            self._entries[name] = _Entry(addresses, self._world.clock.monotonic_ns() + round(kept_s * 1e9))
            self._entries.move_to_end(name)
            while len(self._entries) > limits.n_entries_max:
                self._entries.popitem(last=False)
        return addresses

    async def _ask_machine(self, name: str) -> Lookup:
        try:
            found = await self._world.network.resolve(name)
        except OSError as error:
            if error.filename == _NO_SUCH_NAME:
                return Lookup(())
            raise
        return Lookup(tuple(dict.fromkeys(address.host for address in found)))


def _numeric(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


def _ordered(addresses: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(addresses, key=lambda address: ":" in address))
