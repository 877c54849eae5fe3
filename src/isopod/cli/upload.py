"""Sending an archive to the node: from a file, from standard input, or from `tar` run over a folder.

Chunks of 256 KiB, never more than the node has room for. Progress goes to standard error, and only if that is a terminal.
"""

from __future__ import annotations

from isopod.cli.lean import answer, number_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import note
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

    from isopod.cli.lean import Link
    from isopod.cli.protocol import Body

CHUNK_BYTES: Final = 256 << 10
CHUNK_FRAME_BYTES: Final = CHUNK_BYTES + 64
IDLE_LIMIT_S: Final = 300.0
"""The node must take or say something at least this often once the archive is sent (unpacking a large layer takes a while)."""
MEBIBYTE: Final = 1 << 20


def open_file(path: str) -> int:
    """Return a descriptor of a file to be sent.

    Raises:
        NotFound: There is none.
        UnavailableError: It cannot be read.
    """
    from isopod.world.errors import NotFound, from_os_error

    try:
        return console.open_to_read(path)
    except FileNotFoundError:
        raise NotFound("file", path) from None
    except OSError as error:
        raise from_os_error(error, "read", path) from error


class FileSource:
    """An open descriptor. `owned`: it is closed here."""

    def __init__(self, fd: int, *, owned: bool) -> None:
        self.fd: Final = fd
        self.total_bytes: Final = console.size_bytes(fd)
        self._owned: Final = owned

    def __enter__(self) -> Self:
        return self

    def finish(self) -> None:
        """All was read."""

    def __exit__(self, *_ended: object) -> None:
        if self._owned:
            console.close(self.fd)


class FolderSource:
    """A folder, or what is called `name` in it, as a tar stream, made by tar(1) with numeric owners and extended attributes."""

    total_bytes = 0

    def __init__(self, path: str, name: str = ".") -> None:
        from isopod.world.errors import ToolMissing

        self._path: Final = path
        self._finished = False
        try:
            self._tar: Final = console.Child(["tar", "-C", path, "--numeric-owner", "--xattrs", "-cf", "-", "--", name])
        except FileNotFoundError:
            raise ToolMissing("tar", "tar") from None
        self.fd: Final = self._tar.fd

    def __enter__(self) -> Self:
        return self

    def finish(self) -> None:
        """All was read: see how tar ended.

        Raises:
            RuntimeFailed: tar could not read something. (1 means that a file changed meanwhile, and tar said which.)
        """
        from isopod.world.errors import RuntimeFailed

        self._finished = True
        code = self._tar.finish()
        if code > 1:
            raise RuntimeFailed("reading", self._path, f"tar ended with exit code {code}")

    def __exit__(self, *_ended: object) -> None:
        if not self._finished:
            self._tar.finish()


def upload(link: Link, method: str, body: Body, source: FileSource | FolderSource) -> Body:
    """Send an archive with a request, and wait for the answer.

    Args:
        link: The node.
        method: image.import or image.load.
        body: The request.
        source: The archive; the caller closes it.

    Raises:
        IsopodError: What the node answered, or what kept the archive from being read.
    """
    call = link.begin(method, body, None)
    meter = Meter(source.total_bytes)
    is_open = True
    heard_s = console.monotonic_s()
    try:
        while True:
            reads = is_open and link.protocol.room(call) >= CHUNK_FRAME_BYTES and len(link.protocol.outbox) < CHUNK_BYTES
            events, readable, _ = link.turn(IDLE_LIMIT_S, [source.fd] if reads else [])
            for event in events:
                heard_s = console.monotonic_s()
                if event[1] != call:
                    continue
                if event[0] in (REPLY, ERROR):
                    return answer(event)
                if event[0] == ITEM:
                    meter.show(event[2])
                    link.protocol.consumed(call, event[3])
            if readable:
                heard_s = console.monotonic_s()
                is_open = _send_chunk(link, call, source)
            elif not reads and console.monotonic_s() - heard_s > IDLE_LIMIT_S:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"{method} on {link.peer}", IDLE_LIMIT_S)
    finally:
        meter.end()


def _send_chunk(link: Link, call: int, source: FileSource | FolderSource) -> bool:
    """Send the next chunk; return False at the end of the archive."""
    data = console.read(source.fd, CHUNK_BYTES)
    if data:
        link.protocol.send_item(call, {"type": "chunk", "data": data})
        return True
    source.finish()
    link.protocol.send_end(call)
    return False


class Meter:
    """Progress on one line of a terminal."""

    def __init__(self, total_bytes: int, *, is_quiet: bool = False) -> None:
        self._is_shown: Final = not is_quiet and console.is_terminal(console.STDERR)
        self._total_bytes: Final = total_bytes
        self._since_s: Final = console.monotonic_s()
        self._width = 0

    def show(self, item: object) -> None:
        """Show a Progress item."""
        done_bytes = number_of(item, "done_bytes")
        if not self._is_shown or text_of(item, "type") != "progress" or done_bytes is None:
            return
        rate = done_bytes / max(1e-3, console.monotonic_s() - self._since_s) / MEBIBYTE
        total_bytes = number_of(item, "total_bytes") or self._total_bytes
        total = f" of {total_bytes / MEBIBYTE:.1f}" if total_bytes else ""
        line = f"{text_of(item, 'what')[:40]}: {done_bytes / MEBIBYTE:.1f}{total} MiB, {rate:.0f} MiB/s"
        note("\r" + line.ljust(self._width))
        self._width = len(line)

    def end(self) -> None:
        """Clear the line."""
        if self._width:
            note("\r" + " " * self._width + "\r")
