"""Copying files into a machine and out of it, as a tar archive that tar(1) makes or unpacks here.

What comes out of a machine was packed by its guest, which may be hostile: tar writes below the folder only (it strips leading slashes,
refuses "..", and makes links that lead elsewhere last).
"""

from __future__ import annotations

from isopod.cli.lean import Link, answer, bytes_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import invalid
from isopod.cli.upload import FolderSource, upload
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.protocol import Body

IDLE_LIMIT_S: Final = 60.0


def check_source(path: str) -> None:
    """Raise NotFound if there is nothing at `path` here."""
    if console.kind_of(path) == "nothing":
        from isopod.world.errors import NotFound

        raise NotFound("file", path)


def check_destination(path: str) -> None:
    """Raise InvalidArgument if `path` is no folder here."""
    if console.kind_of(path) != "folder":
        raise invalid("destination", path, "no such folder here", "create it first")


def put(link: Link, body: Body, path: str) -> None:
    """Send a file or folder to where the request says.

    Args:
        link: The node.
        body: The request of vm.copy_to.
        path: What to send, absolute.

    Raises:
        NotFound: No such folder there.
        RuntimeFailed: It cannot be read.
    """
    folder, _, name = path.rstrip("/").rpartition("/")
    with FolderSource(folder or "/", name or ".") as source:
        upload(link, "vm.copy_to", body, source)


def fetch(link: Link, body: Body, folder: str) -> None:
    """Unpack what the request names into a folder here.

    Args:
        link: The node.
        body: The request of vm.copy_from.
        folder: Where to, absolute; it exists.

    Raises:
        NotFound: No such file there.
        RuntimeFailed: It cannot be unpacked.
    """
    with console.Consumer(["tar", "-x", "-C", folder, "-f", "-"]) as unpacking:
        call = link.begin("vm.copy_from", body, None)
        heard_s = console.monotonic_s()
        done = False
        while not done:
            events, _, _ = link.turn(IDLE_LIMIT_S)
            for event in events:
                heard_s = console.monotonic_s()
                if event[1] != call:
                    continue
                if event[0] in (REPLY, ERROR):
                    answer(event)
                    done = True
                elif event[0] == ITEM:
                    console.write_all(unpacking.fd, bytes_of(event[2], "data"))
                    link.protocol.consumed(call, event[3])
            if not done and console.monotonic_s() - heard_s > IDLE_LIMIT_S:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"the next part of the archive from {link.peer}", IDLE_LIMIT_S)
        code = unpacking.finish()
    if code:
        from isopod.world.errors import RuntimeFailed

        raise RuntimeFailed("unpacking into", folder, f"tar ended with exit code {code}")
