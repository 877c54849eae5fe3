"""The virtual machine that the tests here look at: booted once, with cgroup v2 only and two memory nodes; in it pytest runs once."""

import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.vm import chosen, machine
from tests.vm.machine import Outcome

DEADLINE_S: Final = 900.0
IN_GUEST_S: Final = 120


class Ran(NamedTuple):
    """What came of it."""

    outcome: Outcome
    ends: dict[str, str]
    """How each test in the machine ended: "passed", or what junit's report says below it (skipped, failure, error)."""


@pytest.fixture(scope="session")
def ran() -> Iterator[Ran]:
    """Boot it, and wait until it has ended."""
    absent = machine.missing()
    if absent is not None:
        pytest.skip(absent)
    with tempfile.TemporaryDirectory(prefix="isopod-test-") as folder:
        try:
            outcome = machine.boot(Path(folder), chosen.arguments(IN_GUEST_S), DEADLINE_S, n_nodes=2)
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"the guest did not end in {DEADLINE_S:.0f} s:\n{error.output}", pytrace=False)
        assert "junit.xml" in outcome.files, f"the guest ended before its tests did:\n{outcome.console}"
        cases = ET.fromstring(outcome.files["junit.xml"]).iter("testcase")
        yield Ran(outcome, {case.attrib["name"]: _end_of(case) for case in cases})


def _end_of(case: ET.Element) -> str:
    return ", ".join(child.tag for child in case if child.tag in ("skipped", "failure", "error")) or "passed"
