"""What a user of a journal may set, and what a journal tells about itself."""

from typing import NamedTuple, Protocol

from isopod.journal.layout import GROUP_HEADER_BYTES, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES
from isopod.world.errors import InvalidArgument

DAY_S = 86_400.0
_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30


class JournalSettings(NamedTuple):
    """How large, how many, how old. The defaults are for a busy log (Raft's); `METADATA` is for records that change now and then."""

    segment_bytes: int = 64 << 20
    """Size of one segment file; its space is allocated before it is written. A batch fits into one segment."""
    segment_age_s: float = 0.0
    """A segment with records in it is closed when it is older, at the next write; 0 for never."""
    record_bytes_max: int = 16 << 20
    """The longest payload of one record."""
    queue_bytes_max: int = 256 << 20
    """What may be queued and not yet written; more is `Exhausted`."""
    group_bytes_max: int = 8 << 20
    """What one write takes along, if more is queued (one batch always goes whole)."""
    compress: bool = True
    """Whether a closed segment is compressed by zstd, in the background."""
    archive_n_max: int = 10
    """How many closed segments are kept that no recovery needs any more; 0 removes them at once."""
    archive_bytes_max: int = 1 << 30
    """Their bytes together, as they lie there."""
    archive_age_s_max: float = 30 * DAY_S
    """How old they may become, counted from their last change."""
    snapshots_kept: int = 3
    """How many snapshots stay; at least 1."""
    snapshot_interval_s: float = 60.0
    """`SnapshotSchedule`: how long after the last snapshot a new one is due, if anything was written since."""
    snapshot_records: int = 100_000
    """`SnapshotSchedule`: after how many records one is due at once."""

    def checked(self) -> "JournalSettings":
        """Return self if every value makes sense, and they go together.

        Raises:
            InvalidArgument: One does not.
        """
        _between("segment_bytes", self.segment_bytes, 4 * _KIB, _GIB)
        _between("record_bytes_max", self.record_bytes_max, 1, _GIB)
        _between("queue_bytes_max", self.queue_bytes_max, 1, 64 * _GIB)
        _between("group_bytes_max", self.group_bytes_max, 1, _GIB)
        _between("archive_n_max", self.archive_n_max, 0, 1_000_000)
        _between("archive_bytes_max", self.archive_bytes_max, 0, 1 << 50)
        _between("snapshots_kept", self.snapshots_kept, 1, 10_000)
        _between("snapshot_records", self.snapshot_records, 1, 1 << 50)
        for name in ("segment_age_s", "archive_age_s_max", "snapshot_interval_s"):
            _between(name, getattr(self, name), 0.0, 1e10)
        return self

    @property
    def batch_bytes_max(self) -> int:
        """What the records of one batch may take together, with their headers."""
        return self.segment_bytes - SEGMENT_HEADER_BYTES - 3 * GROUP_HEADER_BYTES

    @property
    def payload_bytes_max(self) -> int:
        """The longest payload that is really accepted."""
        return min(self.record_bytes_max, self.batch_bytes_max - RECORD_HEADER_BYTES)


METADATA = JournalSettings(segment_bytes=16 * _MIB)


class JournalStatistics(NamedTuple):
    """What a journal has done since it was opened. A frozen snapshot."""

    n_batches: int = 0
    n_records: int = 0
    n_bytes: int = 0
    """Written, headers included."""
    n_writes: int = 0
    """Durable writes; fewer than batches when some went together."""
    n_rotations: int = 0
    n_snapshots: int = 0
    n_segments: int = 0
    """Segments a recovery would read, the open one included."""
    n_archived: int = 0
    """Closed segments that no recovery needs."""
    archived_bytes: int = 0
    queued_bytes: int = 0
    torn_bytes_cut: int = 0
    """What a crash had left half written, cut when the journal was opened."""
    first_lsn: int = 1
    last_lsn: int = 0
    durable_lsn: int = 0


class JournalLog(Protocol):
    """The part of a logger that a journal uses; `isopod.runtime.logger.Logger` has it."""

    def info(self, event: str, /, **facts: object) -> None:
        """Log what happened."""

    def warning(self, event: str, /, **facts: object) -> None:
        """Log what somebody should look at."""


class JournalMetrics(Protocol):
    """Who counts. Called in the loop's thread, and must not raise."""

    def journal_wrote(self, n_records: int, n_bytes: int, duration_s: float) -> None:
        """One durable write has ended."""

    def journal_rotated(self) -> None:
        """A segment was closed."""


class SilentLog:
    """A log for nobody."""

    def info(self, event: str, /, **facts: object) -> None:
        """Say nothing."""

    def warning(self, event: str, /, **facts: object) -> None:
        """Say nothing."""


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidArgument(name, value, f"want {least} to {most}")
