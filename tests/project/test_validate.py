"""The validation command runs every step to its end and fails when any of them fails."""

import sys
from pathlib import Path

import pytest

from scripts.validate import STEPS, Step, main, run

PASSES = [sys.executable, "-c", "print('fine')"]


@pytest.mark.row("S31")
def test_all_steps_passing_is_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([Step("one", PASSES, 20), Step("two", PASSES, 20)], logs=tmp_path) == 0
    assert "validation: all passed" in capsys.readouterr().out
    assert (tmp_path / "two.log").read_text(encoding="utf-8") == "fine\n"


@pytest.mark.row("S31")
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('broken'); raise SystemExit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import signal; signal.pause()", "took longer than 0.5 s"),
    ],
)
def test_one_failing_step_fails_the_whole_and_the_others_still_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, why: str
) -> None:
    steps = [Step("bad", [sys.executable, "-c", code], 0.5 if "longer" in why else 20), Step("after", PASSES, 20)]

    assert run(steps, logs=tmp_path) == 1
    printed = capsys.readouterr().out
    assert why in printed
    assert "validation: 1 of 2 failed: bad" in printed
    assert (tmp_path / "after.log").exists()


@pytest.mark.row("S31")
def test_a_step_that_cannot_be_started_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([Step("gone", ["/no/such/program"], 20)], logs=tmp_path) == 1
    assert "cannot be started" in capsys.readouterr().out


@pytest.mark.row("S31")
def test_nothing_at_all_is_not_a_success(tmp_path: Path) -> None:
    assert run([], logs=tmp_path) == 1


@pytest.mark.row("S31")
def test_it_covers_build_tests_parity_benchmarks_lint_and_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"build", "lint", "unit", "integration", "parity", "examples", "docs", "bench", "soak"} <= {step.name for step in STEPS}
    assert main(["nonsense"]) == 2
    assert "known are: build" in capsys.readouterr().err
