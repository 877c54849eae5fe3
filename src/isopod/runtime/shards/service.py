"""SmpService: starts the shards, keeps them running, and stops them. It runs on shard 0, the process that started them and owns the state.

    async with SmpService(world, SmpConfig(n_shards=4), logger=logger, services=["my.program:serve"]) as smp:
        ...

With one shard there is no process and no channel: every call is local. With more, each other shard is a process that runs the same
services; between every two there is a channel. A shard that dies is started again after a pause; calls to it meanwhile raise
`Disconnected`. One that keeps dying is given up: calls raise `ShardLost`, and `wait_lost` returns.

Life of a shard, as seen from here::

    starting --Ready--> joining --all attached, instances made--> up --process ended--> down --pause--> starting
                                                                                         `--too often--> lost

Rules: all start at once and join in the order of their numbers; stopped are first instances, in reverse order of their start, then the
other shards' services, then shard 0's. A shard that has not ended after the grace is killed. No process, descriptor or task is left behind.
"""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal

import msgspec

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards import messages as m
from isopod.runtime.shards.child import ENTRY, Stop, start_services, stop_services
from isopod.runtime.shards.config import SmpConfig
from isopod.runtime.shards.connections import Distribution
from isopod.runtime.shards.credits import CONTROL_GROUP
from isopod.runtime.shards.names import main_path, name_of
from isopod.runtime.shards.placement import n_shards_auto, place
from isopod.runtime.shards.sharded import replay, serve_sharded, stop_all
from isopod.runtime.shards.smp import STATISTICS, ShardStats, Smp
from isopod.runtime.waiters import Waiters
from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, ShardLost, WrongState, from_code
from isopod.world.network import Address, TcpOptions
from isopod.world.shards import Part, ShardProcess
from isopod.world.world import World

State = Literal["starting", "joining", "up", "down", "lost"]
KILL_MARGIN_S: Final = 1.0
"""What a shard may take beyond its grace to end by itself."""


class ShardEvent(msgspec.Struct, frozen=True):
    """What became of a shard, for `on_event`.

    Args:
        shard: Which.
        state: What it is now: "up", "down" or "lost".
        status: How its process ended (negative for a signal), None if it runs or never began.
        n_restarts: How often it was started again so far.
    """

    shard: int
    state: State
    status: int | None
    n_restarts: int


class _Slot:
    """One of the other shards, over all lives of its process."""

    def __init__(self, shard: int, cpu: int | None) -> None:
        self.shard = shard
        self.cpu = cpu
        self.state: State = "starting"
        self.process: ShardProcess | None = None
        self.ready: asyncio.Future[None] | None = None
        self.is_connected = False
        self.is_gone = False
        """Its link is closed: it answers nothing any more."""
        self.n_restarts = 0
        self.n_quick_deaths = 0
        self.started_s = 0.0
        self.acks: dict[int, asyncio.Future[None]] = {}
        self.task: asyncio.Task[None] | None = None

    def fail(self, error: IsopodError) -> None:
        """Let whoever waits for this shard hear that it is gone."""
        self.is_gone = True
        for waiter in [*([self.ready] if self.ready is not None else []), *self.acks.values()]:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # seen, if nobody waits any more
        self.acks.clear()


class SmpService:
    """All shards of a program.

    Args:
        world: The ports of shard 0.
        config: How many, where, how.
        logger: Where shard 0 and the supervision report.
        metrics: Where shard 0 counts.
        services: What every shard runs: `async def service(smp: Smp) -> Stop | None`, or its name.
        on_event: Told when a shard is up, down or lost.
    """

    def __init__(
        self,
        world: World,
        config: SmpConfig,
        *,
        logger: Logger,
        metrics: Registry | None = None,
        services: Sequence[Callable[..., Any] | str] = (),
        on_event: Callable[[ShardEvent], None] | None = None,
    ) -> None:
        self.world = world
        self.config = config
        self._logger = logger
        self._metrics = metrics if metrics is not None else Registry()
        self._topology = list(world.shards.topology())
        self.n_shards = config.n_shards or n_shards_auto(self._topology)
        cpus = place(self._topology, self.n_shards)
        self.cpus = cpus if config.pin != "none" else [None] * self.n_shards
        """The processor of each shard, None for one that is not pinned."""
        self._services = [name_of(service) for service in services]
        self._on_event = on_event
        self._slots: dict[int, _Slot] = {}
        self._smp: Smp | None = None
        self._stops: list[Stop] = []
        self._distributions: list[Distribution] = []
        self._n_attached = 0
        self._is_stopping = False
        self._changed = Waiters()
        self._joining = asyncio.Lock()
        """Shards join one by one: of two at once neither would see the other."""
        self._script = main_path()
        self._restarts = self._metrics.counter("isopod_smp_restarts_total", "Shards started again after their process had ended.")
        self._up = self._metrics.gauge("isopod_smp_shards_up", "Shards that run, shard 0 among them.")

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Smp:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> Smp:
        """Start all shards and wait until all are up; return shard 0.

        Raises:
            WrongState: It was started before.
            IsopodError: A shard or a service could not be started; nothing is left running.
            OSError: A process could not be started.
        """
        if self._smp is not None:
            raise WrongState("shards", "", "started", "start them again")
        smp = self._smp = Smp(self.world, 0, self.n_shards, self.config, logger=self._logger, metrics=self._metrics)
        smp.enter()
        serve_sharded(smp, self._script)
        self._up.set(1)
        try:
            if self.config.pin == "all" and self.cpus[0] is not None and self.n_shards > 1:
                self.world.shards.pin(self.cpus[0])
            self._stops = await start_services(smp, self._services, self._script)
            await self._start_others()
        except BaseException:
            await self.stop()
            raise
        return smp

    async def stop(self) -> None:
        """Stop everything, in order. A second time nothing happens."""
        smp = self._smp
        if smp is None or self._is_stopping:
            return
        self._is_stopping = smp.is_stopping = True
        try:
            await self._stop_in_order(smp, self.config.stop_grace_s)
        except BaseException:  # cancelled: nothing may be left all the same
            await asyncio.gather(*(self._stop_at_once(slot) for slot in self._slots.values()))
            smp.close()
            raise
        finally:
            self._up.set(0)
            if self.config.pin == "all":
                self.world.shards.unpin()
            self._changed.wake()

    async def _stop_in_order(self, smp: Smp, grace_s: float) -> None:
        for distribution in self._distributions:
            await distribution.close()
        for failure in await stop_all(smp):
            self._logger.error("smp.stop_failed", error=repr(failure))
        await asyncio.gather(*(self._stop_slot(slot, grace_s) for slot in self._slots.values()))
        await smp.drain(grace_s)
        await stop_services(smp, self._stops, grace_s)
        smp.close()

    # --- what a program asks ------------------------------------------------------------------------------------------

    def states(self) -> dict[int, State]:
        """Return the state of each shard; shard 0 is up while this can be asked."""
        return {0: "up", **{shard: slot.state for shard, slot in self._slots.items()}}

    async def wait_up(self, shard: int) -> None:
        """Wait until a shard is up.

        Raises:
            ShardLost: It will not be.
        """
        slot = self._slots.get(shard)
        while slot is not None and slot.state != "up":
            if slot.state == "lost" or self._is_stopping:
                raise ShardLost(shard)
            await self._changed.wait()

    async def wait_lost(self) -> int:
        """Wait until a shard is given up; return its number."""
        while True:
            for shard, slot in self._slots.items():
                if slot.state == "lost":
                    return shard
            await self._changed.wait()

    async def statistics(self) -> list[ShardStats]:
        """Return the numbers of every shard that is up, by shard."""
        smp = self._running()
        shards = [0, *(shard for shard in smp.peers() if self._slots[shard].state == "up")]
        calls = [smp.submit_to(shard, STATISTICS, None, group=CONTROL_GROUP) for shard in shards]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        found = [outcome for outcome in outcomes if isinstance(outcome, ShardStats)]
        return [msgspec.structs.replace(each, restarts=self._n_restarts(each.shard)) for each in found]

    async def listen(
        self,
        address: Address,
        name: str,
        *,
        shards: Sequence[int] | None = None,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        options: TcpOptions | None = None,
    ) -> Distribution:
        """Accept connections here, and hand each to the shard with the fewest open ones.

        Args:
            address: Where.
            name: Who serves them: what `Smp.serve_connections` was given on each of the shards.
            shards: Among which; None for all, shard 0 included.
            mode: Permission bits of a Unix socket's file.
            gid: Its group.
            backlog: Connections that may wait to be accepted.
            options: Of every accepted TCP connection.

        Returns:
            The listener; the service closes it too.
        """
        self._running()
        number = len(self._distributions)
        among = list(range(self.n_shards)) if shards is None else list(shards)
        distribution = Distribution(among, lambda shard, part: self._hand_out(number, shard, part, name))
        self._distributions.append(distribution)
        distribution.listener = await self.world.shards.accept(
            address, distribution.take, mode=mode, gid=gid, backlog=backlog, options=options
        )
        return distribution

    # --- the other shards ---------------------------------------------------------------------------------------------

    async def _start_others(self) -> None:
        self._slots = {shard: _Slot(shard, self.cpus[shard]) for shard in range(1, self.n_shards)}
        outcomes = await asyncio.gather(*(self._begin(slot) for slot in self._slots.values()), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for slot in self._slots.values():
            await self._join(slot)
        loop = asyncio.get_running_loop()
        for slot in self._slots.values():
            slot.task = loop.create_task(self._keep(slot), name=f"smp keep {slot.shard}")

    async def _begin(self, slot: _Slot) -> None:
        """Start a shard's process, and wait until its services run."""
        loop = asyncio.get_running_loop()
        slot.state = "starting"
        slot.is_gone = False
        slot.started_s = loop.time()
        process = slot.process = await self.world.shards.start(ENTRY, name=f"shard-{slot.shard}", cpu=slot.cpu)
        slot.ready = loop.create_future()
        process.link.start(lambda packed, parts: self._on_order(slot, packed, parts), lambda: slot.fail(_gone(slot.shard)))
        config = msgspec.Raw(m.ENCODER.encode(self.config))
        process.link.send(m.ENCODER.encode(m.Configure(slot.shard, self.n_shards, config, tuple(self._services), self._script)))
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                await slot.ready
        except TimeoutError:
            raise DeadlineExceeded(f"the start of shard {slot.shard}", self.config.start_timeout_s) from None

    async def _join(self, slot: _Slot) -> None:
        """Connect a new shard with all others, and make there what was started; then it is up."""
        slot.state = "joining"
        async with self._joining:
            await self._connect(slot)
        self._set_state(slot, "up", None)

    async def _connect(self, slot: _Slot) -> None:
        smp = self._running()
        ours, theirs = self.world.shards.pair(self.config.channel_settings)
        try:
            smp.attach(slot.shard, ours)
        except BaseException:
            theirs.close()
            raise
        waiting = [self._attach(slot, 0, theirs)]
        for other in self._slots.values():
            if other.is_connected and other is not slot:
                left, right = self.world.shards.pair(self.config.channel_settings)
                waiting += [self._attach(slot, other.shard, left), self._attach(other, slot.shard, right)]
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise DeadlineExceeded(f"joining shard {slot.shard}", self.config.start_timeout_s) from None
        if slot.is_gone:
            raise _gone(slot.shard)
        await replay(smp, slot.shard)
        slot.is_connected = True

    def _attach(self, slot: _Slot, peer: int, part: Part) -> "asyncio.Future[None]":
        """Give a shard its end of a channel; the future is done when it uses it, or when it is gone."""
        self._n_attached += 1
        number = self._n_attached
        acked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if slot.is_gone:  # nobody would answer, and whoever waited for this shard has been told
            part.close()
            acked.set_result(None)
            return acked
        slot.acks[number] = acked
        assert slot.process is not None
        slot.process.link.send(m.ENCODER.encode(m.Attach(peer, number)), [part])
        return acked

    async def _keep(self, slot: _Slot) -> None:
        """Wait for a shard's end, and start it again, until there is no more use in it."""
        while not self._ends():
            assert slot.process is not None
            status = await slot.process.wait()
            await self._bury(slot)
            if self._ends():
                return
            self._set_state(slot, "down", status)
            if not await self._revive(slot, status):
                return

    async def _revive(self, slot: _Slot, status: int | None) -> bool:
        """Start a dead shard again, after a pause, as often as it takes; return False once it is given up."""
        while self._count_death(slot):
            await asyncio.sleep(self._pause_s(slot))
            if self._ends():
                return False
            slot.n_restarts += 1
            self._restarts.inc()
            try:
                await self._begin(slot)
                await self._join(slot)
            except (IsopodError, OSError) as error:
                self._logger.error("smp.restart_failed", shard=slot.shard, error=str(error))
                await self._bury(slot)
                if self._ends():
                    return False
                self._set_state(slot, "down", status)
            else:
                return True
        self._set_state(slot, "lost", status)
        self._running().lose(slot.shard)
        for other in self._slots.values():
            if other.process is not None and other is not slot:
                other.process.link.send(m.ENCODER.encode(m.Lost(slot.shard)))
        return False

    def _ends(self) -> bool:
        """Return whether it is being stopped: that may begin during any wait."""
        return self._is_stopping

    def _count_death(self, slot: _Slot) -> bool:
        """Return whether a shard that ended is to be started again."""
        policy = self.config.restart
        lived_s = asyncio.get_running_loop().time() - slot.started_s
        slot.n_quick_deaths = slot.n_quick_deaths + 1 if lived_s < policy.quick_s else 1
        return slot.n_quick_deaths <= policy.n_quick_deaths_max

    def _pause_s(self, slot: _Slot) -> float:
        policy = self.config.restart
        pause_s = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** (slot.n_quick_deaths - 1))
        return pause_s * (1 - policy.jitter * self.world.random.stream("smp.restart").random())

    async def _bury(self, slot: _Slot) -> None:
        """Make sure that a shard's process is gone, and that nobody waits for it."""
        process, slot.process = slot.process, None
        slot.is_connected = False
        slot.fail(_gone(slot.shard))
        for distribution in self._distributions:
            distribution.forget(slot.shard)
        if process is not None:
            await process.end()

    async def _stop_slot(self, slot: _Slot, grace_s: float) -> None:
        process = slot.process
        if process is not None:
            process.link.send(m.ENCODER.encode(m.Stop(grace_s)))
            try:
                # Once for calls, once for services, and something on top.
                async with asyncio.timeout(2 * grace_s + KILL_MARGIN_S):
                    await process.wait()
            except TimeoutError:
                self._logger.error("smp.shard_killed", shard=slot.shard, grace_s=grace_s)
        await self._stop_at_once(slot)

    async def _stop_at_once(self, slot: _Slot) -> None:
        if slot.task is not None:
            slot.task.cancel()
            await asyncio.gather(slot.task, return_exceptions=True)
        await self._bury(slot)

    def _on_order(self, slot: _Slot, packed: bytes, parts: Sequence[Part]) -> None:
        """Take a message from a shard."""
        for part in parts:  # none is expected
            part.close()
        try:
            order = m.ORDERS.decode(packed)
        except msgspec.MsgspecError as error:
            self._logger.error("smp.shard_talks_nonsense", shard=slot.shard, error=str(error))
            if slot.process is not None:
                slot.process.link.close()  # which ends it
            return
        if isinstance(order, m.Gone):
            self._distributions[order.number].on_gone(slot.shard, order.n_connections)
        elif isinstance(order, m.Attached):
            acked = slot.acks.pop(order.number, None)
            if acked is not None and not acked.done():
                acked.set_result(None)
        elif slot.ready is not None and not slot.ready.done():
            if isinstance(order, m.Ready):
                slot.ready.set_result(None)
            elif isinstance(order, m.NotReady):
                slot.ready.set_exception(from_code(order.code, order.message, order.hint))

    def _hand_out(self, number: int, shard: int, part: Part, name: str) -> bool:
        """Give an accepted connection of a distribution to a shard; False if that cannot take it now."""
        slot = self._slots.get(shard)
        if shard == 0:
            self._running().adopt(name, part, lambda: self._distributions[number].on_gone(0, 1))
        elif slot is not None and slot.process is not None and slot.state == "up":
            slot.process.link.send(m.ENCODER.encode(m.Adopt(name, number)), [part])
        else:
            return False
        return True

    def _set_state(self, slot: _Slot, state: State, status: int | None) -> None:
        slot.state = state
        self._up.set(1 + sum(other.state == "up" for other in self._slots.values()))
        log = {"up": self._logger.info, "down": self._logger.warning}.get(state, self._logger.error)
        log(f"smp.shard_{state}", shard=slot.shard, status=status, n_restarts=slot.n_restarts)
        self._changed.wake()
        if self._on_event is not None:
            try:
                self._on_event(ShardEvent(slot.shard, state, status, slot.n_restarts))
            except Exception as error:  # noqa: BLE001 - the supervision goes on
                self._logger.error("smp.event_failed", shard=slot.shard, state=state, error=repr(error))

    def _n_restarts(self, shard: int) -> int:
        return self._slots[shard].n_restarts if shard in self._slots else 0

    def _running(self) -> Smp:
        if self._smp is None:
            raise WrongState("shards", "", "not started", "use them")
        return self._smp


def _gone(shard: int) -> Disconnected:
    return Disconnected(f"shard {shard}", "its process ended")
