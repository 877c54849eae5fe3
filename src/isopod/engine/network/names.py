"""What an instance calls its objects in the kernel. Pure.

| object | name | example (prefix "isopod") |
|---|---|---|
| filter tables | PREFIX | `inet isopod`, `bridge isopod` |
| bridge of the default network | PREFIX0 | isopod0 |
| bridge of a created network | PREFIX-b and 5 hexadecimal digits | isopod-b3fa21 |
| host end of a veth pair, and its namespace's file | PREFIX-v and 5 hexadecimal digits | isopod-v09c4d |
| tap of a virtual machine | PREFIX-t and 5 hexadecimal digits | isopod-t5e01b |

Rules: a prefix is a lower-case letter and up to 7 lower-case letters or digits, so every link name fits IFNAMSIZ (15 characters), and a
name can be read back in one way only: what stands before "-", or before the final "0", is the prefix. Two instances with different
prefixes therefore never meet, although "iso" is the beginning of "iso2": what belongs to an instance is asked of `owns_*`, never of
`startswith`. The packet filter compares names too; its one wildcard is PREFIX-t*, whose "-" no other prefix can have in that place.
"""

import hashlib
from collections.abc import Container
from typing import Final

from isopod.world.errors import InvalidArgument

PREFIX_CHARS_MAX: Final = 8
DIGITS: Final = 5
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz")
_HEX: Final = frozenset("0123456789abcdef")


def check_prefix(prefix: str) -> str:
    """Return `prefix` unchanged if it may begin an instance's names.

    Raises:
        InvalidArgument: It may not.
    """
    allowed = _LETTERS | frozenset("0123456789")
    if not 0 < len(prefix) <= PREFIX_CHARS_MAX or prefix[0] not in _LETTERS or not all(c in allowed for c in prefix):
        why = f"want a lower-case letter and up to {PREFIX_CHARS_MAX - 1} lower-case letters or digits"
        raise InvalidArgument("instance prefix", prefix, why, "for example isopod2")
    return prefix


def default_bridge(prefix: str) -> str:
    """Return the name of the default network's bridge."""
    return f"{prefix}0"


def bridge(prefix: str, network: str, used: Container[str]) -> str:
    """Return a bridge name for a created network: the same for the same name, unless another network of the instance has it."""
    attempt = 0
    while True:
        digest = hashlib.sha256(f"{attempt}/{network}".encode()).hexdigest()
        name = f"{prefix}-b{digest[:DIGITS]}"
        if name not in used:
            return name
        attempt += 1


def veth(prefix: str, digits: str) -> str:
    """Return the name of a veth's host end; `digits` are 5 hexadecimal ones drawn by chance."""
    return f"{prefix}-v{digits}"


def tap(prefix: str, digits: str) -> str:
    """Return the name of a virtual machine's tap; `digits` as for `veth`."""
    return f"{prefix}-t{digits}"


def guest_mac(container_id: str) -> str:
    """Return the address of a virtual machine's network card: locally administered, and the same for the same machine at each start."""
    return ":".join(["0a", *(f"{octet:02x}" for octet in hashlib.sha256(container_id.encode()).digest()[:5])])


def owns_bridge(prefix: str, link: str) -> bool:
    """Return whether `link` is a bridge of this very instance."""
    return link == default_bridge(prefix) or _has_digits(link, f"{prefix}-b")


def owns_veth(prefix: str, link: str) -> bool:
    """Return whether `link` is the host end of a veth of this very instance."""
    return _has_digits(link, f"{prefix}-v")


def owns_tap(prefix: str, link: str) -> bool:
    """Return whether `link` is a tap of this very instance."""
    return _has_digits(link, f"{prefix}-t")


def _has_digits(link: str, head: str) -> bool:
    tail = link.removeprefix(head)
    return len(link) == len(head) + len(tail) == len(head) + DIGITS and all(c in _HEX for c in tail)
