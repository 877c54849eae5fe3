"""MemoryNetwork: a transport within one process, for tests of the driver and of what stands on it.

What may happen to a message, all of it decided by the caller's `lose` and `delay_s`: it is lost, or it comes later than others (so messages
of one peer may overtake each other, which real connections never do and Raft bears). Nodes may be cut off from each other, in one direction
or both. What it is not: a network; bytes, connections, back-off and bounds are tested with the real transport.
"""

import asyncio
from collections.abc import Callable, Sequence

from isopod.cluster.raft.ports import NodeId, PeerLink, SnapshotOffer, TransportIdentity, TransportSink
from isopod.world.errors import IsopodError, NotStarted

CHUNK_BYTES = 64 << 10


class MemoryNetwork:
    """Connects `MemoryTransport`s.

    Args:
        delay_s: How long a message takes from one node to another; 0.0 is the next turn of the loop.
        lose: Whether a message from one node to another is lost.
    """

    def __init__(
        self,
        *,
        delay_s: Callable[[NodeId, NodeId], float] = lambda _sender, _to: 0.0,
        lose: Callable[[NodeId, NodeId], bool] = lambda _sender, _to: False,
    ) -> None:
        self.delay_s = delay_s
        self.lose = lose
        self.n_messages = 0
        self._nodes: dict[NodeId, MemoryTransport] = {}
        self._cuts: dict[tuple[NodeId, NodeId], None] = {}

    def transport(self) -> "MemoryTransport":
        """Return the transport of one more node."""
        return MemoryTransport(self)

    def cut(self, sender: NodeId, to: NodeId) -> None:
        """Let nothing pass in that direction."""
        self._cuts[sender, to] = None

    def isolate(self, node_id: NodeId) -> None:
        """Cut a node off, in both directions."""
        for other in self._nodes:
            if other != node_id:
                self.cut(node_id, other)
                self.cut(other, node_id)

    def heal(self) -> None:
        """Let everything pass."""
        self._cuts.clear()

    def passes(self, sender: NodeId, to: NodeId) -> bool:
        """Return whether something sent now would arrive."""
        return to in self._nodes and (sender, to) not in self._cuts and not self.lose(sender, to)

    # --- for the transports -------------------------------------------------------------------------------------------

    def join(self, node_id: NodeId, transport: "MemoryTransport") -> None:
        """A node is there."""
        self._nodes[node_id] = transport

    def leave(self, node_id: NodeId, transport: "MemoryTransport") -> None:
        """A node is gone: the others see its connection close."""
        if self._nodes.get(node_id) is transport:
            del self._nodes[node_id]
            for other in tuple(self._nodes.values()):
                other.on_gone(node_id)

    def find(self, node_id: NodeId) -> "MemoryTransport | None":
        """Return a node's transport."""
        return self._nodes.get(node_id)


class MemoryTransport:
    """One node's way to the others: `Transport`. Made by `MemoryNetwork.transport`."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._node_id: NodeId = 0
        self._sink: TransportSink | None = None
        self._peers: tuple[NodeId, ...] = ()
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}

    async def start(self, identity: TransportIdentity, sink: TransportSink) -> None:
        """See `Transport.start`."""
        self._node_id, self._sink = identity.node_id, sink
        self._network.join(identity.node_id, self)

    async def close(self) -> None:
        """See `Transport.close`."""
        self._sink = None
        self._network.leave(self._node_id, self)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_peers(self, node_ids: Sequence[NodeId]) -> None:
        """See `Transport.set_peers`."""
        self._peers = tuple(node_ids)

    def send(self, to: NodeId, messages: Sequence[bytes]) -> None:
        """See `Transport.send`."""
        loop = asyncio.get_running_loop()
        network = self._network
        for message in messages:
            network.n_messages += 1
            if network.passes(self._node_id, to):
                loop.call_later(network.delay_s(self._node_id, to), self._deliver, to, message)

    def send_snapshot(self, to: NodeId, message: bytes, *, index: int, term: int) -> None:
        """See `Transport.send_snapshot`."""
        if to not in self._tasks:
            self._tasks[to] = asyncio.get_running_loop().create_task(self._stream(to, message, index, term), name=f"snapshot to {to}")

    def link(self, node_id: NodeId) -> PeerLink:
        """See `Transport.link`."""
        return PeerLink(is_connected=self._network.passes(self._node_id, node_id))

    def on_gone(self, node_id: NodeId) -> None:
        """A peer's process ended."""
        if self._sink is not None:
            self._sink.on_peer_lost(node_id)

    def _deliver(self, to: NodeId, message: bytes) -> None:
        peer = self._network.find(to)
        if peer is not None and peer._sink is not None:
            peer._sink.on_messages(self._node_id, (message,))

    async def _stream(self, to: NodeId, message: bytes, index: int, term: int) -> None:
        ok = False
        try:
            await self._stream_all(to, message, index, term)
            ok = True
        except (IsopodError, OSError):
            pass
        finally:
            del self._tasks[to]
            if self._sink is not None:
                self._sink.on_snapshot_sent(to, ok=ok)

    async def _stream_all(self, to: NodeId, message: bytes, index: int, term: int) -> None:
        assert self._sink is not None
        source = await self._sink.open_source(index, term)
        try:
            peer = self._network.find(to)
            if peer is None or peer._sink is None:
                raise NotStarted(f"node {to}")
            receiver = await peer._sink.open_receiver(self._node_id, SnapshotOffer(message, index, term, source.n_bytes, source.crc))
            try:
                while receiver.offset < source.n_bytes:
                    await asyncio.sleep(self._network.delay_s(self._node_id, to))
                    if not self._network.passes(self._node_id, to):
                        raise NotStarted(f"node {to}")
                    await receiver.write(await source.read(receiver.offset, CHUNK_BYTES))
                await receiver.finish()
            except BaseException:
                receiver.abandon()
                raise
        finally:
            source.close()
