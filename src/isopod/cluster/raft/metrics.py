"""The numbers of one Raft node, in the registry it was given. Counted per turn of the loop, never per command where it can be avoided."""

from collections.abc import Callable

from isopod.cluster.raft.ports import NodeId, PeerLink
from isopod.runtime.metrics import Gauge, Registry


class RaftMetrics:
    """The instruments.

    Args:
        registry: Where they are.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._peers: dict[NodeId, tuple[Gauge, Gauge, Gauge]] = {}
        self._hooks: list[Callable[[], None]] = []
        counter, gauge, histogram = registry.counter, registry.gauge, registry.histogram
        self.proposals = counter("isopod_raft_proposals_total", "Commands proposed by this node.")
        self.proposals_failed = counter("isopod_raft_proposals_failed_total", "Proposals that ended without their result.")
        self.rounds = counter("isopod_raft_rounds_total", "Rounds of proposals: what came together.")
        self.reads = counter("isopod_raft_read_rounds_total", "Questions for a read index.")
        self.committed_entries = counter("isopod_raft_committed_entries_total", "Entries known to be committed.")
        self.applied_entries = counter("isopod_raft_applied_entries_total", "Entries applied to the machine.")
        self.applied_commands = counter("isopod_raft_applied_commands_total", "Commands applied to the machine.")
        self.leader_changes = counter("isopod_raft_leader_changes_total", "Times this node came to know another leader, or none.")
        self.campaigns = counter("isopod_raft_early_campaigns_total", "Campaigns begun because the connection to the leader closed.")
        self.refused_messages = counter("isopod_raft_refused_messages_total", "Messages that the core did not take in.")
        self.snapshots_made = counter("isopod_raft_snapshots_made_total", "Snapshots of this node's machine.")
        self.snapshots_failed = counter("isopod_raft_snapshots_failed_total", "Snapshots that could not be made.")
        self.snapshots_sent = counter("isopod_raft_snapshots_sent_total", "Snapshots that reached a peer.")
        self.snapshots_received = counter("isopod_raft_snapshots_received_total", "Snapshots that replaced this node's log.")
        self.late_ticks = counter("isopod_raft_late_ticks_total", "Times this node stood still for longer than two ticks.")
        self.term = gauge("isopod_raft_term", "The present term.")
        self.commit = gauge("isopod_raft_commit_index", "How far the log is committed, as this node knows.")
        self.applied = gauge("isopod_raft_applied_index", "How far the log is applied.")
        self.is_leader = gauge("isopod_raft_is_leader", "1 on the leader.")
        self.append_duration = histogram("isopod_raft_append_duration_seconds", "From queueing entries to their being durable.")
        self.round_duration = histogram("isopod_raft_round_duration_seconds", "From proposing a round to applying it.")

    def watch_peers(self, links: Callable[[], list[tuple[NodeId, PeerLink]]]) -> None:
        """Ask for the state of every way to a peer before each snapshot of the registry."""

        def refresh() -> None:
            for node_id, link in links():
                rtt, queue, connected = self._of_peer(node_id)
                rtt.set(link.rtt_s or 0.0)
                queue.set(link.n_queued)
                connected.set(float(link.is_connected))

        self._hooks.append(self._registry.before_snapshot(refresh))

    def close(self) -> None:
        """Ask nobody any more."""
        hooks, self._hooks = self._hooks, []
        for remove in hooks:
            remove()

    def _of_peer(self, node_id: NodeId) -> tuple[Gauge, Gauge, Gauge]:
        found = self._peers.get(node_id)
        if found is None:
            peer = str(node_id)
            gauge = self._registry.gauge
            found = self._peers[node_id] = (
                gauge("isopod_raft_peer_rtt_seconds", "The last measured way to a peer and back, 0 if unknown.", peer=peer),
                gauge("isopod_raft_peer_queued_messages", "Messages that wait for a peer.", peer=peer),
                gauge("isopod_raft_peer_connected", "1 while a connection to the peer stands.", peer=peer),
            )
        return found
