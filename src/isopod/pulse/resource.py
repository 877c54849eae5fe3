"""Resource: the kubelet's short list (/metrics/resource), as the metrics server reads it, made of the families under cAdvisor's names.

Labels are the kubelet's: container, namespace and pod. They do not say which sandbox it is, so that

- a sandbox of which nobody has said whose it is has nothing here;
- of two sandboxes of one pod (the old one is being taken down) only the newer one may be shown: `newest` chooses.

container_* are there for pods of one container, whose figures can be told from the pod's (`cadvisor`).
Source: the kubelet's resource metrics endpoint, KEP-727.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Protocol, TypeVar

from isopod.pulse.labels import block
from isopod.pulse.model import Families, Fragment, Kind, Pod

_Told = tuple[str, str, Kind, bytes]
_POD: Final[tuple[_Told, ...]] = (
    ("container_cpu_usage_seconds_total", "pod_cpu_usage_seconds_total", "counter", b"CPU time that the pod used, in seconds."),
    ("container_memory_working_set_bytes", "pod_memory_working_set_bytes", "gauge", b"Working set of the pod, in bytes."),
    ("container_memory_swap", "pod_swap_usage_bytes", "gauge", b"Swapped memory of the pod, in bytes."),
)
_CONTAINER: Final[tuple[_Told, ...]] = (
    ("container_cpu_usage_seconds_total", "container_cpu_usage_seconds_total", "counter", b"CPU time that the container used, in seconds."),
    ("container_memory_working_set_bytes", "container_memory_working_set_bytes", "gauge", b"Working set of the container, in bytes."),
    ("container_memory_swap", "container_swap_usage_bytes", "gauge", b"Swapped memory of the container, in bytes."),
    ("container_start_time_seconds", "container_start_time_seconds", "gauge", b"When the container started, in seconds since 1970."),
)


class Shown(Protocol):
    """What is asked of a sandbox's entry in the store."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def pod(self) -> Pod | None:
        """Whose it is."""

    @property
    def containers(self) -> Families:
        """Its families under cAdvisor's names."""


_Entry = TypeVar("_Entry", bound=Shown)


def resource(entry: Shown) -> Families:
    """Return what the kubelet's list has of a sandbox, by name, in the order of names."""
    pod = entry.pod
    if pod is None or not pod.name:
        return {}
    labels = (("namespace", pod.namespace), ("pod", pod.name))
    found = _shown(entry.containers, _POD, block(labels), wants_inner=False)
    if len(pod.containers) == 1:
        found |= _shown(entry.containers, _CONTAINER, block((("container", pod.containers[0].name), *labels)), wants_inner=True)
    return dict(sorted(found.items()))


def newest(entries: Iterable[_Entry]) -> list[_Entry]:
    """Return the entries that may be shown together: of those of one pod the one made last, in their order."""
    chosen: dict[tuple[str, str], _Entry] = {}
    every = [entry for entry in entries if entry.pod is not None]
    for entry in every:
        assert entry.pod is not None
        name = (entry.pod.namespace, entry.pod.name)
        if name not in chosen or _age_key(entry) > _age_key(chosen[name]):
            chosen[name] = entry
    shown = frozenset(entry.id for entry in chosen.values())
    return [entry for entry in every if entry.id in shown]


def scrape_error(*, failed: bool) -> Families:
    """Return the family by which the kubelet says whether the list could be made, under both of its names."""
    text = b"1" if failed else b"0"
    told = b"1 if the figures could not be had, else 0."
    return {name: Fragment("gauge", told, b"%b %b\n" % (name.encode(), text), 1) for name in ("resource_scrape_error", "scrape_error")}


def _age_key(entry: Shown) -> tuple[int, str]:
    return (entry.pod.created_ns if entry.pod is not None else 0, entry.id)


def _shown(families: Mapping[str, Fragment], wanted: tuple[_Told, ...], labels: bytes, *, wants_inner: bool) -> Families:
    found: Families = {}
    for source, name, kind, told in wanted:
        fragment = families.get(source)
        figure = None if fragment is None else _figure(fragment.text, wants_inner=wants_inner)
        if figure is not None:
            found[name] = Fragment(kind, told, b"%b{%b} %b\n" % (name.encode(), labels, figure), 1)
    return found


def _figure(text: bytes, *, wants_inner: bool) -> bytes | None:
    """Return the figure at one level. Families of `cadvisor` have a line for the pod, then one for its only container or none."""
    lines = text.splitlines()
    for line in lines:
        if (b'{container="",' in line) is not wants_inner:
            return line.rpartition(b" ")[2]
    return None
