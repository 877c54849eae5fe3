"""Both forms of layers: a test (or module) marked `usefixtures("form")` unpacks into a folder, and mounts tar and index at one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from isopod.world.host import mountspace
from tests.core import layers


@pytest.fixture(params=["directory", "erofs"])
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[layers.Form]:
    """What `layers.unpack` makes of a layer. What it mounted is unmounted at the end."""
    layers.chosen.form = request.param
    try:
        yield request.param
    finally:
        layers.chosen.form = "directory"
        mountspace.unmount_tree(str(tmp_path.resolve()))
