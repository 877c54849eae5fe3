"""Base units: what becomes of Kata's families, exactly, and that all of it is valid whatever came in."""

import math
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as open_parser
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import core
from isopod.pulse.base_families import KNOWN
from isopod.pulse.base_units import DIGITS_MAX, KNOWN_MAX, BaseUnits, Converted, Scale, scaled
from isopod.pulse.cadvisor import FAMILIES
from isopod.pulse.labels import block, kata_labels
from isopod.pulse.model import Pod, Reading, Target
from isopod.pulse.options import settings_from
from isopod.pulse.own import Facts, Own
from isopod.pulse.store import Store
from isopod.world.errors import InvalidArgument
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse import metric_family
from tests.pulse.reparsed import PROMTOOL, as_open, as_text, check_reading, promtool_complaint, promtool_lint
from tests.pulse.shims import FakeShims
from tests.pulse.test_agent import asking
from tests.pulse.test_intake import Kept

pytestmark = pytest.mark.row("T15")

A = "a" * 64
LABELS: Final = kata_labels("s", Pod("u", 'n"} 1', "prod"))
BLOCK: Final = block(LABELS)
SAMPLES: Final = sorted((Path(__file__).parent / "data").glob("*.prom"))
RIGHT_AS_THEY_ARE: Final = {
    "kata_agent_threads",
    "kata_guest_load",
    "kata_guest_tasks",
    *(f"kata_{who}_{what}" for who in ("hypervisor", "shim", "virtiofsd") for what in ("fds", "threads")),
}
MS: Final = Scale(places=3)
RPC: Final = b"kata_shim_rpc_durations_histogram_milliseconds"


def convert(body: bytes, *, is_rust: bool = False, unit_s: float = 0.001, units: BaseUnits | None = None) -> Converted:
    reading = core.read(body, LABELS, core.Rules(), {})
    return (units or BaseUnits()).convert(reading.families, BLOCK, is_rust=is_rust, cpu_unit_s=unit_s)


def lines(converted: Converted, *, opened: bool = False) -> dict[str, list[str]]:
    """Return lines by family, without the sandbox's block."""
    found = {}
    for name, each in converted.families.items():
        text = each.open_text if opened and each.open_text is not None else each.text
        found[name] = text.decode().replace(f"{{{BLOCK.decode()}", "{").replace("{,", "{").replace("{}", "").split("\n")[:-1]
    return found


def check(converted: Converted) -> None:
    """Assert that a reading would be like this: in order, with no series twice, and legible to both parsers."""
    check_reading(Reading(converted.families, {}, sum(each.n_series for each in converted.families.values()), {}))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('kata_guest_cpu_time{cpu="0",item="user"} 1.227951e+06', 'kata_guest_cpu_seconds_total{cpu="0",item="user"} 1227.951'),
        ('kata_guest_diskstat{disk="vda",item="reads"} 78082', 'kata_guest_disk_reads_total{disk="vda"} 78082'),
        ('kata_guest_diskstat{item="sectors_read",disk="vda"} 8', 'kata_guest_disk_read_bytes_total{disk="vda"} 4096'),
        ('kata_guest_diskstat{disk="vda",item="sectors_written"} 0.5', 'kata_guest_disk_write_bytes_total{disk="vda"} 256'),
        ('kata_guest_diskstat{disk="vda",item="time_reading"} 1', 'kata_guest_disk_read_seconds_total{disk="vda"} 0.001'),
        (
            'kata_guest_diskstat{disk="vda",item="weighted_time_in_progress"} 15',
            'kata_guest_disk_io_weighted_seconds_total{disk="vda"} 0.015',
        ),
        ('kata_guest_diskstat{disk="vda",item="in_progress"} 3', 'kata_guest_disk_io_current{disk="vda"} 3'),
        ('kata_guest_netdev_stat{interface="eth0",item="sent_errs"} 5', 'kata_guest_network_transmit_errors_total{interface="eth0"} 5'),
        (
            'kata_hypervisor_netdev{interface="t",item="recv_drop"} 5',
            'kata_hypervisor_network_receive_packets_dropped_total{interface="t"} 5',
        ),
        ('kata_shim_netdev{interface="t",item="sent_colls"} 5', 'kata_shim_network_transmit_collisions_total{interface="t"} 5'),
        ('kata_guest_vm_stat{item="pgfault"} 7', 'kata_guest_vm_events_total{item="pgfault"} 7'),
        ('kata_guest_vm_stat{item="nr_written"} 7', 'kata_guest_vm_events_total{item="nr_written"} 7'),
        ('kata_guest_vm_stat{item="nr_free_pages"} 7', 'kata_guest_vm_state{item="nr_free_pages"} 7'),
        ('kata_guest_vm_stat{item="workingset_nodes"} 7', 'kata_guest_vm_state{item="workingset_nodes"} 7'),
        ('kata_guest_meminfo{item="mem_free"} 4096', 'kata_guest_memory_bytes{item="mem_free"} 4096'),
        ('kata_guest_meminfo{item="hugepages_total"} 2', 'kata_guest_memory_hugepages{item="hugepages_total"} 2'),
        ('kata_hypervisor_proc_stat{item="utime"} 89486', 'kata_hypervisor_cpu_seconds_total{item="utime"} 894.86'),
        ('kata_shim_io_stat{item="rchar"} 12', 'kata_shim_io_bytes_total{item="rchar"} 12'),
        ('kata_agent_io_stat{item="read_bytes"} 12', 'kata_agent_io_bytes_total{item="read_bytes"} 12'),
        ('kata_virtiofsd_io_stat{item="syscw"} 12', 'kata_virtiofsd_io_calls_total{item="syscw"} 12'),
        ('kata_shim_proc_status{item="vmrss"} 4096', 'kata_shim_memory_bytes{item="vmrss"} 4096'),
        ('kata_agent_proc_status{item="vmrss"} 4', 'kata_agent_memory_bytes{item="vmrss"} 4096'),
        (
            'kata_shim_proc_status{item="voluntary_ctxt_switches"} 4',
            'kata_shim_context_switches_total{item="voluntary_ctxt_switches"} 4',
        ),
        ("kata_agent_scrape_count 42", "kata_agent_scrapes_total 42"),
        ("kata_agent_total_time 3.41", "kata_agent_time_seconds_total 3.41"),
        ("kata_agent_total_rss 17235968", "kata_agent_resident_memory_bytes 17235968"),
        ("kata_agent_total_vm 1.33e+08", "kata_agent_virtual_memory_bytes 1.33e+08"),
        ("kata_shim_pod_overhead_cpu 1.75", "kata_shim_pod_overhead_cpu_ratio 0.0175"),
        ("kata_shim_pod_overhead_memory_in_bytes 5", "kata_shim_pod_overhead_memory_bytes 5"),
        ('kata_hypervisor_vcpu{item="failures"} 5', 'kata_hypervisor_vcpu_events_total{item="failures"} 5'),
        ('kata_hypervisor_seccomp{item="num_faults"} 5', 'kata_hypervisor_seccomp_faults_total{item="num_faults"} 5'),
        ('kata_hypervisor_signals{item="sigbus"} 5', 'kata_hypervisor_signals_received_total{item="sigbus"} 5'),
    ],
)
def test_each_family_has_its_unit_and_its_type(line: str, expected: str) -> None:
    converted = convert(f"{line}\n".encode())
    ((name, shown),) = lines(converted).items()
    assert shown == [expected]
    kind = converted.families[name].kind
    assert (kind == "counter") == name.endswith("_total")
    assert kind in {"counter", "gauge"}
    assert converted.families[name].help.isascii()


def test_histograms_are_in_seconds_and_counts_stay() -> None:
    name, new = "kata_shim_rpc_durations_histogram_milliseconds", "kata_shim_rpc_durations_seconds"
    body = f"# HELP {name} Old words.\n# TYPE {name} histogram\n"
    body += "".join(f'{name}_bucket{{action="create",le="{le}"}} 3\n' for le in (1, 2, 64, 512, "+Inf"))
    converted = convert(f'{body}{name}_sum{{action="create"}} 189.25\n{name}_count{{action="create"}} 3\n'.encode())
    assert lines(converted)[new] == [
        *(f'{new}_bucket{{action="create",le="{le}"}} 3' for le in ("0.001", "0.002", "0.064", "0.512", "+Inf")),
        f'{new}_sum{{action="create"}} 0.18925',
        f'{new}_count{{action="create"}} 3',
    ]
    assert converted.families[new].kind == "histogram"
    assert b"Old" not in converted.families[new].help
    check(converted)


@pytest.mark.parametrize(("unit_s", "shown"), [(0.001, "0.25"), (0.01, "2.5"), (1.0, "250")])
def test_cpu_time_is_in_the_unit_that_was_found_out(unit_s: float, shown: str) -> None:
    converted = convert(b'kata_guest_cpu_time{cpu="0",item="idle"} 250\n', unit_s=unit_s)
    assert lines(converted) == {"kata_guest_cpu_seconds_total": [f'kata_guest_cpu_seconds_total{{cpu="0",item="idle"}} {shown}']}


def test_sizes_that_the_shim_in_rust_read_on_the_host_are_in_kib() -> None:
    body = b'kata_shim_proc_status{item="vmrss"} 4\nkata_agent_proc_status{item="vmrss"} 4\n'
    units = BaseUnits()
    for is_rust, size in ((True, 4096), (False, 4), (True, 4096)):
        shown = lines(convert(body, is_rust=is_rust, units=units))
        assert shown["kata_shim_memory_bytes"] == [f'kata_shim_memory_bytes{{item="vmrss"}} {size}']
        assert shown["kata_agent_memory_bytes"] == ['kata_agent_memory_bytes{item="vmrss"} 4096']


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_of_samples_every_line_is_there_and_every_family_is_known(path: Path) -> None:
    body = path.read_bytes()
    reading = core.read(body, LABELS, core.Rules(), {})
    for name in reading.families:
        assert name in KNOWN or name in RIGHT_AS_THEY_ARE or name.startswith(("kata_shim_go_", "kata_shim_process_")), name
    converted = convert(body, is_rust=path.stem.endswith("_rs"))
    assert converted.dropped == {}
    assert sum(each.n_series for each in converted.families.values()) == reading.n_series
    assert not converted.families.keys() & KNOWN.keys()
    for each in converted.families.values():
        assert all(line.partition(b"{")[2].startswith(BLOCK) for line in each.text.split(b"\n")[:-1])
    check(converted)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_of_samples_every_figure_is_the_old_one_in_another_unit(path: Path) -> None:
    def total(text: str, names: tuple[str, ...]) -> Decimal:
        found = text_string_to_metric_families(text)
        return sum((Decimal(repr(s.value)) for family in found for s in family.samples if s.name in names), Decimal(0))

    is_rust = path.stem.endswith("_rs")
    before = core.read(path.read_bytes(), LABELS, core.Rules(), {}).families
    after = convert(path.read_bytes(), is_rust=is_rust).families
    exact = {"kata_guest_cpu_time": 1000, "kata_agent_proc_stat": 100, "kata_shim_proc_stat": 100, "kata_guest_vm_stat": 1}
    exact |= {"kata_guest_netdev_stat": 1, "kata_guest_meminfo": 1, "kata_agent_io_stat": 1, "kata_shim_pod_overhead_cpu": 100}
    for name, divisor in exact.items():
        old = total(as_text({name: before[name]}), (name,)) if name in before else Decimal(0)
        new = {each: after[each] for each in KNOWN[name].made if each in after}
        assert total(as_text(new), tuple(new)) * divisor == old, name


@pytest.mark.skipif(not os.path.exists(PROMTOOL), reason="Debian's prometheus is not installed")
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_promtool_finds_nothing_to_say_about_the_names(path: Path) -> None:
    assert promtool_lint(as_text(convert(path.read_bytes()).families)) == ""
    assert promtool_lint(as_text(core.read(path.read_bytes(), LABELS, core.Rules(), {}).families)) != "", "it could"


def test_in_openmetrics_counters_are_counters() -> None:
    families = convert(SAMPLES[0].read_bytes()).families
    kinds = {metric.name: metric.type for metric in open_parser.text_string_to_metric_families(as_open(families))}  # type: ignore[no-untyped-call] # the client's
    for name in (name for known in KNOWN.values() for name in known.made):
        if name in families and families[name].kind == "counter":
            assert kinds[name.removesuffix("_total")] == "counter", name


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_protobuf_says_the_same(path: Path) -> None:
    families = convert(path.read_bytes()).families
    kinds, _ = metric_family.series_of(b"".join(core.protobuf(name, each.kind, each.help, [each.text]) for name, each in families.items()))
    assert kinds == {name: each.kind for name, each in families.items()}


async def test_no_new_name_is_anybody_elses(sim_world: SimWorld) -> None:
    new = [name for known in KNOWN.values() for name in known.names]
    assert len(new) == len(set(new))
    own = Own(sim_world.world, Store(lambda: 0.0), version="1").families(Facts())
    taken = {*own, *FAMILIES, *KNOWN, *RIGHT_AS_THEY_ARE}
    for path in SAMPLES:
        taken |= core.read(path.read_bytes(), LABELS, core.Rules(), {}).families.keys()
    assert not taken & set(new)
    for name in new:  # in OpenMetrics a counter stands under its name without _total
        assert name.removesuffix("_total") not in taken | (set(new) - {name}), name


def test_what_is_not_known_stays_as_it_came() -> None:
    body = b"# TYPE kata_firecracker_vmm gauge\n" + b'kata_firecracker_vmm{item="x"} 1\nkata_new 2\n'
    body += b"# HELP kata_guest_diskstat Old.\n# TYPE kata_guest_diskstat gauge\n"
    body += b'kata_guest_diskstat{disk="a",item="reads"} 1\nkata_guest_diskstat{disk="a",item="warp"} 2\nkata_guest_diskstat{disk="a"} 3\n'
    body += b'kata_guest_vm_stat{a="b"} 4\nkata_guest_meminfo 5\n'
    converted = convert(body)
    assert lines(converted) == {
        "kata_firecracker_vmm": ['kata_firecracker_vmm{item="x"} 1'],
        "kata_guest_disk_reads_total": ['kata_guest_disk_reads_total{disk="a"} 1'],
        "kata_guest_diskstat": ['kata_guest_diskstat{disk="a",item="warp"} 2', 'kata_guest_diskstat{disk="a"} 3'],
        "kata_guest_meminfo": ["kata_guest_meminfo 5"],
        "kata_guest_vm_stat": ['kata_guest_vm_stat{a="b"} 4'],
        "kata_new": ["kata_new 2"],
    }
    left = converted.families["kata_guest_diskstat"]
    assert (left.kind, left.help) == ("gauge", b"Old.")
    check(converted)


@pytest.mark.parametrize(
    "body",
    [
        b"# TYPE kata_guest_cpu_time summary\nkata_guest_cpu_time_sum 1\nkata_guest_cpu_time_count 1\n",
        b'# TYPE kata_guest_cpu_time histogram\nkata_guest_cpu_time_bucket{le="+Inf"} 1\n',
        b'# TYPE %b gauge\n%b{item="a"} 1\n' % (RPC, RPC),
        b'kata_guest_diskstat{disk="a",item="reads"} 1\nkata_guest_disk_write_bytes_total{disk="a"} 2\n',
        b'# TYPE %b histogram\n%b_bucket{le="+Inf"} 1\nkata_shim_rpc_durations_seconds_count 5\n' % (RPC, RPC),
    ],
    ids=["summary", "histogram", "no histogram", "new name in use", "new part in use"],
)
def test_what_is_not_as_kata_says_it_or_would_clash_stays_as_it_came(body: bytes) -> None:
    before = core.read(body, LABELS, core.Rules(), {}).families
    assert as_text(convert(body).families) == as_text(before)


def test_a_counter_below_zero_or_not_a_number_is_left_out_and_counted() -> None:
    body = b'kata_guest_vm_stat{item="pgfault"} -1\nkata_guest_vm_stat{item="pgfree"} NaN\nkata_guest_vm_stat{item="a"} -0\n'
    body += b'kata_guest_vm_stat{item="b"} +Inf\nkata_guest_vm_stat{item="nr_x"} -1\nkata_guest_cpu_time{cpu="0",item="user"} -5 17\n'
    converted = convert(body)
    assert converted.dropped == {"counter": 3}
    assert lines(converted)["kata_guest_vm_events_total"] == [
        'kata_guest_vm_events_total{item="a"} -0',
        'kata_guest_vm_events_total{item="b"} +Inf',
    ]
    assert lines(converted)["kata_guest_vm_state"] == ['kata_guest_vm_state{item="nr_x"} -1']
    assert "kata_guest_cpu_seconds_total" not in converted.families
    check(converted)


def test_a_figure_that_64_bits_cannot_hold_is_left_out_and_counted() -> None:
    converted = convert(b'kata_agent_proc_status{item="vmrss"} -1.7e308\nkata_agent_proc_status{item="vmhwm"} -1e300\n')
    assert converted.dropped == {"value": 1}
    assert lines(converted) == {"kata_agent_memory_bytes": ['kata_agent_memory_bytes{item="vmhwm"} -1.024e+303']}
    check(converted)


def test_times_and_exemplars_stay_and_an_exemplars_value_is_scaled() -> None:
    name, new = "kata_shim_rpc_durations_histogram_milliseconds", "kata_shim_rpc_durations_seconds"
    body = f'# TYPE {name} histogram\n{name}_bucket{{action="a # {{b",le="2"}} 1 # {{id="x"}} 1.5 7\n'
    body += f'{name}_bucket{{action="a # {{b",le="+Inf"}} 1\n{name}_sum{{action="a # {{b"}} 1.5\n{name}_count{{action="a # {{b"}} 1\n'
    body += '# TYPE kata_agent_proc_stat gauge\nkata_agent_proc_stat{item="utime"} 150 1700\n# EOF\n'
    converted = convert(body.encode())
    assert lines(converted, opened=True) == {
        "kata_agent_cpu_seconds_total": ['kata_agent_cpu_seconds_total{item="utime"} 1.5 1700.000'],
        new: [
            f'{new}_bucket{{action="a # {{b",le="0.002"}} 1 # {{id="x"}} 0.0015 7',
            f'{new}_bucket{{action="a # {{b",le="+Inf"}} 1',
            f'{new}_sum{{action="a # {{b"}} 0.0015',
            f'{new}_count{{action="a # {{b"}} 1',
        ],
    }
    assert lines(converted)["kata_agent_cpu_seconds_total"] == ['kata_agent_cpu_seconds_total{item="utime"} 1.5 1700000']
    check(converted)


def test_two_spellings_of_one_limit_are_one_bucket() -> None:
    name = "kata_shim_rpc_durations_histogram_milliseconds"
    body = f'# TYPE {name} histogram\n{name}_bucket{{a="1",le="1"}} 1\n{name}_bucket{{le="1.0",a="1"}} 1\n'
    body += f'{name}_bucket{{a="1",le="1e0",b=""}} 1\n{name}_bucket{{a="1",le="+Inf"}} 1\n'
    converted = convert(body.encode())
    assert converted.dropped == {"duplicate": 2}
    assert len(lines(converted)["kata_shim_rpc_durations_seconds"]) == 2
    check(converted)


@given(st.integers(0, 10**15), st.integers(-12, 12), st.sampled_from([Scale(1, 3), Scale(1, 2), Scale(512, 0), Scale(1024, 0)]))
def test_decimals_are_exact(digits: int, exponent: int, scale: Scale) -> None:
    for text in (f"{digits}e{exponent}", str(digits), f"{digits}.0", f"0.{digits}", f"-{digits}"):
        got = scaled(text.encode(), scale)
        expected = Decimal(text) * scale.factor / 10**scale.places
        assert float(got) == float(expected), text
        if len(expected.normalize().as_tuple().digits) <= 15:
            assert Decimal(got.decode()) == expected, text
            assert len(got) <= DIGITS_MAX + 4, "no noise behind the last digit"


@given(st.floats(min_value=0.0, max_value=1e19), st.floats(min_value=0.0, max_value=1e19), st.sampled_from([MS, Scale(512, 0)]))
def test_what_grows_still_grows(one: float, other: float, scale: Scale) -> None:
    least, most = sorted((one, other))
    assert float(scaled(repr(least).encode(), scale)) <= float(scaled(repr(most).encode(), scale))


def test_numbers_that_are_none_stay() -> None:
    assert [scaled(text, MS) for text in (b"NaN", b"+Inf", b"-Inf", b"0", b"-0", b"5.")] == [b"NaN", b"+Inf", b"-Inf", b"0", b"0", b"0.005"]
    assert float(scaled(b"0." + b"1" * 5000, MS)) == pytest.approx(1 / 9000)
    assert math.isclose(float(scaled(b"1" * 300, MS)), float("1" * 297))


_HOSTILE: Final = st.text(st.sampled_from('abz,{}" =\\#\n\r\x0b\u2028é0'), max_size=8)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*KNOWN, "kata_guest_cpu_seconds_total", "kata_guest_disk_reads_total", "kata_odd"]),
            st.sampled_from(["reads", "user", "pgfault", "nr_x", "vmrss", "rchar", "recv_bytes", "sectors_read", "utime", "", "odd"]),
            _HOSTILE,
            st.sampled_from(["0", "1", "1.5", "-1", "NaN", "+Inf", "1e300", "3 1700000000000"]),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_whatever_stands_in_the_labels_what_comes_out_is_valid(rows: list[tuple[str, str, str, str]], is_typed: bool) -> None:
    def escape(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    body = "".join(f"# TYPE {name} gauge\n" for name in KNOWN) if is_typed else ""
    body += "".join(f'{name}{{cpu="{escape(value)}",item="{item}",le="1"}} {figure}\n' for name, item, value, figure in rows)
    before = core.read(body.encode(), LABELS, core.Rules(), {})
    converted = convert(body.encode())
    check(converted)
    assert sum(each.n_series for each in converted.families.values()) + sum(converted.dropped.values()) == before.n_series


def test_what_is_remembered_has_a_bound() -> None:
    units = BaseUnits()
    for number in range(4):
        names = "".join(f'kata_guest_vm_stat{{item="{number}_{n}"}} 1\n' for n in range(KNOWN_MAX // 2))
        convert(names.encode(), units=units)
    remembered = sum(len(fates) for fates in units._fates.values())
    assert remembered <= KNOWN_MAX * 1.5
    long = "x" * 5000
    convert(f'kata_guest_vm_stat{{item="{long}"}} 1\n'.encode(), units=units)
    assert max(len(tail) for fates in units._fates.values() for tail in fates) < 5000


def test_the_intake_converts_before_rules_and_counts_what_it_leaves_out(sim_world: SimWorld) -> None:
    kept = Kept(sim_world, base_units=True)
    target = Target(A, "go", "/run/a")
    kept.store.add(target)
    body = b'# TYPE c counter\nc -1\nkata_guest_vm_stat{item="pgfault"} -1\nkata_guest_load{item="load1"} 1\n'
    kept.intake.accept(target, body, 0.01)
    entry = kept.store.get(A)
    assert entry is not None
    assert entry.dropped == {"counter": 2}
    assert list(entry.families) == ["kata_guest_load"]


def test_a_guest_that_counts_in_ticks_is_found_out_by_its_age(sim_world: SimWorld) -> None:
    kept = Kept(sim_world, base_units=True)
    target = Target(A, "go", "/run/a")
    kept.store.add(target)
    for number in range(2):
        kept.intake.accept(target, b'kata_guest_cpu_time{cpu="0",item="idle"} %d\n' % (100_000 + 1000 * number), 0.01)
        kept.now_s += 10.0
    assert kept.family("kata_guest_cpu_seconds_total").endswith(" 1010\n")


@pytest.mark.parametrize("flag", ["--base-units", "--merge-histograms"])
def test_strictly_there_is_no_such_view(flag: str) -> None:
    with pytest.raises(InvalidArgument, match="kata-monitor shows no such families"):
        settings_from([flag, "--strict-compat"], {})
    told = settings_from([], {f"ISOPOD_PULSE_{flag.strip('-').replace('-', '_').upper()}": "true"})
    assert told.base_units != told.merge_histograms
    assert settings_from([flag, "--strict-compat=false"], {}) == told


async def test_a_scrape_shows_base_units_and_rules_know_the_new_names(world: World, folder: str) -> None:
    policy = f"{folder}/policy.yaml"
    rule = b"metric_relabel_configs: [{source_labels: [__name__, item], regex: 'kata_guest_memory_bytes;mem_.*', action: drop}]\n"
    await world.disk.write(policy, rule)
    told = {"base_units": True, "policy_file": policy}
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, **told) as asked:
        await shims.add(A, body=SAMPLES[0].read_bytes())
        await asked.until(lambda: asked.up(A))
        _, text = await asked.get("/metrics")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert not families.keys() & KNOWN.keys()
        cpu = families["kata_guest_cpu_seconds"]
        assert cpu.type == "counter"
        assert {sample.labels["sandbox_id"] for sample in cpu.samples} == {A}
        items = {sample.labels["item"] for sample in families["kata_guest_memory_bytes"].samples}
        assert "cached" in items
        assert "mem_total" not in items
        assert families["container_memory_rss"].samples, "those under cAdvisor's names are as ever"
        assert families["kata_shim_rpc_durations_seconds"].type == "histogram"
        _, some = await asked.get("/metrics?filter_family=kata_guest_disk_read")
        assert 'kata_guest_disk_read_bytes_total{sandbox_id="' in some
        assert not promtool_complaint(text) if os.path.exists(PROMTOOL) else True


def test_an_agent_that_does_neither_does_not_load_what_does() -> None:
    program = "import sys, isopod.pulse.agent; print([name for name in sys.modules if name.endswith(('.base_units', '.histograms'))])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert run.stdout == b"[]\n"


async def test_without_the_setting_families_are_as_kata_says_them(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A, body=SAMPLES[0].read_bytes())
        await asked.until(lambda: asked.up(A))
        _, text = await asked.get("/metrics?view=kata")
        assert "# TYPE kata_guest_cpu_time gauge" in text
        assert "kata_guest_cpu_seconds_total" not in text
