"""Pages: the port to memory that several processes see at once.

A page is a small file mapped into memory: one process writes it, any other maps it for reading. It is not durable, and it is no message:
what a writer stores, a reader sees without either of them making a system call. In the simulation a page is a shared bytearray.

Rules: a page appears under its name whole (its size and its head are there before its name is); its size never changes after that, so
that a mapping never points past its end; aligned stores of eight bytes are not torn. Failures are OSErrors.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Page(Protocol):
    """One mapped page. Who created or opened it closes it; views made of it stay readable as long as somebody holds them."""

    @property
    def view(self) -> memoryview:
        """The page's bytes (format "B"), writable for its creator."""

    def close(self) -> None:
        """Give the mapping back once nobody holds a view of it; twice is fine."""


class Pages(Protocol):
    """Mapped pages by path, and what keeps two threads of one process from writing the same cell."""

    def create(self, path: str, n_bytes: int, head: bytes) -> Page:
        """Make a page of `n_bytes` that begins with `head`, the rest zero, and map it for writing. One of that name is replaced for
        those who open it from now on. Missing folders are made (mode 0700)."""

    def open(self, path: str) -> Page:
        """Map a page for reading. FileNotFoundError; EINVAL if it is empty or no regular file."""

    def names(self, folder: str) -> Sequence[str]:
        """Return the sorted names of the pages in a folder; [] if there is none."""

    def remove(self, path: str) -> None:
        """Remove a page's name; nothing there is fine. Mappings live on."""

    def writer_id(self) -> int:
        """Return a number that the calling thread shares with no other thread alive in this process."""

    def lock(self) -> AbstractContextManager[object]:
        """Return a new lock between this process's threads. It is held for microseconds only."""
