"""Changes of members in Raft, one server at a time, as a model.

Servers have a log of configurations and commands; the configuration that counts is the newest in the log (Ongaro's form) or the newest
*committed and applied* one (the form of etcd and of the crate `raft`, which isopod uses). Elections, appends and commits are single atomic
steps between a server and a majority: messages that are lost or late show as steps that are not taken.

The promise: what is committed stays committed, on every leader of a later term, and no term has two leaders. Two rules keep it:

- one server is added or removed at a time, and the next change waits until the last is committed (and applied, where that counts);
- a new leader begins a change only after it has committed an entry of its own term (Ongaro's later correction).

Each rule can be switched off, and so can the limit of one server a change; the checker then finds two leaders or a lost commit. (The second
rule is missed only where the newest configuration in the log counts, and only from four voters on: the applied form kept the promise
without it in every bound that was tried. The crate has the rule all the same.)

Bounds: `n_servers`, `n_terms`, entries per log, and changes in all. At the beginning the voters differ in nothing but their names, so the
first election is won by the first of them with the votes of those that follow: all others are the same by another name.

Source: Ongaro, "Consensus: Bridging Theory and Practice" (2014), chapter 4; and his correction on the raft-dev list, 10 July 2015.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Final, NamedTuple

NONE: Final = -1
CLASH: Final = -2
"""In `MembershipState.leaders`: the term had two."""


class Record(NamedTuple):
    """An entry: its leader's term and, for a change of members, the voters after it ((): a command)."""

    term: int
    voters: tuple[int, ...] = ()


class Server(NamedTuple):
    """A server: its term, for whom it voted in it, its log, and how much of that it knows to be committed."""

    term: int
    voted_for: int
    log: tuple[Record, ...]
    n_committed: int


class MembershipState(NamedTuple):
    """All servers, who leads in which term (index: term), and the longest committed log there was."""

    servers: tuple[Server, ...]
    leaders: tuple[int, ...]
    committed: tuple[Record, ...]
    n_changes: int


class MembershipModel:
    """The model.

    Args:
        n_servers: Servers there are; the first `n_voters` vote at the beginning.
        n_voters: See there.
        n_terms: Elections that are held.
        n_entries: Entries in a log, at most.
        n_changes: Changes that are begun, at most.
        at_apply: Whether a configuration counts when it is committed, not when it is in the log.
        one_at_a_time: The rule that a change waits for the last.
        own_term_first: The rule that a leader commits in its term before it begins a change.
        step: How many servers one change may add or remove.
        commands: Whether leaders append commands too; a change can be what commits in a term.
    """

    def __init__(
        self,
        *,
        n_servers: int = 4,
        n_voters: int = 3,
        n_terms: int = 3,
        n_entries: int = 3,
        n_changes: int = 2,
        at_apply: bool = False,
        one_at_a_time: bool = True,
        own_term_first: bool = True,
        step: int = 1,
        commands: bool = True,
    ) -> None:
        self._n_servers = n_servers
        self._voters = tuple(range(n_voters))
        self._n_terms = n_terms
        self._n_entries = n_entries
        self._n_changes = n_changes
        self._at_apply = at_apply
        self._one_at_a_time = one_at_a_time
        self._own_term_first = own_term_first
        self._step = step
        self._commands = commands

    def start(self) -> Iterator[MembershipState]:
        """Begin with empty logs, in term 0."""
        servers = tuple(Server(0, NONE, (), 0) for _ in range(self._n_servers))
        yield MembershipState(servers, (NONE,) * (self._n_terms + 1), (), 0)

    def steps(self, state: MembershipState) -> Iterator[tuple[str, MembershipState]]:
        """An election is won, a leader appends, a follower catches up, or a leader commits."""
        for id_ in range(self._n_servers):
            yield from self._elections(state, id_)
            if state.leaders[state.servers[id_].term] == id_:
                yield from self._changes(state, id_)
                yield from self._replications(state, id_)
                yield from self._commits(state, id_)

    def violation(self, state: MembershipState) -> str:
        """A leader of a later term lacks what was committed."""
        for term, id_ in enumerate(state.leaders):
            if id_ == CLASH:
                return f"term {term} has two leaders"
            server = state.servers[id_]
            if id_ == NONE or server.term != term or not state.committed or term < state.committed[-1].term:
                continue
            if server.log[: len(state.committed)] != state.committed:
                return f"server {id_} leads term {term} without all that is committed"
        return ""

    def canonical(self, state: MembershipState) -> MembershipState:
        """Nothing is folded: ids are in configurations, votes and leaders."""
        return state

    def conf(self, server: Server) -> tuple[int, ...]:
        """The voters that count for a server."""
        log = server.log[: server.n_committed] if self._at_apply else server.log
        return next((record.voters for record in reversed(log) if record.voters), self._voters)

    def _elections(self, state: MembershipState, id_: int) -> Iterator[tuple[str, MembershipState]]:
        server = state.servers[id_]
        conf = self.conf(server)
        is_first = all(leader == NONE for leader in state.leaders)
        if id_ not in conf or (is_first and id_ != 0):
            return
        # One election a term is won at most. Lost ones leave nothing but a later term behind: the winner may skip some.
        for term in range(server.term + 1, 2 if is_first else self._n_terms + 1):
            willing = [peer for peer in conf if peer != id_ and self._grants(state.servers[peer], id_, term, server.log)]
            for others in list(combinations(willing, len(conf) // 2))[: 1 if is_first else None]:
                voters = (id_, *others)
                servers = tuple(s._replace(term=term, voted_for=id_) if i in voters else s for i, s in enumerate(state.servers))
                elected = id_ if state.leaders[term] in (NONE, id_) else CLASH
                leaders = (*state.leaders[:term], elected, *state.leaders[term + 1 :])
                yield f"{id_} is elected in term {term} by {sorted(voters)}", state._replace(servers=servers, leaders=leaders)

    def _grants(self, voter: Server, candidate: int, term: int, log: tuple[Record, ...]) -> bool:
        if voter.term > term or (voter.term == term and voter.voted_for not in (NONE, candidate)):
            return False
        return (log[-1].term if log else 0, len(log)) >= (voter.log[-1].term if voter.log else 0, len(voter.log))

    def _changes(self, state: MembershipState, id_: int) -> Iterator[tuple[str, MembershipState]]:
        """The leader appends: a command if it has none in its term, or a change of members."""
        leader = state.servers[id_]
        if len(leader.log) >= self._n_entries:
            return
        if self._commands and not any(record.term == leader.term for record in leader.log):
            yield f"{id_} appends a command", self._appended(state, id_, Record(leader.term))
        conf = next((record.voters for record in reversed(leader.log) if record.voters), self._voters)
        is_pending = any(record.voters for record in leader.log[leader.n_committed :])
        has_committed = any(record.term == leader.term for record in leader.log[: leader.n_committed])
        if state.n_changes >= self._n_changes or (self._one_at_a_time and is_pending) or (self._own_term_first and not has_committed):
            return
        for after in self._neighbours(conf):
            changed = self._appended(state, id_, Record(leader.term, after))
            yield f"{id_} changes the voters from {list(conf)} to {list(after)}", changed._replace(n_changes=state.n_changes + 1)

    def _neighbours(self, conf: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for n_changed in range(1, self._step + 1):
            for changed in combinations(range(self._n_servers), n_changed):
                after = tuple(sorted(set(conf) ^ set(changed)))
                if after:
                    yield after

    def _appended(self, state: MembershipState, id_: int, record: Record) -> MembershipState:
        server = state.servers[id_]
        return self._with(state, id_, server._replace(log=(*server.log, record)))

    def _replications(self, state: MembershipState, id_: int) -> Iterator[tuple[str, MembershipState]]:
        """A follower takes over the leader's log and commit index, whole: the crate's batches and retries end there."""
        leader = state.servers[id_]
        for peer, server in enumerate(state.servers):
            if peer == id_ or server.term > leader.term:
                continue
            n_committed = max(leader.n_committed, server.n_committed)
            after = server._replace(
                term=leader.term,
                voted_for=server.voted_for if server.term == leader.term else NONE,
                log=leader.log,
                n_committed=min(n_committed, len(leader.log)),
            )
            if after != server:
                yield f"{peer} takes over the log of {id_}", self._with(state, peer, after)

    def _commits(self, state: MembershipState, id_: int) -> Iterator[tuple[str, MembershipState]]:
        leader = state.servers[id_]
        conf = self.conf(leader)
        for n in range(len(leader.log), leader.n_committed, -1):
            holders = [peer for peer in conf if state.servers[peer].log[:n] == leader.log[:n] and state.servers[peer].term == leader.term]
            if leader.log[n - 1].term == leader.term and 2 * len(holders) > len(conf):
                committed = max(state.committed, leader.log[:n], key=len)
                yield f"{id_} commits {n} entries", self._with(state, id_, leader._replace(n_committed=n))._replace(committed=committed)
                return

    def _with(self, state: MembershipState, id_: int, server: Server) -> MembershipState:
        return state._replace(servers=(*state.servers[:id_], server, *state.servers[id_ + 1 :]))
