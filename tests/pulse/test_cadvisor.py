"""cAdvisor's names, units, types and labels, against figures whose results can be worked out by hand."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import cadvisor
from isopod.pulse.labels import block, exchange
from isopod.pulse.model import Container, Families, LocalContainer, LocalDetails, LocalDevice, LocalInterface, Pod
from isopod.pulse.options import settings_from
from isopod.world.errors import InvalidArgument
from tests.pulse.guests import CPU, MEMORY, MIB, POD, SANDBOX, guest

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

OUTER: Final = dict(cadvisor.cadvisor_labels(SANDBOX, POD))
INNER: Final = {**OUTER, "container": "web", "id": f"/kubepods/pod0b1c/{'c' * 64}", "image": "docker.io/library/nginx:1", "name": "c" * 64}


def text_of(families: Families) -> str:
    return "".join(
        f"# HELP {name} {fragment.help.decode()}\n# TYPE {name} {fragment.kind}\n{fragment.text.decode()}"
        for name, fragment in families.items()
    )


def series_of(families: Families) -> Series:
    """Return all series as Prometheus' own parser reads them; none may stand twice."""
    found: Series = {}
    for family in text_string_to_metric_families(text_of(families)):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def figure(families: Families, name: str, **labels: str) -> float | None:
    """Return a figure at pod level."""
    return series_of(families).get((name, frozenset({**OUTER, **labels}.items())))


def made(**changed: object) -> Families:
    return cadvisor.families(guest(**changed), SANDBOX, POD, "go")  # type: ignore[arg-type]  # of guest's by name


@pytest.mark.row("K14")
@pytest.mark.parametrize(
    "name,labels,value",
    [
        ("container_cpu_usage_seconds_total", {"cpu": "total"}, 7.6),
        ("container_cpu_user_seconds_total", {}, 5.1),
        ("container_cpu_system_seconds_total", {}, 2.1),
        ("container_cpu_load_average_10s", {}, 250),
        ("container_memory_usage_bytes", {}, 512 * MIB),
        ("container_memory_working_set_bytes", {}, 412 * MIB),
        ("container_memory_cache", {}, 160 * MIB),
        ("container_memory_rss", {}, 200 * MIB),
        ("container_memory_swap", {}, 4 * MIB),
        ("container_memory_mapped_file", {}, 40 * MIB),
        ("container_memory_failures_total", {"failure_type": "pgfault", "scope": "container"}, 500),
        ("container_memory_failures_total", {"failure_type": "pgmajfault", "scope": "hierarchy"}, 5),
        ("container_oom_events_total", {}, 1),
        ("container_network_receive_bytes_total", {"interface": "eth0"}, 1000),
        ("container_network_receive_packets_total", {"interface": "eth0"}, 10),
        ("container_network_receive_errors_total", {"interface": "eth0"}, 1),
        ("container_network_receive_packets_dropped_total", {"interface": "eth0"}, 2),
        ("container_network_transmit_bytes_total", {"interface": "eth0"}, 2000),
        ("container_network_transmit_packets_total", {"interface": "eth0"}, 20),
        ("container_network_transmit_errors_total", {"interface": "eth0"}, 3),
        ("container_network_transmit_packets_dropped_total", {"interface": "eth0"}, 0),
        ("container_fs_reads_total", {"device": "/dev/vda"}, 8),
        ("container_fs_reads_bytes_total", {"device": "/dev/vda"}, 8192),
        ("container_fs_read_seconds_total", {"device": "/dev/vda"}, 1.5),
        ("container_fs_writes_total", {"device": "/dev/vda"}, 4),
        ("container_fs_writes_bytes_total", {"device": "/dev/vda"}, 1024),
        ("container_fs_write_seconds_total", {"device": "/dev/vda"}, 0.25),
        ("container_fs_io_current", {"device": "/dev/vda"}, 0),
        ("container_fs_io_time_seconds_total", {"device": "/dev/vda"}, 1.75),
        ("container_fs_io_time_weighted_seconds_total", {"device": "/dev/vda"}, 3),
        ("container_threads", {}, 120),
        ("container_file_descriptors", {}, 82),
        ("container_spec_memory_limit_bytes", {}, 2048 * MIB),
        ("container_start_time_seconds", {}, 1_700_000_000),
    ],
)
def test_names_units_and_labels(name: str, labels: dict[str, str], value: float) -> None:
    assert figure(made(), name, **labels) == value


@pytest.mark.row("T15")
def test_counters_are_counters_and_nothing_else_is() -> None:
    families = made()
    assert list(families) == sorted(families)
    for name, fragment in families.items():
        assert (fragment.kind == "counter") == name.endswith("_total"), name
        assert fragment.n_series == fragment.text.count(b"\n") > 0
        assert fragment.help
    assert list(cadvisor.FAMILIES) == sorted(cadvisor.FAMILIES)


@pytest.mark.row("K14")
def test_labels_at_both_levels() -> None:
    assert {
        "container": "",
        "id": f"/kubepods/pod0b1c/{SANDBOX}",
        "image": "",
        "name": SANDBOX,
        "namespace": "team",
        "pod": "web-0",
    } == OUTER
    series = series_of(made())
    for name, labels in (
        ("container_cpu_usage_seconds_total", {"cpu": "total"}),
        ("container_memory_working_set_bytes", {}),
        ("container_fs_reads_total", {"device": "/dev/vda"}),
    ):
        assert series[name, frozenset({**INNER, **labels}.items())] == series[name, frozenset({**OUTER, **labels}.items())]
    for name in ("container_network_receive_bytes_total", "container_start_time_seconds", "container_spec_memory_limit_bytes"):
        assert all(dict(labels)["container"] == "" for found, labels in series if found == name), f"{name} is the pod's"


@pytest.mark.row("T18")
def test_no_query_finds_a_figure_twice() -> None:
    """Of all series of a family that differ in the level alone, container!="" and container="" find one each."""
    for containers in (POD.containers, (), (*POD.containers, Container("d", "side", "x"))):
        series = series_of(cadvisor.families(guest(), SANDBOX, POD._replace(containers=containers), "go"))
        for is_inner in (True, False):
            chosen = [
                (name, frozenset((key, value) for key, value in labels if key not in ("container", "id", "image", "name")))
                for name, labels in series
                if bool(dict(labels)["container"]) is is_inner
            ]
            assert len(chosen) == len(set(chosen))
            assert bool(chosen) is (not is_inner or len(containers) == 1)


@pytest.mark.row("T18")
def test_groups_and_levels_can_be_left_out() -> None:
    shape = cadvisor.Shape(groups=("network", "disk"), containers=False)
    families = cadvisor.families(guest(), SANDBOX, POD, "go", shape=shape)
    assert {name.split("_")[1] for name in families} == {"network", "fs"}
    assert b'container="web"' not in b"".join(fragment.text for fragment in families.values())
    assert {told.group for told in cadvisor.FAMILIES.values()} == set(cadvisor.GROUPS)


@pytest.mark.row("T18")
def test_what_is_left_out_is_a_setting() -> None:
    told = settings_from(["--cadvisor-without", "cpu,containers", "--cadvisor-without=spec"], {})
    shape = cadvisor.shape_without(told.cadvisor_without)
    assert shape == cadvisor.Shape(("memory", "network", "disk", "process", "time"), containers=False)
    assert cadvisor.shape_without(settings_from([], {}).cadvisor_without) == cadvisor.WHOLE
    with pytest.raises(InvalidArgument, match="--cadvisor-without 'kernel': choose one of cpu, memory"):
        settings_from(["--cadvisor-without", "kernel"], {})


def test_a_sandbox_nobody_knows_is_told_by_its_id() -> None:
    families = cadvisor.families(guest(), SANDBOX, None, "go")
    labels = {"container": "", "id": f"/{SANDBOX}", "image": "", "name": SANDBOX, "namespace": "", "pod": ""}
    assert series_of(families)["container_threads", frozenset(labels.items())] == 120
    assert series_of(families)["container_start_time_seconds", frozenset(labels.items())] == 1_600_000_000.5


def test_labels_can_be_exchanged_as_one_block() -> None:
    late = cadvisor.families(guest(), SANDBOX, POD._replace(containers=(), created_ns=0), "go")
    early = cadvisor.families(guest(), SANDBOX, None, "go")
    old, new = cadvisor.cadvisor_labels(SANDBOX, None), cadvisor.cadvisor_labels(SANDBOX, POD)
    for name, fragment in early.items():
        assert all(line.startswith(f"{name}{{".encode() + block(old)) for line in fragment.text.splitlines())
        assert exchange(fragment.text, old, new) == late[name].text


@pytest.mark.row("T17")
def test_time_of_guests_inside_is_not_counted_twice_and_waiting_is_no_use() -> None:
    busier = {**CPU, "guest": 1e9, "guest_nice": 1e9, "idle": 1e9, "iowait": 1e9}
    assert figure(made(cpu={"total": busier}), "container_cpu_usage_seconds_total", cpu="total") == 7.6
    without = {item: CPU[item] for item in ("user", "system", "idle")}
    assert figure(made(cpu={"total": without}), "container_cpu_usage_seconds_total", cpu="total") == 7.0


@pytest.mark.row("T17")
def test_the_total_is_not_added_to_the_cpus() -> None:
    two = {"0": CPU, "1": CPU}
    doubled = {item: value * 2 for item, value in CPU.items()}
    for cpus in (two, {**two, "total": doubled}):
        assert figure(made(cpu=cpus), "container_cpu_usage_seconds_total", cpu="total") == 15.2


@pytest.mark.row("T17")
@pytest.mark.parametrize("unit_s,runtime,expected", [(0.001, "go", 7.6), (0.01, "go", 76.0), (1.0, "go", 7600.0), (0.01, "rust", 7.6)])
def test_cpu_units(unit_s: float, runtime: str, expected: float) -> None:
    families = cadvisor.families(guest(), SANDBOX, POD, runtime, cpu_unit_s=unit_s)  # type: ignore[arg-type]  # a Runtime
    assert figure(families, "container_cpu_usage_seconds_total", cpu="total") == expected


@pytest.mark.row("T10")
def test_what_cannot_be_true_is_left_out() -> None:
    wrapped = 2.0**64 - 7
    families = made(memory={**MEMORY, "anon_pages": wrapped, "mem_free": MEMORY["mem_total"] + 1, "swap_free": -1.0})
    absent = ("container_memory_rss", "container_memory_usage_bytes", "container_memory_working_set_bytes", "container_memory_swap")
    assert not set(absent) & set(families)
    assert figure(families, "container_memory_cache") == 160 * MIB
    assert "container_cpu_usage_seconds_total" not in made(cpu={"total": {**CPU, "system": wrapped}})
    assert figure(made(memory={**MEMORY, "inactive_file": 600.0 * MIB}), "container_memory_working_set_bytes") == 0


def test_what_is_missing_is_left_out_and_nothing_is_made_of_nothing() -> None:
    assert cadvisor.families({}, SANDBOX, POD, "go", now_ns=5) == {}
    for name in cadvisor.WANTED:
        rest = {family: rows for family, rows in guest().items() if family != name}
        assert series_of(cadvisor.families(rest, SANDBOX, POD, "go"))
    assert "container_network_receive_bytes_total" not in made(interfaces=("lo",))
    assert "container_file_descriptors" not in made(more={"kata_hypervisor_fds": ()})
    assert "container_processes" not in made(), "Kata's cur is no number of processes"
    assert figure(made(more={"kata_shim_agent_answers": (((), 1.0),)}), "container_processes") == 2


@pytest.mark.parametrize(
    "disks,shown",
    [
        (("vda", "vda1", "vda15"), {"/dev/vda"}),
        (("nvme0n1", "nvme0n1p1"), {"/dev/nvme0n1"}),
        (("pmem0", "pmem0p1", "loop3", "ram0", "zram0"), {"/dev/pmem0"}),
        (("vda1",), {"/dev/vda1"}),
        (("dm-0", "sdb", "mmcblk0"), {"/dev/dm-0", "/dev/sdb", "/dev/mmcblk0"}),
    ],
)
def test_parts_of_disks_are_not_counted_again(disks: tuple[str, ...], shown: set[str]) -> None:
    series = series_of(made(disks=disks))
    assert {dict(labels)["device"] for name, labels in series if name == "container_fs_reads_total"} == shown


def test_only_interfaces_that_lead_outside() -> None:
    series = series_of(made(interfaces=("lo", "eth0", "net1", "docker0", "veth12", "cni0", "tunl0", "ens5")))
    names = {dict(labels)["interface"] for name, labels in series if name == "container_network_receive_bytes_total"}
    assert names == {"eth0", "net1", "ens5"}


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_hostile_names_stay_within_their_labels(name: str, image: str, device: str) -> None:
    pod = Pod("u", name, "n\\", containers=(Container("c", name or "x", image),))
    families = cadvisor.families(guest(interfaces=(f"e{device}",), disks=()), SANDBOX, pod, "go")
    lines = b"".join(fragment.text for fragment in families.values()).decode().split("\n")
    assert len(lines) - 1 == sum(fragment.n_series for fragment in families.values())
    # The parser takes escapes apart one after the other, so that it is asked only where none stands beside another.
    if "\\" not in name + image + device:
        found = {dict(labels)["interface"] for family, labels in series_of(families) if family == "container_network_receive_bytes_total"}
        assert found == {f"e{device}"}
        assert {dict(labels)["pod"] for _, labels in series_of(families)} == {name}


def test_last_seen_and_when_it_began() -> None:
    families = cadvisor.families(guest(), SANDBOX, POD, "go", now_ns=1_700_000_100_250_000_000)
    assert figure(families, "container_last_seen") == 1_700_000_100.25
    again = cadvisor.last_seen(SANDBOX, POD, 1_700_000_160_000_000_000)
    assert figure({"container_last_seen": again}, "container_last_seen") == 1_700_000_160


# --- isopod's own containers ------------------------------------------------------------------------------------------

LOCAL: Final = LocalContainer(
    id="f00d",
    pod=Pod("f00d", "web", "isopod", source="isopod", created_ns=1, containers=(Container("f00d", "web", "nginx"),)),
    started_ns=1_700_000_000_000_000_000,
    cpu_s=12.345678,
    memory_bytes=7 * MIB,
    memory_limit_bytes=0,
    n_processes=3,
    interfaces=(LocalInterface("eth0", 1, 2, 3, 4, 5, 6, 7, 8), LocalInterface("lo", 9, 9, 9, 9)),
    devices=(LocalDevice("sda", 512, 1024, 1, 2),),
    cpus=1.5,
    processes_max=64,
    details=LocalDetails(
        working_set_bytes=5 * MIB,
        rss_bytes=3 * MIB,
        cache_bytes=2 * MIB,
        swap_bytes=1 * MIB,
        n_oom_kills=2,
        n_periods=40,
        n_throttled_periods=10,
        throttled_s=0.5,
    ),
)


@pytest.mark.row("K14")
def test_a_container_of_isopod() -> None:
    families = cadvisor.local_families(LOCAL, now_ns=1_700_000_001_000_000_000)
    series = series_of(families)
    outer = {"container": "", "id": "/isopod/f00d", "image": "", "name": "f00d", "namespace": "isopod", "pod": "web"}
    inner = {**outer, "container": "web", "image": "nginx"}
    for labels in (outer, inner):
        assert series["container_cpu_usage_seconds_total", frozenset({**labels, "cpu": "total"}.items())] == 12.345678
        assert series["container_memory_usage_bytes", frozenset(labels.items())] == 7 * MIB
        assert series["container_memory_working_set_bytes", frozenset(labels.items())] == 5 * MIB
        assert series["container_memory_rss", frozenset(labels.items())] == 3 * MIB
        assert series["container_memory_cache", frozenset(labels.items())] == 2 * MIB
        assert series["container_memory_swap", frozenset(labels.items())] == MIB
        assert series["container_oom_events_total", frozenset(labels.items())] == 2
        assert series["container_fs_writes_bytes_total", frozenset({**labels, "device": "/dev/sda"}.items())] == 1024
        assert series["container_start_time_seconds", frozenset(labels.items())] == 1_700_000_000
        assert series["container_cpu_cfs_periods_total", frozenset(labels.items())] == 40
        assert series["container_cpu_cfs_throttled_periods_total", frozenset(labels.items())] == 10
        assert series["container_cpu_cfs_throttled_seconds_total", frozenset(labels.items())] == 0.5
        assert series["container_spec_cpu_quota", frozenset(labels.items())] == 150_000
    for what, expected in {"transmit_bytes": 3, "receive_packets": 2, "receive_errors": 5, "transmit_packets_dropped": 8}.items():
        assert series[f"container_network_{what}_total", frozenset({**outer, "interface": "eth0"}.items())] == expected
    assert series["container_threads_max", frozenset(outer.items())] == 64
    assert series["container_spec_memory_limit_bytes", frozenset(outer.items())] == 0, "zero is a figure: no limit"
    assert sum(name == "container_network_receive_bytes_total" for name, _ in series) == 1
    assert "container_cpu_user_seconds_total" not in families
    assert set(families) <= set(cadvisor.FAMILIES)


def test_what_the_node_does_not_measure_is_left_out() -> None:
    unlimited = cadvisor.local_families(LOCAL._replace(cpus=0.0))
    assert not [name for name in unlimited if "_cfs_" in name or "spec_cpu" in name]
    families = cadvisor.local_families(LOCAL._replace(interfaces=(), devices=(), cpus=0.0, details=None))
    assert sorted(families) == [
        "container_cpu_usage_seconds_total",
        "container_memory_usage_bytes",
        "container_spec_memory_limit_bytes",
        "container_start_time_seconds",
        "container_threads",
        "container_threads_max",
    ]
