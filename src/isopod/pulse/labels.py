"""Labels: which ones say whose a sandbox is, and how they stand in a line.

The block of a sandbox's labels stands in each of its lines as one run of bytes, first of all labels. A quote in a label's value is always
escaped, so the block cannot occur inside a value, and may be replaced as bytes when the runtime endpoint says later whose the sandbox is.
Source: the exposition format's escapes; kata-monitor's four names.
"""

import re
from collections.abc import Iterable
from typing import Final

from isopod.pulse.model import Labels, Pod
from isopod.world.errors import InvalidArgument

NO_POD = Pod("", "", "")
_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_LABEL: Final = re.compile(rb'([{,])([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\.)*)"')


def kata_labels(identifier: str, pod: Pod | None) -> Labels:
    """Return the labels on a sandbox's own families: kata-monitor's four, then the allowed labels and annotations of the pod.

    Args:
        identifier: The sandbox.
        pod: Whose it is; None while nobody has said.
    """
    known = pod or NO_POD
    return (
        ("sandbox_id", identifier),
        ("cri_uid", known.uid),
        ("cri_name", known.name),
        ("cri_namespace", known.namespace),
        *_unique("label_", known.labels),
        *_unique("annotation_", known.annotations),
    )


def _unique(prefix: str, labels: Labels) -> Labels:
    """Return labels under names that the format allows; of two that would have one name the first."""
    found: dict[str, str] = {}
    for name, value in labels:
        found.setdefault(f"{prefix}{label_name(name)}", value)
    return tuple(found.items())


def label_name(text: str) -> str:
    """Return a text as the part of a label's name: what is no letter, digit or underscore becomes an underscore."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in text)


def given_labels(texts: Iterable[str]) -> Labels:
    """Return the labels that NAME=VALUE words say.

    Raises:
        InvalidArgument: One says none, or one says a name again.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or name.startswith("__"):
            raise InvalidArgument(
                "label", text, "want NAME=VALUE with a name of letters, digits and underscores that does not begin with two"
            )
        if name in found:
            raise InvalidArgument("label", text, "there is another value for this name")
        found[name] = value
    return tuple(found.items())


def block(labels: Labels) -> bytes:
    """Return labels as they stand between the braces, without a comma at either end."""
    return ",".join(f'{name}="{escaped(value)}"' for name, value in labels).encode()


def escaped(value: str) -> str:
    """Return a label's value with the format's three escapes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def exchange(text: bytes, old: Labels, new: Labels) -> bytes:
    """Return lines that begin their labels with the block of `old`, with that of `new` in its place.

    A label of a line's own that has the name of one that comes in anew becomes exported_NAME, as it would have if it had been so from the
    beginning.
    """
    had = {name for name, _ in old}
    for name, _ in new:
        if name not in had and f',{name}="'.encode() in text:
            text = _export(text, name.encode())
    return text.replace(b"{" + block(old), b"{" + block(new))


def _export(text: bytes, name: bytes) -> bytes:
    """Rename a label in all lines. What looks like it may stand inside a value, so labels are read one after the other."""
    exported = b"exported_" + name
    while b"," + exported + b'="' in text:
        exported = b"exported_" + exported
    return _LABEL.sub(lambda found: b'%b%b="%b"' % (found[1], exported, found[3]) if found[2] == name else found[0], text)
