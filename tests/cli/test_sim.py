"""`isopod sim`: seeds and where they come from, reports, exit codes, traces, scenario files."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from isopod.cli.parse import parse
from isopod.cli.sim import main
from isopod.testing.outcome import Outcome
from isopod.testing.plan import Plan, decode_plan
from isopod.testing.rig import Tampering
from isopod.testing.simulation import run_plan
from tests.cli.scripted_node import SOURCE, TIMEOUT_S, environment
from tests.sim.mutations import TrustsItsOwnClock

LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; site = sys.argv.pop(1); "
    "sys.exit(main(sys.argv[1:], site_packages=site))"
)
SMALL = ("--scenario", "load", "--nodes", "1", "--until", "1s")


def sim(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `isopod sim` as its launcher does: in an isolated interpreter."""
    argv = [sys.executable, "-I", "-S", "-c", LAUNCH, SOURCE, sysconfig.get_paths()["purelib"], "sim", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(env), check=False)


@pytest.mark.row("B22")
def test_the_seed_comes_from_the_option_the_environment_or_is_12345() -> None:
    digests = {
        "option": sim(*SMALL, "--digest", "--seed", "7", env={"ISOPOD_SIM_SEED": "8"}).stdout,
        "ours": sim(*SMALL, "--digest", env={"ISOPOD_SIM_SEED": "7", "MADSIM_TEST_SEED": "8"}).stdout,
        "reference's": sim(*SMALL, "--digest", env={"MADSIM_TEST_SEED": "7"}).stdout,
    }

    assert len(set(digests.values())) == 1
    assert len(digests["ours"].strip()) == 64
    assert sim(*SMALL, "--digest").stdout == sim(*SMALL, "--digest", "--seed", "12345").stdout != digests["ours"]


def test_the_report_says_what_happened_and_what_was_covered() -> None:
    ended = sim(*SMALL, "--seeds", "3..4")

    assert ended.returncode == 0, ended.stderr
    assert "scenario load, seed 3, 1 nodes" in ended.stdout
    assert "scenario load, seed 4, 1 nodes" in ended.stdout
    assert "coverage" in ended.stdout
    assert "without any fault of: process, power" in ended.stdout
    assert "fault classes, and in how many runs: process 0, power 0" in ended.stdout
    assert "2 runs, 0 with a violation" in ended.stdout


def test_json_is_one_object_a_run() -> None:
    ended = sim(*SMALL, "--runs", "2", "--format", "json")

    facts = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [each["seed"] for each in facts] == [12345, 12346]
    assert facts[0]["violations"] == []
    assert facts[0]["operations"]["answered"] > 10
    assert "2 runs, 0 with a violation" in ended.stderr, "the summary is for who waits"
    assert facts[0]["replay"] == "isopod sim --seed 12345 --scenario load --nodes 1 --until 1000ms"


def test_a_trace_has_a_line_for_each_event(folder: str) -> None:
    path = os.path.join(folder, "trace")

    assert sim(*SMALL, "--trace", path).returncode == 0

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    assert any("is leader" in line for line in lines)
    assert all(float(line.split()[0]) >= 0 for line in lines)
    assert "is leader" in sim(*SMALL, "--trace", "-").stdout


def test_a_scenario_file_is_replayed(folder: str) -> None:
    path = os.path.join(folder, "plan.json")
    step = b'{"at_ms":10,"do":"put","client":1,"key":"x","value":"a"}'
    plan = b'{"version":1,"scenario":"load","seed":7,"nodes":1,"until_ms":500,"steps":[%b]}' % step
    Path(path).write_bytes(plan)
    assert decode_plan(plan).seed == 7

    ended = sim(path)

    assert ended.returncode == 0, ended.stderr
    assert "seed 7, 1 nodes, 1 steps: no violation" in ended.stdout


def broken(plan: Plan, *, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run a plan on nodes whose machine looks at its own clock."""
    return run_plan(plan, trace=trace, tampering=Tampering(machine=TrustsItsOwnClock))


FAILING = ("sim", "--scenario", "clocks", "--nodes", "2", "--until", "2s", "--seed", "3")


def test_a_broken_promise_is_told_with_the_way_to_see_it_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(parse([*FAILING]), broken) == 1

    said = capfd.readouterr().out
    assert "VIOLATION equal state at equal index" in said
    assert "again: isopod sim --seed 3 --scenario clocks --nodes 2 --until 2000ms" in said
    assert "FAILED equal state at equal index: isopod sim --seed 3" in said
    assert "1 runs, 1 with a violation" in said


@pytest.mark.slow
@pytest.mark.row("B23")
def test_a_failing_run_is_shrunk_and_printed_as_a_scenario_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(parse([*FAILING, "--shrink"]), broken) == 1

    said = capfd.readouterr()
    plan = decode_plan(said.out.encode())
    assert plan.found == "equal state at equal index"
    assert len(plan.steps) < 20
    assert "steps are left after" in said.err
    assert broken(plan).failure == plan.found
    assert not run_plan(plan).violations


def test_a_failure_is_told_at_once_to_who_waits(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(parse([*FAILING, "--format", "json"]), broken) == 1

    said = capfd.readouterr()
    assert "1 runs in " in said.err
    assert ", 1 failed; seed 3: equal state at equal index\n" in said.err
    assert len(said.out.splitlines()) == 1


def test_scenarios_are_listed() -> None:
    listed = sim("--list").stdout.split()

    assert {"idle", "load", "partitions", "everything"} <= set(listed)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--seed", "x"), "--seed 'x': want a number"),
        (("--seed", "-1"), "want a number"),
        (("--seed", str(1 << 64)), "want a number"),
        (("--seeds", "5"), "want FIRST..LAST"),
        (("--seeds", "5..1"), "at least one"),
        (("--seeds", "1..99999999"), "at most"),
        (("--runs", "0"), "--runs '0'"),
        (("--nodes", "10"), "want a number from 1 to 9"),
        (("--until", "soon"), "duration 'soon'"),
        (("--until", "48h"), "a day at most"),
        (("--scenario", "sunshine"), "there is no such one"),
        (("--format", "xml"), "xml"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(words: tuple[str, ...], why: str) -> None:
    ended = sim(*words)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert why in ended.stderr


def test_a_file_that_is_missing_or_no_scenario_is_refused(folder: str) -> None:
    assert sim(os.path.join(folder, "none.json")).returncode == 1
    path = os.path.join(folder, "bad.json")
    Path(path).write_text("{}", encoding="utf-8")
    ended = sim(path)
    assert ended.returncode == 2
    assert "not a scenario file" in ended.stderr
