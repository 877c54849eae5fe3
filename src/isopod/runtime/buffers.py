"""Buffers: memory that is aligned for direct I/O, pools that recycle it, and chains of pieces that are sent together.

Aligned memory is anonymous pages of the kernel's, so it begins at a page by its nature and is zero. A page is placed on the NUMA node of
the processor that touches it first; a pool with `prefault` touches at once, in the thread (and so on the node) of its pinned shard.

A pool hands out leases. What was handed out is checked when it comes back: twice is refused, and so is a buffer of which somebody still
holds a view (its memory would be overwritten by the next user). A view that was taken from a lease is dead after the return.
"""

import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final, NamedTuple, Self

from isopod.runtime.memory import MemoryLedger, MemoryStats
from isopod.world.errors import Exhausted, InUse, InvalidArgument, WrongState

PAGE_BYTES: Final = mmap.PAGESIZE
POOL_BYTES_MAX: Final = 64 << 20
LARGEST_BYTES: Final = 1 << 20
"""The largest size class; what is larger is made and freed each time."""


class AlignedBuffer:
    """Memory that begins at a multiple of `alignment`. Who made it releases it.

    Args:
        n_bytes: Its length, at least 1.
        alignment: A power of two up to a page.
        ledger: Where its pages are accounted for.

    Raises:
        InvalidArgument: The length or alignment cannot be had.
    """

    __slots__ = ("_ledger", "_memory", "_view", "alignment", "n_bytes")

    def __init__(self, n_bytes: int, alignment: int = PAGE_BYTES, *, ledger: MemoryLedger | None = None) -> None:
        if n_bytes < 1:
            raise InvalidArgument("buffer length", n_bytes, "it must be at least 1")
        if alignment < 1 or alignment & (alignment - 1) or alignment > PAGE_BYTES:
            raise InvalidArgument("buffer alignment", alignment, f"it must be a power of two up to {PAGE_BYTES}")
        self.n_bytes = n_bytes
        self.alignment = alignment
        self._ledger = ledger or MemoryLedger()
        # Private: shared anonymous memory would be a file of the kernel's, with dearer page faults, and seen by children after a fork.
        self._memory = mmap.mmap(-1, pages_of(n_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view: memoryview | None = memoryview(self._memory)[:n_bytes]
        self._ledger.take(len(self._memory))

    @property
    def view(self) -> memoryview:
        """The memory, writable.

        Raises:
            WrongState: It was released.
        """
        if self._view is None:
            raise WrongState("buffer", f"of {self.n_bytes} bytes", "released", "use it")
        return self._view

    @property
    def is_released(self) -> bool:
        """Whether its memory was given back."""
        return self._view is None

    def __len__(self) -> int:
        """Return its length in bytes."""
        return self.n_bytes

    def touch(self) -> None:
        """Write to every page, so that each gets its memory now, on the node of the processor this runs on."""
        view = self.view
        for offset in range(0, self.n_bytes, PAGE_BYTES):
            view[offset] = 0

    def release(self) -> None:
        """Give the memory back; twice is fine.

        Raises:
            InUse: Somebody holds a part of its view. It is not released then.
        """
        if self._view is None:
            return
        self._view.release()
        try:
            self._memory.close()
        except BufferError as error:
            self._view = memoryview(self._memory)[: self.n_bytes]
            raise InUse("buffer", f"of {self.n_bytes} bytes", "a view of it") from error
        self._view = None
        self._ledger.give_back(pages_of(self.n_bytes))

    def renew(self) -> None:
        """Make every view that was taken so far useless, and the buffer ready for another user.

        Raises:
            InUse: Somebody holds a part of its view.
        """
        self.view.release()
        try:
            self._memory.resize(len(self._memory))  # to what it is: asks whether views are left, in the one way there is
        except BufferError as error:
            raise InUse("buffer", f"of {self.n_bytes} bytes", "a view of it") from error
        finally:
            self._view = memoryview(self._memory)[: self.n_bytes]


def pages_of(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


class PoolStatistics(NamedTuple):
    """What a pool did and holds."""

    n_hits: int
    """Leases served from a recycled buffer."""
    n_misses: int
    """Leases for which memory was allocated."""
    n_refused: int
    """Leases that the bound forbade."""
    n_leased: int
    """Leases out now."""
    leased_bytes: int
    idle_bytes: int
    memory: MemoryStats

    @property
    def hit_ratio(self) -> float:
        """Hits over all leases, 0 before the first."""
        total = self.n_hits + self.n_misses
        return self.n_hits / total if total else 0.0


class Lease:
    """A buffer out of a pool, from `BufferPool.lease` until `give_back`. Usable in a `with` block.

    Args:
        pool: Where it goes back to.
        buffer: The memory, at least as long.
        n_bytes: What was asked for.
    """

    __slots__ = ("_buffer", "_pool", "n_bytes")

    def __init__(self, pool: "BufferPool", buffer: AlignedBuffer, n_bytes: int) -> None:
        self._pool = pool
        self._buffer: AlignedBuffer | None = buffer
        self.n_bytes = n_bytes

    @property
    def buffer(self) -> AlignedBuffer:
        """The whole buffer of the size class.

        Raises:
            WrongState: It was given back.
        """
        if self._buffer is None:
            raise WrongState("buffer", f"of {self.n_bytes} bytes", "given back", "use it")
        return self._buffer

    @property
    def view(self) -> memoryview:
        """The bytes that were asked for, writable; a new view at each call. Their content is what the last user left.

        Raises:
            WrongState: It was given back.
        """
        return self.buffer.view[: self.n_bytes]

    def give_back(self) -> None:
        """Return it to the pool.

        Raises:
            WrongState: It was given back before.
            InUse: Somebody still holds a view of it; it stays leased.
        """
        buffer = self.buffer
        self._pool.take_back(buffer)
        self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._buffer is not None:
            self.give_back()


class BufferPool:
    """Recycles aligned buffers in classes of power-of-two sizes, from a page to 1 MiB. Belongs to one shard.

    Args:
        bytes_max: What leased and idle buffers together may hold.
        prefault: Whether new memory is touched at once (see above).
        ledger: Where its memory is accounted for; one of its own if None.
    """

    def __init__(self, bytes_max: int = POOL_BYTES_MAX, *, prefault: bool = False, ledger: MemoryLedger | None = None) -> None:
        self._bytes_max = bytes_max
        self._prefault = prefault
        self._ledger = ledger or MemoryLedger()
        self._idle: dict[int, list[AlignedBuffer]] = {}
        self._idle_bytes = self._leased_bytes = 0
        self._n_hits = self._n_misses = self._n_refused = self._n_leased = 0

    def lease(self, n_bytes: int) -> Lease:
        """Hand out at least `n_bytes` of page-aligned memory.

        Raises:
            InvalidArgument: `n_bytes` is less than 1.
            Exhausted: The pool's bound is reached.
        """
        size = size_class(n_bytes)
        idle = self._idle.get(size)
        if idle:
            buffer = idle.pop()
            self._idle_bytes -= size
            self._n_hits += 1
        else:
            buffer = self._allocate(size)
            self._n_misses += 1
        self._n_leased += 1
        self._leased_bytes += size
        return Lease(self, buffer, n_bytes)

    def take_back(self, buffer: AlignedBuffer) -> None:
        """Recycle a leased buffer. For `Lease.give_back`."""
        size = buffer.n_bytes
        if size > LARGEST_BYTES:
            buffer.release()
        else:
            buffer.renew()
            self._idle.setdefault(size, []).append(buffer)
            self._idle_bytes += size
        self._n_leased -= 1
        self._leased_bytes -= size

    def shrink(self, idle_bytes_max: int = 0) -> int:
        """Free idle buffers, the largest first, until at most `idle_bytes_max` are left; return the bytes freed."""
        before = self._idle_bytes
        for size in sorted(self._idle, reverse=True):
            idle = self._idle[size]
            while idle and self._idle_bytes > idle_bytes_max:
                idle.pop().release()
                self._idle_bytes -= size
        return before - self._idle_bytes

    def statistics(self) -> PoolStatistics:
        """Return what the pool did and holds."""
        return PoolStatistics(
            n_hits=self._n_hits,
            n_misses=self._n_misses,
            n_refused=self._n_refused,
            n_leased=self._n_leased,
            leased_bytes=self._leased_bytes,
            idle_bytes=self._idle_bytes,
            memory=self._ledger.statistics(),
        )

    def _allocate(self, size: int) -> AlignedBuffer:
        room = self._bytes_max - self._leased_bytes - size
        if room < 0:
            self._n_refused += 1
            raise Exhausted("buffer pool", f"{self._leased_bytes} of {self._bytes_max} bytes are out, {size} more were asked for")
        if self._idle_bytes > room:
            self.shrink(room)
        buffer = AlignedBuffer(size, ledger=self._ledger)
        if self._prefault:
            buffer.touch()
        return buffer


def size_class(n_bytes: int) -> int:
    """Return the length of the buffer that a pool gives for `n_bytes`: a power of two from a page on, whole pages above 1 MiB."""
    if n_bytes < 1:
        raise InvalidArgument("buffer length", n_bytes, "it must be at least 1")
    if n_bytes > LARGEST_BYTES:
        return pages_of(n_bytes)
    return max(PAGE_BYTES, 1 << (n_bytes - 1).bit_length())


class ScatterGatherBuffer:
    """A chain of pieces that are one message, without copying them together.

    The pieces are views of what was added: it must not change until they were sent.

    Args:
        pieces: The first ones.
    """

    __slots__ = ("_n_bytes", "_pieces")

    def __init__(self, pieces: Iterable[bytes | bytearray | memoryview] = ()) -> None:
        self._pieces: deque[memoryview] = deque()
        self._n_bytes = 0
        for piece in pieces:
            self.append(piece)

    def __len__(self) -> int:
        """Return the bytes in all pieces."""
        return self._n_bytes

    def __iter__(self) -> Iterator[memoryview]:
        """Iterate over the pieces, none of which is empty: what `transport.writelines` takes."""
        return iter(self._pieces)

    @property
    def n_pieces(self) -> int:
        """How many pieces there are."""
        return len(self._pieces)

    def append(self, piece: bytes | bytearray | memoryview) -> None:
        """Add a piece at the end."""
        view = memoryview(piece).cast("B")
        if len(view):
            self._pieces.append(view)
            self._n_bytes += len(view)

    def prepend(self, piece: bytes | bytearray | memoryview) -> None:
        """Add a piece in front: a header whose content depends on what follows."""
        view = memoryview(piece).cast("B")
        if len(view):
            self._pieces.appendleft(view)
            self._n_bytes += len(view)

    def take(self, n_bytes: int) -> "ScatterGatherBuffer":
        """Remove the first `n_bytes` (or all there are) and return them as a chain of their own."""
        taken = ScatterGatherBuffer()
        while self._pieces and len(taken) < n_bytes:
            piece = self._pieces.popleft()
            n_left = n_bytes - len(taken)
            if len(piece) > n_left:
                self._pieces.appendleft(piece[n_left:])
                piece = piece[:n_left]
            taken.append(piece)
        self._n_bytes -= len(taken)
        return taken

    def drop(self, n_bytes: int) -> None:
        """Remove the first `n_bytes`, which were sent."""
        self.take(n_bytes)

    def gather(self) -> bytes:
        """Return a copy of all bytes in one piece."""
        return b"".join(self._pieces)

    def scatter(self, offset: int) -> list[tuple[int, memoryview]]:
        """Return (offset, piece) of each piece for `DataFile.write_many`, laid out from `offset` on."""
        placed: list[tuple[int, memoryview]] = []
        for piece in self._pieces:
            placed.append((offset, piece))
            offset += len(piece)
        return placed
