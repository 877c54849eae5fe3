"""Trace: the history of a run, hashed, and written down if somebody wants to read it.

One line per event: `TIME_NS HOST WHAT`. Time is the simulation's, the host is "-" for the test's own code and on a World of one machine.
What an event is:

- a step of a task: the qualified name of its coroutine; a callback: its own;
- `net A>B N CRC`: N bytes delivered from host A to host B over a connection, `udp A>B N CRC` in a datagram, `net A>B N tls` in a TLS
  connection, whose bytes OpenSSL makes by chance of its own;
- `disk PATH OFFSET N CRC`: bytes written through a data file.

The digest is SHA-256 over the lines, so that two runs of equal digest had the same events at the same times with the same data. Nothing of
it depends on addresses of objects, on hashes or on the names of tasks, which Python numbers through all loops of a process.
"""

import hashlib
from collections.abc import Callable
from typing import Final

LineSink = Callable[[bytes], object]
"""Gets whole lines, a batch at a time: a binary file's `write` will do."""

_BATCH_LINES: Final = 4096


class Trace:
    """The lines since it was made.

    Args:
        write: Gets them too.
    """

    __slots__ = ("_hash", "_lines", "_write", "n_lines")

    def __init__(self, write: LineSink | None = None) -> None:
        self.n_lines = 0
        self._hash = hashlib.sha256()
        self._lines: list[str] = []
        self._write = write

    def add(self, elapsed_ns: int, host: str, what: str) -> None:
        """Note one event."""
        self._lines.append(f"{elapsed_ns} {host or '-'} {what}\n")
        self.n_lines += 1
        if len(self._lines) >= _BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        """Hash what waits, and hand it out."""
        data = "".join(self._lines).encode(errors="surrogateescape")
        self._lines.clear()
        self._hash.update(data)
        if self._write is not None and data:
            self._write(data)

    def digest(self) -> str:
        """Return the digest of all lines."""
        self.flush()
        return self._hash.hexdigest()
