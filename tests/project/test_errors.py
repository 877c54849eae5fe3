"""Every error class of the tree is met by some test, has a code of its own, and says what to do in one line."""

import ast
import functools
import inspect

import pytest

from isopod.world import errors
from tests.project.sources import modules

CLASSES = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.IsopodError)]
# Branches of the tree: they are caught, their leaves are raised.
BRANCHES = {errors.IsopodError, errors.UsageError, errors.RefusedError, errors.PeerError, errors.UnavailableError, errors.CorruptError}


def test_codes_are_distinct_and_stable_in_form() -> None:
    codes = [cls.code for cls in CLASSES]

    assert sorted(set(codes)) == sorted(codes)
    assert [code for code in codes if not code.replace("_", "").isalpha() or not code.islower()] == []


def test_exit_codes_leave_the_containers_own_alone() -> None:
    # 125, 126, 127 and 128+n mean what they mean for docker; an error of isopod's that says 126 or 127 is about the command itself.
    assert {cls.exit_code for cls in CLASSES} <= {1, 2, 3, 4, 5, 70, 127}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in BRANCHES], ids=lambda cls: cls.__name__)
def test_error_is_met_by_a_test(cls: type[errors.IsopodError]) -> None:
    assert cls.__name__ in _names_used_by_tests(), f"no test raises or expects {cls.__name__}"


@functools.cache
def _names_used_by_tests() -> frozenset[str]:
    """Return the error classes that tests expect (`pytest.raises`), call, or name by their code, this file left out."""
    by_code = {cls.code: cls.__name__ for cls in CLASSES}
    names: set[str] = set()
    for module in modules("tests"):
        if module.path.name == "test_errors.py" and module.path.parent.name == "project":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in by_code:
                names.add(by_code[node.value])
    return frozenset(names)
