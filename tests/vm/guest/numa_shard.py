"""A shard's service that leases buffers and asks the kernel on which memory node each of their pages is.

Source: move_pages(2): without target nodes it only reports.
"""

import ctypes
import os
from typing import Final

import msgspec

from isopod.runtime.buffers import LARGEST_BYTES, PAGE_BYTES, BufferPool
from isopod.runtime.shards import Smp
from isopod.wire.service import Method

SYS_MOVE_PAGES: Final = 279
"""On x86_64, which is what the guest is."""


class Wanted(msgspec.Struct, frozen=True):
    """How much to lease."""

    n_bytes: int


class Places(msgspec.Struct, frozen=True):
    """Where the shard may run, and where its pages are."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    n_pages: int


PLACES: Final = Method("numa.places", Wanted, Places)


async def serve(smp: Smp) -> None:
    """Serve `PLACES`."""

    async def places(request: Wanted) -> Places:
        nodes, n_pages = nodes_of_leases(request.n_bytes)
        return Places(tuple(sorted(os.sched_getaffinity(0))), nodes, n_pages)

    smp.serve({PLACES: places})


def nodes_of_leases(n_bytes: int) -> tuple[tuple[int, ...], int]:
    """Lease `n_bytes` from a new pool; return the nodes of their pages, sorted and once each, and the number of pages."""
    pool = BufferPool(n_bytes, prefault=True)
    leases = [pool.lease(LARGEST_BYTES) for _ in range(n_bytes // LARGEST_BYTES)]
    found: list[int] = []
    for lease in leases:
        with lease.view as view:
            found += _nodes_of(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view))
        lease.give_back()
    pool.shrink()
    return tuple(sorted(set(found))), len(found)


def _nodes_of(address: int, n_bytes: int) -> list[int]:
    n_pages = n_bytes // PAGE_BYTES
    pages = (ctypes.c_void_p * n_pages)(*range(address, address + n_bytes, PAGE_BYTES))
    status = (ctypes.c_int * n_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_MOVE_PAGES, 0, ctypes.c_ulong(n_pages), pages, None, status, 0) != 0:
        raise OSError(ctypes.get_errno(), "move_pages")
    return list(status)
