"""The life of a shard that another one started: configure, serve, stop.

It ends when it is told to, and when its link closes, whatever it is doing: its starter is gone.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Home, Registry, next_generation
from isopod.runtime.shards import messages as m
from isopod.runtime.shards.config import SmpConfig
from isopod.runtime.shards.names import find
from isopod.runtime.shards.sharded import serve_sharded
from isopod.runtime.shards.smp import GoneCounter, Smp
from isopod.world.errors import BugError, IsopodError
from isopod.world.shards import Link, Part
from isopod.world.world import World

ENTRY: Final = "isopod.runtime.shards.child:run"
Stop = Callable[[], Awaitable[None]]


async def run(world: World, link: Link) -> None:
    """Be a shard: the entry of its process."""
    inbox: asyncio.Queue[tuple[m.Order, Sequence[Part]] | None] = asyncio.Queue()

    def on_message(packed: bytes, parts: Sequence[Part]) -> None:
        inbox.put_nowait((m.ORDERS.decode(packed), parts))

    link.start(on_message, lambda: inbox.put_nowait(None))
    first = await inbox.get()
    if first is None or not isinstance(first[0], m.Configure):
        return
    await _Child(world, link, first[0]).live(inbox)


class _Child:
    """A configured shard."""

    def __init__(self, world: World, link: Link, orders: m.Configure) -> None:
        config = msgspec.msgpack.decode(orders.config, type=SmpConfig)
        self._link = link
        self._orders = orders
        home = None
        if config.metrics_folder:
            generation = next_generation(world.pages, config.metrics_folder, orders.shard)
            home = Home(world.pages, config.metrics_folder, orders.shard, generation)
        self._metrics = Registry(home)
        logger = Logger(link.write_log, world.clock, level=config.log_level).bind(shard=orders.shard)
        self._smp = Smp(world, orders.shard, orders.n_shards, config, logger=logger, metrics=self._metrics)
        self._stops: list[Stop] = []
        self._gone = GoneCounter(self._send)

    async def live(self, inbox: "asyncio.Queue[tuple[m.Order, Sequence[Part]] | None]") -> None:
        """Serve until told to stop, or until nobody is there to tell."""
        self._smp.enter()
        serve_sharded(self._smp, self._orders.main_path)
        grace_s = 0.0
        # The link is watched from the start: services may take long, and the starter may die meanwhile.
        starting = asyncio.get_running_loop().create_task(self._start())
        try:
            while (order := await inbox.get()) is not None:
                if isinstance(order[0], m.Stop):
                    grace_s = order[0].grace_s
                    break
                self._obey(*order)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await self._stop(grace_s)

    async def _start(self) -> None:
        try:
            self._stops.extend(await start_services(self._smp, self._orders.services, self._orders.main_path))
        except Exception as error:  # noqa: BLE001 - told to who started us
            told = error if isinstance(error, IsopodError) else BugError(f"{type(error).__name__}: {error}")
            if told is not error:
                self._smp.logger.error("smp.start_failed", traceback="".join(traceback.format_exception(error)))
            self._send(m.NotReady(told.code, m.sayable(told.message), m.sayable(told.hint)))
        else:
            self._send(m.Ready())

    def _obey(self, order: m.Order, parts: Sequence[Part]) -> None:
        if isinstance(order, m.Attach) and parts:
            self._smp.attach(order.shard, parts[0])
            self._send(m.Attached(order.number))
        elif isinstance(order, m.Adopt) and parts:
            self._smp.adopt(order.name, parts[0], partial(self._gone.add, order.number))
        elif isinstance(order, m.Lost):
            self._smp.lose(order.shard)

    async def _stop(self, grace_s: float) -> None:
        smp = self._smp
        await smp.drain(grace_s)
        await stop_services(smp, self._stops, grace_s)
        smp.close()
        self._metrics.close()

    def _send(self, order: m.Order) -> None:
        self._link.send(m.ENCODER.encode(order))


async def start_services(smp: Smp, services: Sequence[str], main_path: str) -> list[Stop]:
    """Start the services of a shard in their order; return how to stop them.

    A service is `async def service(smp: Smp) -> Stop | None`; if a later one fails, those before are stopped.
    """
    stops: list[Stop] = []
    try:
        for name in services:
            service: Any = find(name, main_path)
            stop = await service(smp)
            if stop is not None:
                stops.append(stop)
    except BaseException:
        await stop_services(smp, stops, smp.config.stop_grace_s)
        raise
    return stops


async def stop_services(smp: Smp, stops: Sequence[Stop], grace_s: float) -> None:
    """Stop services in reverse order; one that fails or takes longer than `grace_s` does not keep the others from it."""
    for stop in reversed(stops):
        try:
            async with asyncio.timeout(grace_s):
                await stop()
        except Exception as error:  # noqa: BLE001 - the others have to be stopped too
            smp.logger.error("smp.stop_failed", error=repr(error))
