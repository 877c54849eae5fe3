"""Names of images: NAME[:TAG], their one grammar, and what a user may write to mean an image.

NAME is one or more components joined by "/", at most 255 characters; the first may be a registry's host with a port. A component is
lower-case letters and digits with single separators (".", "_", "__" or any number of "-") between them. TAG is at most 128 letters,
digits, "_", "." or "-", "latest" if left out. So a name never holds a space, "..", an empty component, or a leading separator.

Names are kept as given: "busybox" and "docker.io/library/busybox" are two names. A name that could be read as a full id is refused.
Source: the reference grammar that docker, podman and containerd share (distribution specification 1.1, "pulling manifests").
"""

import re
from typing import Final

from isopod.world.errors import InvalidArgument
from isopod.world.ids import ImageName

NAME_CHARS_MAX: Final = 255
DEFAULT_TAG: Final = "latest"
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST: Final = r"(?:[a-zA-Z0-9]+(?:[.-][a-zA-Z0-9]+)*)(?::[0-9]{1,5})?"
_REFERENCE: Final = re.compile(
    rf"(?P<name>(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>[a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}}))?", re.ASCII
)
_FULL_ID: Final = re.compile(r"(?:sha256:)?[0-9a-f]{64}", re.ASCII)
_ID_PREFIX: Final = re.compile(r"(?:sha256:)?(?P<digits>[0-9a-f]{1,64})", re.ASCII)


def parse_name(text: str) -> ImageName:
    """Return NAME:TAG, the tag filled in.

    Raises:
        InvalidArgument: Not an image name.
    """
    match = _REFERENCE.fullmatch(text) if len(text) <= NAME_CHARS_MAX + 129 else None
    if match is None or len(match["name"]) > NAME_CHARS_MAX:
        raise InvalidArgument("image name", text[:NAME_CHARS_MAX], _why_bad(text), "for example isopod/busybox or busybox:1.36")
    if _FULL_ID.fullmatch(text) or match["name"] == "sha256":
        raise InvalidArgument("image name", text, "that is an id, not a name")
    return ImageName(f"{match['name']}:{match['tag'] or DEFAULT_TAG}")


def parse_full_id(text: str) -> str | None:
    """Return "sha256:..." if `text` is a full id, with or without the algorithm; else None."""
    return f"sha256:{text.removeprefix('sha256:')}" if _FULL_ID.fullmatch(text) else None


def parse_id_prefix(text: str) -> str | None:
    """Return "sha256:" and the digits given if `text` can be the beginning of an id; else None."""
    match = _ID_PREFIX.fullmatch(text)
    return f"sha256:{match['digits']}" if match else None


def _why_bad(text: str) -> str:
    if "@" in text:
        return "images are not named by digest here; use the id"
    if text.lower() != text and _REFERENCE.fullmatch(text.lower()):
        return "only the tag may have capital letters"
    return "want NAME[:TAG] of lower-case letters and digits, separated by '.', '_', '-' or '/'"
