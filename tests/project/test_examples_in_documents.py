"""Every Python block in the documents runs as it stands, with warnings as errors, and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.project.sources import PROJECT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code and where it stands."""

    document: str
    line: int
    code: str


def blocks() -> list[Block]:
    found = []
    for path in sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")]):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(PROJECT).as_posix()
        found += [Block(name, text.count("\n", 0, match.start()) + 1, match[1]) for match in BLOCK.finditer(text)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.document}:{block.line}")
def test_block_runs(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "block.py"
    program.write_text(block.code, encoding="utf-8")
    env = {"PYTHONPATH": str(PROJECT / "src"), "PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}

    argv = [sys.executable, "-W", "error", str(program)]
    ended = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=40)

    unexpected = [line for line in ended.stderr.splitlines() if not line.startswith('{"time":')]  # a program may log
    assert (ended.returncode, unexpected) == (0, [])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("block.py", "__pycache__")) == []


def test_the_runtime_is_taught_with_examples() -> None:
    assert len([block for block in blocks() if block.document.startswith("docs/runtime")]) > 10
