"""Validation: everything that says whether isopod is sound, in one command that fails if any part fails.

Run as `python -m scripts.validate [NAME ...]` (`make validate`); names choose steps. Every step runs, whatever happened to those before
it, so that one round shows all that is wrong; its output goes to build/validate/NAME.log, and the end of a failed one is shown. A step that
cannot be started, is killed, or outlasts its deadline has failed. Nothing is retried and nothing is only a warning.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parent.parent
LOGS: Final = PROJECT / "build" / "validate"
PYTHON: Final = ".venv/bin/python"
TAIL_LINES: Final = 30
_PYTEST: Final = (PYTHON, "-m", "pytest", "-q")


class Step(NamedTuple):
    """One part: its name, its command, and the seconds it may take."""

    name: str
    argv: Sequence[str]
    timeout_s: float


class Outcome(NamedTuple):
    """How a step went: why it failed, "" if it did not."""

    name: str
    why: str
    duration_s: float


STEPS: Final = (
    Step("build", ["scripts/setup.sh", "--tests"], 1800),
    Step("lint", ["scripts/lint.sh"], 900),
    Step("rust", ["scripts/cargo.sh", "test", "--quiet"], 900),
    Step("unit", [*_PYTEST, "-m", "not host and not slow", "--ignore=tests/parity", "--ignore=tests/examples"], 1800),
    Step("integration", [*_PYTEST, "-m", "host or slow", "--ignore=tests/parity", "--ignore=tests/examples"], 1800),
    Step("parity", [*_PYTEST, "tests/parity"], 600),
    Step("examples", [*_PYTEST, "tests/examples"], 600),
    Step("docs", [PYTHON, "-m", "scripts.reference"], 300),
    Step("bench", [PYTHON, "-m", "benchmarks.runtime", "--quick"], 1800),
    Step("soak", [PYTHON, "-m", "benchmarks.soak", "--seconds", "20"], 300),
)


def run(steps: Sequence[Step], *, logs: Path = LOGS) -> int:
    """Run all steps and return 0 if every one passed, else 1."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps:
        print(f"{step.name:<12} ", end="", flush=True)
        outcome = _run_step(step, logs / f"{step.name}.log")
        outcomes.append(outcome)
        print(f"{'FAILED' if outcome.why else 'ok':<7}{outcome.duration_s:7.1f} s  {outcome.why}", flush=True)
        if outcome.why:
            print(_tail(logs / f"{step.name}.log"))
    failed = [outcome.name for outcome in outcomes if outcome.why]
    print(f"validation: {len(failed)} of {len(outcomes)} failed: {', '.join(failed)}" if failed else "validation: all passed")
    return 1 if failed or not outcomes else 0


def main(argv: Sequence[str]) -> int:
    """Run all steps, or those named."""
    names = [step.name for step in STEPS]
    unknown = [name for name in argv if name not in names]
    if unknown:
        print(f"unknown step: {', '.join(unknown)}; known are: {', '.join(names)}", file=sys.stderr)
        return 2
    os.chdir(PROJECT)
    return run([step for step in STEPS if not argv or step.name in argv])


def _run_step(step: Step, log: Path) -> Outcome:
    began = time.monotonic()
    why = ""
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                step.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=PROJECT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, f"cannot be started: {error}", time.monotonic() - began)
        try:
            status = process.wait(step.timeout_s)
            why = "" if status == 0 else f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {step.timeout_s:g} s"
        finally:
            _end(process)
    return Outcome(step.name, why, time.monotonic() - began)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a step's own session, and reap it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
