"""Link: the way to one peer. A connection that is opened again whenever it ends, and what waits while there is none.

One task per peer connects, says hello, and then only looks at the connection's end (and measures the way there and back now and then).
Sending is a plain call: onto the connection if it stands and the peer reads, else into a queue of at most 100 messages or 8 MiB, of which
the oldest are dropped: Raft sends again what mattered.

Pauses between attempts: 100 ms, doubled each time, shortened by chance; the first after a connection that stood is a few milliseconds, for
a peer that was just there. They grow to `pause_max_s` for a peer that does not answer, and to `refused_pause_s` for one that refuses us.
A peer that connects to us is up, so the next attempt is made at once. After five failures in a row the breaker is open: what is sent is
dropped at once and reported, until an attempt succeeds.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from isopod.cluster.raft.codec import FRAME_HEAD, pack_length
from isopod.cluster.raft.ports import NodeId, PeerLink
from isopod.cluster.raft.wire import MESSAGES
from isopod.net.rpc import Client
from isopod.wire import frames as f
from isopod.world.errors import IsopodError, ProtocolViolation, RefusedError
from isopod.world.failpoints import Failpoint

FRAME_BODY_MAX: Final = (1 << 20) - (16 << 10)
"""What one frame carries: the RPC's limit less its own head."""
BREAKER_FAILURES: Final = 5
_NOTICE: Final = f.prefix_of((f.NOTIFY, MESSAGES.name, None))


class LinkSettings(NamedTuple):
    """Bounds and times of links.

    Args:
        queue_max: Messages that wait for a peer without a connection.
        queue_bytes_max: Their bytes.
        pause_first_s: After the first failure; doubled with each.
        pause_max_s: For a peer that does not answer.
        refused_pause_s: For a peer that refuses us, or that we do not trust.
        pause_again_s: After a connection that stood.
        connect_s: How long connecting may take, hello included.
        ping_s: How often the way to a peer and back is measured.
        user_timeout_s: How long sent bytes may stay unacknowledged before the connection is given up.
        snapshot_stall_s: How long a snapshot's stream may stand still.
        snapshot_attempts: How often its stream is taken up again before the core is told that it failed.
    """

    queue_max: int = 100
    queue_bytes_max: int = 8 << 20
    pause_first_s: float = 0.1
    pause_max_s: float = 2.0
    refused_pause_s: float = 30.0
    pause_again_s: float = 0.005
    connect_s: float = 2.0
    ping_s: float = 5.0
    user_timeout_s: float = 3.0
    snapshot_stall_s: float = 10.0
    snapshot_attempts: int = 5

    def pause_s(self, n_failed: int, *, is_refused: bool, chance: float) -> float:
        """Return how long to wait after that many failures in a row.

        Args:
            n_failed: 0 after a connection that stood.
            is_refused: Whether the last one was a refusal.
            chance: Drawn from 0 to 1.
        """
        if n_failed == 0:
            return self.pause_again_s * (1 + chance)
        most_s = self.refused_pause_s if is_refused else self.pause_max_s
        return min(most_s, self.pause_first_s * 2.0 ** min(n_failed - 1, 20)) * (1 - 0.5 * chance)


class Connected(NamedTuple):
    """A connection that stands, after the hello."""

    client: Client
    session: int


class Link:
    """The way to one peer.

    Args:
        node_id: The peer.
        settings: Bounds and times.
        connect: Makes a connection and says hello.
        chance: Draws from 0 to 1.
        on_up: Told when a connection stands.
        on_lost: Told when it closed.
        on_dropped: Told when messages were dropped.
        before_send: The failpoint.
    """

    def __init__(
        self,
        node_id: NodeId,
        settings: LinkSettings,
        connect: Callable[[NodeId], Awaitable[Connected]],
        *,
        chance: Callable[[], float],
        on_up: Callable[[NodeId], None],
        on_lost: Callable[[NodeId], None],
        on_dropped: Callable[[NodeId], None],
        before_send: Failpoint,
    ) -> None:
        self.node_id = node_id
        self.n_frames = 0
        self.n_connects = 0
        self.n_failed = 0
        """In a row."""
        self._settings = settings
        self._connect = connect
        self._chance = chance
        self._on_up = on_up
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        self._before_send = before_send
        self._client: Client | None = None
        self._head = b""
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._n_dropped = 0
        self._rtt_s: float | None = None
        self._why = ""
        self._hurry: asyncio.Future[None] | None = None
        self._is_draining = False
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin to connect."""
        self._tasks["run"] = self._loop.create_task(self._run(), name=f"raft link to {self.node_id}")

    async def close(self) -> None:
        """End the connection and the task; what is queued is dropped."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def send(self, messages: Sequence[bytes]) -> None:
        """Send, or keep for later."""
        client = self._client
        if client is None or self._queue or client.connection.is_write_paused:
            self._keep(messages)
            return
        if self._before_send.armed:
            try:
                self._before_send.hit_now()
            except OSError:
                self._drop(len(messages))
                return
        self._write(client, messages)

    def hurry(self) -> None:
        """The peer is up: connect now."""
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    def state(self) -> PeerLink:
        """Return what is known."""
        return PeerLink(
            is_connected=self._client is not None,
            rtt_s=self._rtt_s,
            n_queued=len(self._queue),
            n_queued_bytes=self._queue_bytes,
            n_dropped=self._n_dropped,
            is_broken=self.n_failed >= BREAKER_FAILURES,
            why=self._why,
        )

    # --- sending ------------------------------------------------------------------------------------------------------

    def _write(self, client: Client, messages: Sequence[bytes]) -> None:
        if len(messages) == 1:
            message = messages[0]
            self._write_frame(client, (self._head, pack_length(len(message)), message))
            return
        parts = [self._head]
        n_bytes = len(self._head)
        for message in messages:
            if n_bytes + 4 + len(message) > FRAME_BODY_MAX and len(parts) > 1:
                self._write_frame(client, tuple(parts))
                parts = [self._head]
                n_bytes = len(self._head)
            parts += (pack_length(len(message)), message)
            n_bytes += 4 + len(message)
        self._write_frame(client, tuple(parts))

    def _write_frame(self, client: Client, parts: tuple[bytes, ...]) -> None:
        self.n_frames += 1
        try:
            client.connection.send_packed(_NOTICE, parts)
        except f.TooLarge:
            self._drop(1)  # the core's bounds keep messages below it

    def _keep(self, messages: Sequence[bytes]) -> None:
        if self.n_failed >= BREAKER_FAILURES:
            self._drop(len(messages))
            return
        queue, settings = self._queue, self._settings
        for message in messages:
            queue.append(message)
            self._queue_bytes += len(message)
        n_dropped = 0
        while len(queue) > settings.queue_max or self._queue_bytes > settings.queue_bytes_max:
            self._queue_bytes -= len(queue.popleft())
            n_dropped += 1
        if n_dropped:
            self._drop(n_dropped)
        if self._client is not None and not self._is_draining:
            self._is_draining = True
            self._tasks["drain"] = self._loop.create_task(self._drain(), name=f"raft queue for {self.node_id}")

    def _drop(self, n: int) -> None:
        self._n_dropped += n
        self._on_dropped(self.node_id)

    async def _drain(self) -> None:
        """Send what waits when the peer reads again."""
        try:
            while (client := self._client) is not None and self._queue:
                if client.connection.is_write_paused:
                    await client.connection.writable.wait()
                else:
                    self._flush_queue(client)
        finally:
            self._is_draining = False

    def _flush_queue(self, client: Client) -> None:
        if self._queue:
            messages = list(self._queue)
            self._queue.clear()
            self._queue_bytes = 0
            self._write(client, messages)

    # --- the connection -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        is_refused = False
        while True:
            try:
                found = await self._connect(self.node_id)
            except (IsopodError, OSError) as error:
                self.n_failed += 1
                self._why = str(error)
                is_refused = isinstance(error, RefusedError)
                if self.n_failed == BREAKER_FAILURES and self._queue:
                    self._drop(len(self._queue))
                    self._queue.clear()
                    self._queue_bytes = 0
            else:
                self.n_failed = 0
                is_refused = await self._use(found)
                self.n_failed += is_refused
            await self._pause(self._settings.pause_s(self.n_failed, is_refused=is_refused, chance=self._chance()))

    async def _use(self, found: Connected) -> bool:
        """Stay until the connection ends; return whether the peer ended it for something we said."""
        client = found.client
        self._client = client
        self._head = FRAME_HEAD.pack(found.session)
        self.n_connects += 1
        self._why = ""
        self._flush_queue(client)
        self._on_up(self.node_id)
        try:
            while True:
                try:
                    async with asyncio.timeout(self._settings.ping_s):
                        await client.connection.wait_gone()
                    break
                except TimeoutError:
                    await self._ping(client)
        finally:
            self._client = None
            self._rtt_s = None
            client.connection.abort()
        error = client.connection.error
        self._why = "" if error is None else error.message
        self._on_lost(self.node_id)
        return isinstance(error, ProtocolViolation)

    async def _ping(self, client: Client) -> None:
        try:
            self._rtt_s = await client.ping(timeout_s=self._settings.ping_s)
        except IsopodError as error:
            client.connection.drop(error)  # it answers nothing any more

    async def _pause(self, pause_s: float) -> None:
        self._hurry = self._loop.create_future()
        try:
            async with asyncio.timeout(pause_s):
                await self._hurry
        except TimeoutError:
            pass
        finally:
            self._hurry = None
