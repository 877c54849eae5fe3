//! The Raft core for Python: see `isopod.cluster.raft.core`. Calls take microseconds and keep the GIL. A panic of the crate is caught, and
//! the core refuses to go on after it.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use prost::Message as _;
use pyo3::IntoPyObjectExt as _;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList, PyTuple};
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, HardState, Message};
use raft::{INVALID_ID, ProgressState, SoftState, StateRole};

use crate::raft_core::{Core, Mail, Turn, conf_change, is_conf_change};
use crate::raft_log::{Log, Record, decode};

pyo3::create_exception!(
    isopod._core,
    CorePanicked,
    PyRuntimeError,
    "The Raft core broke an assumption; its state is unknown. args = (why,)."
);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("CorePanicked", module.py().get_type::<CorePanicked>())?;
    module.add_class::<RaftCore>()?;
    module.add_function(wrap_pyfunction!(raft_decode_records, module)?)?;
    module.add_function(wrap_pyfunction!(raft_describe_message, module)?)?;
    module.add_function(wrap_pyfunction!(raft_encode_conf_change, module)?)?;
    module.add_function(wrap_pyfunction!(raft_decode_conf_change, module)?)
}

/// A tuple of any length; `PyO3` converts those of up to twelve.
macro_rules! fields {
    ($py:expr; $($value:expr),+ $(,)?) => { PyTuple::new($py, [$($value.into_bound_py_any($py)?),+]) };
}

/// `isopod.cluster.raft.core.CoreConfig`, attribute by attribute.
#[derive(FromPyObject)]
struct Config<'py> {
    id: u64,
    seed: u64,
    election_ticks: usize,
    election_ticks_max: usize,
    heartbeat_ticks: usize,
    pre_vote: bool,
    check_quorum: bool,
    max_inflight: usize,
    bytes_per_message_max: u64,
    uncommitted_bytes_max: u64,
    committed_bytes_per_ready_max: u64,
    applied: u64,
    hard_state: PyBackedBytes,
    conf_state: Bound<'py, PyAny>,
    snapshot_index: u64,
    snapshot_term: u64,
    records: Vec<PyBackedBytes>,
}

impl Config<'_> {
    fn settings(&self) -> raft::Config {
        raft::Config {
            id: self.id,
            election_tick: self.election_ticks,
            min_election_tick: self.election_ticks,
            max_election_tick: if self.election_ticks_max == 0 { 2 * self.election_ticks } else { self.election_ticks_max },
            heartbeat_tick: self.heartbeat_ticks,
            pre_vote: self.pre_vote,
            check_quorum: self.check_quorum,
            max_inflight_msgs: self.max_inflight,
            max_size_per_msg: self.bytes_per_message_max,
            max_uncommitted_size: self.uncommitted_bytes_max,
            max_committed_size_per_ready: self.committed_bytes_per_ready_max,
            applied: self.applied,
            ..raft::Config::default()
        }
    }

    fn log(&self) -> PyResult<Log> {
        let hard_state = HardState::decode(&*self.hard_state).map_err(|error| refused(format!("the hard state is damaged: {error}")))?;
        let (voters, learners, voters_outgoing, learners_next, auto_leave) = self.conf_state.extract()?;
        let conf = ConfState { voters, learners, voters_outgoing, learners_next, auto_leave };
        let mut records = Vec::new();
        for data in &self.records {
            records.extend(decode(data).map_err(refused)?);
        }
        Log::restore(hard_state, (self.snapshot_index, self.snapshot_term), records, self.applied, conf).map_err(refused)
    }
}

/// One member's part in the consensus: the contract is `isopod.cluster.raft.core.RaftCore`.
#[pyclass(module = "isopod._core")]
struct RaftCore {
    core: Core,
    why_poisoned: Option<String>,
}

impl RaftCore {
    fn run<T>(&mut self, work: impl FnOnce(&mut Core) -> T) -> PyResult<T> {
        if self.why_poisoned.is_none() {
            match guarded(|| work(&mut self.core)) {
                Ok(value) => return Ok(value),
                Err(why) => self.why_poisoned = Some(why),
            }
        }
        Err(CorePanicked::new_err(self.why_poisoned.clone()))
    }
}

#[pymethods]
impl RaftCore {
    #[new]
    fn new(config: Config<'_>) -> PyResult<Self> {
        let (settings, log) = (config.settings(), config.log()?);
        let core = guarded(|| Core::new(&settings, config.seed, log)).map_err(CorePanicked::new_err)?.map_err(refused)?;
        Ok(Self { core, why_poisoned: None })
    }

    fn tick(&mut self, n: u32) -> PyResult<u32> {
        self.run(|core| core.tick(n))
    }

    fn step_many(&mut self, messages: Vec<PyBackedBytes>) -> PyResult<Vec<(usize, u64, &'static str)>> {
        self.run(|core| {
            let results = messages.iter().map(|data| core.step(data)).enumerate();
            results.filter_map(|(position, result)| result.err().map(|(sender, why)| (position, sender, why))).collect()
        })
    }

    fn propose<'py>(&mut self, py: Python<'py>, data: Vec<PyBackedBytes>) -> PyResult<Bound<'py, PyAny>> {
        if data.is_empty() {
            return Err(refused("nothing to propose"));
        }
        taken(py, self.run(|core| core.propose(data.iter().map(|data| data.to_vec()).collect()))?)
    }

    fn propose_conf_change<'py>(&mut self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyAny>> {
        let change = ConfChangeV2::decode(data).map_err(refused)?;
        taken(py, self.run(|core| core.propose_conf_change(&change))?.map_err(refused)?)
    }

    fn apply_conf_change<'py>(&mut self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyTuple>> {
        conf_fields(py, &self.run(|core| core.apply_conf_change(data))?.map_err(refused)?)
    }

    fn read_index(&mut self, context: &[u8]) -> PyResult<()> {
        self.run(|core| core.read_index(context.to_vec()))
    }

    fn transfer_leader(&mut self, to: u64) -> PyResult<()> {
        self.run(|core| core.transfer_leader(to))
    }

    fn campaign(&mut self) -> PyResult<()> {
        self.run(Core::campaign)
    }

    fn forget_leader(&mut self) -> PyResult<()> {
        self.run(Core::forget_leader)
    }

    fn ready<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        self.run(Core::ready)?.map(|turn| turn_fields(py, turn)).transpose()
    }

    fn on_persisted(&mut self, number: u64) -> PyResult<()> {
        self.run(|core| core.on_persisted(number))?.map_err(refused)
    }

    fn applied_to(&mut self, index: u64) -> PyResult<()> {
        self.run(|core| core.applied_to(index))?.map_err(refused)
    }

    fn compact(&mut self, index: u64) -> PyResult<()> {
        self.run(|core| core.compact(index))?.map_err(refused)
    }

    fn snapshot_made(&mut self, index: u64, data: &[u8]) -> PyResult<()> {
        self.run(|core| core.snapshot_made(index, data.to_vec()))?.map_err(refused)
    }

    fn snapshot_wanted(&mut self) -> PyResult<bool> {
        self.run(|core| core.snapshot_wanted())
    }

    fn report_unreachable(&mut self, peer: u64) -> PyResult<()> {
        self.run(|core| core.report_unreachable(peer))
    }

    fn report_snapshot(&mut self, peer: u64, ok: bool) -> PyResult<()> {
        self.run(|core| core.report_snapshot(peer, ok))
    }

    fn ticks_until_event(&mut self) -> PyResult<u64> {
        self.run(|core| core.ticks_until_event())
    }

    fn status<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        self.run(|core| status_fields(py, core))?
    }
}

/// Take the records of a log apart: (index, term, kind, data), kind 0 for a command, 1 for a change of members, -1 for a snapshot.
#[pyfunction]
fn raft_decode_records<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyList>> {
    let show = |record| match record {
        Record::Entry(entry) => (entry.index, entry.term, i8::from(is_conf_change(&entry)), PyBytes::new(py, &entry.data)),
        Record::Replaced(index, term) => (index, term, -1, PyBytes::new(py, b"")),
    };
    PyList::new(py, decode(data).map_err(refused)?.into_iter().map(show))
}

/// (kind, sender, to, term, log term, index, commit, reject, number of entries, index of the snapshot) of a message.
#[pyfunction]
fn raft_describe_message<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyTuple>> {
    let m = Message::decode(data).map_err(refused)?;
    let kind = format!("{:?}", m.get_msg_type());
    let snapshot_index = m.get_snapshot().get_metadata().index;
    fields!(py; kind, m.from, m.to, m.term, m.log_term, m.index, m.commit, m.reject, m.entries.len(), snapshot_index)
}

/// Encode a change of members: [(what, id)], the caller's context, and whether it goes through a joint configuration.
#[pyfunction]
fn raft_encode_conf_change<'py>(
    py: Python<'py>,
    changes: Vec<(String, u64)>,
    context: &[u8],
    joint: bool,
    auto_leave: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let mut singles = Vec::new();
    for (what, node_id) in changes {
        let change_type = KINDS.iter().find(|(name, _)| *name == what).ok_or_else(|| refused(format!("{what:?} is no change")))?.1.into();
        if node_id == INVALID_ID {
            return Err(refused("0 is no member's id"));
        }
        singles.push(ConfChangeSingle { change_type, node_id });
    }
    Ok(PyBytes::new(py, &conf_change(singles, context.to_vec(), joint, auto_leave).encode_to_vec()))
}

/// The inverse of `raft_encode_conf_change`.
#[pyfunction]
fn raft_decode_conf_change<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyTuple>> {
    let change = ConfChangeV2::decode(data).map_err(refused)?;
    let name = |single: &ConfChangeSingle| {
        (KINDS.iter().find(|(_, kind)| *kind == single.get_change_type()).map_or("", |(name, _)| *name), single.node_id)
    };
    let changes = PyTuple::new(py, change.changes.iter().map(name))?;
    let joint = change.get_transition() != ConfChangeTransition::Auto;
    fields!(py; changes, PyBytes::new(py, &change.context), joint, change.get_transition() != ConfChangeTransition::Explicit)
}

const KINDS: [(&str, ConfChangeType); 3] =
    [("add_voter", ConfChangeType::AddNode), ("add_learner", ConfChangeType::AddLearnerNode), ("remove", ConfChangeType::RemoveNode)];

fn turn_fields(py: Python<'_>, turn: Turn) -> PyResult<Bound<'_, PyTuple>> {
    let snapshot = turn.snapshot.map(|snapshot| {
        let meta = snapshot.get_metadata();
        fields!(py; meta.index, meta.term, conf_fields(py, meta.get_conf_state())?, PyBytes::new(py, &snapshot.data))
    });
    let committed = |entry: &Entry| (entry.index, entry.term, u8::from(is_conf_change(entry)), PyBytes::new(py, &entry.data));
    let read_states = turn.read_states.iter().map(|state| (PyBytes::new(py, &state.request_ctx), state.index));
    let to_send = turn.snapshots_to_send.iter().map(|(to, index, term, data)| (*to, *index, *term, PyBytes::new(py, data)));
    fields!(py;
        turn.number,
        turn.soft_state.map(|SoftState { leader_id, raft_state }| (leader_id, role(raft_state))),
        PyBytes::new(py, &turn.hard_state),
        PyBytes::new(py, &turn.records),
        turn.range.0,
        turn.range.1,
        turn.must_sync,
        mail(py, &turn.messages)?,
        mail(py, &turn.persisted_messages)?,
        PyList::new(py, turn.committed.iter().map(committed))?,
        snapshot.transpose()?,
        PyList::new(py, read_states)?,
        PyList::new(py, to_send)?,
    )
}

fn mail<'py>(py: Python<'py>, mail: &Mail) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, mail.iter().map(|(to, data)| (*to, PyBytes::new(py, data))))
}

fn status_fields<'py>(py: Python<'py>, core: &Core) -> PyResult<Bound<'py, PyTuple>> {
    let raft = core.raft();
    let (first, last) = core.range();
    let mut progress = Vec::new();
    for (id, peer) in core.progress() {
        let state = match peer.state {
            ProgressState::Probe => "probe",
            ProgressState::Replicate => "replicate",
            ProgressState::Snapshot => "snapshot",
        };
        progress.push((id, peer.matched, peer.next_idx, state, peer.recent_active, peer.pending_snapshot, peer.ins.count()));
    }
    fields!(py;
        raft.id,
        role(raft.state),
        raft.term,
        raft.leader_id,
        raft.vote,
        raft.raft_log.committed,
        raft.raft_log.applied,
        raft.raft_log.persisted,
        first,
        last.max(raft.raft_log.last_index()),
        conf_fields(py, &core.conf())?,
        raft.lead_transferee.unwrap_or(INVALID_ID),
        raft.has_pending_conf(),
        raft.uncommitted_size(),
        PyTuple::new(py, progress)?,
    )
}

fn role(role: StateRole) -> &'static str {
    match role {
        StateRole::Follower => "follower",
        StateRole::PreCandidate => "pre_candidate",
        StateRole::Candidate => "candidate",
        StateRole::Leader => "leader",
    }
}

fn conf_fields<'py>(py: Python<'py>, conf: &ConfState) -> PyResult<Bound<'py, PyTuple>> {
    let ids = |ids: &[u64]| PyTuple::new(py, ids);
    fields!(py; ids(&conf.voters)?, ids(&conf.learners)?, ids(&conf.voters_outgoing)?, ids(&conf.learners_next)?, conf.auto_leave)
}

/// The index of what was proposed, or why it was dropped.
fn taken<'py>(py: Python<'py>, result: Result<u64, &'static str>) -> PyResult<Bound<'py, PyAny>> {
    match result {
        Ok(index) => index.into_bound_py_any(py),
        Err(why) => why.into_bound_py_any(py),
    }
}

fn refused(why: impl ToString) -> PyErr {
    PyValueError::new_err(why.to_string())
}

thread_local! {
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Turns a panic into its message, in place of a report on stderr.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| if IS_GUARDED.get() { LAST_PANIC.set(describe(info)) } else { before(info) }));
    });
    IS_GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_GUARDED.set(false);
    result.map_err(|_| LAST_PANIC.take())
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    let place = info
        .location()
        .map_or(String::new(), |place| format!(" ({}:{})", place.file().rsplit('/').next().unwrap_or_default(), place.line()));
    format!("{}{place}", text.unwrap_or("panicked"))
}
