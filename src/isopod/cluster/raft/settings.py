"""RaftSettings: times and bounds of the driver.

The defaults are for machines of one site: a heartbeat every 50 ms, an election after 150 to 300 ms of silence. All voters of a cluster
should have the same times.
"""

from typing import Final, NamedTuple

from isopod.world.errors import InvalidArgument

TICK_S: Final = 0.01
ENTRY_BYTES_MAX: Final = 512 << 10
"""The largest command: with what goes around it, it still fits into one RPC frame of 1 MiB."""


class RaftSettings(NamedTuple):
    """Times are seconds.

    Args:
        tick_s: The unit of the core's clock.
        heartbeat_s: How often a leader speaks.
        election_s: The least silence after which a follower asks for votes; the most is twice that.
        command_bytes_max: The largest single command.
        entry_bytes_max: How much one Raft entry holds before the next is begun; a larger command gets an entry of its own.
        message_bytes_max: How many bytes of entries one message carries (at least one entry).
        rounds_max: Rounds of proposals under way; what comes meanwhile shares the next entry.
        proposals_max: Proposals that wait in this node, begun or not.
        proposal_bytes_max: Their bytes.
        reads_max: Read barriers that wait.
        inflight_max: Append messages under way to one follower.
        uncommitted_bytes_max: Of the leader's log; more is refused.
        apply_commands_max: Commands applied before others get a turn.
        snapshot_log_bytes: A snapshot is made when so much log came since the last one.
        snapshot_log_entries: The same in entries.
        snapshot_age_s: The same in time, if anything at all came.
        keep_log_bytes: How much log stays behind a snapshot for followers that are a little behind.
        keep_log_entries: The same in entries; whichever is less.
        snapshots_kept: Snapshot files that stay.
        caught_up_entries: A learner that is no further behind may be promoted.
        snapshot_chunk_bytes: Of a streamed snapshot.
        transfer_s: How long a hand-over may take before it is tried once more, or given up.
    """

    tick_s: float = TICK_S
    heartbeat_s: float = 0.05
    election_s: float = 0.15
    command_bytes_max: int = ENTRY_BYTES_MAX
    entry_bytes_max: int = 128 << 10
    message_bytes_max: int = 256 << 10
    rounds_max: int = 2
    proposals_max: int = 4096
    proposal_bytes_max: int = 64 << 20
    reads_max: int = 65536
    inflight_max: int = 256
    uncommitted_bytes_max: int = 64 << 20
    apply_commands_max: int = 512
    snapshot_log_bytes: int = 16 << 20
    snapshot_log_entries: int = 100_000
    snapshot_age_s: float = 3600.0
    keep_log_bytes: int = 4 << 20
    keep_log_entries: int = 20_000
    snapshots_kept: int = 2
    caught_up_entries: int = 256
    snapshot_chunk_bytes: int = 256 << 10
    transfer_s: float = 0.3

    @property
    def heartbeat_ticks(self) -> int:
        """The heartbeat in ticks."""
        return max(1, round(self.heartbeat_s / self.tick_s))

    @property
    def election_ticks(self) -> int:
        """The election timeout in ticks."""
        return round(self.election_s / self.tick_s)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            InvalidArgument: A bound or a time makes no sense; it is named.
        """
        for name, value in zip(self._fields, self, strict=True):
            if not value > 0:
                raise InvalidArgument(f"raft {name}", value, "must be above 0")
        if self.election_ticks < 2 * self.heartbeat_ticks:
            raise InvalidArgument("raft election_s", self.election_s, f"must be at least twice heartbeat_s ({self.heartbeat_s:g})")
        if self.command_bytes_max > ENTRY_BYTES_MAX:
            raise InvalidArgument("raft command_bytes_max", self.command_bytes_max, f"must be at most {ENTRY_BYTES_MAX}")
        if self.message_bytes_max > ENTRY_BYTES_MAX:
            raise InvalidArgument("raft message_bytes_max", self.message_bytes_max, f"must be at most {ENTRY_BYTES_MAX}")
        if self.entry_bytes_max > self.message_bytes_max:
            raise InvalidArgument("raft entry_bytes_max", self.entry_bytes_max, "must be at most message_bytes_max")
