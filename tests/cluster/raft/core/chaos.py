"""A seeded cluster of bare cores: time, messages, disks and members all go wrong, and the checker watches.

One call of `Chaos(seed).run()` is one history. Legal faults: a message is lost, doubled, or overtaken by later ones; two groups cannot
talk, or only one way; a clock runs slow or leaps; a disk takes its time; a process ends between any two of its writes and comes back; a
snapshot is durable before the log that goes with it is. Not legal, so not done: what was durable is lost, or a message is changed.

After `n_rounds` everything heals, and within `N_ROUNDS_TO_HEAL` the members must agree on a leader, commit, and be equal.
"""

import hashlib
import random
from collections import Counter
from typing import Any, Final, NamedTuple

from isopod.cluster.raft.core import Change, ConfChange, ConfState, ProposalDropped, Ready
from tests.cluster.raft.core.harness import Checker, Mail, Member

N_ROUNDS_TO_HEAL: Final = 400
N_VOTERS_MIN: Final = 3
N_MEMBERS_MAX: Final = 7
SNAPSHOT: Final = b"\x08\x07"
"""How a message with a snapshot begins."""


class Faults(NamedTuple):
    """How often, as chances per message or per round."""

    loss: float = 0.05
    duplication: float = 0.03
    reordering: float = 0.2
    slow_disk: float = 0.3
    slow_clock: float = 0.1
    crash: float = 0.01
    partition: float = 0.01
    heal: float = 0.03
    change: float = 0.02
    transfer: float = 0.01
    compaction: float = 0.03
    stand: float = 0.02
    """A follower takes its leader for dead and campaigns, right or wrong."""


EVERY: Final = Faults()


class Chaos:
    """One history."""

    def __init__(
        self,
        seed: int,
        *,
        n_members: int = 0,
        faults: Faults = EVERY,
        core_seed: int | None = None,
        kind: type[Member] = Member,
        **settings: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        # Histories differ in kind, too: without a fault or with much of it other things happen than with a little of everything.
        self.faults = Faults(*[rate * self.random.choice((0, 1, 1, 3)) for rate in EVERY]) if faults is EVERY else faults
        n_members = n_members or self.random.choice((3, 3, 4, 5))
        self.conf = ConfState(voters=tuple(range(1, n_members + 1)))
        self.kind = kind
        self.settings = {"seed": seed if core_seed is None else core_seed, "uncommitted_bytes_max": 1 << 20, **settings}
        self.checker = Checker()
        self.members: dict[int, Member] = {}
        self.down: set[int] = set()
        self.removed: set[int] = set()
        self.mail: list[Mail] = []
        self.cut: set[tuple[int, int]] = set()
        self.reads: dict[bytes, int] = {}
        self.n_events = 0
        self.seen: Counter[str] = Counter()
        self.hash = hashlib.blake2b(digest_size=16)
        for id_ in self.conf.voters:
            self._add(id_)

    def run(self, n_rounds: int = 300) -> str:
        """Run it; returns a digest of every message, write and commit. AssertionError: a promise was broken."""
        for _ in range(n_rounds):
            self._round()
        self._heal()
        n_committed = self.checker.commit_max
        for n in range(N_ROUNDS_TO_HEAL):
            self._round(proposing=n < N_ROUNDS_TO_HEAL // 2 or self.checker.commit_max == n_committed)
            if n > N_ROUNDS_TO_HEAL // 2 and self.checker.commit_max > n_committed and self._is_quiet():
                return self.hash.hexdigest()
        raise AssertionError(f"no agreement {N_ROUNDS_TO_HEAL} ticks after all faults ended")

    def _round(self, *, proposing: bool = True) -> None:
        for id_, member in list(self.members.items()):
            if id_ in self.down or self.random.random() < self.faults.slow_clock:
                continue
            n_ticks = 20 if self.random.random() < self.faults.slow_clock / 20 else 1
            member.core.tick(n_ticks)
            self._work(member)
        for _ in range(self.random.randrange(1, 4)):
            self._deliver()
        if proposing:
            self._propose()
        self._disturb()

    def _work(self, member: Member) -> None:
        self.n_events += 1
        slow = self.random.random() < self.faults.slow_disk
        member.work(sync=not slow)
        if member.unwritten and not slow:
            member.write(self.random.choice((None, 1, None)))
            member.work(sync=False)
        for mail in member.outbox:
            self._send(mail)
        member.outbox.clear()
        self._check_reads(member)
        if member.machine.index and member.id not in member.machine.conf.voters + member.machine.conf.learners and self._was_member(member):
            self.removed.add(member.id)
            self.down.add(member.id)

    def _was_member(self, member: Member) -> bool:
        return member.id <= len(self.conf.voters) or any(member.id in machine.conf.learners for machine in self.checker.machines.values())

    def _send(self, mail: Mail) -> None:
        self.hash.update(mail.data)
        if self.random.random() < self.faults.loss or (mail.sender, mail.to) in self.cut:
            self.seen["lost"] += 1
            self._report_snapshot(mail, arrived=False)
            return
        self.mail.append(mail)
        if self.random.random() < self.faults.duplication:
            self.seen["doubled"] += 1
            self.mail.append(mail)

    def _deliver(self) -> None:
        arriving, self.mail = self.mail, []
        if self.random.random() < self.faults.reordering:
            self.random.shuffle(arriving)
            kept = self.random.randrange(len(arriving) + 1)
            arriving, self.mail = arriving[kept:], arriving[:kept]
            self.seen["reordered"] += 1
        boxes: dict[int, list[Mail]] = {}
        for mail in arriving:
            if mail.to in self.members and mail.to not in self.down:
                boxes.setdefault(mail.to, []).append(mail)
            else:
                self._report_snapshot(mail, arrived=False)
        for to, box in boxes.items():
            self.n_events += len(box)
            member = self.members[to]
            refusals = member.core.step_many([mail.data for mail in box])
            assert all(refusal.why == "unknown_peer" for refusal in refusals), refusals
            for mail in box:
                self._report_snapshot(mail, arrived=True)
            self._work(member)

    def _report_snapshot(self, mail: Mail, *, arrived: bool) -> None:
        """The sender learns how its snapshot fared; the connection may break after the last byte, so it may be told too little."""
        if mail.data[:2] == SNAPSHOT and mail.sender not in self.down:
            self.seen["snapshot" if arrived else "snapshot lost"] += 1
            self.members[mail.sender].core.report_snapshot(mail.to, ok=arrived and self.random.random() < 0.8)

    def _propose(self) -> None:
        for id_, member in self.members.items():
            if id_ in self.down or not member.is_leader or self.random.random() < 0.5:
                continue
            try:
                member.core.propose_many([self.random.randbytes(8) for _ in range(self.random.randrange(1, 4))])
                self.seen["proposed"] += 1
            except ProposalDropped as dropped:
                self.seen[dropped.why] += 1
        reader = self.random.choice(list(self.members.values()))
        if reader.id not in self.down and self.random.random() < 0.3:
            context = b"%d/%d" % (reader.id, len(self.reads))
            self.reads[context] = self.checker.commit_max
            reader.core.read_index(context)
            self._work(reader)

    def _check_reads(self, member: Member) -> None:
        for context, index in member.reads:
            self.seen["read"] += 1
            assert index >= self.reads[context], f"member {member.id} reads at {index} what was at {self.reads[context]} before it asked"
        member.reads.clear()

    def _disturb(self) -> None:
        chance, faults = self.random.random, self.faults
        if chance() < faults.crash:
            self._crash(self.random.choice(list(self.members)))
        for id_ in sorted(self.down - self.removed):
            if chance() < 0.05:
                self._restart(id_)
        if chance() < faults.partition:
            self._partition()
        if chance() < faults.heal:
            self.cut.clear()
        leaders = [member for id_, member in self.members.items() if member.is_leader and id_ not in self.down]
        if leaders:
            leader = self.random.choice(leaders)
            if chance() < faults.change:
                self._change(leader)
            if chance() < faults.transfer:
                self.seen["transfer"] += 1
                leader.core.transfer_leader(self.random.choice(list(self.members)))
            if chance() < 0.05:
                leader.core.report_unreachable(self.random.choice(list(self.members)))
        if chance() < faults.stand:
            self._stand(self.members[self.random.choice(list(self.members))])
        if chance() < faults.compaction:
            member = self.members[self.random.choice(list(self.members))]
            if member.id not in self.down and not any(ready.snapshot for ready in member.unwritten):
                member.make_snapshot(self.random.randrange(5))

    def _crash(self, id_: int) -> None:
        if id_ in self.down or len(self.down - self.removed) >= 2:
            return
        self.seen["crash"] += 1
        member = self.members[id_]
        member.crash(self.random.randrange(len(member.unwritten) + 1), snapshot_only=self.random.random() < 0.5)
        self.down.add(id_)

    def _restart(self, id_: int) -> None:
        self.down.discard(id_)
        self.members[id_].open()

    def _partition(self) -> None:
        self.seen["partition"] += 1
        ids = list(self.members)
        side = set(self.random.sample(ids, self.random.randrange(1, len(ids))))
        both_ways = self.random.random() < 0.7
        self.cut = {(a, b) for a in ids for b in ids if (a in side) != (b in side) and (both_ways or a in side)}

    def _stand(self, member: Member) -> None:
        if member.id in self.down:
            return
        self.seen["stand"] += 1
        for other in self.members.values():
            if other.id not in self.down and self.random.random() < 0.7:
                other.core.forget_leader()
        member.core.forget_leader()
        member.core.campaign()
        self._work(member)

    def _change(self, leader: Member) -> None:
        status = leader.core.status()
        conf = status.conf
        caught_up = [peer.id for peer in status.progress if peer.id in conf.learners and peer.match + 10 > status.commit]
        if caught_up:
            change = Change("add_voter", self.random.choice(caught_up))
        elif (
            not conf.learners and len(conf.voters) < N_MEMBERS_MAX and len(self.members) < 3 * N_MEMBERS_MAX and self.random.random() < 0.5
        ):
            change = Change("add_learner", max(self.members) + 1)
        elif len(conf.voters) > N_VOTERS_MIN:
            change = Change(self.random.choice(("remove", "add_learner")), self.random.choice(conf.voters))
        elif conf.learners:
            change = Change("remove", self.random.choice(conf.learners))
        else:
            return
        try:
            leader.core.propose_conf_change(ConfChange((change,)))
        except ProposalDropped:
            return
        self.seen[change.what] += 1
        if change.id not in self.members:
            self._add(change.id)

    def _add(self, id_: int) -> None:
        member = self.members[id_] = self.kind(id_, self.conf, self.checker, **self.settings)
        member.on_turn = self._record

    def _record(self, ready: Ready) -> None:
        self.hash.update(ready.hard_state + ready.records + b"%d" % len(ready.committed))

    def _heal(self) -> None:
        self.faults = Faults(*[0.0] * len(Faults._fields))._replace(heal=1.0)
        for id_ in sorted(self.down - self.removed):
            self._restart(id_)

    def _is_quiet(self) -> bool:
        """Whether all that are members agree on one leader and have applied the same."""
        alive = [member for id_, member in self.members.items() if id_ not in self.down]
        leaders = [member for member in alive if member.is_leader]
        if len(leaders) != 1:
            return False
        conf = leaders[0].core.status().conf
        of_conf = [member for member in alive if member.id in conf.voters + conf.learners]
        commits = {member.core.status().commit for member in of_conf}
        return len(commits) == 1 and all(member.machine == leaders[0].machine for member in of_conf)
