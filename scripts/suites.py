"""Test suites: which tests run alone together, which never at once, and how failures are counted.

Run as `python -m scripts.suites NAME [--profile PROFILE] [--jobs N] [--repeat N] [-- PYTEST ARGUMENTS]` (`make test-NAME`).

A suite is a list of groups; each group is one pytest process, and leaves build/junit/SUITE/GROUP.xml. Groups run beside each other, up to
`--jobs`, but two of the same lane never do: both would load the same thing (consensus timing, the disk, the kernel's tables), and one would
fail for the other's sake. The profile says how: `default` stops a group at its first failure; `ci` runs everything, stretches limits, and
shows the slowest; `stress` repeats everything `--repeat` times with other seeds each time and prints how often each test failed.

Nothing is ever tried again until it passes: a test that fails once has failed, in every profile. Stress measures, it does not forgive.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as Xml
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

PROJECT: Final = Path(__file__).resolve().parent.parent
REPORTS: Final = PROJECT / "build" / "junit"
Profile = Literal["default", "ci", "stress"]
PROFILES: Final[tuple[Profile, ...]] = ("default", "ci", "stress")
Lane = Literal["consensus", "storage", "kernel", "plain"]
LANES: Final[Mapping[Lane, str]] = MappingProxyType(
    {
        "consensus": "real clusters and simulations: elections have deadlines",
        "storage": "journals and disks: flushes are slow for everybody at once",
        "kernel": "namespaces, mounts, packet filters: there is one kernel",
        "plain": "nothing that others could disturb",
    }
)
REPEATS: Final = 5
GROUP_TIMEOUT_S: Final = 3600.0
POLL_S: Final = 0.05
FAILED_SHOWN_MAX: Final = 50
_SIM_SEED: Final = "ISOPOD_SIM_SEED"
_SIM_SEED_FIRST: Final = 12345
_HYPOTHESIS_SEED: Final = "--hypothesis-seed"


class Group(NamedTuple):
    """Tests that one process runs: what is collected, which marks count, and whom it must not run beside."""

    name: str
    paths: tuple[str, ...]
    lane: Lane
    marks: str = ""
    ignored: tuple[str, ...] = ()
    keyword: str = ""
    """Only tests whose name, file or class has this in it."""


_CONSENSUS: Final = ("tests/sim", "tests/testing", "tests/cluster")
_STORAGE: Final = ("tests/journal", "tests/world")
_PLAIN: Final = ("tests/wire", "tests/runtime", "tests/net", "tests/api", "tests/telemetry", "tests/cli", "tests/parity", "tests/project")

_ENGINE: Final = ("tests/engine", "tests/node", "tests/faces", "tests/guest", "tests/shim", "tests/examples")

SUITES: Final[Mapping[str, tuple[Group, ...]]] = MappingProxyType(
    {
        "simulation": (Group("simulation", ("tests/sim", "tests/testing"), "consensus"),),
        "failpoints": (Group("failpoints", ("tests/world", "tests/journal", "tests/cluster"), "storage", keyword="failpoint"),),
        "all": (
            Group("consensus", _CONSENSUS, "consensus", "not host"),
            Group("storage", _STORAGE, "storage", "not host"),
            Group("plain", _PLAIN, "plain", "not host"),
            Group("engine", _ENGINE, "plain", "not host"),
            Group("kernel", ("tests",), "kernel", "host"),
        ),
    }
)
"""Suites by name. Paths that do not exist (yet) are left out; a group without any is not run."""


class Ended(NamedTuple):
    """How a group ended: pytest's exit code, 5 for "nothing collected", and what failed in it."""

    group: Group
    exit_code: int
    n_tests: int
    failed: tuple[str, ...]
    duration_s: float


def main(argv: Sequence[str]) -> int:
    """Run a suite; return 0 if everything passed."""
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="suites", description="run a test suite")
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--profile", choices=PROFILES, default=os.environ.get("ISOPOD_TEST_PROFILE", "default"))
    parser.add_argument("--jobs", type=int, default=1, help="groups that run at once; never two of one lane")
    parser.add_argument("--repeat", type=int, default=REPEATS, help="rounds of the stress profile")
    options = parser.parse_args(own)
    groups = [found for group in SUITES[options.suite] if (found := existing(group)) is not None]
    rounds = options.repeat if options.profile == "stress" else 1
    ended: list[Ended] = []
    for number in range(rounds):
        ended += run_groups(groups, options.profile, options.suite, number=number, jobs=options.jobs, more=rest)
    return report(ended, rounds)


def existing(group: Group) -> Group | None:
    """Return a group with the paths that exist, None if there are none."""
    paths = tuple(path for path in group.paths if (PROJECT / path).exists())
    return group._replace(paths=paths) if paths else None


def command(group: Group, profile: Profile, junit: Path, *, number: int) -> list[str]:
    """Return the command line of a group.

    Args:
        group: What to run.
        profile: How.
        junit: Where its report goes.
        number: Of the round, from 0: each has other random examples.
    """
    argv = [sys.executable, "-m", "pytest", "-q", *group.paths, f"--junitxml={junit}", "-o", f"cache_dir=build/pytest/{group.name}"]
    argv += [f"--ignore={path}" for path in group.ignored]
    if group.keyword:
        argv += ["-k", group.keyword]
    if group.marks:
        argv += ["-m", f"({group.marks}) and not vm"]
    if profile == "default":
        argv.append("-x")
    if profile == "ci":
        argv += ["--durations=20", "--timeout=180"]
    if profile == "stress":
        argv += [f"{_HYPOTHESIS_SEED}={number}"]
    return argv


def environment(profile: Profile, number: int) -> dict[str, str]:
    """Return the environment of a group: limits are stretched in `ci`, and every round of `stress` has another seed."""
    found = dict(os.environ, ISOPOD_TEST_PROFILE=profile)
    if profile == "ci":
        found.setdefault("CI", "true")
    if profile == "stress":
        found[_SIM_SEED] = str(_SIM_SEED_FIRST + number)
    return found


def run_groups(groups: Sequence[Group], profile: Profile, suite: str, *, number: int, jobs: int, more: Sequence[str] = ()) -> list[Ended]:
    """Run groups beside each other, never two of one lane; return how they ended, in their order."""
    waiting, ended = list(groups), list[Ended]()
    running: list[tuple[Group, subprocess.Popen[bytes], Path, float]] = []
    while waiting or running:
        taken = [group.lane for group, *_ in running]
        ready = next((group for group in waiting if len(running) < max(1, jobs) and group.lane not in taken), None)
        if ready is not None:
            waiting.remove(ready)
            junit = REPORTS / suite / (f"{ready.name}.xml" if profile != "stress" else f"{ready.name}-{number}.xml")
            junit.parent.mkdir(parents=True, exist_ok=True)
            junit.unlink(missing_ok=True)
            argv = [*command(ready, profile, junit, number=number), *more]
            process = subprocess.Popen(argv, cwd=PROJECT, env=environment(profile, number))
            running.append((ready, process, junit, time.monotonic()))
            continue
        for entry in running[:]:
            group, process, junit, began = entry
            late = time.monotonic() - began > GROUP_TIMEOUT_S
            if late:
                process.kill()
            if late or process.poll() is not None:
                exit_code = process.wait()
                n_tests, failed = read_report(junit)
                ended.append(Ended(group, exit_code, n_tests, failed, time.monotonic() - began))
                running.remove(entry)
        time.sleep(POLL_S)
    return ended


def read_report(junit: Path) -> tuple[int, tuple[str, ...]]:
    """Return how many tests a JUnit report names, and which of them failed."""
    if not junit.exists():
        return 0, ()
    cases = list(Xml.parse(junit).getroot().iter("testcase"))
    failed = tuple(
        f"{case.get('classname', '')}::{case.get('name', '')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    )
    return len(cases), failed


def report(ended: Sequence[Ended], rounds: int) -> int:
    """Print how it went, with the rate of failures; return the exit code."""
    failures: dict[str, int] = {}
    for each in ended:
        state = "passed" if each.exit_code == 0 else "nothing collected" if each.exit_code == 5 else f"FAILED ({each.exit_code})"
        print(f"{each.group.name:<12} {each.n_tests:>5} tests {each.duration_s:>7.1f} s  {state}")
        for name in each.failed:
            failures[name] = failures.get(name, 0) + 1
    if rounds > 1:
        print(f"{rounds} rounds, {sum(failures.values())} failures in {sum(each.n_tests for each in ended)} tests")
    for name, n in sorted(failures.items())[:FAILED_SHOWN_MAX]:
        print(f"  {name}: failed {n} of {rounds}" if rounds > 1 else f"  {name}")
    return 0 if all(each.exit_code in (0, 5) for each in ended) and any(each.exit_code == 0 for each in ended) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
