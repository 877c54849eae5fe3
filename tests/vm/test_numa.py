"""isopod on a machine with two memory nodes: such a machine is booted, and its shards' buffers are looked for in it.

Run by `make test-v2`; left out of every other run by its mark.
"""

import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

import pytest

from tests.vm import machine
from tests.vm.image import PROJECT

DEADLINE_S: Final = 300.0
IN_GUEST_S: Final = 120
CHECKS: Final = "tests/vm/guest/numa.py"

pytestmark = [pytest.mark.vm, pytest.mark.slow]


@pytest.mark.timeout(DEADLINE_S + 300)
@pytest.mark.row("S5")
def test_shards_and_their_buffers_are_placed_by_node(folder: str) -> None:
    absent = machine.missing()
    if absent is not None:
        pytest.skip(absent)
    try:
        outcome = machine.boot(Path(folder), [CHECKS, "-v", f"--timeout={IN_GUEST_S}"], DEADLINE_S, n_nodes=2)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"the guest did not end in {DEADLINE_S:.0f} s:\n{error.output}", pytrace=False)

    assert "junit.xml" in outcome.files, f"the guest ended before its tests did:\n{outcome.console}"
    cases = ET.fromstring(outcome.files["junit.xml"]).iter("testcase")
    ends = {case.attrib["name"]: [child.tag for child in case if child.tag in ("skipped", "failure", "error")] for case in cases}
    wanted = re.findall(r"^async def (test_\w+)", (PROJECT / CHECKS).read_text(encoding="utf-8"), re.MULTILINE)
    assert ends == {name: [] for name in wanted}, outcome.files["output"]
