"""A whole node in the simulation: one seed, one history, whatever the hash seed; and it is killed at many instants."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node import whole_node


def digest(seed: int, hash_seed: int) -> str:
    env = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    argv = [sys.executable, str(Path(whole_node.__file__)), str(seed)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=50).stdout.rpartition(" ")[2]


def test_a_whole_node_is_as_deterministic_as_its_world() -> None:
    assert digest(3, hash_seed=1) == digest(3, hash_seed=2)


@pytest.mark.row("R31")
@pytest.mark.parametrize("seed", range(12))
def test_a_node_killed_at_any_instant_loses_and_leaks_nothing(seed: int) -> None:
    assert len(whole_node.digest(seed)) == 64
