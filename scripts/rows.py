"""Rows: the promises of docs/rows.toml beside the tests that are marked with them.

Run as `python -m scripts.rows [--quiet]` (`make rows`): prints the table, and fails if a claimed row has no test or a test is marked
with a row that does not exist. Tests are found in their source, without importing it: a mark is `@pytest.mark.row("R7")` on a function or
class, or in a module's `pytestmark`.
"""

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """One promise."""

    name: str
    promise: str
    commands: tuple[str, ...]
    claimed: bool


class MarkedTest(NamedTuple):
    """A test and the rows it is marked with; `node_id` is what pytest takes."""

    node_id: str
    rows: tuple[str, ...]


def load_rows(project: Path = PROJECT) -> list[Row]:
    """Return the rows in the file's order."""
    table = tomllib.loads((project / "docs/rows.toml").read_text(encoding="utf-8"))
    return [Row(name, row["promise"], tuple(row["commands"]), row["claimed"]) for name, row in table.items()]


def find_tests(project: Path = PROJECT) -> list[MarkedTest]:
    """Return every test function below tests/, in order of path and line."""
    found: list[MarkedTest] = []
    for path in sorted((project / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"), str(path))
        prefix = path.relative_to(project).as_posix()
        found.extend(_tests_in(module.body, prefix, _module_rows(module)))
    return found


def tests_by_row(rows: Sequence[Row], tests: Sequence[MarkedTest]) -> dict[str, list[str]]:
    """Return the node ids for each row, rows without tests included."""
    table: dict[str, list[str]] = {row.name: [] for row in rows}
    for test in tests:
        for name in test.rows:
            table.setdefault(name, []).append(test.node_id)
    return table


def problems(rows: Sequence[Row], tests: Sequence[MarkedTest]) -> list[str]:
    """Return what is wrong, one line each: claimed rows without a test, marks of unknown rows."""
    known = {row.name for row in rows}
    table = tests_by_row(rows, tests)
    empty = [f"no test keeps {row.name}, which is claimed: {row.promise}" for row in rows if row.claimed and not table[row.name]]
    unknown = [f"{test.node_id}: docs/rows.toml has no row {name}" for test in tests for name in test.rows if name not in known]
    return empty + unknown


def render(rows: Sequence[Row], tests: Sequence[MarkedTest]) -> str:
    """Return the table rows x tests as text."""
    table = tests_by_row(rows, tests)
    lines = [f"{'row':<5}{'kept':<6}{'tests':>5}  promise"]
    for row in rows:
        lines.append(f"{row.name:<5}{'yes' if row.claimed else 'later':<6}{len(table[row.name]):>5}  {row.promise}")
        lines.extend(f"{'':<18}{node_id}" for node_id in table[row.name])
    n_claimed = sum(row.claimed for row in rows)
    lines.append(
        f"{n_claimed} of {len(rows)} rows are kept today; {sum(bool(test.rows) for test in tests)} of {len(tests)} tests name a row"
    )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="rows", description="promises beside the tests that keep them")
    parser.add_argument("--quiet", action="store_true", help="print only what is wrong")
    arguments = parser.parse_args(argv)
    rows, tests = load_rows(), find_tests()
    if not arguments.quiet:
        print(render(rows, tests))
    wrong = problems(rows, tests)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _tests_in(body: Sequence[ast.stmt], prefix: str, inherited: tuple[str, ...]) -> Iterator[MarkedTest]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield MarkedTest(f"{prefix}::{node.name}", tuple(dict.fromkeys(inherited + _rows_of(node.decorator_list))))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _tests_in(node.body, f"{prefix}::{node.name}", inherited + _rows_of(node.decorator_list))


def _module_rows(module: ast.Module) -> tuple[str, ...]:
    for node in module.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets):
            marks = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            return _rows_of(marks)
    return ()


def _rows_of(marks: Sequence[ast.expr]) -> tuple[str, ...]:
    """Return the arguments of every `pytest.mark.row(...)` among `marks`."""
    rows: list[str] = []
    for mark in marks:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
            rows.extend(argument.value for argument in mark.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str))
    return tuple(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
