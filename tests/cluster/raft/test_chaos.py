"""Seeded runs of three simulated machines under every kind of fault: nothing acknowledged is lost or applied twice, all end equal."""

import pytest

from isopod.cluster.raft.settings import RaftSettings
from tests.cluster.raft.chaos import Chaos

SMALL = RaftSettings(snapshot_log_entries=150, keep_log_entries=40)
pytestmark = [pytest.mark.row("B20"), pytest.mark.row("B13")]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_few_seeds(seed: int) -> None:
    chaos = Chaos(seed, duration_s=10.0, settings=SMALL if seed % 2 else RaftSettings())
    chaos.run()
    assert len(chaos.watch.acknowledged) > 100
    assert chaos.n_faults


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_seeds(seed: int) -> None:
    chaos = Chaos(seed, settings=SMALL if seed % 2 else RaftSettings())
    chaos.run()
    assert len(chaos.watch.acknowledged) > 100


@pytest.mark.row("B22")
def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        chaos = Chaos(7, duration_s=4.0)
        chaos.run()
        runs.append((chaos.sim.lines, chaos.watch.acknowledged, chaos.watch.entries))
    assert runs[0] == runs[1]
