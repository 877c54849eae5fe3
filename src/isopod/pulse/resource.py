"""Resource: the kubelet's short list (/metrics/resource), as the metrics server reads it, made of the families under cAdvisor's names.

Labels are the kubelet's: container, namespace and pod. They do not say which sandbox it is, so that

- a sandbox of which nobody has said whose it is has nothing here;
- of two sandboxes of one pod (the old one is being taken down) only the newer one may be shown: `newest` chooses.

container_* are there for each container that has figures of its own (`cadvisor`); of two of one name (one is taking the other's place) for
the one made last.
Source: the kubelet's resource metrics endpoint, KEP-727.
"""

from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from isopod.pulse.cadvisor import cadvisor_labels, container_labels
from isopod.pulse.labels import block
from isopod.pulse.model import Container, Families, Fragment, Kind, Pod

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
    of_pod = [(block(labels), block(cadvisor_labels(entry.id, pod)))]
    of_containers = [
        (block((("container", each.name), *labels)), block(container_labels(entry.id, pod, each))) for each in _by_name(pod.containers)
    ]
    found: Families = {}
    for level, wanted in ((of_pod, _POD), (of_containers, _CONTAINER)):
        for source, name, kind, told in wanted:
            fragment = entry.containers.get(source)
            figures = [] if fragment is None else [(shown, _figure(fragment.text, begun)) for shown, begun in level]
            texts = [b"%b{%b} %b\n" % (name.encode(), shown, figure) for shown, figure in figures if figure]
            if texts:
                found[name] = Fragment(kind, told, b"".join(texts), len(texts))
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


def _by_name(containers: Iterable[Container]) -> Iterable[Container]:
    """Return containers that have a name, of those of one name the one made last."""
    chosen: dict[str, Container] = {}
    for each in containers:
        known = chosen.get(each.name)
        if each.name and (known is None or (each.created_ns, each.id) > (known.created_ns, known.id)):
            chosen[each.name] = each
    return chosen.values()


def _figure(text: bytes, begun: bytes) -> bytes:
    """Return the figure of the line whose labels begin as told, b"" if there is none."""
    at = text.find(b"{" + begun)
    return text[at : text.index(b"\n", at)].rpartition(b" ")[2] if at >= 0 else b""
