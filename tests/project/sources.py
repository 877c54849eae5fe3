"""What the project's own rules are checked on: its files and their syntax trees."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parents[2]
_GENERATED: Final = frozenset({".git", ".venv", "build", "target", "__pycache__"})


class Module(NamedTuple):
    """One Python file; `name` is the dotted name for a file below src, else the path."""

    name: str
    path: Path
    tree: ast.Module


@functools.cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Return the Python files below the project's `folders`, in order of their paths."""
    found = []
    for folder in folders:
        for path in sorted((PROJECT / folder).rglob("*.py")):
            found.append(Module(_name(path), path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def text_files() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every file that is or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        paths = [PROJECT / name for name in sorted(listed.stdout.split("\0")) if name]
    else:  # a source archive without its history
        paths = sorted(path for path in PROJECT.rglob("*") if not _GENERATED.intersection(path.relative_to(PROJECT).parts))
    for path in paths:
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data:
                yield path.relative_to(PROJECT).as_posix(), data.decode("utf-8")


def _name(path: Path) -> str:
    relative = path.relative_to(PROJECT)
    if relative.parts[0] != "src":
        return relative.as_posix()
    parts = relative.with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
