"""The commands about images."""

from __future__ import annotations

from isopod.cli.containers import SHORT_ID_CHARS, inspected
from isopod.cli.lean import rows_of, text_of
from isopod.cli.say import for_each, invalid, open_link, say, show
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.lean import Link
    from isopod.cli.parse import Parsed
    from isopod.cli.upload import FileSource, FolderSource


def list_(parsed: Parsed) -> int:
    """`isopod images`."""
    if not parsed.flag("quiet"):
        return show(parsed, "image.list", {})
    with open_link(parsed) as link:
        rows = rows_of(link.call("image.list", {}), "images")
    say("".join(text_of(row, "id").removeprefix("sha256:")[:SHORT_ID_CHARS] + "\n" for row in rows))
    return 0


def inspect(parsed: Parsed) -> int:
    """`isopod image inspect`."""
    return for_each(parsed, lambda link, name: inspected(link, name, ("image",)))


def remove(parsed: Parsed) -> int:
    """`isopod rmi`."""

    def act(link: Link, name: str) -> str:
        removed = link.call("image.remove", {"name": name})
        lines = [f"{what}: {text_of(removed, what)}" for what in ("untagged", "deleted") if text_of(removed, what)]
        return "\n".join(lines) or name

    return for_each(parsed, act)


def import_(parsed: Parsed) -> int:
    """`isopod import`."""
    from isopod.cli.upload import upload

    source, name = parsed.words
    data = _source(source, "isopod import FILE NAME reads a file")
    with data, open_link(parsed) as link:
        image = upload(link, "image.import", {"name": name, "total_bytes": data.total_bytes}, data)
    say(text_of(image, "id") + "\n")
    return 0


def load(parsed: Parsed) -> int:
    """`isopod load`."""
    from isopod.cli.upload import upload

    data = _source(parsed.value("input") or "-", "isopod load -i FILE reads a file")
    with data, open_link(parsed) as link:
        loaded = upload(link, "image.load", {"total_bytes": data.total_bytes}, data)
    for image in rows_of(loaded, "images"):
        names = [name for name in rows_of(image, "names") if isinstance(name, str)]
        say("".join(f"loaded: {name}\n" for name in names or [text_of(image, "id")]))
    return 0


def _source(path: str, hint: str) -> FileSource | FolderSource:
    """Open what is sent: standard input for "-", else a folder or a file."""
    from isopod.cli.upload import FileSource, FolderSource, open_file

    if path == "-":
        return FileSource(_stdin(hint), owned=False)
    return FolderSource(path) if console.is_folder(path) else FileSource(open_file(path), owned=True)


def _stdin(hint: str) -> int:
    """Return standard input's descriptor.

    Raises:
        InvalidArgument: It is a terminal: nobody types an archive.
    """
    if console.is_terminal(console.STDIN):
        raise invalid("archive", "-", "standard input is a terminal", hint)
    return console.STDIN


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "list": list_,
    "inspect": inspect,
    "remove": remove,
    "import": import_,
    "load": load,
}
"""What carries out the commands, by the verb of their method."""
