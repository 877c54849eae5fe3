"""One seed, one history: in this process, and in others whose hashes differ."""

import os
import subprocess
import sys
from pathlib import Path

SCENARIO = Path(__file__).with_name("scenario.py")


def digest(seed: int, hash_seed: int) -> str:
    env = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, str(SCENARIO), str(seed)], env=env, capture_output=True, text=True, check=True, timeout=50)
    return done.stdout.strip()


def test_equal_seeds_give_equal_digests_whatever_the_hash_seed() -> None:
    assert digest(7, hash_seed=1) == digest(7, hash_seed=2) == digest(7, hash_seed=77)


def test_another_seed_gives_another_digest() -> None:
    assert digest(7, hash_seed=1) != digest(8, hash_seed=1)
