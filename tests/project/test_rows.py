"""The table of promises: no claimed row is empty, every area has its suite, and what is generated from it is up to date."""

import ast
from pathlib import Path

import pytest

from scripts import docs, rows
from tests.project.sources import PROJECT


@pytest.mark.row("R38")
def test_every_claimed_row_has_a_test() -> None:
    assert rows.problems(rows.load_rows(), rows.find_tests()) == []


@pytest.mark.row("R38")
@pytest.mark.parametrize(
    "area",
    [
        "wire",
        "world",
        "runtime",
        "net/rpc",
        "engine/images",
        "engine/network",
        "engine",
        "cli",
        "node",
        "project",
        "journal",
        "cluster",
        "testing",
        "sim",
    ],
)
def test_every_area_has_a_suite(area: str) -> None:
    assert sorted((PROJECT / "tests" / area).glob("test_*.py"))


def test_an_empty_claimed_row_and_an_unknown_mark_are_reported() -> None:
    table = [
        rows.Row("R1", "kept", (), claimed=True),
        rows.Row("R2", "not kept", (), claimed=True),
        rows.Row("R3", "later", (), claimed=False),
    ]
    tests = [rows.MarkedTest("tests/test_x.py::test_a", ("R1", "R9"))]

    assert rows.problems(table, tests) == [
        "no test keeps R2, which is claimed: not kept",
        "tests/test_x.py::test_a: docs/rows.toml has no row R9",
    ]


def test_marks_are_found_on_functions_classes_and_modules(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_x.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.host, pytest.mark.row('R1')]\n"
        "@pytest.mark.row('R2', 'R3')\n"
        "async def test_a(): ...\n"
        "@pytest.mark.row('R4')\n"
        "class TestB:\n"
        "    def test_c(self): ...\n"
        "    def helper(self): ...\n",
        encoding="utf-8",
    )

    assert rows.find_tests(tmp_path) == [
        rows.MarkedTest("tests/test_x.py::test_a", ("R1", "R2", "R3")),
        rows.MarkedTest("tests/test_x.py::TestB::test_c", ("R1", "R4")),
    ]


def test_what_is_counted_is_what_pytest_runs(request: pytest.FixtureRequest) -> None:
    counted = {test.node_id for test in rows.find_tests()}
    collected = {item.nodeid.split("[")[0] for item in request.session.items}

    assert sorted(collected - counted) == []


@pytest.mark.parametrize("name", sorted(docs.DOCUMENTS))
def test_generated_document_is_up_to_date(name: str) -> None:
    assert docs.DOCUMENTS[name]() == (PROJECT / name).read_text(encoding="utf-8"), "run make docs"


def test_specification_names_tests_that_exist() -> None:
    named = [line.strip(" `-") for line in (PROJECT / "SPECIFICATION.md").read_text(encoding="utf-8").splitlines() if "tests/" in line]
    known = {test.node_id for test in rows.find_tests()} | {test.node_id.split("::")[0] for test in rows.find_tests()}

    assert named
    assert [name for name in named if name not in known] == []


def test_row_marks_are_literal() -> None:
    """A computed mark would be invisible to the table."""
    wrong = []
    for path in sorted((PROJECT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.row"):
                literal = ast.unparse(node.func) == "pytest.mark.row" and all(isinstance(argument, ast.Constant) for argument in node.args)
                wrong.extend([] if literal else [f"{path.relative_to(PROJECT)}:{node.lineno}"])

    assert wrong == []
