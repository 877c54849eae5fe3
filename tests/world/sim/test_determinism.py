"""One seed, one history: in this process, and in others whose hashes differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def digest(program: str, seed: int, hash_seed: int) -> str:
    env = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    argv = [sys.executable, str(HERE / program), str(seed)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=50).stdout.rpartition(" ")[2]


@pytest.mark.row("B22")
@pytest.mark.parametrize("program", ["scenario.py", "cluster_scenario.py"])
def test_equal_seeds_give_equal_digests_whatever_the_hash_seed(program: str) -> None:
    assert digest(program, 7, hash_seed=1) == digest(program, 7, hash_seed=2) == digest(program, 7, hash_seed=77)


@pytest.mark.row("B22")
@pytest.mark.parametrize("program", ["scenario.py", "cluster_scenario.py"])
def test_another_seed_gives_another_digest(program: str) -> None:
    assert digest(program, 7, hash_seed=1) != digest(program, 8, hash_seed=1)
