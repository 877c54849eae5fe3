"""The journal: an append-only log on disk, with snapshots, compaction and an archive. `Journal` says how it is used."""

from isopod.journal.journal import Journal
from isopod.journal.layout import Record
from isopod.journal.repair import RepairPlan, plan, repair
from isopod.journal.schedule import SnapshotSchedule
from isopod.journal.settings import METADATA, JournalLog, JournalMetrics, JournalSettings, JournalStatistics
from isopod.journal.verify import IntegrityReport, verify

__all__ = [
    "METADATA",
    "IntegrityReport",
    "Journal",
    "JournalLog",
    "JournalMetrics",
    "JournalSettings",
    "JournalStatistics",
    "Record",
    "RepairPlan",
    "SnapshotSchedule",
    "plan",
    "repair",
    "verify",
]
