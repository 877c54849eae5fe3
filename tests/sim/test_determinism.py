"""One seed, one history, in any process; and the proof of that notices what would break it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isopod.testing.scenarios import make_plan, scenario
from isopod.testing.simulation import run_plan
from tests.sim import leaks

SEEDS_TRIED = 4


def digest(seed: int, leak: str, hash_seed: int) -> str:
    """Run in a process of its own."""
    env = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    argv = [sys.executable, str(Path(leaks.__file__)), str(seed), leak]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=50).stdout


@pytest.mark.row("B22")
def test_equal_seeds_give_equal_digests_in_processes_of_other_hashes() -> None:
    assert digest(7, "", hash_seed=1) == digest(7, "", hash_seed=2) == leaks.digest(7, "")


@pytest.mark.row("B22")
def test_another_seed_gives_another_digest() -> None:
    assert len({leaks.digest(seed, "") for seed in (1, 2, 3)}) == 3


@pytest.mark.row("B22")
@pytest.mark.parametrize("leak", ["clock", "random", "set"])
def test_what_leaks_in_from_outside_is_noticed(leak: str) -> None:
    """With a leak the same seed gives different digests in two processes: the test above would fail."""
    first = digest(7, leak, 1)

    assert any(digest(7, leak, hash_seed) != first for hash_seed in range(2, 2 + SEEDS_TRIED))


@pytest.mark.row("B22")
def test_a_trace_is_equal_line_by_line() -> None:
    plan = make_plan(scenario("partitions"), 3, run_s=2.0)
    first: list[str] = []
    second: list[str] = []

    outcome = run_plan(plan, trace=first.append)
    run_plan(plan, trace=second.append)

    assert first == second
    assert len(first) > 20
    assert outcome.digest == run_plan(plan).digest, "watching changes nothing"
