"""Suites: groups of one lane never run at once, reports are JUnit, nothing is tried again, and stress measures a rate."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import suites
from scripts.suites import LANES, PROFILES, SUITES, Group, command, environment, existing, main, read_report, run_groups
from tests.project.sources import PROJECT

PASSES = "def test_a():\n    pass\n"
FAILS = "def test_a():\n    assert False\n\ndef test_b():\n    pass\n"
MEETS = """
import time
from pathlib import Path

def seen(*names):
    return [name for name in names if (Path({path!r}) / name).exists()]

def until(condition, limit_s):
    ends_at = time.monotonic() + limit_s
    while not condition() and time.monotonic() < ends_at:
        time.sleep(0.01)
    return condition()

def test_a():
    (Path({path!r}) / "{name}").touch()
    if "{name}" == "three":
        assert until(lambda: seen("one", "two"), 50), "it runs beside the others"
        assert not until(lambda: len(seen("one", "two")) == 2, 0.5), "two of one lane run at once"
        (Path({path!r}) / "ended").touch()
    else:
        assert until(lambda: seen("ended"), 50), "another lane waits for this one"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, where suites are found and reports go."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    monkeypatch.setattr(suites, "PROJECT", tmp_path)
    monkeypatch.setattr(suites, "REPORTS", tmp_path / "junit")
    return tmp_path


def group(project: Path, name: str, text: str, lane: suites.Lane = "plain") -> Group:
    (project / f"test_{name}.py").write_text(text, encoding="utf-8")
    return Group(name, (f"test_{name}.py",), lane)


@pytest.mark.row("B27")
def test_groups_of_one_lane_never_run_at_once_and_others_do(project: Path) -> None:
    lanes: dict[str, suites.Lane] = {"one": "consensus", "two": "consensus", "three": "plain"}
    groups = [group(project, name, MEETS.format(path=str(project), name=name), lane) for name, lane in lanes.items()]

    ended = run_groups(groups, "default", "mine", number=0, jobs=3)

    assert [(each.exit_code, each.n_tests) for each in ended] == [(0, 1)] * 3
    assert all((project / "junit" / "mine" / f"{name}.xml").exists() for name in lanes)


@pytest.mark.row("B27")
@pytest.mark.parametrize("profile", PROFILES)
def test_a_failure_is_reported_and_not_tried_again(project: Path, profile: suites.Profile) -> None:
    counted = project / "count"
    text = f"def test_a():\n    open({str(counted)!r}, 'a').write('x')\n    assert False\n"

    (ended,) = run_groups([group(project, "bad", text)], profile, "mine", number=0, jobs=1)

    assert ended.exit_code == 1
    assert ended.failed == ("test_bad::test_a",)
    assert counted.read_text() == "x"


@pytest.mark.row("B27")
def test_stress_says_how_often_a_test_failed(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import os\n\ndef test_a():\n    assert int(os.environ['ISOPOD_SIM_SEED']) % 2\n\ndef test_b():\n    pass\n"
    monkeypatch.setattr(suites, "SUITES", {"mine": (group(project, "shaky", text),)})

    assert main(["mine", "--profile", "stress", "--repeat", "3"]) == 1

    said = capsys.readouterr().out
    assert "3 rounds, 1 failures in 6 tests" in said
    assert "test_shaky::test_a: failed 1 of 3" in said


def test_a_suite_that_ran_nothing_has_not_passed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {"mine": (Group("none", ("tests/none",), "plain"),), "ok": (group(project, "ok", PASSES),)})

    assert main(["mine"]) == 1
    assert main(["ok"]) == 0


def test_the_default_profile_stops_at_the_first_failure_and_others_go_on(project: Path) -> None:
    bad = group(project, "bad", FAILS)

    assert run_groups([bad], "default", "mine", number=0, jobs=1)[0].n_tests == 1
    assert run_groups([bad], "ci", "mine", number=0, jobs=1)[0].n_tests == 2


@pytest.mark.row("B47")
def test_every_suite_has_lanes_that_are_explained_and_tests_that_exist() -> None:
    assert {"simulation", "failpoints", "all"} <= set(SUITES)
    for name, groups in SUITES.items():
        assert all(each.lane in LANES for each in groups)
        assert [each for each in groups if existing(each) is not None], name
        assert len({each.name for each in groups}) == len(groups)


def test_profiles_differ_in_limits_and_seeds() -> None:
    some = Group("some", ("tests/wire",), "plain", "not host")

    assert "-x" in command(some, "default", Path("x.xml"), number=0)
    assert "--timeout=180" in command(some, "ci", Path("x.xml"), number=0)
    assert "--hypothesis-seed=4" in command(some, "stress", Path("x.xml"), number=4)
    assert command(some, "ci", Path("x.xml"), number=0)[-1:] != ["--lf"]
    assert environment("stress", 4)["ISOPOD_SIM_SEED"] == "12349"
    assert environment("ci", 0)["CI"]


def test_reports_are_junit(project: Path) -> None:
    run_groups([group(project, "bad", FAILS)], "ci", "mine", number=0, jobs=1)

    assert read_report(project / "junit" / "mine" / "bad.xml") == (2, ("test_bad::test_a",))
    assert read_report(project / "none.xml") == (0, ())


def test_the_program_says_what_suites_there_are() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "scripts.suites", "-h"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20
    )

    assert "simulation" in said.stdout


def test_a_group_that_hangs_is_ended(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "GROUP_TIMEOUT_S", 0.5)
    hangs = "import threading\n\ndef test_a():\n    threading.Event().wait()\n"

    (ended,) = run_groups([group(project, "slow", hangs)], "ci", "mine", number=0, jobs=1)

    assert ended.exit_code != 0
