//! One Raft member without I/O: the crate `raft`, made deterministic, with its traps covered.
//!
//! What is added to `RawNode`, each because the crate does otherwise:
//! - The election timeout is a pure function of (seed, id, term, timeouts so far), set after every call; the crate draws it at random.
//! - A proposal on a follower is refused, not forwarded; a change of members that the crate would silently turn into an empty entry is too.
//! - A read's question that reaches a follower is dropped, not passed on with another member as its sender.
//! - Messages are checked where the crate would panic over a peer's lost disk or lie.
//! - A sole voter leads in the turn in which it votes for itself: what it sends waits until that vote is durable, and it does not campaign
//!   while entries are not (the crate would hand out entries of a term that a crash undoes, or panic).
//! - Nobody campaigns between a received snapshot and its application (the crate looks through entries that are gone, and panics).
//! - A delayed rejection of what a peer has acknowledged since is ignored (the crate probes below the acknowledged index).
//! - A leader that is no voter any more steps down (the crate stays leader and panics at the next acknowledgement).

use std::collections::VecDeque;

use prost::Message as _;
use raft::eraftpb::{ConfChangeTransition, ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, MessageType, Snapshot};
use raft::{Changer, Config, Error, INVALID_ID, Progress, ProgressState, RawNode, ReadState, SnapshotStatus, Storage as _};
use raft::{SoftState, StateRole};

use crate::raft_log::{self, Log};

/// Why a call was turned down by its arguments.
pub type Refused = String;

/// Addressed, encoded messages.
pub type Mail = Vec<(u64, Vec<u8>)>;

/// What a turn produced.
#[derive(Default)]
pub struct Turn {
    /// Passed to `on_persisted`.
    pub number: u64,
    /// If it changed.
    pub soft_state: Option<SoftState>,
    /// Encoded; empty if unchanged.
    pub hard_state: Vec<u8>,
    /// Records of the log.
    pub records: Vec<u8>,
    /// Indexes of the first and last entry among them, (0, 0) if there is none.
    pub range: (u64, u64),
    /// Whether the above must be durable before anything that depends on it.
    pub must_sync: bool,
    /// May be sent at once.
    pub messages: Mail,
    /// May be sent when all is durable.
    pub persisted_messages: Mail,
    /// To be applied.
    pub committed: Vec<Entry>,
    /// To take the place of the machine's state.
    pub snapshot: Option<Snapshot>,
    /// Answers to `read_index`.
    pub read_states: Vec<ReadState>,
    /// (to, index, term, message).
    pub snapshots_to_send: Vec<(u64, u64, u64, Vec<u8>)>,
}

/// A member.
pub struct Core {
    node: RawNode<Log>,
    seed: u64,
    timeouts: (u64, u64),
    n_timeouts: u64,
    hard_state: HardState,
    n_turns: u64,
    n_persisted: u64,
    /// The turn that wrote the present term and vote.
    vote_turn: u64,
    /// Indexes of the changes of members that were handed out and not yet carried out.
    conf_indexes: VecDeque<u64>,
}

impl Core {
    /// Starts from a rebuilt log.
    pub fn new(config: &Config, seed: u64, log: Log) -> Result<Core, Refused> {
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        // RawNode asserts part of it.
        config.validate().map_err(|error| error.to_string())?;
        let node = RawNode::new(config, log, &logger).map_err(|error| error.to_string())?;
        let timeouts = (config.min_election_tick() as u64, config.max_election_tick() as u64);
        let hard_state = node.raft.hard_state();
        let conf_indexes = VecDeque::new();
        let mut core = Core { node, seed, timeouts, n_timeouts: 0, hard_state, n_turns: 0, n_persisted: 0, vote_turn: 0, conf_indexes };
        core.settle();
        Ok(core)
    }

    /// Passes up to `n` ticks, up to the first that starts something; returns how many were.
    pub fn tick(&mut self, n: u32) -> u32 {
        for passed in 1..=n {
            if self.is_due() {
                if !self.may_campaign() {
                    return passed;
                }
                self.n_timeouts += 1;
            }
            let started = self.node.tick();
            self.settle();
            if started {
                return passed;
            }
        }
        n
    }

    fn is_due(&self) -> bool {
        let raft = &self.node.raft;
        raft.state != StateRole::Leader && raft.promotable() && raft.election_elapsed + 1 >= raft.randomized_election_timeout()
    }

    fn may_campaign(&self) -> bool {
        let log = &self.node.raft.raft_log;
        let is_behind_snapshot = log.applied + 1 < self.range().0;
        let is_behind_disk = self.node.raft.prs().is_singleton() && log.persisted < log.last_index();
        !is_behind_snapshot && !is_behind_disk
    }

    /// The ticks before `tick` would start something.
    pub fn ticks_until_event(&self) -> u64 {
        let raft = &self.node.raft;
        let ticks = if raft.state == StateRole::Leader {
            let until_beat = raft.heartbeat_timeout().saturating_sub(raft.heartbeat_elapsed());
            until_beat.min(raft.election_timeout().saturating_sub(raft.election_elapsed))
        } else if raft.promotable() {
            raft.randomized_election_timeout().saturating_sub(raft.election_elapsed)
        } else {
            return (1 << 31) - 1;
        };
        ticks.max(1) as u64
    }

    /// Takes in one message; the error says why not.
    pub fn step(&mut self, data: &[u8]) -> Result<(), (u64, &'static str)> {
        let message = Message::decode(data).map_err(|_| (0, "undecodable"))?;
        let sender = message.from;
        if let Some(why) = self.find_fault(&message) {
            return Err((sender, why));
        }
        if self.is_stale_rejection(&message) {
            let peer = self.node.raft.mut_prs().get_mut(sender).expect("it was found just now");
            peer.recent_active = true;
            peer.resume();
            return Ok(());
        }
        // As if it had been lost: its sender asks again. The crate would pass a question on in its sender's name.
        let is_late = match message.get_msg_type() {
            MessageType::MsgTimeoutNow => !self.may_campaign(),
            MessageType::MsgReadIndex => self.node.raft.state != StateRole::Leader,
            _ => false,
        };
        if is_late {
            return Ok(());
        }
        let result = self.node.step(message);
        self.settle();
        match result {
            Err(Error::StepPeerNotFound) => Err((sender, "unknown_peer")),
            Err(_) => Err((sender, "forbidden")),
            Ok(()) => Ok(()),
        }
    }

    fn find_fault(&self, message: &Message) -> Option<&'static str> {
        use MessageType as T;
        let raft = &self.node.raft;
        let log = &raft.raft_log;
        let is_current = message.term >= raft.term;
        let Some(kind) = MessageType::from_i32(message.msg_type) else { return Some("malformed") };
        if message.to != raft.id || message.from == INVALID_ID || message.from == raft.id {
            return Some("misaddressed");
        }
        match kind {
            T::MsgHup | T::MsgBeat | T::MsgUnreachable | T::MsgSnapStatus | T::MsgCheckQuorum | T::MsgPropose | T::MsgTransferLeader => {
                Some("forbidden")
            }
            T::MsgReadIndex | T::MsgReadIndexResp => (message.entries.len() != 1).then_some("malformed"),
            T::MsgAppend => {
                let is_whole = (message.index + 1..).zip(&message.entries).all(|(index, entry)| {
                    entry.index == index && entry.term >= message.log_term && EntryType::from_i32(entry.entry_type).is_some()
                });
                // A leader's log contains what was committed: what it puts after that is not of an older term.
                let fits = !is_current || message.index < log.committed || message.log_term >= log.term(log.committed).unwrap_or(0);
                if is_whole { (!fits).then_some("contradicts_commit") } else { Some("malformed") }
            }
            T::MsgHeartbeat => (is_current && message.commit > log.last_index()).then_some("log_lost"),
            T::MsgAppendResponse => {
                let is_ahead = raft.state == StateRole::Leader && message.term == raft.term && message.index > log.last_index();
                (is_ahead && !message.reject).then_some("ahead_of_log")
            }
            T::MsgSnapshot => {
                let meta = message.get_snapshot().get_metadata();
                (meta.index == 0 || meta.get_conf_state().voters.is_empty()).then_some("malformed")
            }
            _ => None,
        }
    }

    fn is_stale_rejection(&self, message: &Message) -> bool {
        let raft = &self.node.raft;
        message.get_msg_type() == MessageType::MsgAppendResponse
            && message.reject
            && message.request_snapshot == 0
            && message.term == raft.term
            && raft.state == StateRole::Leader
            && raft.prs().get(message.from).is_some_and(|peer| peer.state == ProgressState::Probe && message.index <= peer.matched)
    }

    /// Appends entries, all or none; returns the index of the last, or why not.
    pub fn propose(&mut self, data: Vec<Vec<u8>>) -> Result<u64, &'static str> {
        self.append(data.into_iter().map(|data| Entry { data, ..Entry::default() }).collect())
    }

    /// Appends a change of members. The outer error is a change that makes no sense.
    pub fn propose_conf_change(&mut self, change: &ConfChangeV2) -> Result<Result<u64, &'static str>, Refused> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return Ok(Err("not_leader"));
        }
        if raft.has_pending_conf() {
            return Ok(Err("conf_change_pending"));
        }
        let mut changer = Changer::new(raft.prs());
        if change.leave_joint() {
            changer.leave_joint()
        } else if let Some(auto_leave) = change.enter_joint() {
            changer.enter_joint(auto_leave, &change.changes)
        } else {
            changer.simple(&change.changes)
        }
        .map_err(|error| error.to_string())?;
        let entry_type = EntryType::EntryConfChangeV2.into();
        Ok(self.append(vec![Entry { entry_type, data: change.encode_to_vec(), ..Entry::default() }]))
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<u64, &'static str> {
        let raft = &mut self.node.raft;
        if raft.state != StateRole::Leader {
            return Err("not_leader");
        }
        if raft.lead_transferee.is_some() {
            return Err("transferring");
        }
        let msg_type = MessageType::MsgPropose.into();
        let result = raft.step(Message { msg_type, from: raft.id, entries, ..Message::default() });
        self.settle();
        result.map_err(|_| "too_much_uncommitted")?;
        Ok(self.node.raft.raft_log.last_index())
    }

    /// Carries out a committed change of members; returns the members after it.
    pub fn apply_conf_change(&mut self, data: &[u8]) -> Result<ConfState, Refused> {
        let index = self.conf_indexes.pop_front().unwrap_or(self.node.raft.raft_log.applied);
        let change = ConfChangeV2::decode(data).map_err(|error| error.to_string())?;
        let conf = sorted(self.node.apply_conf_change(&change).map_err(|error| error.to_string())?);
        self.node.mut_store().set_conf(index, conf.clone());
        let raft = &mut self.node.raft;
        if raft.state == StateRole::Leader && !raft.promotable() {
            raft.become_follower(raft.term, INVALID_ID);
        }
        self.settle();
        Ok(conf)
    }

    /// Asks for an index to read at.
    pub fn read_index(&mut self, context: Vec<u8>) {
        self.node.read_index(context);
    }

    /// Hands over, on the leader.
    pub fn transfer_leader(&mut self, to: u64) {
        let raft = &self.node.raft;
        if raft.state == StateRole::Leader && raft.prs().conf().voters().contains(to) {
            self.node.transfer_leader(to);
        }
    }

    /// Stands for election.
    pub fn campaign(&mut self) {
        if self.node.raft.promotable() && self.may_campaign() {
            self.n_timeouts += 1;
            // It fails for nobody who may stand.
            let _ = self.node.campaign();
            self.settle();
        }
    }

    /// Drops a follower's belief in its leader.
    pub fn forget_leader(&mut self) {
        if self.node.raft.state == StateRole::Follower {
            self.node.raft.leader_id = INVALID_ID;
        }
    }

    /// Takes what there is to do.
    pub fn ready(&mut self) -> Option<Turn> {
        if !self.node.has_ready() {
            return None;
        }
        let mut ready = self.node.ready();
        self.n_turns = ready.number();
        let mut turn = Turn { number: self.n_turns, must_sync: ready.must_sync(), ..Turn::default() };
        turn.soft_state = ready.ss().map(|soft| SoftState { leader_id: soft.leader_id, raft_state: soft.raft_state });
        if let Some(hard_state) = ready.hs() {
            turn.hard_state = hard_state.encode_to_vec();
            if (hard_state.term, hard_state.vote) != (self.hard_state.term, self.hard_state.vote) {
                self.vote_turn = self.n_turns;
            }
            self.hard_state = hard_state.clone();
        }
        if !ready.snapshot().is_empty() {
            self.install(ready.snapshot().clone(), &mut turn);
        }
        self.write(ready.take_entries(), &mut turn);
        let messages = ready.take_messages();
        Self::post(messages, &mut turn, self.vote_turn > self.n_persisted);
        Self::post(ready.take_persisted_messages(), &mut turn, true);
        turn.committed = ready.take_committed_entries();
        self.conf_indexes.extend(turn.committed.iter().filter(|entry| is_conf_change(entry)).map(|entry| entry.index));
        turn.read_states = ready.take_read_states();
        self.node.advance_append_async(ready);
        Some(turn)
    }

    fn install(&mut self, snapshot: Snapshot, turn: &mut Turn) {
        let meta = snapshot.get_metadata();
        raft_log::encode_replaced(meta.index, meta.term, &mut turn.records);
        self.conf_indexes.clear();
        self.node.mut_store().replace(snapshot.clone());
        turn.snapshot = Some(snapshot);
    }

    fn write(&mut self, entries: Vec<Entry>, turn: &mut Turn) {
        for entry in &entries {
            raft_log::encode_entry(entry, &mut turn.records);
        }
        turn.range = entries.first().zip(entries.last()).map_or((0, 0), |(first, last)| (first.index, last.index));
        self.node.mut_store().append(entries);
    }

    fn post(messages: Vec<Message>, turn: &mut Turn, when_persisted: bool) {
        for message in messages {
            let data = message.encode_to_vec();
            if message.get_msg_type() == MessageType::MsgSnapshot {
                let meta = message.get_snapshot().get_metadata();
                turn.snapshots_to_send.push((message.to, meta.index, meta.term, data));
            } else if when_persisted {
                turn.persisted_messages.push((message.to, data));
            } else {
                turn.messages.push((message.to, data));
            }
        }
    }

    /// All up to this turn is durable.
    pub fn on_persisted(&mut self, number: u64) -> Result<(), Refused> {
        if number > self.n_turns {
            return Err(format!("turn {number} was not given out, the last is {}", self.n_turns));
        }
        self.n_persisted = self.n_persisted.max(number);
        self.node.on_persist_ready(number);
        self.settle();
        Ok(())
    }

    /// The machine has applied all up to an index.
    pub fn applied_to(&mut self, index: u64) -> Result<(), Refused> {
        let log = &self.node.raft.raft_log;
        let limit = log.committed.min(log.persisted);
        if index < log.applied || index > limit {
            return Err(format!("{index} is not between {} (applied) and {limit} (committed and durable)", log.applied));
        }
        let last = log.last_index();
        self.node.advance_apply_to(index);
        // The crate wrote the end of a joint configuration, and would tell nobody before the next heartbeat.
        if self.node.raft.raft_log.last_index() > last {
            self.node.raft.bcast_append();
        }
        self.settle();
        Ok(())
    }

    /// Forgets entries up to an index.
    pub fn compact(&mut self, index: u64) -> Result<(), Refused> {
        self.node.mut_store().compact(index)
    }

    /// Offers a snapshot.
    pub fn snapshot_made(&mut self, index: u64, data: Vec<u8>) -> Result<(), Refused> {
        let applied = self.node.raft.raft_log.applied;
        if index > applied {
            return Err(format!("a snapshot at {index} is beyond what was applied, {applied}"));
        }
        let wanted = self.snapshot_wanted();
        self.node.mut_store().set_snapshot(index, data)?;
        if wanted && self.node.raft.state == StateRole::Leader {
            // Whoever waits would get it only after the next heartbeat.
            self.node.raft.bcast_append();
        }
        Ok(())
    }

    /// Whether a peer waits for a newer snapshot than there is.
    pub fn snapshot_wanted(&self) -> bool {
        self.node.store().snapshot_wanted()
    }

    /// Messages to a peer were lost.
    pub fn report_unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
    }

    /// Sending a snapshot ended.
    pub fn report_snapshot(&mut self, id: u64, ok: bool) {
        self.node.report_snapshot(id, if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
    }

    /// The crate's member, to look at.
    pub fn raft(&self) -> &raft::Raft<Log> {
        &self.node.raft
    }

    /// The members now.
    pub fn conf(&self) -> ConfState {
        sorted(self.node.raft.prs().conf().to_conf_state())
    }

    /// Indexes of the first and last entry.
    pub fn range(&self) -> (u64, u64) {
        let store = self.node.store();
        (store.first_index().expect("it is in memory"), store.last())
    }

    /// What the leader knows of the members, by id; nothing on others.
    pub fn progress(&self) -> Vec<(u64, &Progress)> {
        let raft = &self.node.raft;
        let mut peers: Vec<_> = raft.prs().iter().filter(|_| raft.state == StateRole::Leader).map(|(id, peer)| (*id, peer)).collect();
        peers.sort_unstable_by_key(|(id, _)| *id);
        peers
    }

    /// Puts the timeout that a pure function says in place of the crate's.
    fn settle(&mut self) {
        let raft = &mut self.node.raft;
        let mixed = [self.seed, raft.id, raft.term, self.n_timeouts].into_iter().fold(0, |state, value| mix(state ^ value));
        let (least, limit) = self.timeouts;
        raft.set_randomized_election_timeout(usize::try_from(least + mixed % (limit - least)).expect("timeouts came as usize"));
    }
}

/// One step of splitmix64 (Steele, Lea, Flood, 2014).
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// Whether an entry changes the members.
pub fn is_conf_change(entry: &Entry) -> bool {
    entry.get_entry_type() != EntryType::EntryNormal
}

/// A change of members; `joint` and its `auto_leave` as in the crate.
pub fn conf_change(changes: Vec<raft::eraftpb::ConfChangeSingle>, context: Vec<u8>, joint: bool, auto_leave: bool) -> ConfChangeV2 {
    let transition = match (joint || changes.len() > 1, auto_leave) {
        (false, _) => ConfChangeTransition::Auto,
        (true, true) => ConfChangeTransition::Implicit,
        (true, false) => ConfChangeTransition::Explicit,
    };
    ConfChangeV2 { transition: transition.into(), changes, context }
}

fn sorted(mut conf: ConfState) -> ConfState {
    for ids in [&mut conf.voters, &mut conf.learners, &mut conf.voters_outgoing, &mut conf.learners_next] {
        ids.sort_unstable();
    }
    conf
}

#[cfg(test)]
mod tests {
    use raft::Progress;
    use raft::eraftpb::{ConfState, HardState};

    use super::{Config, Core, Log, Message, MessageType, Turn};
    use prost::Message as _;

    fn core(id: u64, voters: &[u64], learners: &[u64], seed: u64) -> Core {
        let conf = ConfState { voters: voters.to_vec(), learners: learners.to_vec(), ..ConfState::default() };
        let config = Config {
            id,
            election_tick: 10,
            heartbeat_tick: 3,
            max_size_per_msg: 1 << 20,
            pre_vote: true,
            check_quorum: true,
            ..Config::default()
        };
        Core::new(&config, seed, Log::restore(HardState::default(), (0, 0), vec![], 0, conf).unwrap()).unwrap()
    }

    fn persist(core: &mut Core) -> Vec<Turn> {
        let mut turns = Vec::new();
        while let Some(turn) = core.ready() {
            core.on_persisted(turn.number).unwrap();
            turns.push(turn);
        }
        turns
    }

    /// The bug of raft 0.7.0 that raft-rs #557 describes. When this fails the crate was mended, and `is_stale_rejection` can go.
    #[test]
    fn the_crate_probes_below_what_was_acknowledged() {
        let mut peer = Progress::new(1, 16);
        peer.maybe_update(5);
        peer.become_probe();
        assert_eq!((peer.matched, peer.next_idx), (5, 6));
        assert!(peer.maybe_decr_to(5, 0, 0));
        assert_eq!((peer.matched, peer.next_idx), (5, 1));
    }

    #[test]
    fn a_stale_rejection_does_not_move_the_probe() {
        let mut core = core(1, &[1, 2], &[], 3);
        let answer = |kind: MessageType, term, index, reject| {
            Message { msg_type: kind.into(), from: 2, to: 1, term, index, reject, ..Message::default() }.encode_to_vec()
        };
        core.campaign();
        persist(&mut core);
        core.step(&answer(MessageType::MsgRequestPreVoteResponse, 1, 0, false)).unwrap();
        persist(&mut core);
        core.step(&answer(MessageType::MsgRequestVoteResponse, 1, 0, false)).unwrap();
        persist(&mut core);
        core.propose(vec![b"a".to_vec()]).unwrap();
        core.step(&answer(MessageType::MsgAppendResponse, 1, 2, false)).unwrap();
        core.report_unreachable(2);
        persist(&mut core);

        core.step(&answer(MessageType::MsgAppendResponse, 1, 2, true)).unwrap();

        let peer = core.progress()[1].1;
        assert_eq!((peer.matched, peer.next_idx, peer.paused), (2, 3, false));
    }

    #[test]
    fn a_sole_voter_sends_nothing_in_its_term_before_its_vote_is_durable() {
        let mut core = core(1, &[1], &[2], 3);
        core.campaign();
        let elected = core.ready().unwrap();
        assert_eq!((elected.messages.len(), elected.persisted_messages.len()), (0, 1));
        core.on_persisted(elected.number).unwrap();
        core.propose(vec![b"a".to_vec()]).unwrap();
        core.step(
            &Message { msg_type: MessageType::MsgAppendResponse.into(), from: 2, to: 1, term: 1, index: 1, ..Message::default() }
                .encode_to_vec(),
        )
        .unwrap();

        let next = core.ready().unwrap();

        assert_ne!(next.messages.len(), 0);
        assert_eq!(next.persisted_messages.len(), 0);
    }

    /// What makes `settle` necessary.
    #[test]
    fn the_crate_draws_timeouts_at_random() {
        let mut raft = core(1, &[1, 2, 3], &[], 1).node.raft;
        let drawn: Vec<_> = (0..50)
            .map(|_| {
                raft.become_follower(0, 0);
                raft.randomized_election_timeout()
            })
            .collect();
        assert!(drawn.iter().any(|ticks| *ticks != drawn[0]));
    }

    #[test]
    fn the_timeout_is_a_function_of_seed_id_term_and_number() {
        let timeouts = |seed, id| {
            let mut core = core(id, &[1, 2, 3], &[], seed);
            (0..50)
                .map(|_| {
                    let ticks = core.tick(1000);
                    persist(&mut core);
                    ticks
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(timeouts(1, 1), timeouts(1, 1));
        assert_ne!(timeouts(1, 1), timeouts(2, 1));
        assert_ne!(timeouts(1, 1), timeouts(1, 2));
        assert!((10..20).all(|ticks| timeouts(1, 1).contains(&ticks)), "not every timeout occurs");
        assert!(timeouts(1, 1).iter().all(|ticks| (10..20).contains(ticks)));
    }
}
