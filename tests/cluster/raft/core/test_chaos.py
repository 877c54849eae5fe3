"""Seeded histories of bare cores: no promise is broken, all faults occur, and a seed says all."""

import os
import subprocess
import sys
from collections import Counter
from typing import Final

import pytest

from isopod.cluster.raft.core import Ready
from tests.cluster.raft.core.chaos import Chaos, Faults
from tests.cluster.raft.core.harness import Checker, Cluster, Member

HERE: Final = os.path.dirname(os.path.abspath(__file__))
ROOT: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(HERE))))
EVERY_FAULT: Final = (
    "lost doubled reordered partition crash snapshot read transfer transferring proposed add_learner add_voter remove stand".split()
)


@pytest.mark.row("B19")
def test_histories_with_every_fault_break_no_promise() -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        chaos = Chaos(seed)
        try:
            chaos.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        seen += chaos.seen
    assert [name for name in EVERY_FAULT if seen[name] < 5] == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 100))
def test_a_thousand_more_histories_break_no_promise(first: int) -> None:
    for seed in range(first, first + 100):
        try:
            Chaos(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("n_members", [3, 5, 7])
def test_a_bad_network_alone_stops_nobody_for_long(n_members: int) -> None:
    faults = Faults(loss=0.2, duplication=0.2, reordering=0.5, crash=0.0, partition=0.0, change=0.0)
    chaos = Chaos(n_members, n_members=n_members, faults=faults)
    chaos.run(1000)
    assert chaos.checker.commit_max > 300


def test_without_faults_there_is_one_election() -> None:
    chaos = Chaos(1, n_members=3, faults=Faults(*[0.0] * len(Faults._fields)))
    chaos.run(2000)
    assert list(chaos.checker.leaders) == [1]
    assert chaos.checker.commit_max > 1000


def test_a_seed_gives_the_same_history_in_processes_with_other_hash_seeds() -> None:
    code = "from tests.cluster.raft.core.chaos import Chaos; print([Chaos(seed).run() for seed in range(3)])"
    outputs = set()
    for hash_seed in ("1", "77"):
        environment = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONHASHSEED": hash_seed}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, timeout=50, check=True).stdout
        )
    assert len(outputs) == 1
    assert outputs == {f"{[Chaos(seed).run() for seed in range(3)]}\n".encode()}


def test_another_seed_gives_another_history() -> None:
    assert len({Chaos(seed, n_members=3).run(50) for seed in range(10)}) == 10


def test_the_seed_of_the_cores_decides_who_campaigns_when() -> None:
    """The rest of the history is equal: only the election timeouts differ."""
    digests = {Chaos(3, n_members=3, core_seed=core_seed).run(100) for core_seed in range(10)}
    assert len(digests) > 5


class Hasty(Member):
    """It says that data are durable while some are not yet."""

    def open(self) -> None:
        """Start from what reached the disk."""
        self.under_way: list[Ready] = []
        super().open()

    def _store(self, ready: Ready) -> None:
        self.under_way.append(ready)
        while len(self.under_way) > 5:
            super()._store(self.under_way.pop(0))


class Careless(Chaos):
    """Members start again as soon as they ended."""

    def _crash(self, id_: int) -> None:
        super()._crash(id_)
        if id_ in self.down:
            self._restart(id_)


@pytest.mark.parametrize(("kind", "may_be_found"), [(Member, False), (Hasty, True)])
def test_a_disk_that_lies_is_found_out(kind: type[Member], may_be_found: bool) -> None:
    n_found = 0
    for seed in range(15):
        faults = Faults(crash=0.5, change=0.0, compaction=0.0, partition=0.1, reordering=0.8)
        chaos = Careless(seed, n_members=4, faults=faults, kind=kind, pre_vote=False, check_quorum=False, election_ticks_max=16)
        try:
            chaos.run(200)
        except AssertionError as error:
            # With equal timeouts, for many split votes, they may well not agree; that is no lie.
            n_found += "no agreement" not in str(error)
    assert (n_found > 0) == may_be_found


def test_a_vote_that_a_disk_forgot_is_found_out() -> None:
    cluster = Cluster(3, pre_vote=False)
    for id_ in (2, 3):
        cluster[id_].core.campaign()
        cluster[id_].work()
        requests = [mail.data for mail in cluster[id_].outbox if mail.to == 1]
        cluster[1].core.step_many(requests)
        cluster[1].work()
        (vote,) = [mail.data for mail in cluster[1].outbox]
        cluster[1].outbox.clear()
        cluster[id_].core.step_many([vote])
        if id_ == 2:
            cluster[2].work()
            # Term 1 in field 1, the vote in field 2.
            assert cluster[1].hard_state[:4] == b"\x08\x01\x10\x02"
            cluster[1].hard_state = cluster[1].hard_state[:2]
            cluster[1].restart()
    with pytest.raises(AssertionError, match="two leaders in term 1"):
        cluster[3].work()


def test_the_checker_wants_a_leader_to_have_what_was_committed() -> None:
    checker = Checker()
    chaos = Chaos(5, n_members=3)
    chaos.run(100)
    member = next(iter(chaos.members.values()))
    checker.on_commit(member.machine.index + 50, (1, 0, b"x"))
    with pytest.raises(AssertionError, match="which was committed"):
        checker.on_leader(member)
