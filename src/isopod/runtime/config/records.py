"""RecordsSection: how the journal of sandbox records is kept: the table [records] of the configuration file, and ISOPOD_RECORDS_*.

Values and their form only; what they mean, `isopod.journal.JournalSettings` says.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

SECTION: Final = "records"
_BYTES: Final = "a whole number of bytes"
_SECONDS: Final = "a number of seconds"
_NUMBER: Final = "a whole number"


def _meta(want: str, text: str) -> Meta:
    return Meta(description=text, extra={"want": want})


SegmentBytes = Annotated[int, Meta(ge=1 << 20, le=1 << 30), _meta(f"{_BYTES}, 1048576 or more", "size of one segment of the journal")]
SegmentAge = Annotated[float, Meta(ge=0, le=1e9), _meta(_SECONDS, "a segment is closed when it is older; 0 for never")]
Compress = Annotated[bool, _meta("true or false", "whether closed segments are compressed by zstd")]
ArchiveNumber = Annotated[int, Meta(ge=0, le=100_000), _meta(_NUMBER, "closed segments kept that no recovery needs")]
ArchiveBytes = Annotated[int, Meta(ge=0), _meta(_BYTES, "their bytes together at most")]
ArchiveAge = Annotated[float, Meta(ge=0, le=1e10), _meta(_SECONDS, "how old they may become")]
SnapshotsKept = Annotated[int, Meta(ge=1, le=1000), _meta(f"{_NUMBER}, 1 or more", "snapshots kept")]
SnapshotInterval = Annotated[float, Meta(ge=1, le=1e9), _meta(_SECONDS, "how long after a change a snapshot is taken at the latest")]
SnapshotRecords = Annotated[int, Meta(ge=10), _meta(f"{_NUMBER}, 10 or more", "after how many changes one is taken at once")]


class RecordsSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings."""

    segment_bytes: SegmentBytes = 4 << 20
    segment_age_s: SegmentAge = 0.0
    compress: Compress = True
    archive_n_max: ArchiveNumber = 10
    archive_bytes_max: ArchiveBytes = 1 << 30
    archive_age_s_max: ArchiveAge = 30 * 86_400.0
    snapshots_kept: SnapshotsKept = 3
    snapshot_interval_s: SnapshotInterval = 60.0
    snapshot_records: SnapshotRecords = 10_000
