"""What must hold in every run of a cluster, whatever breaks: checked at each event, and once more over the whole at the end.

- one leader per term, and one vote of a node (Raft, figure 3: election safety);
- an entry is known by its index and term: equal in every log, with an equal predecessor (log matching, by induction);
- what one node applied, every node applies at that index, and nobody changes it later (state machine safety, committed never lost);
- on one node, from its start to its end: term, commit and applied index never go back, and every index is applied once, in order;
- what a node promised does not vanish with a restart, as it was durable before: a term in which it led or applied, a vote that it gave,
  an entry that it applied;
- equal index, equal state;
- a snapshot and the entries after it make the same state as all entries from the first one.

Nothing here runs a cluster: it is told what happens (`isopod.testing.observe`), so each rule can be tested by telling it lies. The memory
of a run is bounded by its log.
Source: Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm" (2014), figure 3.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

VIOLATIONS_MAX: Final = 20
"""More are counted, but not kept."""


class Batch(Protocol):
    """What was applied at one index: see `isopod.cluster.raft.ports.Batch`."""

    @property
    def index(self) -> int:
        """Its place in the log."""

    @property
    def term(self) -> int:
        """The term of the leader that wrote it."""

    @property
    def stamp_ns(self) -> int:
        """That leader's time."""

    @property
    def commands(self) -> Sequence[bytes]:
        """The commands."""


class Machine(Protocol):
    """A state machine: see `isopod.cluster.raft.ports.StateMachine`."""

    def apply(self, batch: Any) -> Sequence[Any]:
        """Apply a batch."""

    def restore(self, data: bytes) -> None:
        """Become a snapshot."""

    def digest(self) -> str:
        """Return the digest of the state."""


class Violation(NamedTuple):
    """A promise that was broken: which, when, and how."""

    rule: str
    at_ns: int
    text: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.at_ns / 1e9:.6f} s: {self.text}"


class _Life:
    """What is known of one node since its process began."""

    __slots__ = ("applied", "commit", "term")

    def __init__(self) -> None:
        self.term = 0
        self.commit = 0
        self.applied = 0


class Invariants:
    """The rules. Every method may be called at any time, in the order in which things happen.

    Args:
        now_ns: Virtual time.
    """

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.violations: list[Violation] = []
        self.n_violations = 0
        self.n_applied = 0
        self.leaders: dict[int, int] = {}
        """Who led each term."""
        self._now_ns = now_ns
        self._lives: dict[int, _Life] = {}
        self._durable_term: dict[int, int] = {}
        self._durable_index: dict[int, int] = {}
        self._votes: dict[int, tuple[int, int]] = {}
        self._entries: dict[tuple[int, int], tuple[bytes, int]] = {}
        self._applied: dict[int, tuple[int, bytes]] = {}
        self._batches: dict[int, tuple[Batch, int]] = {}
        self._states: dict[int, tuple[str, int]] = {}
        self._snapshots: dict[int, bytes] = {}

    @property
    def last_applied(self) -> int:
        """The highest index that any node applied."""
        return max(self._applied, default=0)

    def report(self, rule: str, text: str) -> None:
        """Note a violation."""
        self.n_violations += 1
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(rule, self._now_ns(), text))

    # -- a node ------------------------------------------------------------------------------------------------------------------------

    def on_start(self, node: int, term: int, applied: int = 0, *, vote: int = 0, last_index: int | None = None) -> None:
        """A node's core was opened: with the term, the applied index, the vote and the end of the log that its disk remembers."""
        before = self._durable_term.get(node, 0)
        voted_in, candidate = self._votes.get(node, (0, 0))
        if term < before:
            self.report("durable term", f"node {node} came back with term {term}, but had acted in term {before}")
        elif term < voted_in or (term == voted_in and vote != candidate):
            self.report(
                "durable vote", f"node {node} came back with term {term} and a vote for {vote}, but voted for {candidate} in {voted_in}"
            )
        index = self._durable_index.get(node, 0)
        if last_index is not None and last_index < index:
            self.report("durable log", f"node {node} came back with a log that ends at {last_index}, but had applied {index}")
        life = self._lives[node] = _Life()
        life.term, life.applied = term, applied

    def on_wiped(self, node: int) -> None:
        """A node's disk is empty by intent: nothing it had known counts any more."""
        for known in (self._durable_term, self._durable_index, self._votes, self._lives):
            known.pop(node, None)

    def on_vote(self, node: int, term: int, candidate: int) -> None:
        """A node has told a candidate that it votes for it, in a term."""
        voted_in, other = self._votes.get(node, (0, 0))
        if term == voted_in and candidate != other:
            self.report("one vote per term", f"node {node} voted for {other} and for {candidate} in term {term}")
        elif term > voted_in:
            self._votes[node] = (term, candidate)

    def on_term(self, node: int, term: int, commit: int) -> None:
        """A node has this term and commit index."""
        life = self._life(node)
        if term < life.term:
            self.report("monotonic term", f"node {node} went from term {life.term} back to {term}")
        if commit < life.commit:
            self.report("monotonic commit", f"node {node} went from commit {life.commit} back to {commit}")
        life.term, life.commit = max(term, life.term), max(commit, life.commit)

    def on_leader(self, node: int, term: int, n_voters: int) -> None:
        """A node leads a term."""
        other = self.leaders.setdefault(term, node)
        if other != node:
            self.report("one leader per term", f"nodes {other} and {node} both lead term {term}")
        if n_voters > 1:  # alone, a node elects itself before its vote is durable; among others it asked for theirs after
            self._acted(node, term)

    def on_append(self, node: int, index: int, term: int, *, previous_term: int | None, data: bytes) -> None:
        """An entry was put into a node's log; `previous_term` is that of the entry before it there, None if unknown."""
        key = (index, term)
        digest = _hash(data)
        known = self._entries.get(key)
        if known is None:
            self._entries[key] = (digest, -1 if previous_term is None else previous_term)
            return
        if known[0] != digest:
            self.report("log matching", f"node {node} has another entry {index} of term {term} than an earlier log")
        if previous_term is not None and known[1] == -1:
            self._entries[key] = (digest, previous_term)
        elif previous_term is not None and known[1] != previous_term:
            self.report(
                "log matching", f"entry {index} of term {term} follows term {previous_term} on node {node}, term {known[1]} elsewhere"
            )

    def on_committed(self, node: int, index: int, term: int, *, kind: int, data: bytes) -> None:
        """A node was handed a committed entry."""
        life = self._life(node)
        if index != life.applied + 1:
            self.report("applied once, in order", f"node {node} applies {index} after {life.applied}")
        life.applied = index
        self.n_applied += 1
        self._durable_index[node] = max(index, self._durable_index.get(node, 0))
        entry = (term, _hash(bytes((kind,)) + data))
        known = self._applied.setdefault(index, entry)
        if known != entry:
            self.report(
                "committed never lost", f"node {node} applies an entry of term {term} at {index}, another applied one of term {known[0]}"
            )
        self._acted(node, term)

    def on_snapshot_installed(self, node: int, index: int, term: int) -> None:
        """A node jumped to a snapshot that came from another."""
        life = self._life(node)
        if index < life.applied:
            self.report("applied once, in order", f"node {node} went back from {life.applied} to a snapshot of {index}")
        known = self._applied.get(index)
        if known is not None and known[0] != term:
            self.report("committed never lost", f"the snapshot of node {node} says term {term} at {index}, it was {known[0]}")
        life.applied = index
        life.commit = max(life.commit, index)

    # -- state ---------------------------------------------------------------------------------------------------------------------------

    def on_batch(self, batch: Batch) -> None:
        """A machine applied a batch: kept for the replay at the end, with the time when it was first applied."""
        if batch.index not in self._batches:
            self._batches[batch.index] = (batch, self._now_ns())

    def batches(self) -> list[tuple[Batch, int]]:
        """Return every batch that was applied anywhere, in order, and when it was first."""
        return [self._batches[index] for index in sorted(self._batches)]

    def on_state(self, node: int, index: int, digest: str) -> None:
        """A node's machine has this digest after this index."""
        known, first = self._states.setdefault(index, (digest, node))
        if known != digest:
            self.report("equal state at equal index", f"after {index} node {node} has state {digest[:12]}, node {first} had {known[:12]}")

    def on_snapshot_made(self, index: int, data: bytes) -> None:
        """A machine made a snapshot at this index: one per index is kept for the replay at the end."""
        self._snapshots.setdefault(index, data)

    def check_replay(self, new_machine: Callable[[], Machine], *, n_snapshots_max: int = 3) -> None:
        """Replay everything from the first entry on, and again from some snapshots; all must end in the same state."""
        whole = new_machine()
        order = sorted(self._batches)
        snapshots = sorted(self._snapshots)
        chosen = snapshots[:: max(1, -(-len(snapshots) // n_snapshots_max))]
        for index in order:
            whole.apply(self._batches[index][0])
            known = self._states.get(index)
            if known is not None and whole.digest() != known[0]:
                self.report("replay", f"all entries up to {index} make another state than node {known[1]} had ({known[0][:12]})")
                break
        final = whole.digest()
        for index in chosen:
            part = new_machine()
            part.restore(self._snapshots[index])
            for later in order:
                if later > index:
                    part.apply(self._batches[later][0])
            if part.digest() != final:
                self.report("snapshot and replay", f"the snapshot of {index} and the entries after it do not make the state of all entries")

    # -- helpers -------------------------------------------------------------------------------------------------------------------------

    def _life(self, node: int) -> _Life:
        found = self._lives.get(node)
        if found is None:
            found = self._lives[node] = _Life()
        return found

    def _acted(self, node: int, term: int) -> None:
        if term > self._durable_term.get(node, 0):
            self._durable_term[node] = term


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
