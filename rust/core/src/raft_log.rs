//! The log of one Raft member, in memory: what the crate `raft` reads, and the form in which it is written to disk.
//!
//! It holds the entries beyond the compacted prefix, the term at that prefix's end, the head of the newest snapshot and the members as of
//! every change since. The disk holds a sequence of records, `length (u32, little-endian) | kind (u8) | body`: the body is an entry as
//! protobuf, or index and term of a snapshot that replaced the log. An entry under an index that exists replaces it and all after it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use prost::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};

const ENTRY: u8 = 0;
const REPLACED: u8 = 1;
const CUT_OFF: &str = "a record is cut off";

/// What a record says.
#[derive(Debug, PartialEq)]
pub enum Record {
    /// Append this.
    Entry(Entry),
    /// A snapshot of this index and term took the place of the log.
    Replaced(u64, u64),
}

/// Appends a record to a buffer.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    put_head(entry.encoded_len(), ENTRY, out);
    entry.encode(out).expect("a vector grows");
}

/// Appends a record to a buffer.
pub fn encode_replaced(index: u64, term: u64, out: &mut Vec<u8>) {
    put_head(16, REPLACED, out);
    out.extend_from_slice(&index.to_le_bytes());
    out.extend_from_slice(&term.to_le_bytes());
}

fn put_head(n_bytes: usize, kind: u8, out: &mut Vec<u8>) {
    let length = u32::try_from(n_bytes + 1).expect("an entry is smaller than 4 GiB");
    out.reserve(n_bytes + 5);
    out.extend_from_slice(&length.to_le_bytes());
    out.push(kind);
}

/// Takes records apart; the error says what is wrong.
pub fn decode(mut data: &[u8]) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    while !data.is_empty() {
        let (length, rest) = data.split_first_chunk::<4>().ok_or(CUT_OFF)?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(CUT_OFF)?;
        records.push(match record.split_first() {
            Some((&ENTRY, body)) => Record::Entry(Entry::decode(body).map_err(|error| error.to_string())?),
            Some((&REPLACED, body)) => {
                let (index, term) = body.split_first_chunk::<8>().ok_or(CUT_OFF)?;
                let term = term.try_into().map_err(|_| CUT_OFF)?;
                Record::Replaced(u64::from_le_bytes(*index), u64::from_le_bytes(term))
            }
            _ => return Err("a record is of an unknown kind".into()),
        });
        data = rest;
    }
    Ok(records)
}

/// The log: entries `base_index + 1 ..= last()`.
#[derive(Default)]
pub struct Log {
    hard_state: HardState,
    base_index: u64,
    base_term: u64,
    entries: VecDeque<Entry>,
    snapshot: Option<Snapshot>,
    /// (index, members from there on), oldest first, never empty.
    confs: VecDeque<(u64, ConfState)>,
    /// Whether a peer needs a newer snapshot than there is.
    snapshot_wanted: AtomicBool,
}

impl Log {
    /// Rebuilds a log from what was written: the newest snapshot's (index, term), (0, 0) if there is none, and the records in order.
    /// `conf` is valid as of `applied`. The error says what is missing.
    pub fn restore(
        mut hard_state: HardState,
        snapshot: (u64, u64),
        records: Vec<Record>,
        applied: u64,
        conf: ConfState,
    ) -> Result<Log, String> {
        let mut log = Log::default();
        log.confs.push_back((applied, conf));
        for record in records {
            log.replay(record, snapshot.0)?;
        }
        log.begin_after(snapshot)?;
        if log.last_term() > hard_state.term {
            if !log.entries.is_empty() {
                return Err(format!(
                    "the log has entries of term {}, but no hard state later than term {}",
                    log.last_term(),
                    hard_state.term
                ));
            }
            // The snapshot was durable, and the process ended before the hard state that came with it: nothing was answered in that term.
            hard_state = HardState { term: log.last_term(), vote: 0, commit: hard_state.commit };
        }
        // The commit index is written lazily; what a snapshot or the machine holds was committed.
        hard_state.commit = hard_state.commit.max(snapshot.0).max(applied);
        if hard_state.commit > log.last() {
            return Err(format!("the log ends at {}, but {} was committed: its tail is lost", log.last(), hard_state.commit));
        }
        if applied < log.base_index {
            return Err(format!("the log begins after {}, but only {applied} was applied", log.base_index));
        }
        log.hard_state = hard_state;
        if applied == log.base_index && applied > 0 {
            log.set_snapshot(applied, Vec::new())?;
        }
        Ok(log)
    }

    /// Takes in what was written next. Entries that are missing are no loss if the snapshot holds them: it was durable, and the process ended before
    /// the log said so; the log then went on behind it.
    fn replay(&mut self, record: Record, snapshot_index: u64) -> Result<(), String> {
        match record {
            Record::Replaced(index, term) => {
                self.entries.clear();
                (self.base_index, self.base_term) = (index, term);
            }
            Record::Entry(entry) => {
                let first = self.entries.front().map_or(entry.index, |first| first.index);
                if entry.index == 0 || entry.index > first + self.entries.len() as u64 {
                    if entry.index != 0 && entry.index <= snapshot_index + 1 {
                        self.entries.clear();
                        self.entries.push_back(entry);
                        return Ok(());
                    }
                    return Err(format!("entries from {} to {} are missing", self.last() + 1, entry.index.saturating_sub(1)));
                }
                self.entries.truncate(usize::try_from(entry.index.saturating_sub(first)).expect("it is below the length"));
                self.entries.push_back(entry);
            }
        }
        Ok(())
    }

    /// Lets the log begin after the newest snapshot. One that was durable before the log was replaced by it takes its place now.
    fn begin_after(&mut self, (index, term): (u64, u64)) -> Result<(), String> {
        if self.base_index > index {
            return Err(format!("the log continues a snapshot at {}, which is lost; the newest is at {index}", self.base_index));
        }
        let first = self.entries.front().map_or(index + 1, |entry| entry.index);
        if first > index + 1 {
            return Err(format!("entries from {} to {} are missing", index + 1, first - 1));
        }
        let n_covered = usize::try_from(index + 1 - first).expect("an index fits the memory");
        match n_covered.checked_sub(1).map(|position| self.entries.get(position)) {
            Some(Some(entry)) if entry.term == term => drop(self.entries.drain(..n_covered)),
            Some(_) => self.entries.clear(),
            None => {}
        }
        (self.base_index, self.base_term) = (index, term);
        Ok(())
    }

    /// Appends entries, in place of those under the same indexes and all after them.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.base_index && first.index <= self.last() + 1, "entries leave a gap");
        self.entries.truncate(self.position(first.index));
        self.entries.extend(entries);
    }

    /// Puts a snapshot that came from the leader in place of everything.
    pub fn replace(&mut self, snapshot: Snapshot) {
        let meta = snapshot.get_metadata();
        self.entries.clear();
        (self.base_index, self.base_term) = (meta.index, meta.term);
        self.confs.clear();
        self.confs.push_back((meta.index, meta.get_conf_state().clone()));
        self.snapshot = Some(snapshot);
    }

    /// Remembers the members from an index on.
    pub fn set_conf(&mut self, index: u64, conf: ConfState) {
        self.confs.push_back((index, conf));
    }

    /// Offers a snapshot to peers. The error says why it cannot be.
    pub fn set_snapshot(&mut self, index: u64, data: Vec<u8>) -> Result<(), String> {
        let known = self.confs.iter().rposition(|(since, _)| *since <= index);
        let (Ok(term), Some(known)) = (self.term(index), known) else {
            return Err(format!("a snapshot at {index} is too old: the log begins after {}", self.base_index));
        };
        self.confs.drain(..known);
        let mut snapshot = Snapshot { data, ..Snapshot::default() };
        let meta = snapshot.mut_metadata();
        (meta.index, meta.term) = (index, term);
        meta.set_conf_state(self.confs[0].1.clone());
        self.snapshot = Some(snapshot);
        self.snapshot_wanted.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Whether a peer waits for a newer snapshot than there is.
    pub fn snapshot_wanted(&self) -> bool {
        self.snapshot_wanted.load(Ordering::Relaxed)
    }

    /// Forgets entries up to an index that a snapshot covers.
    pub fn compact(&mut self, index: u64) -> Result<(), String> {
        if index <= self.base_index {
            return Ok(());
        }
        let covered = self.snapshot.as_ref().map_or(0, |snapshot| snapshot.get_metadata().index);
        if index > covered {
            return Err(format!("cannot compact up to {index}: the newest snapshot is at {covered}"));
        }
        let position = self.position(index);
        self.base_term = self.entries[position].term;
        self.entries.drain(..=position);
        self.base_index = index;
        Ok(())
    }

    /// The index of the last entry.
    pub fn last(&self) -> u64 {
        self.base_index + self.entries.len() as u64
    }

    fn last_term(&self) -> u64 {
        self.entries.back().map_or(self.base_term, |entry| entry.term)
    }

    fn position(&self, index: u64) -> usize {
        usize::try_from(index - self.base_index - 1).expect("an index fits the memory")
    }
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.confs[0].1.clone()))
    }

    fn entries(&self, low: u64, high: u64, max_size: impl Into<Option<u64>>, _: GetEntriesContext) -> raft::Result<Vec<Entry>> {
        if low <= self.base_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let mut n_bytes = 0;
        let range = self.entries.range(self.position(low)..self.position(high));
        // Counted before they are copied; the first always fits.
        let fitting = range.enumerate().take_while(|(position, entry)| {
            n_bytes += entry.encoded_len() as u64;
            *position == 0 || n_bytes <= max_size
        });
        Ok(fitting.map(|(_, entry)| entry.clone()).collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.base_index {
            return Ok(self.base_term);
        }
        if index < self.base_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.entries.get(self.position(index)).map(|entry| entry.term).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base_index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        if let Some(snapshot) = &self.snapshot {
            let meta = snapshot.get_metadata();
            // A member ignores a snapshot from before it was one.
            let conf = meta.get_conf_state();
            let mut members = conf.voters.iter().chain(&conf.learners).chain(&conf.voters_outgoing);
            if meta.index >= request_index.max(self.base_index) && members.any(|id| *id == to) {
                return Ok(snapshot.clone());
            }
        }
        self.snapshot_wanted.store(true, Ordering::Relaxed);
        Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

#[cfg(test)]
mod tests {
    use raft::Storage as _;
    use raft::eraftpb::{ConfState, Entry, HardState};

    use super::{Log, Record, decode, encode_entry, encode_replaced};

    fn entry(index: u64, term: u64) -> Record {
        Record::Entry(Entry { index, term, ..Entry::default() })
    }

    fn restored(snapshot: (u64, u64), records: Vec<Record>) -> Result<Vec<u64>, String> {
        let hard_state = HardState { term: 9, vote: 1, commit: 0 };
        let log = Log::restore(hard_state, snapshot, records, snapshot.0, ConfState::default())?;
        Ok((log.first_index().unwrap() - 1..=log.last()).map(|index| log.term(index).unwrap()).collect())
    }

    #[test]
    fn records_come_back_and_damage_is_told() {
        let mut data = Vec::new();
        encode_entry(&Entry { index: 7, term: 3, data: b"command".to_vec(), ..Entry::default() }, &mut data);
        encode_replaced(8, 4, &mut data);
        assert_eq!(decode(&data).unwrap()[1], Record::Replaced(8, 4));
        assert!(matches!(&decode(&data).unwrap()[0], Record::Entry(entry) if entry.data == b"command"));
        for end in 1..data.len() {
            assert!(decode(&data[..end]).is_ok_and(|records| records.len() == 1) == (end == data.len() - 21), "cut at {end}");
        }
        assert!(decode(&[1, 0, 0, 0, 9]).is_err());
    }

    #[test]
    fn what_was_written_last_counts() {
        assert_eq!(restored((0, 0), vec![entry(1, 1), entry(2, 1), entry(3, 1), entry(2, 2)]), Ok(vec![0, 1, 2]));
        assert_eq!(restored((0, 0), vec![entry(1, 1), entry(2, 1), entry(1, 3)]), Ok(vec![0, 3]));
    }

    #[test]
    fn a_snapshot_takes_the_place_of_what_it_covers() {
        let log = || vec![entry(1, 1), entry(2, 1), entry(3, 2), entry(4, 2)];
        assert_eq!(restored((3, 2), log()), Ok(vec![2, 2]), "the rest of a log that contains it stays");
        assert_eq!(restored((3, 3), log()), Ok(vec![3]), "one that does not is dropped: the process ended before this was written");
        assert_eq!(restored((9, 3), log()), Ok(vec![3]));
        let replaced = || log().into_iter().chain([Record::Replaced(3, 3), entry(4, 3)]).collect();
        assert_eq!(restored((3, 3), replaced()), Ok(vec![3, 3]));
        assert_eq!(restored((4, 3), replaced()), Ok(vec![3]));
        assert!(restored((0, 0), replaced()).unwrap_err().contains("snapshot at 3, which is lost"));
        assert_eq!(restored((3, 3), vec![entry(4, 3)]), Ok(vec![3, 3]));
    }

    #[test]
    fn a_gap_or_a_lost_tail_is_told() {
        assert!(restored((0, 0), vec![entry(2, 1)]).unwrap_err().contains("entries from 1 to 1"));
        assert!(restored((0, 0), vec![entry(1, 1), entry(4, 1)]).unwrap_err().contains("entries from 2 to 3"));
        assert!(restored((2, 1), vec![entry(4, 1)]).unwrap_err().contains("entries from 3 to 3"));
        assert_eq!(restored((3, 1), vec![entry(1, 1), entry(4, 1)]), Ok(vec![1, 1]), "the snapshot holds what is missing");
        assert!(restored((3, 1), vec![entry(1, 1), entry(5, 1)]).unwrap_err().contains("entries from 2 to 4"));
        let hard_state = HardState { term: 1, vote: 1, commit: 5 };
        let lost = Log::restore(hard_state, (0, 0), vec![entry(1, 1)], 0, ConfState::default()).err().unwrap();
        assert!(lost.contains("ends at 1, but 5 was committed"));
        let stale = Log::restore(HardState::default(), (0, 0), vec![entry(1, 1)], 0, ConfState::default()).err().unwrap();
        assert!(stale.contains("no hard state later than term 0"));
    }

    #[test]
    fn compaction_keeps_the_term_before_the_first_entry() {
        let conf = ConfState { voters: vec![1, 2], ..ConfState::default() };
        let mut log =
            Log::restore(HardState { term: 9, ..HardState::default() }, (0, 0), (1..=5).map(|i| entry(i, i)).collect(), 4, conf).unwrap();
        assert!(log.compact(3).is_err(), "no snapshot covers it");
        log.set_snapshot(4, b"meta".to_vec()).unwrap();
        log.compact(3).unwrap();
        log.compact(2).unwrap();
        assert_eq!((log.first_index().unwrap(), log.last(), log.term(3).unwrap()), (4, 5, 3));
        assert!(log.term(2).is_err());
        assert!(log.term(6).is_err());
        assert_eq!(log.snapshot(0, 2).unwrap().data, b"meta");
        assert!(log.snapshot(5, 2).is_err());
        assert!(log.snapshot_wanted());
        log.set_snapshot(4, Vec::new()).unwrap();
        assert!(!log.snapshot_wanted());
        assert!(log.snapshot(0, 3).is_err(), "it is from before 3 was a member");
        assert!(log.snapshot_wanted());
    }
}
