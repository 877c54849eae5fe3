"""Fixtures of the shim's tests."""

from collections.abc import Iterator

import pytest

from tests.shim.bench import Bench


@pytest.fixture
def bench(folder: str) -> Iterator[Bench]:
    """A shim that is not started yet."""
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.close()
