"""The private mount namespace, enclosed: the scenarios of mount_scenarios.py."""

import pytest

from tests.world.host.enclosed import run_enclosed
from tests.world.host.mount_scenarios import SCENARIOS


@pytest.mark.host
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_scenario(name: str, folder: str) -> None:
    run_enclosed("tests.world.host.mount_scenarios", name, folder)
