"""isopod on a machine that has cgroup v2 and nothing else: such a machine is booted, and tests of the node run on it.

Run by `make test-v2`, which fetches QEMU and a kernel; left out of every other run by its mark (pyproject.toml), because it takes minutes.
"""

import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

import pytest

from tests.vm import machine
from tests.vm.image import PROJECT

DEADLINE_S: Final = 900.0
IN_GUEST_S: Final = 240
"""The time limit of one test in the guest. What takes a second on a machine takes ten to twenty where each instruction is translated."""
CHECKS: Final = "tests/vm/guest/checks.py"
HOST: Final = (
    "test_anonymous_memory_over_the_limit_is_killed_and_recorded",
    "test_the_pids_limit_refuses_one_more_process",
    "test_the_cpu_limit_holds",
    "test_limits_are_visible_in_the_record",
    "test_a_container_is_confined",
    "test_a_container_sees_its_network_only",
    "test_two_containers_reach_each_other",
    "test_a_dead_supervisor_ends_the_container_as_unknown",
    "test_supervisor_and_daemon_dead_is_found_out_at_the_next_start",
    "test_both_runtimes_run_containers[crun]",
    "test_both_runtimes_run_containers[runc]",
)
LIFECYCLE: Final = (
    "test_run_attached_shows_output_and_exit_code[host]",
    "test_stop_ends_it_and_says_how[host]",
    "test_exec_runs_the_given_command_inside[host]",
    "test_kill_of_the_daemon_stops_no_container[host]",
)
CGROUPS: Final = (
    "test_a_real_group_is_measured_killed_and_deleted[uvloop]",
    "test_a_group_with_a_process_is_not_deleted[uvloop]",
)

pytestmark = [pytest.mark.vm, pytest.mark.slow]


@pytest.mark.timeout(DEADLINE_S + 300)
@pytest.mark.row("R11")
def test_a_node_works_where_cgroup_v2_is_all_there_is(folder: str) -> None:
    absent = machine.missing()
    if absent is not None:
        pytest.skip(absent)
    chosen = [f"tests/node/test_host.py::{name}" for name in HOST]
    chosen += [f"tests/node/test_lifecycle.py::{name}" for name in LIFECYCLE]
    chosen += [f"tests/world/host/test_cgroups.py::{name}" for name in CGROUPS]
    try:
        outcome = machine.boot(Path(folder), [*chosen, CHECKS, "-v", f"--timeout={IN_GUEST_S}"], DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"the guest did not end in {DEADLINE_S:.0f} s:\n{error.output}", pytrace=False)

    assert "junit.xml" in outcome.files, f"the guest ended before its tests did:\n{outcome.console}"
    assert _cgroup_mounts(outcome.files["mounts"]) == ["cgroup2 at /sys/fs/cgroup"]
    assert outcome.files["group"] == "0::/system.slice/isopod.service\n"
    assert outcome.files["enabled"].split() == [], "nobody had enabled a controller before"
    ends = {case.attrib["name"]: _end_of(case) for case in ET.fromstring(outcome.files["junit.xml"]).iter("testcase")}
    wanted = [*HOST, *LIFECYCLE, *CGROUPS, *_tests_of(PROJECT / CHECKS)]
    assert ends == dict.fromkeys(wanted, "passed"), outcome.files["output"]
    closing = [line for line in outcome.files["output"].splitlines() if line][-1]
    assert re.fullmatch(rf"=+ {len(wanted)} passed in [0-9.]+s.* =+", closing), closing


def _cgroup_mounts(mounts: str) -> list[str]:
    rows = [line.split() for line in mounts.splitlines()]
    return [f"{row[2]} at {row[1]}" for row in rows if row[2].startswith("cgroup")]


def _end_of(case: ET.Element) -> str:
    """Return "passed", or what is said below the case: skipped, failure, error."""
    return ", ".join(child.tag for child in case if child.tag in ("skipped", "failure", "error")) or "passed"


def _tests_of(path: Path) -> list[str]:
    return re.findall(r"^async def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
