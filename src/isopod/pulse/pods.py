"""Pods: from what a runtime lists to whose each sandbox is. Pure.

Rules: of labels and annotations only those of the allow-lists are kept, in the order of their names, cut to `VALUE_CHARS_MAX`; two allowed
names that would become one label's name (`a.b` and `a/b`) would make a line with that label twice, so the first of the list has it.
Containers stand in the order of their names. What has no id is no sandbox.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from isopod.pulse.labels import label_name
from isopod.pulse.model import ID_BYTES_MAX, Container, Labels, Pod

VALUE_CHARS_MAX: Final = 1024
"""Of one label's or annotation's value: annotations may be 256 KiB long, and the value stands in every line of the sandbox."""


class Wanted(NamedTuple):
    """Which labels and annotations of pods are wanted, by name."""

    labels: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()


class PodRow(NamedTuple):
    """A sandbox as its runtime lists it. Times are in nanoseconds since the epoch."""

    id: str
    uid: str
    name: str
    namespace: str
    runtime_handler: str = ""
    created_ns: int = 0
    labels: Labels = ()
    annotations: Labels = ()


class ContainerRow(NamedTuple):
    """A container as its runtime lists it. Times are in nanoseconds since the epoch."""

    id: str
    pod_id: str
    name: str
    image: str
    created_ns: int = 0


def wanted(labels: Sequence[str], annotations: Sequence[str]) -> Wanted:
    """Return allow-lists without names that are empty or would become a label that another one has become."""
    return Wanted(_distinct(labels), _distinct(annotations))


def allowed(pairs: Iterable[tuple[str, str]], names: tuple[str, ...]) -> Labels:
    """Return the pairs whose name is in an allow-list, each once, by name."""
    found = {name: value[:VALUE_CHARS_MAX] for name, value in pairs if name in names}
    return tuple(sorted(found.items()))


def join(pods: Iterable[PodRow], containers: Iterable[ContainerRow], want: Wanted, *, pods_max: int) -> dict[str, Pod]:
    """Return whose each sandbox is, by its id.

    Args:
        pods: What the runtime lists; of two with one id the last counts.
        containers: The containers; those of no pod in the list are left out, and of two with one id the last counts.
        want: What to keep of labels and annotations.
        pods_max: Those beyond so many are left out.
    """
    of_pod: dict[str, list[Container]] = {}
    for row in _once(containers):
        of_pod.setdefault(row.pod_id, []).append(Container(row.id, row.name, row.image, row.created_ns))
    found: dict[str, Pod] = {}
    for pod in pods:
        if not 0 < len(pod.id) <= ID_BYTES_MAX or (len(found) >= pods_max and pod.id not in found):
            continue
        found[pod.id] = Pod(
            uid=pod.uid,
            name=pod.name,
            namespace=pod.namespace,
            runtime_handler=pod.runtime_handler,
            created_ns=pod.created_ns,
            labels=allowed(pod.labels, want.labels),
            annotations=allowed(pod.annotations, want.annotations),
            containers=tuple(sorted(of_pod.get(pod.id, ()), key=lambda each: (each.name, each.id))),
        )
    return found


def _once(rows: Iterable[ContainerRow]) -> Iterable[ContainerRow]:
    """Return each container once; those without an id cannot be told apart and are all kept."""
    found: dict[object, ContainerRow] = {row.id or number: row for number, row in enumerate(rows)}
    return found.values()


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for name in names:
        if name:
            first.setdefault(label_name(name), name)
    return tuple(first.values())
