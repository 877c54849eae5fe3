"""Names of things: distinct types for the identifiers that pass through isopod, and their one grammar.

Grammar of names (containers, networks): `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}`, so that a name is always one safe path component,
cgroup name and host name. A container's id is 64 hexadecimal digits, as docker's; its short form is the first 12.
"""

from typing import Final, NewType

from isopod.world.errors import InvalidArgument

ContainerId = NewType("ContainerId", str)
Digest = NewType("Digest", str)
ImageName = NewType("ImageName", str)
NetworkName = NewType("NetworkName", str)

ID_CHARS: Final = 64
SHORT_ID_CHARS: Final = 12
NAME_CHARS_MAX: Final = 63
_ALNUM: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_HEX: Final = frozenset("0123456789abcdef")
_NAME: Final = _ALNUM | frozenset("_.-")


def check_name(kind: str, name: str) -> str:
    """Return `name` unchanged if it is one safe path component.

    Args:
        kind: What the name is for, used in the error ("container name").
        name: The candidate.

    Raises:
        InvalidArgument: The name is empty, too long, or holds other characters.
    """
    if not name or len(name) > NAME_CHARS_MAX or name[0] not in _ALNUM or not all(c in _NAME for c in name):
        raise InvalidArgument(
            kind,
            name,
            f"want 1-{NAME_CHARS_MAX} letters, digits, '_', '.' or '-', beginning with a letter or digit",
        )
    return name


def is_container_id(text: str) -> bool:
    """Return whether a text found somewhere (a file's name, an argument) may be used as a container's id in paths."""
    return len(text) == ID_CHARS and all(c in _HEX for c in text)


def short(identifier: str) -> str:
    """Return the form of an id or digest that people read: its first 12 hexadecimal digits."""
    return identifier.removeprefix("sha256:")[:SHORT_ID_CHARS]
