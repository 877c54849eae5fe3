"""Both forms of layers: a test module marked `usefixtures("form")` runs each test with layers kept as directories and as files."""

from collections.abc import Iterator

import pytest

from isopod.engine.images.store import LayerForm
from isopod.world.host import mountspace
from tests.engine.images import build


@pytest.fixture(params=["directory", "erofs"])
def form(request: pytest.FixtureRequest) -> Iterator[LayerForm]:
    """How stores that `build.open_store` opens keep new layers. What they mounted on the host is unmounted at the end."""
    folder = request.getfixturevalue("folder") if "folder" in request.fixturenames else ""
    build.chosen.form = request.param
    try:
        yield request.param
    finally:
        if folder and "sim" not in request.node.name:
            mountspace.unmount_tree(folder)
