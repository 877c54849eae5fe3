"""isopod on a machine that has cgroup v2 and nothing else: such a machine is booted, and tests of the node run on it.

Run by `make test-v2`, which fetches QEMU and a kernel; left out of every other run by its mark (pyproject.toml), because it takes minutes.
"""

import re

import pytest

from tests.vm import chosen
from tests.vm.conftest import DEADLINE_S, Ran

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(DEADLINE_S + 300)]


@pytest.mark.row("R11")
def test_a_node_works_where_cgroup_v2_is_all_there_is(ran: Ran) -> None:
    files = ran.outcome.files
    assert _cgroup_mounts(files["mounts"]) == ["cgroup2 at /sys/fs/cgroup"]
    assert files["group"] == "0::/system.slice/isopod.service\n"
    assert files["enabled"].split() == [], "nobody had enabled a controller before"
    wanted = chosen.names()
    assert {name: ran.ends.get(name, "did not run") for name in wanted} == dict.fromkeys(wanted, "passed"), files["output"]
    assert sorted(ran.ends) == sorted((*wanted, *chosen.tests_of(chosen.NUMA)))
    closing = [line for line in files["output"].splitlines() if line][-1]
    assert re.fullmatch(r"=+ .*\d+ passed.* in [0-9.]+s.* =+", closing), closing


def _cgroup_mounts(mounts: str) -> list[str]:
    rows = [line.split() for line in mounts.splitlines()]
    return [f"{row[2]} at {row[1]}" for row in rows if row[2].startswith("cgroup")]
