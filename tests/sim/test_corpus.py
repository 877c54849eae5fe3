"""The corpus: plans that once failed, each kept with what it found. None fails any more."""

from pathlib import Path

import pytest

from isopod.testing.outcome import describe
from isopod.testing.plan import decode_plan, encode_plan
from isopod.testing.simulation import run_plan

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.json"))


@pytest.mark.row("B23", "B24")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_mended_stays_mended(path: Path) -> None:
    plan = decode_plan(path.read_bytes(), path.name)

    outcome = run_plan(plan)

    assert not outcome.violations, describe(outcome)


def test_files_are_written_as_the_program_writes_them() -> None:
    assert FILES
    for path in FILES:
        plan = decode_plan(path.read_bytes(), path.name)
        assert path.read_bytes() == encode_plan(plan), path.name
        assert plan.found, f"{path.name} says what it found"
