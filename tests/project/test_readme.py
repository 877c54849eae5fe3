"""README says only what works: its length, its targets, its verbs, its links; and `make help` lists every target."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.project.sources import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE)


def test_readme_fits_on_three_screens() -> None:
    assert README.count("\n") <= 150


def test_readme_names_targets_that_exist() -> None:
    named = re.findall(r"\bmake ([a-z][a-z-]*)", _code(README))

    assert {"run", "test"} <= set(named)
    assert sorted(set(named) - set(TARGETS)) == []


def test_readme_names_verbs_that_exist() -> None:
    from isopod.cli import grammar

    verbs = {name.split()[0] for command in grammar.COMMANDS for name in command.names}
    named = set(re.findall(r"\bisopod ([a-z]+)", _code(README)))

    assert named
    assert sorted(named - verbs) == []


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "SPECIFICATION.md", "changelog.d/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = PROJECT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))

    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.row("R33")
def test_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20).stdout

    assert [target for target in TARGETS if f"make {target} " not in listed] == []
    assert {"run", "stop", "test", "test-unit", "test-host", "lint", "rows", "bench-run", "clean"} <= set(TARGETS)


@pytest.mark.row("R33")
@pytest.mark.parametrize(("target", "selection"), [("test", ""), ("test-unit", '-m "not host and not slow"'), ("test-host", "-m host")])
def test_test_targets_run_what_they_say(target: str, selection: str) -> None:
    steps = subprocess.run(["make", "--dry-run", target], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20).stdout
    pytest_lines = [line for line in steps.splitlines() if "-m pytest" in line]

    assert [line.split("-m pytest", 1)[1].strip() for line in pytest_lines] == [selection]
    assert "scripts/setup.sh" in steps


def test_every_target_without_a_file_is_phony() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert phony

    assert sorted(set(TARGETS) - set(phony.group(1).split())) == []


@pytest.mark.parametrize("script", sorted((PROJECT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_is_well_formed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)


def _code(text: str) -> str:
    """Return what stands between backticks or in fenced blocks."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
