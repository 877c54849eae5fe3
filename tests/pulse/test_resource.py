"""The kubelet's short list, made of the families under cAdvisor's names."""

from typing import NamedTuple

import pytest

from isopod.pulse import cadvisor
from isopod.pulse.model import Container, Families, Pod
from isopod.pulse.resource import newest, resource, scrape_error
from tests.pulse.guests import MIB, POD, SANDBOX, guest
from tests.pulse.test_cadvisor import LOCAL, series_of

NAMED = {"namespace": "team", "pod": "web-0"}


class Entry(NamedTuple):
    id: str
    pod: Pod | None
    containers: Families


def entry(pod: Pod | None, identifier: str = SANDBOX) -> Entry:
    return Entry(identifier, pod, cadvisor.families(guest(), identifier, pod, "go"))


@pytest.mark.row("T17")
def test_a_pod_of_one_container() -> None:
    families = resource(entry(POD))
    labels = {**NAMED, "container": "web"}
    assert series_of(families) == {
        ("container_cpu_usage_seconds_total", frozenset(labels.items())): 7.6,
        ("container_memory_working_set_bytes", frozenset(labels.items())): 412 * MIB,
        ("container_swap_usage_bytes", frozenset(labels.items())): 4 * MIB,
        ("pod_cpu_usage_seconds_total", frozenset(NAMED.items())): 7.6,
        ("pod_memory_working_set_bytes", frozenset(NAMED.items())): 412 * MIB,
        ("pod_swap_usage_bytes", frozenset(NAMED.items())): 4 * MIB,
    }
    assert list(families) == sorted(families)
    assert {name for name, fragment in families.items() if fragment.kind == "counter"} == {
        "container_cpu_usage_seconds_total",
        "pod_cpu_usage_seconds_total",
    }


def test_a_pod_of_several_containers_has_no_figures_of_them() -> None:
    families = resource(entry(POD._replace(containers=(*POD.containers, Container("d", "side", "x")))))
    assert sorted(families) == ["pod_cpu_usage_seconds_total", "pod_memory_working_set_bytes", "pod_swap_usage_bytes"]


def test_nothing_of_who_is_unknown_or_says_nothing() -> None:
    assert resource(entry(None)) == {}
    assert resource(Entry(SANDBOX, POD, {})) == {}


def test_a_container_of_isopod_has_its_start() -> None:
    families = resource(Entry(LOCAL.id, LOCAL.pod, cadvisor.local_families(LOCAL)))
    labels = frozenset({"container": "web", "namespace": "isopod", "pod": "web"}.items())
    assert series_of(families)["container_start_time_seconds", labels] == 1_700_000_000
    without = cadvisor.local_families(LOCAL._replace(details=None))
    assert "pod_memory_working_set_bytes" not in resource(Entry(LOCAL.id, LOCAL.pod, without))


def test_of_two_sandboxes_of_a_pod_the_newer_one_is_shown() -> None:
    old, new = entry(POD, "f" * 64), entry(POD._replace(created_ns=POD.created_ns + 1), "0" * 64)
    other, unknown = entry(POD._replace(name="other"), "1"), entry(None, "2")
    assert newest([old, new, other, unknown]) == [new, other]
    assert newest([new, old]) == [new]


def test_names_need_escapes_here_too() -> None:
    pod = POD._replace(name='a"b', containers=(Container("c", 'w{container="",', ""),))
    families = resource(entry(pod))
    named = {"namespace": "team", "pod": 'a"b'}
    assert series_of(families)["pod_cpu_usage_seconds_total", frozenset(named.items())] == 7.6
    assert families["container_cpu_usage_seconds_total"].text.endswith(b" 7.6\n")


def test_the_error_figure() -> None:
    assert series_of(scrape_error(failed=True)) == {("resource_scrape_error", frozenset()): 1, ("scrape_error", frozenset()): 1}
    assert set(series_of(scrape_error(failed=False)).values()) == {0}
