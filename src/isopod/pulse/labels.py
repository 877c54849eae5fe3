"""Labels: which ones say whose a sandbox is, and how they stand in a line.

The block of a sandbox's labels stands in each of its lines as one run of bytes, first of all labels. A quote in a label's value is always
escaped, so the block cannot occur inside a value, and may be replaced as bytes when the runtime endpoint says later whose the sandbox is.
Source: the exposition format's escapes; kata-monitor's four names.
"""

from isopod.pulse.model import Labels, Pod

NO_POD = Pod("", "", "")


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
        *((f"label_{label_name(name)}", value) for name, value in known.labels),
        *((f"annotation_{label_name(name)}", value) for name, value in known.annotations),
    )


def label_name(text: str) -> str:
    """Return a text as the part of a label's name: what is no letter, digit or underscore becomes an underscore."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in text)


def block(labels: Labels) -> bytes:
    """Return labels as they stand between the braces, without a comma at either end."""
    return ",".join(f'{name}="{escaped(value)}"' for name, value in labels).encode()


def escaped(value: str) -> str:
    """Return a label's value with the format's three escapes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
