"""Messenger: messages from node to node that arrive, once and in order, or are known not to have arrived (row S20).

    receipt = messenger.send(3, "image.wanted", b"...", ttl_s=30.0)     # never waits
    await receipt                                                       # the handler on node 3 has returned

What is promised, for messages of one sender to one receiver:

    acknowledged   `send`'s future ends when the receiver's handler has returned, or with the error it raised
    retried        what was not acknowledged is sent again, over whatever connection there is then, until its time to live is over
    once           a message that comes again is acknowledged and not handled again, for as long as the receiver's process lives; across
                   a crash of the receiver one may be handled twice, across a crash of the sender what waited is gone
    ordered        messages are handled in the order in which they were sent; those whose time is over are left out
    bounded        1,000 messages or 4 MiB wait for one receiver, more is refused at once; a receiver remembers 4,096 senders

One call with a batch of messages is under way to each receiver; its answer acknowledges every one of them. Senders are told apart by id and
by a nonce drawn when the process started: a restarted sender begins to count anew and is not taken for its former self.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from isopod.cluster.members.credentials import bearer_of
from isopod.net.rpc.call import AnyCall, AnyHandler, AnyMethod
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.wire.service import Method
from isopod.world.errors import (
    BugError,
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    IdentityConflict,
    InvalidArgument,
    IsopodError,
    NotFound,
    from_code,
)
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

QUEUE_MAX: Final = 1000
QUEUE_BYTES_MAX: Final = 4 << 20
BODY_BYTES_MAX: Final = 256 << 10
BATCH_MAX: Final = 128
BATCH_BYTES_MAX: Final = 512 << 10
SENDERS_MAX: Final = 4096
LIVES_MAX: Final = 4
"""Of one sender."""
TTL_S: Final = 30.0
TTL_S_MAX: Final = 3600.0
CALL_S: Final = 10.0
PAUSE_FIRST_S: Final = 0.05
PAUSE_MAX_S: Final = 2.0
TOPIC_CHARS_MAX: Final = 64


class WireMessage(msgspec.Struct, frozen=True, array_like=True):
    """A message on its way."""

    seq: int
    topic: str
    ttl_ms: int
    """What is left of its time when it is sent."""
    body: bytes


class Batch(msgspec.Struct, frozen=True):
    """Messages of one sender, in order."""

    sender: int
    epoch: str
    messages: list[WireMessage]


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What became of a message: code "" if it was handled, else an error of the tree."""

    seq: int
    code: str = ""
    message: str = ""
    hint: str = ""


class Verdicts(msgspec.Struct, frozen=True):
    """One for each message of a batch, up to the first that is to be sent again."""

    verdicts: list[Verdict]


SEND: Final = Method("message.send", Batch, Verdicts, idempotent=True)


class Message(NamedTuple):
    """A message as its handler gets it."""

    sender: int
    topic: str
    body: bytes


Handler = Callable[[Message], Awaitable[None]]
"""It has 10 seconds, then it is cancelled and the message comes again."""


class Links(Protocol):
    """The ways to other nodes: `isopod.cluster.members.links.Links`."""

    async def call(self, node_id: int, method: Method[Q, R], request: Q, *, timeout_s: float) -> R:
        """Call a method of a node, once."""


class _Waiting(NamedTuple):
    seq: int
    topic: str
    body: bytes
    expires_at: float
    ttl_s: float
    receipt: "asyncio.Future[None]"


class _Sender:
    """What a receiver remembers of a sender."""

    __slots__ = ("lock", "seq", "verdicts")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.seq = 0
        """The last message that was handled."""
        self.verdicts: OrderedDict[int, Verdict] = OrderedDict()
        """Of the last ones that failed: who asks again hears the same."""


class Messenger:
    """Sends and receives. Who made it closes it.

    Args:
        world: For a nonce and chance.
        node_id: This node.
        links: Ways to the others.
        logger: Told of handlers' bugs.
        metrics: Counts.
    """

    def __init__(self, world: World, node_id: int, links: Callable[[], Links], *, logger: Logger, metrics: Registry) -> None:
        self._node_id = node_id
        self._links = links
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._random = world.random.stream("cluster.messages")
        self._epoch = world.random.token_hex(8)
        self._handlers: dict[str, Handler] = {}
        self._n_sent = 0
        self._queues: dict[int, deque[_Waiting]] = {}
        self._n_bytes: dict[int, int] = {}
        """Of what waits, by receiver."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._senders: OrderedDict[int, OrderedDict[str, _Sender]] = OrderedDict()
        """By id and life (a process's, not a disk's)."""
        self._is_closed = False
        counter = metrics.counter
        self._sent = counter("isopod_messages_sent_total", "Messages given to the messenger.")
        self._acknowledged = counter("isopod_messages_acknowledged_total", "Messages that were handled.")
        self._expired = counter("isopod_messages_expired_total", "Messages whose time was over before they were acknowledged.")
        self._retries = counter("isopod_messages_retries_total", "Batches sent again.")
        self._handled = counter("isopod_messages_handled_total", "Messages handled here.")
        self._duplicates = counter("isopod_messages_duplicates_total", "Messages that came again, and were not handled again.")

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, to: int, topic: str, body: bytes, *, ttl_s: float = TTL_S) -> "asyncio.Future[None]":
        """Send a message; the future ends when it was handled.

        Args:
            to: The receiver's id; this node's own is fine.
            topic: Which of its handlers.
            body: At most 256 KiB.
            ttl_s: How long it is worth anything, in seconds.

        Returns:
            A future, which raises DeadlineExceeded if the time was over first (then it may have been handled, or not), NotFound if the
            receiver has no such handler, and what the handler raised. Whoever does not care may drop it.

        Raises:
            InvalidArgument: A bound is over its limit.
            Exhausted: Too much waits for that receiver.
            Disconnected: The messenger is closed.
        """
        self._check(topic, body, ttl_s)
        queue = self._queues.setdefault(to, deque())
        if len(queue) >= QUEUE_MAX or self._n_bytes.get(to, 0) + len(body) > QUEUE_BYTES_MAX:
            raise Exhausted(
                f"messages to node {to}", f"{QUEUE_MAX} or {QUEUE_BYTES_MAX >> 20} MiB wait", "is it running? send less, or later"
            )
        receipt: asyncio.Future[None] = self._loop.create_future()
        receipt.add_done_callback(_seen)
        receipt.add_done_callback(lambda _: self._release(to, len(body)))
        self._n_bytes[to] = self._n_bytes.get(to, 0) + len(body)
        self._n_sent += 1
        self._sent.inc()
        queue.append(_Waiting(self._n_sent, topic, body, self._loop.time() + ttl_s, ttl_s, receipt))
        if to not in self._tasks:
            self._tasks[to] = self._loop.create_task(self._deliver(to, queue), name=f"messages to {to}")
        return receipt

    def on(self, topic: str, handler: Handler) -> None:
        """Have messages of a topic handled. An error it raises goes to the sender; a temporary one makes it try again.

        Raises:
            BugError: The topic has a handler.
        """
        if topic in self._handlers:
            raise BugError(f"two handlers for messages of {topic}")
        self._handlers[topic] = handler

    async def close(self) -> None:
        """Send nothing more; what waits fails."""
        self._is_closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for to, queue in self._queues.items():
            for waiting in queue:
                _fail(waiting, Disconnected(f"node {to}", "this node is shutting down"))
        self._queues.clear()

    def handlers(self) -> dict[AnyMethod, AnyHandler]:
        """Return what the node's server has to serve."""
        return {SEND: self._on_batch}

    def _release(self, to: int, n_bytes: int) -> None:
        left = self._n_bytes.get(to, 0) - n_bytes
        if left > 0:
            self._n_bytes[to] = left
        else:
            self._n_bytes.pop(to, None)

    def _check(self, topic: str, body: bytes, ttl_s: float) -> None:
        if self._is_closed:
            raise Disconnected(f"node {self._node_id}", "this node is shutting down")
        if not 0 < len(topic) <= TOPIC_CHARS_MAX:
            raise InvalidArgument("topic", topic, f"want 1 to {TOPIC_CHARS_MAX} characters")
        if len(body) > BODY_BYTES_MAX:
            raise InvalidArgument("message", f"{len(body)} bytes", f"over {BODY_BYTES_MAX}", "send where it is to be found instead")
        if not 0 < ttl_s <= TTL_S_MAX:
            raise InvalidArgument("time to live", f"{ttl_s:g} s", f"want more than 0, at most {TTL_S_MAX:g} s")

    async def _deliver(self, to: int, queue: deque[_Waiting]) -> None:
        """Send what waits for one receiver until nothing does."""
        n_failed = 0
        try:
            while queue:
                self._drop_expired(to, queue)
                if not queue:
                    break
                try:
                    done = await self._send_batch(to, queue)
                except IsopodError:
                    done = False
                n_failed = 0 if done else n_failed + 1
                if n_failed:
                    self._retries.inc()
                    await self._pause(queue, n_failed)
        finally:
            del self._tasks[to]
            if not queue:
                self._queues.pop(to, None)

    async def _send_batch(self, to: int, queue: deque[_Waiting]) -> bool:
        """Send the first of what waits; return whether any of it was settled."""
        now = self._loop.time()
        messages: list[WireMessage] = []
        n_bytes = 0
        for waiting in queue:
            n_bytes += len(waiting.body) + len(waiting.topic) + 16
            if messages and (len(messages) >= BATCH_MAX or n_bytes > BATCH_BYTES_MAX):
                break
            messages.append(WireMessage(waiting.seq, waiting.topic, max(1, int((waiting.expires_at - now) * 1000)), waiting.body))
        batch = Batch(self._node_id, self._epoch, messages)
        if to == self._node_id:
            verdicts = await self._take(batch)
        else:
            left_s = max(waiting.expires_at for waiting in queue) - now
            verdicts = (await self._links().call(to, SEND, batch, timeout_s=min(CALL_S, left_s))).verdicts
        by_seq = {verdict.seq: verdict for verdict in verdicts}
        n_settled = 0
        while queue and queue[0].seq in by_seq:
            waiting = queue.popleft()
            self._settle(waiting, by_seq[waiting.seq])
            n_settled += 1
        return n_settled > 0

    def _settle(self, waiting: _Waiting, verdict: Verdict) -> None:
        if verdict.code:
            _fail(waiting, from_code(verdict.code, verdict.message, verdict.hint))
            return
        self._acknowledged.inc()
        if not waiting.receipt.done():
            waiting.receipt.set_result(None)

    def _drop_expired(self, to: int, queue: deque[_Waiting]) -> None:
        now = self._loop.time()
        for waiting in [waiting for waiting in queue if waiting.expires_at <= now or waiting.receipt.cancelled()]:
            queue.remove(waiting)
            if not waiting.receipt.cancelled():
                self._expired.inc()
                _fail(waiting, DeadlineExceeded(f"a message of {waiting.topic} to node {to}", waiting.ttl_s))

    async def _pause(self, queue: deque[_Waiting], n_failed: int) -> None:
        """Wait before the next try, but not past the time of what expires first."""
        pause_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(n_failed - 1, 10)) * (1 - 0.5 * self._random.random())
        first = min((waiting.expires_at for waiting in queue), default=self._loop.time())
        await asyncio.sleep(max(0.0, min(pause_s, first - self._loop.time())))

    # --- receiving ----------------------------------------------------------------------------------------------------

    async def _on_batch(self, call: AnyCall, batch: Batch) -> Verdicts:
        bearer = bearer_of(call.identity)
        if bearer is not None and bearer.node_id != batch.sender:
            raise IdentityConflict(batch.sender, f"its certificate is that of node {bearer.node_id}", "no node speaks for another")
        if len(batch.messages) > BATCH_MAX:
            raise InvalidArgument("batch", f"{len(batch.messages)} messages", f"at most {BATCH_MAX}")
        return Verdicts(await self._take(batch))

    async def _take(self, batch: Batch) -> list[Verdict]:
        arrived = self._loop.time()
        sender = self._sender(batch)
        verdicts: list[Verdict] = []
        # One batch of a sender at a time: one that is sent again while its first is handled waits, and finds it handled.
        async with sender.lock:
            for message in batch.messages:
                verdict = await self._handle(sender, batch.sender, message, arrived)
                if verdict is None:
                    break  # it is to be sent again, and what is behind it too: order
                verdicts.append(verdict)
        return verdicts

    def _sender(self, batch: Batch) -> _Sender:
        """Return what is remembered of a life of a sender. A batch of an earlier one may come late: it makes nothing forgotten."""
        lives = self._senders.setdefault(batch.sender, OrderedDict())
        sender = lives.get(batch.epoch)
        if sender is None:
            sender = lives[batch.epoch] = _Sender()
        lives.move_to_end(batch.epoch)
        while len(lives) > LIVES_MAX:
            lives.popitem(last=False)
        self._senders.move_to_end(batch.sender)
        while len(self._senders) > SENDERS_MAX:
            self._senders.popitem(last=False)
        return sender

    async def _handle(self, sender: _Sender, sender_id: int, message: WireMessage, arrived: float) -> Verdict | None:
        if message.seq <= sender.seq:
            self._duplicates.inc()
            return sender.verdicts.get(message.seq) or Verdict(message.seq)
        if self._loop.time() - arrived > message.ttl_ms / 1000:
            sender.seq = message.seq
            return self._refuse(sender, message.seq, DeadlineExceeded(f"a message of {message.topic}", message.ttl_ms / 1000))
        handler = self._handlers.get(message.topic)
        if handler is None:
            sender.seq = message.seq
            return self._refuse(sender, message.seq, NotFound("handler for messages of", message.topic))
        try:
            await handler(Message(sender_id, message.topic, message.body))
        except IsopodError as error:
            if error.temporary:
                return None
            sender.seq = message.seq
            return self._refuse(sender, message.seq, error)
        except Exception as error:  # noqa: BLE001 - a handler's bug is told to both ends
            self._logger.error("message.handler_failed", topic=message.topic, sender=sender_id, why=f"{type(error).__name__}: {error}")
            sender.seq = message.seq
            return self._refuse(sender, message.seq, BugError(f"the handler for messages of {message.topic} failed"))
        sender.seq = message.seq
        self._handled.inc()
        return Verdict(message.seq)

    def _refuse(self, sender: _Sender, seq: int, error: IsopodError) -> Verdict:
        verdict = sender.verdicts[seq] = Verdict(seq, error.code, error.message, error.hint)
        while len(sender.verdicts) > BATCH_MAX:
            sender.verdicts.popitem(last=False)
        return verdict


def _fail(waiting: _Waiting, error: IsopodError) -> None:
    if not waiting.receipt.done():
        waiting.receipt.set_exception(error)


def _seen(receipt: "asyncio.Future[None]") -> None:
    """Take note of a failure: whoever dropped the future does not want to hear of it."""
    if not receipt.cancelled():
        receipt.exception()
