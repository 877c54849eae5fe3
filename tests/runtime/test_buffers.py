"""Aligned buffers, pools and chains of pieces."""

import ctypes
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.buffers import LARGEST_BYTES, PAGE_BYTES, AlignedBuffer, BufferPool, Lease, ScatterGatherBuffer, size_class
from isopod.runtime.memory import MemoryLedger
from isopod.world.errors import BugError, Exhausted, InUse, InvalidArgument, WrongState


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.row("S5")
@pytest.mark.parametrize("alignment", [1, 512, 4096])
@pytest.mark.parametrize("n_bytes", [1, 511, 4096, 4097, 1 << 20])
def test_aligned_buffers_are_aligned(alignment: int, n_bytes: int) -> None:
    buffers = [AlignedBuffer(n_bytes, alignment) for _ in range(5)]
    assert [address(buffer.view) % alignment for buffer in buffers] == [0] * 5
    assert [bytes(buffer.view) == bytes(n_bytes) for buffer in buffers] == [True] * 5
    for buffer in buffers:
        buffer.touch()
        buffer.view[n_bytes - 1] = 255
        buffer.release()
        buffer.release()


@pytest.mark.parametrize(("n_bytes", "alignment"), [(0, 512), (-1, 512), (1, 0), (1, 3), (1, 2 * PAGE_BYTES)])
def test_what_cannot_be_aligned_is_refused(n_bytes: int, alignment: int) -> None:
    with pytest.raises(InvalidArgument):
        AlignedBuffer(n_bytes, alignment)


@pytest.mark.row("S5")
def test_a_ledger_is_true() -> None:
    ledger = MemoryLedger()
    first, second = AlignedBuffer(5000, ledger=ledger), AlignedBuffer(1, ledger=ledger)
    assert ledger.statistics() == (3 * PAGE_BYTES, 0, 3 * PAGE_BYTES, 3 * PAGE_BYTES)
    first.release()
    first.release()
    assert ledger.statistics() == (3 * PAGE_BYTES, 2 * PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES)
    second.release()
    with pytest.raises(BugError):
        ledger.give_back(1)


def test_a_released_buffer_is_not_used_and_one_in_use_is_not_released() -> None:
    buffer = AlignedBuffer(100)
    part = buffer.view[10:20]
    with pytest.raises(InUse):
        buffer.release()
    part[0] = 1
    assert buffer.view[10] == 1
    part.release()
    buffer.release()
    assert buffer.is_released
    with pytest.raises(WrongState):
        buffer.view  # noqa: B018 - it raises


@pytest.mark.row("S5")
def test_a_pool_recycles_and_says_so() -> None:
    pool = BufferPool()
    with pool.lease(5000) as first:
        assert (len(first.view), len(first.buffer)) == (5000, 8192)
        place = address(first.view)
    for n_bytes in (8192, 4097, 5000):
        with pool.lease(n_bytes) as again:
            assert address(again.view) == place
    with pool.lease(4096) as other:
        assert address(other.view) % PAGE_BYTES == 0
    found = pool.statistics()
    assert (found.n_hits, found.n_misses, found.hit_ratio) == (3, 2, 0.6)
    assert (found.n_leased, found.leased_bytes, found.idle_bytes, found.memory.active) == (0, 0, 12288, 12288)
    assert pool.shrink(5000) == 8192
    assert pool.shrink() == 4096
    assert pool.statistics().memory == (12288, 12288, 0, 12288)


@pytest.mark.row("S5")
def test_twice_returned_and_used_after_return_are_found() -> None:
    pool = BufferPool()
    lease = pool.lease(100)
    view = lease.view
    with pytest.raises(InUse):
        lease.give_back()
    view.release()
    lease.give_back()
    with pytest.raises(WrongState):
        lease.give_back()
    with pytest.raises(WrongState):
        lease.view  # noqa: B018 - it raises
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    assert pool.statistics().n_leased == 0


@pytest.mark.row("S5")
def test_a_pool_is_bounded_and_frees_idle_memory_for_other_sizes() -> None:
    pool = BufferPool(4 * PAGE_BYTES, prefault=True)
    small = [pool.lease(PAGE_BYTES) for _ in range(4)]
    with pytest.raises(Exhausted):
        pool.lease(1)
    for lease in small[:3]:
        lease.give_back()
    with pool.lease(2 * PAGE_BYTES) as large:
        assert len(large.view) == 2 * PAGE_BYTES
        found = pool.statistics()
        assert (found.n_refused, found.memory.active, found.memory.peak) == (1, 4 * PAGE_BYTES, 4 * PAGE_BYTES)
    small[3].give_back()


def test_what_is_larger_than_every_class_is_not_kept() -> None:
    pool = BufferPool()
    with pool.lease(LARGEST_BYTES + 1) as lease:
        assert len(lease.buffer) == LARGEST_BYTES + PAGE_BYTES
    assert pool.statistics().memory.active == 0


def test_size_classes() -> None:
    assert [size_class(n) for n in (1, 4096, 4097, 8192, 8193, LARGEST_BYTES)] == [4096, 4096, 8192, 8192, 16384, LARGEST_BYTES]
    with pytest.raises(InvalidArgument):
        size_class(0)


@pytest.mark.row("S5")
def test_a_pool_under_stress_keeps_its_promises() -> None:
    """Ten thousand seeded leases and returns: the bound holds, nothing is handed out twice, nothing is lost."""
    pool = BufferPool(1 << 20)
    chance = random.Random(7)
    out: list[tuple[Lease, int]] = []
    for number in range(10_000):
        if out and chance.random() < 0.5:
            lease, mark = out.pop(chance.randrange(len(out)))
            with lease.view as view:
                assert view[0] == view[-1] == mark
            lease.give_back()
        else:
            try:
                lease = pool.lease(chance.randrange(1, 100_000))
            except Exhausted:
                continue
            with lease.view as view:
                view[0] = view[-1] = number % 256
            out.append((lease, number % 256))
        found = pool.statistics()
        assert found.leased_bytes + found.idle_bytes == found.memory.active <= 1 << 20
        assert found.n_leased == len(out)
    for lease, _ in out:
        lease.give_back()
    pool.shrink()
    assert pool.statistics().memory.active == 0
    assert pool.statistics().hit_ratio > 0.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=10), st.lists(st.integers(0, 30), max_size=10))
def test_a_chain_is_its_bytes(pieces: list[bytes], cuts: list[int]) -> None:
    chain = ScatterGatherBuffer(pieces)
    expected = b"".join(pieces)
    for cut in cuts:
        assert (len(chain), chain.gather(), b"".join(chain)) == (len(expected), expected, expected)
        assert chain.take(cut).gather() == expected[:cut]
        expected = expected[cut:]
        chain.prepend(b"head")
        expected = b"head" + expected
    assert all(len(piece) for piece in chain)


def test_a_chain_is_laid_out_for_a_file() -> None:
    chain = ScatterGatherBuffer([b"abc", b"", memoryview(b"defg")])
    assert [(offset, bytes(piece)) for offset, piece in chain.scatter(10)] == [(10, b"abc"), (13, b"defg")]
    chain.drop(4)
    assert (chain.gather(), chain.n_pieces) == (b"efg", 1)
