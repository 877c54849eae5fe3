"""What survives a crash, by a model: every sector is a version that the file really had, and what was promised is there."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.world.sim.content import SECTOR_BYTES, Content

pytestmark = pytest.mark.row("B21")

SIZE = 4 * SECTOR_BYTES
Step = tuple[str, int, int]

steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "durable", "sync", "late_sync", "fail", "grow"]),
        st.integers(0, SIZE - 1),
        st.integers(1, SIZE),
    ),
    max_size=12,
)


class Model:
    """The versions that each sector may have after a crash, the promised one first."""

    def __init__(self) -> None:
        self.now = bytearray(SIZE)
        self.versions = [[bytes(SECTOR_BYTES)] for _ in range(SIZE // SECTOR_BYTES)]

    def sector(self, index: int) -> bytes:
        return bytes(self.now[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES])

    def write(self, offset: int, data: bytes) -> list[int]:
        self.now[offset : offset + len(data)] = data
        touched = list(range(offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)))
        for index in touched:
            self.versions[index].append(self.sector(index))
        return touched

    def settle(self, indexes: list[int]) -> None:
        for index in indexes:
            self.versions[index] = self.versions[index][-1:]


@settings(max_examples=300, deadline=None)
@given(steps=steps, seed=st.integers(0, 1000))
def test_a_crash_keeps_what_was_promised_and_nothing_that_never_was(steps: list[Step], seed: int) -> None:
    content, model = Content(), Model()
    content.resize(SIZE)
    content.sync()
    for fill, (what, offset, length) in enumerate(steps):
        data = bytes([fill % 255 + 1]) * min(length, SIZE - offset)
        if what == "write":
            content.write(offset, data)
            model.write(offset, data)
        elif what == "durable":
            number = content.write(offset, data)
            touched = model.write(offset, data)
            content.sync_write(number)
            model.settle(touched)
        elif what == "sync":
            content.sync()
            model.settle(list(range(len(model.versions))))
        elif what == "late_sync":
            mark = content.mark()
            model.settle(list(range(len(model.versions))))
            content.write(offset, data)
            model.write(offset, data)
            content.sync(mark)
        elif what == "fail":
            content.drop(content.mark(), at_once=False)
        else:
            content.resize(content.size + 1)
            content.sync()
            model.settle(list(range(len(model.versions))))
        assert content.read(0, SIZE) == bytes(model.now)
    # A failed sync leaves the old versions possible, not the promised ones impossible: the model lists all since the last promise.
    content.survive(random.Random(seed))
    assert content.size >= SIZE
    for index, versions in enumerate(model.versions):
        found = content.read(index * SECTOR_BYTES, SECTOR_BYTES)
        if not any(step[0] == "fail" for step in steps):
            assert found in versions
    assert content.read(0, SIZE) == bytes(content.whole()[:SIZE])


@settings(max_examples=200, deadline=None)
@given(steps=steps)
def test_a_crash_that_loses_all_keeps_the_promised_version(steps: list[Step]) -> None:
    content, model = Content(), Model()
    content.resize(SIZE)
    content.sync()
    for fill, (what, offset, length) in enumerate(steps):
        data = bytes([fill % 255 + 1]) * min(length, SIZE - offset)
        number = content.write(offset, data)
        touched = model.write(offset, data)
        if what == "durable":
            content.sync_write(number)
            model.settle(touched)
        elif what == "sync":
            content.sync()
            model.settle(list(range(len(model.versions))))
    content.lose()
    for index, versions in enumerate(model.versions):
        found = content.read(index * SECTOR_BYTES, SECTOR_BYTES)
        # A neighbour's promise may have made more durable than was asked; never less, and never something else.
        assert found in versions


def test_a_sync_covers_only_what_was_written_before_it_began() -> None:
    content = Content()
    content.write(0, b"before")
    mark = content.mark()
    content.write(0, b"after!")
    content.sync(mark)
    assert content.read(0, 6) == b"after!"
    content.lose()
    assert content.read(0, 6) == b"before"


def test_many_pending_changes_become_one() -> None:
    content = Content()
    for index in range(5000):
        content.write(index, b"x")
    content.sync()
    content.lose()
    assert content.read(0, 5001) == b"x" * 5000
    content.write(0, bytes(9 << 20))
    content.lose()
    assert content.size == 5000


def test_dropped_bytes_may_vanish_at_once() -> None:
    content = Content()
    content.write(0, b"old")
    content.sync()
    content.write(0, b"new and longer")
    content.drop(content.mark(), at_once=True)
    assert content.read(0, 100) == b"old".ljust(14, b"\0")
    content.write(20, b"later")
    content.sync()
    content.lose()
    assert content.read(0, 100) == b"old".ljust(20, b"\0") + b"later"
