"""Help needs no node, and reads as its transcripts say; docs/cli.md is what the grammar says.

`ISOPOD_REWRITE_TRANSCRIPTS=1 pytest tests/cli/test_manual.py` writes the transcripts anew, to be reviewed as a diff.
"""

import os
from pathlib import Path

import pytest

from isopod.cli import grammar, manual
from isopod.cli.grammar_containers import CONTAINER_COMMANDS
from isopod.cli.reference import reference
from isopod.runtime.config import CONFIG_FLAG, SETTINGS, NodeConfig
from isopod.runtime.config.cluster import CLUSTER_SETTINGS, ClusterSection
from isopod.world.paths import CONFIG_FILE, PATHS
from tests.cli.scripted_node import isopod

HERE = Path(__file__).parent
TRANSCRIPTS = {
    "overview": ["--help"],
    "family": ["network"],
    "run": ["run", "--help"],
    "exec": ["help", "exec"],
    "logs": ["logs", "-h"],
    "node": ["node", "--help"],
    "wrong": ["run", "--detatch", "img"],
    "unknown": ["runn"],
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript(name: str) -> None:
    words = TRANSCRIPTS[name]
    ended = isopod(*words, env={"ISOPOD_SOCKET": "/nonexistent/socket"})
    text = f"$ isopod {' '.join(words)}\n{(ended.stdout + ended.stderr).decode()}[exit code {ended.returncode}]\n"
    path = HERE / "transcripts" / f"{name}.txt"
    if os.environ.get("ISOPOD_REWRITE_TRANSCRIPTS") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_ways_to_the_same_help() -> None:
    overview = manual.overview()
    for words in ([], ["--help"], ["-h"], ["help"], ["--help", "ps"]):
        ended = isopod(*words)
        assert (ended.returncode, ended.stdout.decode()) == (0, overview)
    run = manual.page(CONTAINER_COMMANDS[0])
    for words in (["run", "--help"], ["help", "run"], ["run", "-it", "-h"], ["container", "run", "--help"], ["help", "container", "run"]):
        assert isopod(*words).stdout.decode() == run
    assert isopod("image").stdout == isopod("help", "image").stdout == isopod("image", "--help").stdout
    assert isopod("run", "img", "--help", env={"ISOPOD_SOCKET": "/nonexistent"}).returncode == 125, "--help belongs to the command inside"


def test_the_agents_help_has_no_option_that_it_refuses() -> None:
    shown = manual.page(grammar.PULSE)
    assert "--socket" not in shown and "-h, --help" in shown
    assert all("--socket" in manual.page(command) for command in grammar.COMMANDS if command is not grammar.PULSE)


def test_every_command_is_in_the_overview_or_its_family() -> None:
    shown = manual.overview() + "".join(manual.family(name) for name, _about in grammar.GROUPS)
    for command in grammar.COMMANDS:
        assert f"  {command.name} " in shown
        assert manual.page(command).startswith(f"Usage: isopod {command.name}")


def test_help_is_readable_on_a_plain_terminal() -> None:
    for command in grammar.COMMANDS:
        for line in manual.page(command).splitlines():
            assert len(line) <= 140, line
            assert line.isascii()


def test_the_reference_is_up_to_date() -> None:
    path = HERE.parent.parent / "docs" / "cli.md"
    assert path.read_text(encoding="utf-8") == reference(), "python -m isopod.cli.reference > docs/cli.md"


def test_the_reference_has_every_command() -> None:
    assert [command for _, commands in grammar.SECTIONS for command in commands] == list(grammar.COMMANDS)
    text = reference()
    assert [command.name for command in grammar.COMMANDS if f"### isopod {command.name}\n" not in text] == []


def test_the_nodes_options_are_those_it_reads() -> None:
    shown = {option.names[-1]: option for option in manual.options_of(grammar.NODE)}
    paths = [row.flag for row in PATHS if row.flag != "--socket"]
    cluster = [row.flag for row in CLUSTER_SETTINGS]
    assert list(shown) == [CONFIG_FLAG, *(row.flag for row in SETTINGS), *cluster, "--grpc-listen", "--pulse-listen", *paths]
    for name, value in ((row.flag, getattr(ClusterSection(), row.name)) for row in CLUSTER_SETTINGS):
        assert not isinstance(value, int | str) or isinstance(value, bool) or str(value) in ("", shown[name].default)
    assert shown[CONFIG_FLAG].default == CONFIG_FILE
    for row in SETTINGS:
        default = str(getattr(NodeConfig(), row.name))
        # What has no default of its own is worked out when the node starts: help says from what.
        assert shown[row.flag].default == default if default else shown[row.flag].default


def test_version() -> None:
    import isopod as package

    assert isopod("--version").stdout.decode() == f"isopod {package.__version__}\n"
