"""Events: who is told of changes to records, in which order, and how a stream goes on after it was cut.

An event is told once its change is durable, in the order of the journal. Handlers live in this process and are called in turn; one that
fails is logged and goes on being called. A stream is for somebody else's program: it has a bounded queue, and a reader that is too slow
for it loses nothing, because what the queue did not take is read from the journal again. An event's cursor is the number of its journal
record, and no two events have the same one: a stream that begins after a cursor has neither gaps nor repetitions, whatever was restarted
in between.

Rules: a handler must not block and must not change records (it may start a task that does). Events of memory alone do not exist.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, Literal, Protocol, get_args

from isopod.api.messages import Cursor, Event, EventKind, EventsRequest, Status
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import Exhausted, InvalidArgument
from isopod.world.world import World

Handler = Callable[[Event], None]
QUEUE_EVENTS_MAX: Final = 1024
STREAMS_MAX: Final = 256
_SECOND_NS: Final = 1_000_000_000


class History(Protocol):
    """Where old events are read."""

    @property
    def last_cursor(self) -> int:
        """Everything up to this journal record was told."""

    def events_after(self, cursor: int) -> AsyncGenerator[Event, None]:
        """Yield what was told after a journal record, oldest first."""


class Source(History, Protocol):
    """A store, as a stream of events needs it."""

    @property
    def n_streams(self) -> int:
        """How many streams are open."""

    async def oldest_cursor(self) -> int:
        """Return the journal record after which events can still be had."""

    def follow(self, cursor: int) -> AsyncGenerator[Event, None]:
        """Yield every event after a journal record, past ones and those to come."""


class Hub:
    """Tells events to handlers and streams.

    Args:
        logger: Told of handlers that fail.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._handlers: dict[int, Handler] = {}
        self._queues: dict[int, Queue] = {}
        self._n_given = 0

    @property
    def n_streams(self) -> int:
        """How many streams listen."""
        return len(self._queues)

    def subscribe(self, handler: Handler) -> Callable[[], None]:
        """Have a handler told of every event from now on; return what ends that."""
        self._n_given += 1
        key = self._n_given
        self._handlers[key] = handler

        def end() -> None:
            self._handlers.pop(key, None)

        return end

    def tell(self, event: Event) -> None:
        """Tell everybody."""
        for handler in list(self._handlers.values()):
            try:
                handler(event)
            except Exception as error:  # noqa: BLE001  somebody else's code: the others must hear of it all the same
                self._logger.error("event.handler_failed", kind=event.kind, id=event.id, why=repr(error))
        for queue in list(self._queues.values()):
            queue.put(event)

    def open_queue(self) -> "Queue":
        """Begin to collect events for one reader; the reader closes it."""
        self._n_given += 1
        key = self._n_given
        queue = self._queues[key] = Queue(lambda: self._queues.pop(key, None))
        return queue

    def close(self) -> None:
        """End every stream."""
        for queue in list(self._queues.values()):
            queue.end()


class Queue:
    """Events for one reader, at most `QUEUE_EVENTS_MAX` of them.

    Args:
        on_close: Called when the reader goes.
    """

    def __init__(self, on_close: Callable[[], object]) -> None:
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._on_close = on_close
        self.has_overflowed = False
        """Some were not taken: the rest is to be read from the journal."""
        self.is_ended = False

    def put(self, event: Event) -> None:
        """Add an event, or note that there was no room."""
        if len(self._events) >= QUEUE_EVENTS_MAX:
            self.has_overflowed = True
        elif not self.has_overflowed:
            self._events.append(event)
        self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self.is_ended = True
        self._news.set()

    async def next(self) -> Event | None:
        """Return the next event; None when what was taken is read and the queue overflowed or ended."""
        while not self._events:
            if self.has_overflowed or self.is_ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def close(self) -> None:
        """Stop collecting."""
        self._on_close()


async def follow(hub: Hub, history: History, cursor: int) -> AsyncGenerator[Event, None]:
    """Yield every event after a cursor, past ones and those to come, until the hub closes. Close the iterator (`aclosing`).

    Args:
        hub: Tells the new ones.
        history: Knows the old ones.
        cursor: The journal record after which to begin.

    Raises:
        InvalidArgument: The cursor is newer than the journal: it is another one's.
        IsopodError: The journal does not go back so far.
    """
    if cursor > history.last_cursor:
        raise _too_new(cursor, history)
    position = cursor
    is_ended = False
    while not is_ended:
        queue = hub.open_queue()
        try:
            if position < history.last_cursor:
                async with aclosing(history.events_after(position)) as past:
                    async for event in past:
                        position = event.cursor
                        yield event
            while (event_now := await queue.next()) is not None:
                if event_now.cursor > position:
                    position = event_now.cursor
                    yield event_now
            is_ended = queue.is_ended
        finally:
            queue.close()


async def stream_events(world: World, store: Source, request: EventsRequest) -> AsyncGenerator[Event | Cursor, None]:
    """Yield the events that a request asks for, after the cursor at which they begin. Close the iterator (`aclosing`).

    Args:
        world: Whose clock ends a stream that has an end.
        store: Where they come from.
        request: Which ones.

    Raises:
        Exhausted: Too many streams are open.
        InvalidArgument: The cursor is newer than the journal.
        NotFound: The journal does not go back to the cursor.
    """
    if store.n_streams >= STREAMS_MAX:
        raise Exhausted("event streams", f"{STREAMS_MAX} are open", "close some: each `isopod events` is one", retry_after_s=1.0)
    position = await _begin(store, request)
    if position > store.last_cursor:
        raise _too_new(position, store)
    yield Cursor(position)
    async with aclosing(store.events_after(position)) as past:
        async for event in past:
            position = event.cursor
            if _asked(event, request):
                yield event
    async with aclosing(store.follow(position)) as coming:
        while (now := await _next(coming, world, request.until_ns)) is not None:
            if _asked(now, request):
                yield now


async def _begin(store: Source, request: EventsRequest) -> int:
    """Return the journal record after which a stream begins."""
    if request.cursor is not None:
        return request.cursor
    # Wall time may have jumped: every record is looked at, not only the newest part.
    return store.last_cursor if request.since_ns is None else await store.oldest_cursor()


async def _next(coming: AsyncGenerator[Event, None], world: World, until_ns: int | None) -> Event | None:
    """Wait for the next event; None at the time at which the stream is to end, or when the store closes."""
    limit_s = None if until_ns is None else max(0.0, (until_ns - world.clock.now_ns()) / _SECOND_NS)
    try:
        async with asyncio.timeout(limit_s):
            return await anext(coming)
    except (TimeoutError, StopAsyncIteration):
        return None


def _asked(event: Event, request: EventsRequest) -> bool:
    since, until = request.since_ns, request.until_ns
    return (since is None or event.at_ns >= since) and (until is None or event.at_ns <= until) and wanted(event, request)


def _too_new(cursor: int, history: History) -> InvalidArgument:
    hint = "was the node restored? begin without a cursor"
    return InvalidArgument("cursor", cursor, f"the journal ends at {history.last_cursor}", hint)


def wanted(event: Event, request: EventsRequest) -> bool:
    """Return whether a request asks for an event (its times are not looked at)."""
    if request.kinds and event.kind not in request.kinds:
        return False
    return not request.containers or any(event.name == name or event.id.startswith(name) for name in request.containers)


# --- ready-made handlers ----------------------------------------------------------------------------------------------


class LoggingHandler:
    """Writes a line for every event; values of variables and labels stay out of it.

    Args:
        logger: Where.
        level: At which level.
    """

    def __init__(self, logger: Logger, level: Literal["debug", "info"] = "info") -> None:
        self._write = logger.debug if level == "debug" else logger.info

    def __call__(self, event: Event) -> None:
        """Write the line."""
        facts: dict[str, object] = {"kind": event.kind, "id": event.id, "name": event.name, "cursor": event.cursor}
        if event.status is not None:
            facts |= {"status": event.status, "before": event.status_before}
        if event.health is not None:
            facts |= {"health": event.health, "before": event.health_before}
        if event.network:
            facts |= {"network": event.network, "before": event.network_before}
        self._write("event", **facts)


class MetricsHandler:
    """Counts events by kind, and changes of state by the state reached.

    Args:
        metrics: Where.
    """

    def __init__(self, metrics: Registry) -> None:
        text = "Durable changes of container records, by kind."
        self._kinds = {kind: metrics.counter("isopod_container_events_total", text, kind=kind) for kind in get_args(EventKind)}
        text = "States that containers reached, by state."
        self._states = {status: metrics.counter("isopod_container_states_total", text, status=status) for status in get_args(Status)}

    def __call__(self, event: Event) -> None:
        """Count."""
        self._kinds[event.kind].inc()
        if event.status is not None:
            self._states[event.status].inc()
