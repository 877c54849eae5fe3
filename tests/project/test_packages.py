"""Each package stands alone: what importing it brings in, and that it has tests of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.sources import PROJECT

FLOORS = {
    "wire": (),
    "world": (),
    "runtime": ("world", "wire"),
    "net": ("runtime", "world", "wire"),
    "telemetry": ("net", "runtime", "world", "wire"),
}
"""What each package of the framework may bring in beside itself: nothing of containers, nothing of clusters."""

PROBE = """
import sys
before = len(sys.modules)
import isopod.{package}
n_modules = len(sys.modules) - before
import pkgutil, importlib
for module in pkgutil.walk_packages(isopod.{package}.__path__, "isopod.{package}."):
    if ".host" not in module.name:
        importlib.import_module(module.name)
print(n_modules)
print(" ".join(sorted({{name.split(".")[1] for name in sys.modules if name.startswith("isopod.")}})))
print(" ".join(sorted({{name.split(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names))))
"""
MODULES_MAX = 10
"""What `import isopod.PACKAGE` alone may load: names are found when they are asked for."""
LIBRARIES = {"bcrypt", "cryptography", "cython_runtime", "httptools", "msgspec", "typing_extensions", "zstandard"}
"""What all modules of these packages together may load beside the standard library: none drags half of the world in. cryptography loads
bcrypt for the keys of OpenSSH, where it is installed."""


@pytest.mark.row("S40")
@pytest.mark.parametrize("package", FLOORS)
def test_a_package_brings_in_only_the_floors_below_it(package: str) -> None:
    probe = [sys.executable, "-c", PROBE.format(package=package)]
    output = subprocess.run(probe, cwd=PROJECT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, check=True, timeout=50).stdout
    n_modules, names, libraries = output.splitlines()

    assert set(names.split()) - {package, "_core"} <= set(FLOORS[package])
    assert int(n_modules) <= MODULES_MAX
    found = {name for name in libraries.split() if not name.startswith("_")}
    assert found - {"isopod", "sitecustomize"} <= LIBRARIES


@pytest.mark.row("S40")
@pytest.mark.parametrize("package", FLOORS)
def test_a_package_has_tests_of_its_own(package: str) -> None:
    assert list((PROJECT / "tests" / package).rglob("test_*.py")), f"make test PKG={package} would run nothing"
    steps = subprocess.run(
        ["make", "--dry-run", "test", f"PKG={package}"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20
    ).stdout

    assert f"-m pytest tests/{package}" in steps


@pytest.mark.row("S40")
@pytest.mark.parametrize("package", FLOORS)
def test_a_packages_tests_use_nothing_above_it(package: str) -> None:
    allowed = {package, "_core", *FLOORS[package], "__version__"}
    wrong = []
    for path in sorted((PROJECT / "tests" / package).rglob("*.py")):
        wrong += [f"{path.relative_to(PROJECT)}: isopod.{name}" for name in _packages_named(path) if name not in allowed]

    assert wrong == []


def _packages_named(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "isopod":
            names += [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("isopod.")]
    return names
