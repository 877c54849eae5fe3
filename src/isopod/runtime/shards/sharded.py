"""Sharded: one instance of a class on every shard, as one object.

    class Counter:
        def __init__(self, start: int) -> None: ...

        @verb
        async def add(self, request: Add) -> Total: ...

    counter = await Sharded.start(Counter, 100)
    total = await counter.on(2).add(Add(5))
    everything = await counter.map_reduce(lambda each: each.read(), operator.add, 0)
    await counter.stop()

`on(i)` is typed as the class itself: what is marked `@verb` can be called on it, and every call is awaited, also on the own shard.
Instances share nothing; arguments, requests and replies are copied. An instance may have `async def stop(self)`, called at the end, and
may derive from `PeeringShardedService` to reach the others.

Rules: started and stopped on shard 0; at the program's end those still running are stopped in reverse order of their start. A shard that
was started again gets new instances, made of the same arguments: what the old ones held is gone.
Source: Seastar, core/sharded.hh.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar, cast

import msgspec

from isopod.runtime.shards.credits import CONTROL_GROUP, SmpServiceGroup
from isopod.runtime.shards.names import find, name_of
from isopod.runtime.shards.smp import Smp, this_smp
from isopod.runtime.shards.verbs import Signature, Verb, check_packs, decode_arguments, signatures
from isopod.wire.service import Method
from isopod.world.errors import InvalidArgument, WrongState

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")
A = TypeVar("A")


class StartInstance(msgspec.Struct, frozen=True, array_like=True):
    """Make an instance."""

    number: int
    name: str
    arguments: bytes


class StopInstance(msgspec.Struct, frozen=True, array_like=True):
    """Stop an instance."""

    number: int


START: Final = Method("sharded.start", StartInstance, type(None))
STOP: Final = Method("sharded.stop", StopInstance, type(None))


class PeeringShardedService:
    """A base for classes whose instances call each other: `container()` is their `Sharded`."""

    __container: "Sharded[Any] | None" = None

    def container(self) -> "Sharded[Self]":
        """Return the `Sharded` that this is an instance of. Not in `__init__`."""
        if self.__container is None:
            raise WrongState("instance", type(self).__name__, "not in a Sharded", "reach the others")
        return cast("Sharded[Self]", self.__container)

    def _join(self, container: "Sharded[Any]") -> None:
        self.__container = container


class _Class:
    """What every shard knows of a class: its verbs, and how to unpack their replies."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.signatures: Mapping[str, Signature] = signatures(cls)
        self.decoders = {name: msgspec.msgpack.Decoder(each.reply).decode for name, each in self.signatures.items()}

    def verbs(self, instance: object) -> dict[str, Verb]:
        """Return the verbs of an instance."""
        return {
            name: Verb(name, getattr(instance, name), each.request, takes_request=each.takes_request)
            for name, each in self.signatures.items()
        }


class Sharded(Generic[T]):
    """One instance on every shard; made by `start`."""

    def __init__(self, smp: Smp, number: int, known: _Class) -> None:
        self._smp = smp
        self._number = number
        self._known = known
        self._proxies: dict[int, T] = {}
        self._local: T | None = None
        self._is_stopped = False

    @classmethod
    async def start(cls, service: type[A] | str, *args: object, timeout_s: float | None = None) -> "Sharded[A]":
        """Make an instance on every shard, the own one first, and wait until all are there.

        Args:
            service: The class, or "package.module:Class"; every shard must be able to import it.
            *args: For its constructor; they are packed, and unpacked as its annotations say.
            timeout_s: For each shard; None for the default.

        Raises:
            InvalidArgument: The class cannot be found on other shards, or the arguments cannot be sent.
            WrongState: Not on shard 0, or no shards run.
            IsopodError: What a constructor raised; the instances made so far are stopped.
        """
        smp = this_smp()
        if smp.shard != 0:
            raise WrongState("shard", str(smp.shard), "not the first", "start a Sharded", hint="start it on shard 0")
        name = name_of(service)
        number = smp.next_instance()
        order = StartInstance(number, name, check_packs("arguments", args))
        smp.instances_started[number] = order
        try:
            await smp.submit_to(0, START, order, timeout_s=timeout_s, group=CONTROL_GROUP)
            made = cast("Sharded[A]", smp.sharded[number])
            await _all([smp.submit_to(peer, START, order, timeout_s=timeout_s, group=CONTROL_GROUP) for peer in smp.peers()])
        except BaseException:
            del smp.instances_started[number]
            await _stop_everywhere(smp, number)
            raise
        return made

    @property
    def local(self) -> T:
        """The own shard's instance itself.

        Raises:
            WrongState: It was stopped.
        """
        if self._local is None:
            raise WrongState("sharded service", self._known.cls.__name__, "stopped", "use it")
        return self._local

    def on(self, shard: int, *, timeout_s: float | None = None, group: SmpServiceGroup | None = None) -> T:
        """Return what stands for the instance on a shard: its verbs can be awaited.

        Args:
            shard: Which; the own one too.
            timeout_s: For calls through it; None for the default.
            group: Whose credits they use; None for the default group.
        """
        if timeout_s is None and group is None:
            found = self._proxies.get(shard)
            if found is None:
                found = self._proxies[shard] = self._proxy(_Where(shard, None, None))
            return found
        return self._proxy(_Where(shard, timeout_s, group))

    async def invoke_on(self, shard: int, function: Callable[[T, Q], Coroutine[Any, Any, R]], request: Q) -> R:
        """Call a verb, named as the class's function, on a shard: `invoke_on(2, Counter.add, Add(5))`."""
        reply: R = await getattr(self.on(shard), function.__name__)(request)
        return reply

    async def on_all(self, call: Callable[[T], Awaitable[R]]) -> list[R]:
        """Call something on every shard at once: `on_all(lambda each: each.add(Add(1)))`.

        Returns:
            The replies by shard.

        Raises:
            IsopodError: The first failure by shard, after all have ended.
        """
        return await _all([call(self.on(shard)) for shard in range(self._smp.n_shards)])

    async def on_others(self, call: Callable[[T], Awaitable[R]]) -> list[R]:
        """The same on every shard but the own."""
        return await _all([call(self.on(shard)) for shard in range(self._smp.n_shards) if shard != self._smp.shard])

    async def map_reduce(self, mapper: Callable[[T], Awaitable[R]], reducer: Callable[[A, R], A], initial: A) -> A:
        """Call `mapper` on every shard at once, and fold the replies, by shard, with `reducer` here."""
        found = initial
        for reply in await self.on_all(mapper):
            found = reducer(found, reply)
        return found

    async def stop(self) -> None:
        """Stop every instance, on all shards at once. A second time nothing happens.

        Raises:
            WrongState: Not on shard 0.
            IsopodError: What a `stop` raised first, after all have ended.
        """
        if self._smp.shard != 0:
            raise WrongState("shard", str(self._smp.shard), "not the first", "stop a Sharded", hint="stop it on shard 0")
        if self._is_stopped:
            return
        self._is_stopped = True
        self._smp.instances_started.pop(self._number, None)
        failures = await _stop_everywhere(self._smp, self._number)
        if failures:
            raise failures[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    def _proxy(self, where: "_Where") -> T:
        return cast("T", _Proxy(self._smp, self._number, self._known, where))

    # --- for this shard -----------------------------------------------------------------------------------------------

    def make(self, arguments: bytes) -> None:
        """Make this shard's instance."""
        instance = self._known.cls(*decode_arguments(self._known.cls, arguments))
        if isinstance(instance, PeeringShardedService):
            instance._join(self)
        self._local = instance
        self._smp.add_instance(self._number, self._known.verbs(instance))

    async def unmake(self) -> None:
        """Stop this shard's instance."""
        instance, self._local = self._local, None
        self._smp.remove_instance(self._number)
        stop = getattr(instance, "stop", None)
        if stop is not None:
            await stop()


class _Where(NamedTuple):
    """Where a proxy's calls go."""

    shard: int
    timeout_s: float | None
    group: SmpServiceGroup | None


class _Proxy:
    """Stands for an instance on a shard: an attribute for each verb, none else."""

    def __init__(self, smp: Smp, number: int, known: _Class, where: _Where) -> None:
        for name, signature in known.signatures.items():
            self.__dict__[name] = _bind(smp, number, signature, decode=known.decoders[name], where=where)

    def __getattr__(self, name: str) -> Any:  # of what is not there
        raise AttributeError(f"{name} is not marked @verb: only verbs can be called on another shard")


def _bind(
    smp: Smp, number: int, signature: Signature, *, decode: Callable[[msgspec.Raw], Any], where: _Where
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return the function that calls a verb."""
    invoke, name = smp.invoke, signature.name
    shard, timeout_s, group = where

    if signature.takes_request:

        def call(request: object) -> Coroutine[Any, Any, Any]:
            return invoke(shard, number, name, request, decode=decode, timeout_s=timeout_s, group=group)

        return call

    def call_plain() -> Coroutine[Any, Any, Any]:
        return invoke(shard, number, name, None, decode=decode, timeout_s=timeout_s, group=group)

    return call_plain


# --- the framework's own verbs ----------------------------------------------------------------------------------------


def serve_sharded(smp: Smp, script: str) -> None:
    """Let shard 0 make and stop instances on this shard.

    Args:
        smp: This shard.
        script: The program's script.
    """

    async def start(order: StartInstance) -> None:
        cls = find(order.name, script)
        if not isinstance(cls, type):
            raise InvalidArgument("service", order.name, "it is no class")
        made: Sharded[Any] = Sharded(smp, order.number, _Class(cls))
        made.make(order.arguments)
        smp.sharded[order.number] = made

    async def stop(order: StopInstance) -> None:
        found = smp.sharded.pop(order.number, None)
        if found is not None:
            await found.unmake()

    smp.serve({START: start, STOP: stop})


async def replay(smp: Smp, shard: int) -> None:
    """Make every running instance anew on a shard that was started again. On shard 0."""
    for order in list(smp.instances_started.values()):
        await smp.submit_to(shard, START, order, group=CONTROL_GROUP)


async def stop_all(smp: Smp) -> list[Exception]:
    """Stop every instance that still runs, the last started first. On shard 0."""
    failures: list[Exception] = []
    for number in reversed(list(smp.instances_started)):
        smp.instances_started.pop(number, None)
        failures += await _stop_everywhere(smp, number)
    return failures


async def _stop_everywhere(smp: Smp, number: int) -> list[Exception]:
    """Stop an instance on every shard that can be reached; return what went wrong."""
    order = StopInstance(number)
    grace_s = smp.config.stop_grace_s
    calls = [smp.submit_to(shard, STOP, order, timeout_s=grace_s, group=CONTROL_GROUP) for shard in (0, *smp.peers())]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return [outcome for outcome in outcomes if isinstance(outcome, Exception)]


async def _all(calls: list[Awaitable[R]]) -> list[R]:
    """Await all, to the end; then return the results, or raise the first failure."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    found: list[R] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        found.append(outcome)
    return found
