"""Smp: one shard as its own code sees it: who it is, what it serves, and calls to the others.

`submit_to(shard, METHOD, request)` runs a verb on another shard and returns its reply; on the own shard it is a plain call. Which shard the
running code belongs to is carried by the context (in the simulation all shards share one process): everything started on a shard, tasks
and callbacks alike, knows its own.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec

from isopod.runtime.abort import current_deadline, deadline
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.runtime.shards.config import SmpConfig
from isopod.runtime.shards.credits import DEFAULT_GROUP, SmpServiceGroup
from isopod.runtime.shards.lane import Lane, as_told
from isopod.runtime.shards.messages import Gone
from isopod.runtime.shards.verbs import AnyMethod, Handler, Verb
from isopod.runtime.timers import TimerWheel
from isopod.wire.service import Method
from isopod.world.errors import (
    AlreadyExists,
    Disconnected,
    InvalidArgument,
    IsopodError,
    NotFound,
    ProtocolViolation,
    ShardLost,
    WrongState,
)
from isopod.world.network import ProtocolFactory, ServerTls
from isopod.world.shards import Part
from isopod.world.world import World

if TYPE_CHECKING:
    from isopod.runtime.shards.sharded import Sharded, StartInstance

Q = TypeVar("Q")
R = TypeVar("R")

_CURRENT: Final[ContextVar["Smp"]] = ContextVar("isopod_smp")


class LaneStats(msgspec.Struct, frozen=True):
    """The traffic between a shard and one other."""

    peer: int
    channel: str
    calls_sent: int
    calls_received: int
    calls_failed: int
    calls_timed_out: int
    calls_in_flight: int
    calls_waiting: int
    """For a credit."""
    calls_serving: int
    bytes_out: int
    bytes_in: int
    messages_pending: int
    """Queued because the channel is full."""
    flushes: int
    wakeups: int


class QueueStats(msgspec.Struct, frozen=True):
    """What one shard did of a `WorkQueue`'s work."""

    name: str
    submitted: int
    run: int
    given: int
    """Items sent to other shards."""
    taken: int
    """Items run for other shards."""
    waiting: int


class ShardStats(msgspec.Struct, frozen=True):
    """One shard's numbers since it started; `restarts` are known to shard 0 only."""

    shard: int
    pid: int
    calls_local: int
    connections: int
    restarts: int
    lanes: tuple[LaneStats, ...]
    queues: tuple[QueueStats, ...]

    @property
    def calls_sent(self) -> int:
        """Calls to other shards."""
        return sum(lane.calls_sent for lane in self.lanes)

    @property
    def calls_received(self) -> int:
        """Calls from other shards."""
        return sum(lane.calls_received for lane in self.lanes)


STATISTICS: Final = Method("smp.statistics", type(None), ShardStats)


class Queue(Protocol):
    """Something that counts work: see `isopod.runtime.shards.movable`."""

    def statistics(self) -> QueueStats:
        """Return its numbers."""


class ConnectionHandler:
    """Who serves accepted connections of a name on this shard."""

    def __init__(self, factory: ProtocolFactory, tls: ServerTls | None) -> None:
        self.factory = factory
        self.tls = tls


class Smp:
    """This shard.

    Args:
        world: Its ports.
        shard: Its number.
        n_shards: How many there are.
        config: Settings of all shards.
        logger: Where it reports.
        metrics: Where it counts.
    """

    def __init__(self, world: World, shard: int, n_shards: int, config: SmpConfig, *, logger: Logger, metrics: Registry) -> None:
        self.world = world
        self.shard = shard
        self.n_shards = n_shards
        self.config = config
        self.logger = logger
        self.metrics = metrics
        self.wheel = TimerWheel(asyncio.get_running_loop())
        self.contexts: dict[str, Context] = {}
        self.queues: list[Queue] = []
        self.on_attached: list[Callable[[int], None]] = []
        """Called with the number of a shard that can be called from now on."""
        self.on_closed: list[Callable[[], None]] = []
        """Called when this shard stops, after its calls were drained."""
        self.sharded: dict[int, Sharded[Any]] = {}
        self.instances_started: dict[int, StartInstance] = {}
        """What shard 0 started, in order, for shards that are started again."""
        self.n_restarts = 0
        self._n_instances = 0
        self._main_group = current_group()
        self._lanes: dict[int, Lane] = {}
        self._lost: dict[int, None] = {}
        self._verbs: dict[str, Verb] = {}
        self._instances: dict[int, Mapping[str, Verb]] = {}
        self._reply_decoders: dict[str, tuple[AnyMethod, Callable[[msgspec.Raw], Any]]] = {}
        self._default_group = SmpServiceGroup(DEFAULT_GROUP.name, config.max_nonlocal_requests)
        self._handlers: dict[str, ConnectionHandler] = {}
        self._adopting: dict[int, asyncio.Task[None]] = {}
        self._n_adopted = 0
        self._n_connections = 0
        self._n_local = 0
        self._is_closed = False
        self.is_stopping = False
        """Whether the program ends in order: shards that go are then no news."""

    def enter(self) -> None:
        """Let the running task, and all that is started from it, belong to this shard."""
        _CURRENT.set(self)
        self.contexts.setdefault("", copy_context())
        self.serve({STATISTICS: lambda _: self.statistics()})

    # --- what this shard serves ---------------------------------------------------------------------------------------

    def serve(self, handlers: Mapping[AnyMethod, Handler]) -> None:
        """Let every shard call these methods here.

        Args:
            handlers: A plain or a coroutine function of the request, for each method.

        Raises:
            AlreadyExists: A method of that name is served.
        """
        for method, handler in handlers.items():
            if method.name in self._verbs:
                raise AlreadyExists("verb", method.name)
            if method.sends is not None or method.receives is not None:
                raise InvalidArgument("method", method.name, "streams are for RPC, not for calls between shards")
            self._verbs[method.name] = Verb(method.name, handler, method.request)

    def serve_connections(self, name: str, factory: ProtocolFactory, *, tls: ServerTls | None = None) -> None:
        """Serve accepted connections that shard 0 hands out under that name; see `SmpService.listen`.

        Args:
            name: As given to `listen`.
            factory: Makes the protocol of each connection.
            tls: Secure them first.
        """
        self._handlers[name] = ConnectionHandler(factory, tls)

    def use_scheduling_group(self, group: SchedulingGroup) -> None:
        """Let calls by code of a scheduling group of that name run in this one here; those of other names run in the default one."""
        self.contexts[group.name] = self.contexts[""].run(group.context)

    def next_instance(self) -> int:
        """Return the number of a new `Sharded`; 0 stands for the shard itself."""
        self._n_instances += 1
        return self._n_instances

    def add_instance(self, number: int, verbs: Mapping[str, Verb]) -> None:
        """Serve an instance of a `Sharded`."""
        self._instances[number] = verbs

    def remove_instance(self, number: int) -> None:
        """Serve it no more."""
        self._instances.pop(number, None)

    def find(self, instance: int, name: str) -> Verb:
        """Return a verb of this shard.

        Raises:
            NotFound: There is none of that name.
        """
        found = (self._instances.get(instance, {}) if instance else self._verbs).get(name)
        if found is None:
            raise NotFound("verb", f"{name} on shard {self.shard}", "is it served on every shard?")
        return found

    # --- calls --------------------------------------------------------------------------------------------------------

    async def submit_to(
        self, shard: int, method: Method[Q, R], request: Q, *, timeout_s: float | None = None, group: SmpServiceGroup | None = None
    ) -> R:
        """Run a method on a shard and return its reply.

        Args:
            shard: Which; the own one is a plain call, without credits.
            method: One that the shard serves.
            request: What it gets: a copy on other shards, this very object on the own.
            timeout_s: How long it may take; a nearer deadline of the context counts. None for the default.
            group: Whose credits it uses; None for the default group.

        Raises:
            Disconnected: The shard is gone, or went while the call ran; it is probably being started again.
            ShardLost: It will not come back.
            DeadlineExceeded: No answer in time; the call over there is being cancelled.
            IsopodError: What the method raised; anything outside the tree arrives as `BugError`.
        """
        known = self._reply_decoders.get(method.name)
        if known is None or known[0] is not method:
            known = self._reply_decoders[method.name] = (method, msgspec.msgpack.Decoder(method.reply).decode)
        reply: R = await self.invoke(shard, 0, method.name, request, decode=known[1], timeout_s=timeout_s, group=group)
        return reply

    async def invoke(
        self,
        shard: int,
        instance: int,
        name: str,
        request: object,
        *,
        decode: Callable[[msgspec.Raw], Any],  # of the verb's reply
        timeout_s: float | None,
        group: SmpServiceGroup | None,
    ) -> Any:  # of the verb's reply
        """Run a verb of an instance on a shard; see `submit_to`."""
        timeout_s = self._time_left(timeout_s)
        if shard == self.shard:
            return await self._invoke_here(self.find(instance, name), request, timeout_s)
        lane = self._lanes.get(shard)
        if lane is None:
            raise self._no_lane(shard)
        scheduling = current_group()
        packed = await lane.call(
            name,
            request,
            instance=instance,
            timeout_s=timeout_s,
            group=group or self._default_group,
            scheduling="" if scheduling is self._main_group else scheduling.name,
        )
        try:
            return decode(packed)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolViolation(f"shard {shard}", f"reply of {name}: {error}") from None

    async def run_here(self, verb: Verb, request: object, timeout_s: float | None) -> Any:  # of the verb's reply
        """Run a verb that is not among those served, as if it were called on this shard; see `submit_to`."""
        return await self._invoke_here(verb, request, self._time_left(timeout_s))

    async def _invoke_here(self, verb: Verb, request: object, timeout_s: float) -> object:
        self._n_local += 1
        arguments = (request,) if verb.takes_request else ()
        try:
            if not verb.is_async:
                return verb.function(*arguments)
            async with deadline(timeout_s, f"{verb.name} on shard {self.shard}", wheel=self.wheel):
                return await verb.function(*arguments)
        except Exception as error:
            if isinstance(error, IsopodError):
                raise
            raise as_told(error, verb.name, self.logger) from error

    def _time_left(self, timeout_s: float | None) -> float:
        timeout_s = self.config.call_timeout_s if timeout_s is None else timeout_s
        outer_s = current_deadline()
        return timeout_s if outer_s is None else min(timeout_s, outer_s - asyncio.get_running_loop().time())

    def _no_lane(self, shard: int) -> IsopodError:
        if not 0 <= shard < self.n_shards:
            return InvalidArgument("shard", shard, f"there are {self.n_shards}")
        if self._is_closed:
            return WrongState("shards", "", "stopped", "call")
        if shard in self._lost:
            return ShardLost(shard)
        return Disconnected(f"shard {shard}", "it is not running", "it is being started again: try later")

    # --- lanes: used by shard 0's supervisor and the child's main -----------------------------------------------------

    def attach(self, peer: int, part: Part) -> None:
        """Use our end of a new channel to a shard."""
        old = self._lanes.pop(peer, None)
        if old is not None:
            old.close(Disconnected(f"shard {peer}", "it was started again"))
        channel = self.world.shards.open_channel(part, self.config.channel_settings, f"shard {peer}")
        lane = self._lanes[peer] = Lane(self, peer, self.shard, channel)
        self.contexts[""].run(lane.start)
        for callback in self.on_attached:
            self.contexts[""].run(callback, peer)

    def lose(self, peer: int) -> None:
        """Know that a shard will not come back."""
        self._lost[peer] = None

    def on_lane_lost(self, peer: int, lane: Lane, error: IsopodError) -> None:
        """A shard is gone."""
        if self._lanes.get(peer) is lane:
            del self._lanes[peer]
            log = self.logger.debug if self.is_stopping else self.logger.warning
            log("smp.lane_lost", peer=peer, error=error.message)

    def peers(self) -> list[int]:
        """Return the other shards that can be called now, by number."""
        return sorted(self._lanes)

    # --- connections --------------------------------------------------------------------------------------------------

    def adopt(self, name: str, part: Part, on_gone: Callable[[], None]) -> None:
        """Serve an accepted connection; `on_gone` is called once when it has ended, or at once if nobody serves that name."""
        handler = self._handlers.get(name)
        if handler is None or self._is_closed:
            self.logger.warning("smp.connection_unserved", name=name)
            part.close()
            on_gone()
            return
        self._n_adopted += 1
        number = self._n_adopted
        self._n_connections += 1
        told: list[bool] = []

        def gone() -> None:
            if not told:
                told.append(True)
                self._n_connections -= 1
                on_gone()

        def on_done(task: asyncio.Task[None]) -> None:
            del self._adopting[number]
            if task.cancelled() or task.exception() is not None:
                part.close()  # of a task that was cancelled before it began, nobody has taken it
                gone()

        task = asyncio.get_running_loop().create_task(self._adopt(handler, part, gone), context=self.contexts[""].copy())
        self._adopting[number] = task
        task.add_done_callback(on_done)

    async def _adopt(self, handler: ConnectionHandler, part: Part, gone: Callable[[], None]) -> None:
        try:
            await self.world.shards.adopt(part, handler.factory, on_gone=gone, tls=handler.tls)
        except OSError as error:
            self.logger.warning("smp.connection_lost", error=str(error))
            gone()

    @property
    def n_connections(self) -> int:
        """Adopted connections that are open."""
        return self._n_connections

    # --- numbers and the end ------------------------------------------------------------------------------------------

    def statistics(self) -> ShardStats:
        """Return this shard's numbers."""
        return ShardStats(
            shard=self.shard,
            pid=self.world.processes.own_pid(),
            calls_local=self._n_local,
            connections=self._n_connections,
            restarts=self.n_restarts,
            lanes=tuple(_lane_stats(lane) for _, lane in sorted(self._lanes.items())),
            queues=tuple(queue.statistics() for queue in self.queues),
        )

    async def drain(self, grace_s: float) -> None:
        """Take no calls any more, and let those that run end."""
        self.is_stopping = True
        await asyncio.gather(*(lane.drain(grace_s) for lane in self._lanes.values()))

    def close(self) -> None:
        """End all calls and channels."""
        self._is_closed = True
        for callback in self.on_closed:
            callback()
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close(Disconnected(f"shard {lane.peer}", "the shards are shutting down"))
        for task in list(self._adopting.values()):
            task.cancel()
        self.wheel.close()


class GoneCounter:
    """Tells shard 0 how many adopted connections have ended, once per turn of the loop.

    Args:
        send: Sends the message.
    """

    def __init__(self, send: Callable[[Gone], None]) -> None:
        self._send = send
        self._n_gone: dict[int, int] = {}

    def add(self, number: int) -> None:
        """One more, of the listener of that number."""
        if not self._n_gone:
            asyncio.get_running_loop().call_soon(self._flush)
        self._n_gone[number] = self._n_gone.get(number, 0) + 1

    def _flush(self) -> None:
        gone, self._n_gone = self._n_gone, {}
        for number, n_connections in gone.items():
            self._send(Gone(number, n_connections))


def _lane_stats(lane: Lane) -> LaneStats:
    counts, channel = lane.counts, lane.channel.statistics()
    return LaneStats(
        peer=lane.peer,
        channel=lane.channel.kind,
        calls_sent=counts.calls_sent,
        calls_received=counts.calls_received,
        calls_failed=counts.calls_failed,
        calls_timed_out=counts.calls_timed_out,
        calls_in_flight=lane.n_in_flight,
        calls_waiting=lane.n_waiting,
        calls_serving=lane.n_serving,
        bytes_out=channel.n_bytes_out,
        bytes_in=channel.n_bytes_in,
        messages_pending=channel.n_messages_pending,
        flushes=channel.n_flushes,
        wakeups=channel.n_wakeups,
    )


# --- for code on a shard ----------------------------------------------------------------------------------------------


def this_smp() -> Smp:
    """Return the shard that the running code belongs to.

    Raises:
        WrongState: It runs on none: no `SmpService` was started before it.
    """
    smp = _CURRENT.get(None)
    if smp is None:
        raise WrongState("shard", "", "not running", "ask for it", hint="start an SmpService first")
    return smp


def this_shard_id() -> int:
    """Return the number of the shard that the running code belongs to; 0 where no shards were started."""
    smp = _CURRENT.get(None)
    return 0 if smp is None else smp.shard


def shard_count() -> int:
    """Return how many shards there are; 1 where none were started."""
    smp = _CURRENT.get(None)
    return 1 if smp is None else smp.n_shards


async def submit_to(
    shard: int, method: Method[Q, R], request: Q, *, timeout_s: float | None = None, group: SmpServiceGroup | None = None
) -> R:
    """Run a method on a shard and return its reply; see `Smp.submit_to`."""
    return await this_smp().submit_to(shard, method, request, timeout_s=timeout_s, group=group)


async def submit_to_current(method: Method[Q, R], request: Q, *, timeout_s: float | None = None) -> R:
    """Run a method on the own shard and return its reply; see `Smp.submit_to`."""
    smp = this_smp()
    return await smp.submit_to(smp.shard, method, request, timeout_s=timeout_s)
