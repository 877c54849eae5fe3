"""Rules about files: headers, names, sizes, and what a committed file must never say."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.project.sources import PROJECT, Module, modules, text_files

HEADER_CHARS_MIN: Final = 25
LINES_MAX: Final = 800

# The hosts of package registries: a machine's own configuration says where packages come from, so that mirrors and caches work.
REGISTRY_HOSTS: Final = tuple(".".join(parts) for parts in (
    ("pypi", "org"), ("files", "pythonhosted", "org"), ("crates", "io"), ("deb", "debian", "org"), ("registry-1", "docker", "io"),
    ("proxy", "golang", "org"), ("registry", "npmjs", "org"),
))  # fmt: skip
# Cargo.lock names the default registry in each entry: that is its format, not an address that is fetched when another is configured.
REGISTRY_EXEMPT: Final = frozenset({"rust/core/Cargo.lock", "rust/guest/Cargo.lock"})
# This checkout, and what hides in a home: a name that only one machine has.
MACHINE_PATHS: Final = (str(PROJECT), f"{Path.home()}/.")


@pytest.mark.parametrize(
    "module", modules("src", "tests", "scripts", "benchmarks"), ids=lambda module: module.path.relative_to(PROJECT).as_posix()
)
def test_module_says_what_it_is(module: Module) -> None:
    header = ast.get_docstring(module.tree) or ""

    least = HEADER_CHARS_MIN if module.path.is_relative_to(PROJECT / "src") else 1
    assert len(header) >= least, "the header says what the module is, what it is not, its rules and its source"


@pytest.mark.parametrize("module", modules("src"), ids=lambda module: module.name)
def test_module_is_one_noun(module: Module) -> None:
    n_lines = module.path.read_text(encoding="utf-8").count("\n")

    assert n_lines <= LINES_MAX, "a file of more than 800 lines is more than one thing"


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {module.path.parent for module in modules("src")}

    assert sorted(str(folder) for folder in folders if folder != PROJECT / "src" and not (folder / "__init__.py").exists()) == []


def test_test_files_have_distinct_places() -> None:
    tests = [module.path for module in modules("tests") if module.path.name.startswith("test_")]
    names = Counter(path.relative_to(PROJECT).with_suffix("").as_posix().replace("-", "_") for path in tests)

    assert [name for name, count in names.items() if count > 1] == []
    assert [path.name for path in tests if (path.with_suffix("")).is_dir()] == [], "a folder shadows the test file of its name"


def test_test_folders_mirror_the_package() -> None:
    beside = {"project", "node", "benchmarks", "cli", "vm", "parity", "examples", "sim"}
    folders = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    packages = {path.name for path in (PROJECT / "src/isopod").iterdir() if path.is_dir()}

    assert sorted(folders - packages - beside - {"core", "guest", "host", "shim"}) == []


def test_no_committed_file_names_a_machine_or_a_registry() -> None:
    wrong: list[str] = []
    for path, text in text_files():
        wrong.extend(f"{path}: {place}" for place in MACHINE_PATHS if place in text)
        if path not in REGISTRY_EXEMPT:
            wrong.extend(f"{path}: {host}" for host in REGISTRY_HOSTS if host in text)

    assert wrong == []


def test_no_committed_file_promises_work_for_later() -> None:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")

    assert [f"{path}: {match.group()}" for path, text in text_files() for match in marks.finditer(text) if path != "LICENSE"] == []


def test_python_lock_pins_every_requirement() -> None:
    lines = (PROJECT / "requirements.lock").read_text(encoding="utf-8").splitlines()

    assert lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
