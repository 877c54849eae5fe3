"""The commands in the documents about testing are run as they stand there.

A command is a line that begins with `$ ` in a block marked `console`. `isopod` is the one of this checkout. A target of `make` that runs
tests is run with `--collect-only`: it has to find its tests, but a test run must not start another one.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.project.sources import PROJECT

DOCUMENTS = ("docs/how-to-verify-simulation.md", "docs/testing.md", "docs/debugging-raft.md")
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 150


class Command(NamedTuple):
    """A command and where it stands."""

    document: str
    line: int
    text: str


def commands() -> list[Command]:
    found = []
    for name in DOCUMENTS:
        text = (PROJECT / name).read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            first = text.count("\n", 0, block.start(1)) + 1
            lines = block[1].splitlines()
            assert all(line.startswith("$ ") for line in lines), f"{name}: a block of commands has nothing else"
            found += [Command(name, first + number, line.removeprefix("$ ")) for number, line in enumerate(lines)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.row("B42")
@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{Path(command.document).stem}:{command.line}")
def test_command_runs(command: Command) -> None:
    build = PROJECT / "build"
    build.mkdir(exist_ok=True)
    for_trace = build / "raft-trace.txt"
    if command.text.startswith("grep") and not for_trace.exists():
        made = next(each for each in commands() if "raft-trace.txt" in each.text and each.text.startswith("isopod"))
        assert run(made.text).returncode == 0
    text = command.text
    if text.startswith("make test"):
        # The small suites are collected; of those that run everything, the steps are asked for: all tests are collected here already.
        is_small = text.endswith(("simulation", "failpoints"))
        text = f'{text} ARGS="--collect-only -q"' if is_small else text.replace("make", "make --dry-run")

    ended = run(text)

    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def run(text: str) -> "subprocess.CompletedProcess[str]":
    path = f"{PROJECT / '.venv' / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    return subprocess.run(["bash", "-c", text], cwd=PROJECT, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def test_each_document_has_commands() -> None:
    assert {command.document for command in commands()} == set(DOCUMENTS)


@pytest.mark.row("B20")
def test_every_mutation_is_named() -> None:
    from tests.sim.mutations import MUTATIONS

    text = (PROJECT / DOCUMENTS[0]).read_text(encoding="utf-8")

    assert [mutation.name for mutation in MUTATIONS if f"| {mutation.name} |" not in text] == []


@pytest.mark.row("B27")
def test_every_profile_and_lane_is_explained() -> None:
    from scripts.suites import LANES, PROFILES

    text = (PROJECT / DOCUMENTS[1]).read_text(encoding="utf-8")

    assert [profile for profile in PROFILES if f"| {profile} |" not in text] == []
    assert [lane for lane in LANES if f"`{lane}`" not in text] == []
