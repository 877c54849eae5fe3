"""`isopod cp`: files into a container or out of it, by the rules of docker's command of that name.

| the source | the destination | what happens |
|---|---|---|
| a file | is not there | it is made, under that name; its folder must be there |
| a file | is a file | that is replaced |
| a file, a folder | is a folder | the copy goes into it, under the source's name |
| a folder | is not there | it is made, with what is in the source |
| FOLDER/. | is a folder | what is in the source goes right into it |

What comes out was packed by somebody who may be hostile: it is unpacked by `world.host.trees`, confined to what was asked for, without
devices, and without owners and set-user-id unless --archive asks for them. "-" is an archive, on standard input or output.
"""

from __future__ import annotations

from contextlib import contextmanager

from isopod.cli.lean import Link, answer, bytes_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import invalid, note, open_link
from isopod.cli.upload import CHUNK_BYTES, CHUNK_FRAME_BYTES, FileSource, Meter, upload
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body
    from isopod.world.host.trees import Facts

IDLE_LIMIT_S: Final = 60.0
TAKEN_LIMIT_S: Final = 300.0
"""The other side may take so long to write what it was sent."""
STREAM: Final = "-"
_EXAMPLE: Final = "isopod cp ./site web:/www"
_STREAM_TO_FILE: Final = "isopod cp web:/www - >files.tar"


class Place:
    """Where something is.

    Args:
        name: The container, "" for here.
        path: Absolute and clean; "-" for standard input or output.
        end: The last part as it was written: "" after a slash.
    """

    __slots__ = ("is_folder", "is_inside", "name", "path")

    def __init__(self, name: str, path: str, end: str) -> None:
        self.name: Final = name
        self.path: Final = path
        self.is_folder: Final = end in ("", ".", "..") or path == "/"
        """Whether it can only be a folder."""
        self.is_inside: Final = end == "." or path == "/"
        """Whether what is in the folder is meant, not itself."""

    def __str__(self) -> str:
        return f"{self.name}:{self.path}" if self.name else self.path


def copy(parsed: Parsed) -> int:
    """`isopod cp`."""
    source, target = (_place(text) for text in parsed.words)
    if bool(source.name) == bool(target.name):
        why = "copies go from here to a container or back" if source.name else "one of the two is to be CONTAINER:PATH"
        raise invalid("copy", " ".join(parsed.words), why, _EXAMPLE)
    if target.name:
        _put(parsed, source, target)
    else:
        _get(parsed, source, target)
    return 0


# --- in ---------------------------------------------------------------------------------------------------------------


def _put(parsed: Parsed, source: Place, target: Place) -> None:
    if source.path == STREAM:
        with open_link(parsed) as link, FileSource(console.STDIN, owned=False) as stream:
            upload(link, "container.copy_to", {"name": target.name, "path": target.path}, stream)
        return
    from isopod.world.host import trees

    root = console.open_folder("/")
    try:
        here = _look_here(root, source, follow=parsed.flag("follow-link") or source.is_folder, hint="")
        _check_source(source, here.kind)
        with open_link(parsed) as link:
            folder, name = _aim(source, here.kind, target, _look(link, target, follow=True))
            out = _Sending(link, {"name": target.name, "path": folder}, quiet=parsed.flag("quiet"))
            try:
                with _told():
                    trees.pack(root, f"{here.path.rstrip('/')}/." if here.kind == "folder" else here.path, out, name=name)
                out.finish()
            finally:
                out.meter.end()
    finally:
        console.close(root)


class _Sending:
    """The archive on its way to the node, in chunks."""

    def __init__(self, link: Link, body: Body, *, quiet: bool) -> None:
        self.meter: Final = Meter(0, is_quiet=quiet)
        self._link: Final = link
        self._call: Final = link.begin("container.copy_to", body, None)
        self._buffer = bytearray()
        self._n_sent = 0

    def write(self, data: bytes) -> None:
        """Take some bytes."""
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            self._send()

    def finish(self) -> None:
        """Send the rest and wait for the answer."""
        while self._buffer:
            self._send()
        self._link.protocol.send_end(self._call)
        while not self._turn(TAKEN_LIMIT_S):
            pass

    def _send(self) -> None:
        """Send one chunk, as soon as there is room for it."""
        protocol = self._link.protocol
        while protocol.room(self._call) < CHUNK_FRAME_BYTES or len(protocol.outbox) >= CHUNK_BYTES:
            if self._turn(TAKEN_LIMIT_S):
                raise invalid("copy", self._link.peer, "it answered before it had everything")
        data = bytes(self._buffer[:CHUNK_BYTES])
        del self._buffer[:CHUNK_BYTES]
        protocol.send_item(self._call, {"type": "chunk", "data": data})
        self._n_sent += len(data)
        self.meter.show({"type": "progress", "what": "copied", "done_bytes": self._n_sent})

    def _turn(self, limit_s: float) -> bool:
        """Wait once; return whether the answer came. Raises what it says."""
        heard_s = console.monotonic_s()
        while True:
            before = len(self._link.protocol.outbox)
            events, _, _ = self._link.turn(limit_s)
            for event in events:
                if event[1] == self._call and event[0] in (REPLY, ERROR):
                    answer(event)
                    return True
            if events or len(self._link.protocol.outbox) < before:
                return False
            if console.monotonic_s() - heard_s > limit_s:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"the copy to {self._link.peer}", limit_s)


# --- out --------------------------------------------------------------------------------------------------------------


def _get(parsed: Parsed, source: Place, target: Place) -> None:
    if target.path == STREAM and console.is_terminal(console.STDOUT):
        raise invalid("destination", STREAM, "an archive is nothing for a terminal", _STREAM_TO_FILE)
    root = console.open_folder("/")
    try:
        here = None if target.path == STREAM else _look_here(root, target, follow=True, hint="create it first")
        with open_link(parsed) as link:
            follow = parsed.flag("follow-link") or source.is_folder
            there = _look(link, source, follow=follow)
            kind, path = text_of(there, "kind"), text_of(there, "path") if follow else source.path
            _check_source(source, kind)
            archive = _Receiving(link, {"name": source.name, "path": path}, quiet=parsed.flag("quiet"))
            try:
                if here is None:
                    while data := archive.read(CHUNK_BYTES):
                        console.write_all(console.STDOUT, data)
                else:
                    folder, name = _aim(source, kind, target, {"kind": here.kind, "path": here.path})
                    _unpack(root, folder, archive, path=path, name=name, keeps=parsed.flag("archive"))
            finally:
                archive.meter.end()
    finally:
        console.close(root)


def _look_here(root: int, place: Place, *, follow: bool, hint: str) -> Facts:
    from isopod.world.host import trees

    with _told():
        try:
            return trees.look(root, place.path, follow=follow)
        except (FileNotFoundError, NotADirectoryError) as error:
            from isopod.world.errors import NotFound

            raise NotFound("folder" if hint else "file", place.path.rpartition("/")[0] if hint else place.path, hint) from error


def _unpack(root: int, folder: str, archive: _Receiving, *, path: str, name: str, keeps: bool) -> None:
    """Unpack what comes, which is to be what is at `path`.

    Args:
        root: Ours.
        folder: Where to.
        archive: What comes.
        path: What was asked for.
        name: What that is to be called; "" for only what is in it.
        keeps: Whether owners, set-user-id and devices are kept.
    """
    from isopod.world.host import trees

    wishes = trees.Wishes(top=trees.split(path)[1], name=name, confined=True, owners=keeps, special=keeps)
    with _told():
        left_out = trees.unpack(root, folder, archive, wishes)
    while archive.read(CHUNK_BYTES):  # the answer says whether that was all
        pass
    for each in left_out:
        note(f"note: left out {each!r}, a device or something unknown: --archive keeps devices\n")


class _Receiving:
    """The archive on its way from the node, as a file."""

    def __init__(self, link: Link, body: Body, *, quiet: bool) -> None:
        self.meter: Final = Meter(0, is_quiet=quiet)
        self._link: Final = link
        self._call: Final = link.begin("container.copy_from", body, None)
        self._buffer = bytearray()
        self._is_over = False
        self._n_read = 0

    def read(self, n_bytes: int) -> bytes:
        """Return some bytes, b"" at the end. Raises what the node says instead."""
        heard_s = console.monotonic_s()
        while not self._buffer and not self._is_over:
            self._turn()
            if console.monotonic_s() - heard_s > IDLE_LIMIT_S:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"the next part of the archive from {self._link.peer}", IDLE_LIMIT_S)
        data = bytes(self._buffer[:n_bytes])
        del self._buffer[:n_bytes]
        return data

    def _turn(self) -> None:
        events, _, _ = self._link.turn(IDLE_LIMIT_S)
        for event in events:
            if event[1] != self._call:
                continue
            if event[0] in (REPLY, ERROR):
                answer(event)
                self._is_over = True
            elif event[0] == ITEM:
                data = bytes_of(event[2], "data")
                self._buffer += data
                self._link.protocol.consumed(self._call, event[3])
                self._n_read += len(data)
                self.meter.show({"type": "progress", "what": "copied", "done_bytes": self._n_read})


# --- both -------------------------------------------------------------------------------------------------------------


def _place(text: str) -> Place:
    """Return what CONTAINER:PATH, or a path here, means."""
    if text == STREAM:
        return Place("", STREAM, STREAM)
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name or name.startswith("."):
        return Place("", console.absolute(text), text.rpartition("/")[2])
    if not path:
        raise invalid("path", text, "the path inside is missing", f"for everything: {name}:/")
    return Place(name, console.absolute("/" + path), path.rpartition("/")[2])


def _look(link: Link, place: Place, *, follow: bool) -> Body:
    return link.call("container.stat_path", {"name": place.name, "path": place.path, "follow": follow})


def _check_source(source: Place, kind: str) -> None:
    """Raise an error if there is nothing, or no folder where one was named."""
    if kind == "nothing":
        from isopod.world.errors import NotFound

        raise NotFound("file", str(source))
    if source.is_folder and kind != "folder":
        raise invalid("source", str(source), "it is no folder", "leave the slash at its end out")


def _aim(source: Place, kind: str, target: Place, there: Body) -> tuple[str, str]:
    """Return the folder that an archive goes to, and what its first part is called there: "" if what is in it goes right into the folder.

    Args:
        source: What is copied.
        kind: What that is.
        target: Where to.
        there: What is at that place.

    Raises:
        InvalidArgument: One cannot go there.
    """
    path, found = text_of(there, "path") or target.path, text_of(there, "kind")
    if found == "folder":
        return path.rstrip("/") or "/", "" if source.is_inside else source.path.rpartition("/")[2]
    if found == "nothing" and target.is_folder and kind != "folder":
        raise invalid("destination", str(target), "there is no such folder", "create it first, or leave the slash at its end out")
    if found != "nothing" and (kind == "folder" or target.is_folder):
        raise invalid("destination", str(target), "it is no folder", "name a folder, or something that is not there yet")
    folder, _, name = path.rpartition("/")
    return folder or "/", name


@contextmanager
def _told() -> Iterator[None]:
    """Make what goes wrong with files here an error that a user understands."""
    try:
        yield
    except OSError as error:
        from isopod.world.errors import from_os_error

        raise from_os_error(error, "copy", str(error.filename or "the files")) from error
    except Exception as error:
        code = getattr(error, "code", "")
        if type(error).__name__ != "TreeError":
            raise
        raise invalid("archive", code, str(error), "what was unpacked until then stays") from error
