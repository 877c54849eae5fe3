"""What runs in the virtual machine: tests of the node that depend on the kernel's control groups, and checks written for that machine.

A node takes ten seconds there to start, do something and end: each test is chosen because v2 may break what it looks at. What is the same
under both hierarchies (networks, images, streams) is left to the other runs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.vm.image import PROJECT

HOST: Final = (
    "test_anonymous_memory_over_the_limit_is_killed_and_recorded",
    "test_the_pids_limit_refuses_one_more_process",
    "test_the_cpu_limit_holds",
    "test_a_container_is_confined",
    "test_supervisor_and_daemon_dead_is_found_out_at_the_next_start",
)
CGROUPS: Final = (
    "test_a_real_group_is_measured_killed_and_deleted[uvloop]",
    "test_a_group_with_a_process_is_not_deleted[uvloop]",
)
LIMITS: Final = ("test_a_process_that_writes_itself_in_is_limited_and_killed[uvloop]",)
CHECKS: Final = "tests/vm/guest/checks.py"
NUMA: Final = "tests/vm/guest/numa.py"


def arguments(limit_s: int) -> Sequence[str]:
    """Return what pytest is given in the machine.

    Args:
        limit_s: How long one test may take. What takes a second on a machine takes ten to twenty where each instruction is translated.
    """
    chosen = [f"tests/node/test_host.py::{name}" for name in HOST]
    chosen += [f"tests/world/host/test_cgroups.py::{name}" for name in CGROUPS]
    chosen += [f"tests/world/host/test_cgroup_limits.py::{name}" for name in LIMITS]
    return (*chosen, CHECKS, NUMA, "-v", f"--timeout={limit_s}")


def names() -> Sequence[str]:
    """Return the names of all tests that run in the machine, those about memory nodes left out."""
    return (*HOST, *CGROUPS, *LIMITS, *tests_of(CHECKS))


def tests_of(file: str) -> Sequence[str]:
    """Return the names of the tests in a file of the project."""
    return re.findall(r"^async def (test_\w+)", Path(PROJECT, file).read_text(encoding="utf-8"), re.MULTILINE)
