"""isopod on a machine with two memory nodes: such a machine is booted, and its shards' buffers are looked for in it.

Run by `make test-v2`; left out of every other run by its mark.
"""

import pytest

from tests.vm import chosen
from tests.vm.conftest import DEADLINE_S, Ran

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(DEADLINE_S + 300)]


@pytest.mark.row("S5")
def test_shards_and_their_buffers_are_placed_by_node(ran: Ran) -> None:
    wanted = chosen.tests_of(chosen.NUMA)
    found = {name: ran.ends.get(name, "did not run") for name in wanted}
    assert found == dict.fromkeys(wanted, "passed"), ran.outcome.files["output"]
