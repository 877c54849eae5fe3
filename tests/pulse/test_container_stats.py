"""Container level: what a runtime says of containers beside what a guest says of the pod, nothing twice and nothing that cannot be true."""

import asyncio
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse import cadvisor
from isopod.pulse.converter import UNTOLD_ROUNDS, Converter
from isopod.pulse.demo import body
from isopod.pulse.figures import STARTED, Figures, measure_container
from isopod.pulse.model import Container, ContainerStats, Families, Pod, SandboxStats, Target
from isopod.pulse.resource import resource
from isopod.world.sim import SimWorld
from tests.pulse.guests import MIB, POD, SANDBOX, guest
from tests.pulse.test_cadvisor import series_of
from tests.pulse.test_intake import A, Kept
from tests.pulse.test_resource import Entry

NGINX: Final = Container("c" * 64, "web", "docker.io/library/nginx:1", 1_700_000_001_000_000_000)
SIDE: Final = Container("d" * 64, "side", "envoy:1", 1_700_000_002_500_000_000)
TWO: Final = POD._replace(containers=(SIDE, NGINX))
ONE: Final = POD._replace(containers=(NGINX,))
BUSY: Final = ContainerStats(NGINX.id, 3_500_000_000, 100 * MIB, 120 * MIB, 80 * MIB, 28 * MIB, 700, 7, 3 * MIB, 4096, 12, "/var/lib/x")
IDLE: Final = ContainerStats(SIDE.id, cpu_ns=0, working_set_bytes=MIB)
TARGET: Final = Target(SANDBOX, "go", "")
CPU: Final = "container_cpu_usage_seconds_total"


def told(stats: SandboxStats | None, pod: Pod | None = TWO, **shape: Any) -> Families:
    """Return the families of a sandbox of which the runtime has said something."""
    converter = Converter(cadvisor.Shape(**shape))
    converter.take_stats(stats, now_ns=9_000_000_000)
    return converter.take(TARGET, guest(), pod, at_s=1.0, now_ns=10_000_000_000)


def of(families: Families, container: str, name: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the series of a container; of one family, if it is named."""
    found = series_of(families).items()
    return {key: value for key, value in found if dict(key[1])["container"] == container and name in {"", key[0]}}


# --- figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.row("T17", "K14")
@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        (CPU, {"cpu": "total"}, 3.5),
        ("container_memory_working_set_bytes", {}, 100 * MIB),
        ("container_memory_usage_bytes", {}, 120 * MIB),
        ("container_memory_rss", {}, 80 * MIB),
        ("container_memory_swap", {}, 3 * MIB),
        ("container_memory_failures_total", {"failure_type": "pgfault", "scope": "container"}, 700),
        ("container_memory_failures_total", {"failure_type": "pgmajfault", "scope": "container"}, 7),
        ("container_spec_memory_limit_bytes", {}, 128 * MIB),
        ("container_fs_usage_bytes", {"device": "/var/lib/x"}, 4096),
        ("container_fs_inodes_used", {"device": "/var/lib/x"}, 12),
        ("container_last_seen", {}, 9),
        ("container_start_time_seconds", {}, 1_700_000_001),
    ],
)
def test_names_units_and_labels(name: str, labels: dict[str, str], value: float) -> None:
    own = {
        "container": "web",
        "id": f"/kubepods/pod0b1c/{NGINX.id}",
        "image": "docker.io/library/nginx:1",
        "name": NGINX.id,
        "namespace": "team",
        "pod": "web-0",
    }
    assert series_of(told({SANDBOX: (BUSY, IDLE)}))[name, frozenset({**own, **labels}.items())] == value


WRAPPED: Final = 2**64 - 7


@pytest.mark.row("T10", "T17")
@pytest.mark.parametrize(
    ("stats", "families"),
    [
        ({}, {}),
        ({"cpu_ns": 0}, {CPU: 0}),
        ({"cpu_ns": WRAPPED}, {}),
        ({"cpu_ns": -1}, {}),
        ({"cpu_ns": 1_234_567_891}, {CPU: 1.234567891}),
        ({"cpu_ns": 10**18 + 1}, {CPU: 1e9}),
        ({"working_set_bytes": 0}, {"container_memory_working_set_bytes": 0}),
        ({"working_set_bytes": WRAPPED, "usage_bytes": 5}, {"container_memory_usage_bytes": 5}),
        ({"rss_bytes": -5}, {}),
        ({"swap_bytes": WRAPPED}, {}),
        ({"page_faults": 3}, {"container_memory_failures_total": 3}),
        ({"major_page_faults": 3, "page_faults": WRAPPED}, {"container_memory_failures_total": 3}),
        ({"available_bytes": 5}, {}),
        ({"available_bytes": 0, "working_set_bytes": 7}, {"container_memory_working_set_bytes": 7}),
        ({"available_bytes": WRAPPED, "working_set_bytes": 7}, {"container_memory_working_set_bytes": 7}),
        (
            {"available_bytes": 5, "working_set_bytes": 7},
            {"container_memory_working_set_bytes": 7, "container_spec_memory_limit_bytes": 12},
        ),
        ({"written_bytes": WRAPPED, "written_inodes": 1}, {"container_fs_inodes_used": 1}),
    ],
)
def test_what_cannot_be_true_is_left_out_and_what_is_absent_is_not_zero(stats: dict[str, Any], families: dict[str, float]) -> None:
    found = measure_container(ContainerStats("c")._replace(**stats))
    assert {name: samples[0][1] for name, samples in found.items()} == families
    assert set(found) <= set(cadvisor.FAMILIES)


@pytest.mark.row("T17")
def test_what_goes_back_is_left_out_for_that_round() -> None:
    def cpu(figures: Figures) -> float | None:
        return figures[CPU][0][1] if CPU in figures else None

    rows = [BUSY._replace(cpu_ns=each) for each in (5 * 10**9, 10**9, 6 * 10**9, WRAPPED, 7 * 10**9, None, 7 * 10**9)]
    seen = [cpu(measure_container(row, before)) for row, before in zip(rows, (None, *rows), strict=False)]
    assert seen == [5, None, 6, None, 7, None, 7]
    fewer = measure_container(BUSY._replace(page_faults=699, rss_bytes=1), BUSY)
    assert [label for label, _ in fewer["container_memory_failures_total"]] == [',failure_type="pgmajfault",scope="container"']
    assert fewer["container_memory_rss"] == (("", 1),), "a gauge may fall"


@given(st.lists(st.integers(-(2**63), 2**64 - 1) | st.none(), min_size=10, max_size=10), st.text(max_size=20), st.text(max_size=20))
def test_whatever_a_runtime_says_no_line_is_damaged(figures: list[int | None], mountpoint: str, name: str) -> None:
    pod = POD._replace(containers=(NGINX._replace(name=name), SIDE))
    told_of: dict[str, Any] = dict(zip(ContainerStats._fields[1:], [*figures, mountpoint], strict=True))
    row = ContainerStats(NGINX.id)._replace(**told_of)
    families = told({SANDBOX: (row, IDLE)}, pod)
    lines = b"".join(fragment.text for fragment in families.values()).decode().split("\n")
    assert len(lines) - 1 == sum(fragment.n_series for fragment in families.values())
    values = [float(line.rpartition(" ")[2]) for line in lines[:-1]]
    assert all(0 <= value < 1.8e19 for value in values)


# --- levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.row("T17", "K14")
def test_several_containers_stand_beside_the_pod() -> None:
    families = told({SANDBOX: (BUSY, IDLE)})
    assert list(families) == sorted(families)
    assert [*of(families, "", CPU).values()] == [7.6], "the pod's are the guest's"
    assert [*of(families, "web", CPU).values()] == [3.5]
    assert [*of(families, "side", CPU).values()] == [0], "zero is a figure"
    assert sorted(name for name, _ in of(families, "side")) == [
        CPU,
        "container_last_seen",
        "container_memory_working_set_bytes",
        "container_start_time_seconds",
    ]
    assert all(fragment.n_series == fragment.text.count(b"\n") for fragment in families.values())


@pytest.mark.row("T17", "T18")
def test_the_only_container_has_the_runtimes_figures_and_the_guests_where_it_tells_none() -> None:
    families = told({SANDBOX: (BUSY._replace(rss_bytes=None, swap_bytes=None),)}, ONE)
    assert [*of(families, "web", CPU).values()] == [3.5]
    assert [*of(families, "web", "container_memory_working_set_bytes").values()] == [100 * MIB]
    assert of(families, "web", "container_memory_rss") == {}, "the runtime could tell it, so that no other figure stands in for it"
    assert [*of(families, "web", "container_memory_swap").values()] == [4 * MIB]
    assert [*of(families, "web", "container_memory_cache").values()] == [160 * MIB]
    assert [*of(families, "web", "container_fs_reads_total").values()] == [8]
    assert len(of(families, "web", "container_memory_failures_total")) == 2
    assert [*of(families, "", "container_memory_rss").values()] == [200 * MIB]


@pytest.mark.row("T17", "T18")
@pytest.mark.parametrize("pod", [ONE, TWO])
@pytest.mark.parametrize("rows", [(), (BUSY,), (BUSY, IDLE)])
def test_no_query_finds_a_figure_twice(pod: Pod, rows: tuple[ContainerStats, ...]) -> None:
    series = series_of(told({SANDBOX: rows}, pod))
    for is_inner in (True, False):
        chosen = [
            (name, frozenset((key, value) for key, value in labels if key not in ("id", "name")))
            for name, labels in series
            if bool(dict(labels)["container"]) is is_inner
        ]
        assert len(chosen) == len(set(chosen))
    assert all(dict(labels)["image"] for _, labels in series if dict(labels)["container"])


@pytest.mark.row("T17")
def test_without_a_runtimes_figures_all_is_as_it_was() -> None:
    nothing: tuple[SandboxStats | None, ...] = ({SANDBOX: ()}, None)
    for stats in nothing:
        assert [*of(told(stats, ONE), "web", CPU).values()] == [7.6]
        assert of(told(stats, TWO), "web", CPU) == {}
    assert [*of(told(None, TWO), "side", STARTED).values()] == [1_700_000_002.5], "when they were made is known all the same"


@pytest.mark.row("T17")
def test_a_counter_never_changes_over_from_one_source_to_the_other() -> None:
    converter = Converter()

    def look() -> list[float]:
        return [*of(converter.take(TARGET, guest(), ONE, at_s=1.0, now_ns=5), "web", CPU).values()]

    converter.await_stats()
    assert look() == [], "it is not known yet which it will be"
    assert converter.take_stats({SANDBOX: (BUSY,)}, now_ns=1) == (SANDBOX,)
    assert look() == [3.5]
    assert converter.take_stats({SANDBOX: ()}, now_ns=1) == (SANDBOX,)
    assert look() == []
    assert converter.take_stats(None, now_ns=1) is None
    assert look() == []
    converter.take_stats({SANDBOX: (BUSY._replace(cpu_ns=4 * 10**9),)}, now_ns=1)
    assert look() == [4.0]
    converter.forget(SANDBOX)
    converter.take_stats(None, now_ns=1)
    assert look() == [7.6], "a sandbox of that name is another one now"


LAYER: Final = ContainerStats(NGINX.id, written_bytes=4096, mountpoint="/x")
OTHER: Final = "e" * 64
BUSY_OTHER: Final = {OTHER: (ContainerStats("f" * 64, cpu_ns=1),)}
FAULTS: Final = "container_memory_failures_total"


def counted(converter: Converter, pod: Pod = ONE, container: str = "web") -> tuple[list[float], list[float]]:
    """Return what is shown of a container's CPU time and of its page faults; the guest's are 7.6 and 900 (major: 9)."""
    families = converter.take(TARGET, guest(), pod, at_s=1.0, now_ns=5)
    return [*of(families, container, CPU).values()], sorted({*of(families, container, FAULTS).values()})


GUESTS: Final = counted(Converter())


@pytest.mark.row("T17")
@pytest.mark.parametrize("first", [None, {SANDBOX: ()}, {SANDBOX: (LAYER,)}, {OTHER: (LAYER,), SANDBOX: ()}])
def test_counters_that_were_the_guests_are_the_guests_for_good(first: SandboxStats | None) -> None:
    converter = Converter()
    converter.await_stats()
    assert counted(converter) == ([], [])
    converter.take_stats(first, now_ns=1)
    later: tuple[SandboxStats | None, ...] = ({SANDBOX: (BUSY,)}, {SANDBOX: ()}, None, {OTHER: ()}, {SANDBOX: (BUSY,), **BUSY_OTHER})
    assert counted(converter) == GUESTS
    for stats in later:
        converter.take_stats(stats, now_ns=1)
        assert counted(converter) == GUESTS
    families = converter.take(TARGET, guest(), ONE, at_s=1.0, now_ns=5)
    assert [*of(families, "web", "container_memory_rss").values()] == [80 * MIB], "a gauge may change over"
    assert [*of(families, "web", "container_fs_usage_bytes").values()] == [4096]


@pytest.mark.row("T17")
def test_a_container_of_which_nothing_is_told_waits_while_others_are_told_of() -> None:
    converter = Converter()
    converter.await_stats()
    assert converter.take_stats({SANDBOX: (), **BUSY_OTHER}, now_ns=1) == (SANDBOX, OTHER)
    assert counted(converter) == ([], []), "its shim may hang just now"
    converter.take_stats({SANDBOX: (BUSY,), **BUSY_OTHER}, now_ns=2)
    assert counted(converter) == ([3.5], [7, 700])


@pytest.mark.row("T17")
def test_a_container_does_not_wait_for_good() -> None:
    converter = Converter()
    converter.take_stats({SANDBOX: (LAYER,), **BUSY_OTHER}, now_ns=1)
    for _ in range(UNTOLD_ROUNDS - 1):
        assert counted(converter) == ([], [])
        assert converter.take_stats({SANDBOX: (LAYER,), **BUSY_OTHER}, now_ns=2) == ()
    assert counted(converter) == ([], [])
    assert converter.take_stats({SANDBOX: (LAYER,), **BUSY_OTHER}, now_ns=2) == (SANDBOX,), "its families will be others now"
    assert counted(converter) == GUESTS
    assert converter.take_stats({SANDBOX: (LAYER,), **BUSY_OTHER}, now_ns=2) == ()
    converter.take_stats({SANDBOX: (BUSY,), **BUSY_OTHER}, now_ns=3)
    assert counted(converter) == GUESTS


@pytest.mark.row("T17")
def test_a_new_container_is_a_new_life_and_an_old_one_is_none() -> None:
    converter = Converter()
    converter.take_stats(None, now_ns=1)
    assert counted(converter) == GUESTS
    converter.take_stats({SANDBOX: (BUSY, IDLE)}, now_ns=2)
    assert counted(converter, TWO) == ([], []), "a guest does not say which of two did what, and the runtime counts otherwise"
    assert counted(converter, TWO, "side") == ([0], [])
    assert counted(converter) == GUESTS
    side = POD._replace(containers=(SIDE,))
    assert counted(converter, side, "side") == ([0], []), "this one is the runtime's from the first"
    assert counted(converter) == GUESTS


LIVES: Final = tuple(Container(each * 64, each, "image", 5) for each in "ab")
LOOKS: Final = (LIVES[:1], LIVES[:1], LIVES[1:], LIVES)
USED: Final = ContainerStats("", cpu_ns=5)
WORDS: Final = ((), (USED, None), (None, USED), (USED, USED), (USED._replace(cpu_ns=None, written_bytes=5), None))
"""What a runtime says of both: their rows."""


@pytest.mark.row("T17")
@given(
    st.lists(
        st.tuples(st.sampled_from(["look", "look", "told", "told", "others too", "give up", "await"]), st.integers(0, 19)),
        min_size=6,
        max_size=30,
    )
)
def test_whatever_the_order_each_container_is_counted_by_one(steps: list[tuple[str, int]]) -> None:
    converter = Converter()
    by: dict[str, set[float]] = {}
    for what, which in steps:
        if what == "give up":
            converter.take_stats(None, now_ns=1)
        elif what == "await":
            converter.await_stats()
        elif what == "look":
            pod = POD._replace(containers=LOOKS[which % len(LOOKS)])
            families = converter.take(TARGET, guest(), pod, at_s=1.0, now_ns=5)
            for each in pod.containers:
                by.setdefault(each.id, set()).update(of(families, each.name, CPU).values())
        else:
            word = WORDS[which % len(WORDS)]
            rows = tuple(row._replace(id=each.id) for each, row in zip(LIVES, word, strict=False) if row is not None)
            converter.take_stats({SANDBOX: rows, **(BUSY_OTHER if what == "others too" else {})}, now_ns=1)
    assert all(len(values) <= 1 for values in by.values())


@pytest.mark.row("T17")
def test_a_container_of_which_only_the_disk_is_told_keeps_the_guests_figures() -> None:
    families = told({SANDBOX: (ContainerStats(NGINX.id, written_bytes=4096, mountpoint="/x"),)}, ONE)
    assert [*of(families, "web", CPU).values()] == [7.6]
    assert [*of(families, "web", "container_fs_usage_bytes").values()] == [4096]


def test_only_a_difference_is_told() -> None:
    converter = Converter()
    assert converter.take_stats({SANDBOX: (BUSY,), "other": ()}, now_ns=1) == (SANDBOX, "other")
    assert converter.take_stats({SANDBOX: (BUSY,), "other": ()}, now_ns=2) == ()
    assert converter.take_stats({SANDBOX: (BUSY._replace(rss_bytes=1),), "other": ()}, now_ns=3) == (SANDBOX,)
    assert converter.take_stats({}, now_ns=4) == (SANDBOX,), "the pod is gone for its runtime"
    assert converter.take_stats({}, now_ns=5) == ()


@pytest.mark.row("T18")
def test_what_is_left_out_is_left_out_here_too() -> None:
    families = told({SANDBOX: (BUSY, IDLE)}, groups=("network", "disk"))
    assert {name.split("_")[1] for name in families} == {"network", "fs"}
    assert of(families, "web", "container_fs_usage_bytes")
    families = told({SANDBOX: (BUSY, IDLE)}, containers=False)
    assert {dict(labels)["container"] for _, labels in series_of(families)} == {""}


def test_containers_that_cannot_be_told_apart_have_no_series_of_their_own() -> None:
    pod = POD._replace(containers=(Container("", "a", "x", 5), Container("", "b", "x", 5), Container("e", "", "x", 5)))
    families = told({SANDBOX: (ContainerStats("", cpu_ns=1), ContainerStats("e", cpu_ns=1))}, pod)
    assert {dict(labels)["container"] for _, labels in series_of(families)} == {""}


# --- the kubelet's short list ---------------------------------------------------------------------------------------------


@pytest.mark.row("T17")
def test_each_container_is_in_the_short_list() -> None:
    families = resource(Entry(SANDBOX, TWO, told({SANDBOX: (BUSY, IDLE)})))
    named = {"namespace": "team", "pod": "web-0"}
    series = series_of(families)
    for name, container, value in (
        (CPU, "web", 3.5),
        (CPU, "side", 0),
        ("container_memory_working_set_bytes", "web", 100 * MIB),
        ("container_memory_working_set_bytes", "side", MIB),
        ("container_swap_usage_bytes", "web", 3 * MIB),
        ("container_start_time_seconds", "side", 1_700_000_002.5),
    ):
        assert series[name, frozenset({**named, "container": container}.items())] == value
    assert series["pod_cpu_usage_seconds_total", frozenset(named.items())] == 7.6
    assert all(fragment.n_series == fragment.text.count(b"\n") for fragment in families.values())
    assert list(families) == sorted(families)


@pytest.mark.row("T17")
def test_of_two_containers_of_one_name_the_newer_one_is_in_the_short_list() -> None:
    old = NGINX._replace(id="e" * 64, created_ns=5)
    for containers in ((NGINX, old), (old, NGINX)):
        pod = POD._replace(containers=containers)
        families = resource(Entry(SANDBOX, pod, told({SANDBOX: (BUSY, BUSY._replace(id=old.id, cpu_ns=1))}, pod)))
        assert [value for (name, _), value in series_of(families).items() if name == CPU] == [3.5]


# --- from the runtime to the store ----------------------------------------------------------------------------------------


class Agent(Kept):
    """A store and its intake, with one sandbox in it."""

    def __init__(self, sim: SimWorld, **told: Any) -> None:
        super().__init__(sim, **told)
        self.store.add(A)
        self.store.describe(A.id, TWO)

    def shown(self, container: str = "web", name: str = CPU) -> list[float]:
        entry = self.store.get(A.id)
        assert entry is not None
        return [*of(entry.containers, container, name).values()]

    def ask(self) -> None:
        """Have the shim say what it always says."""
        self.intake.accept(A, body(1, 60.0), 0.01)


@pytest.mark.row("T17")
def test_figures_stand_in_the_next_round_also_of_a_shim_that_says_the_same(sim_world: SimWorld) -> None:
    kept = Agent(sim_world)
    kept.ask()
    assert kept.shown() == []
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    assert (kept.shown(), kept.shown("side"), kept.intake.n_read) == ([3.5], [0], 2)
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    assert (kept.intake.n_read, kept.intake.n_unchanged) == (2, 1), "what is the same is not read again"
    kept.intake.take_stats({A.id: (IDLE,)})
    kept.ask()
    assert (kept.shown(), kept.shown("side")) == ([], [0]), "a container that is gone is gone"


@pytest.mark.row("T17")
async def test_when_a_container_was_last_seen_moves_with_what_the_runtime_says(sim_world: SimWorld) -> None:
    kept = Agent(sim_world)
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    (before,) = kept.shown("web", "container_last_seen")
    await asyncio.sleep(60.0)  # in virtual time
    kept.ask()
    assert kept.shown("web", "container_last_seen") == [before], "the runtime has not been heard of since"
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    (after,) = kept.shown("web", "container_last_seen")
    assert after - before == pytest.approx(60.0, abs=0.1)
    assert kept.intake.n_read == 1


@pytest.mark.row("T17")
def test_a_runtime_that_tells_nothing_any_more_leaves_no_figure_behind(sim_world: SimWorld) -> None:
    kept = Agent(sim_world)
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    kept.intake.take_stats(None)
    kept.ask()
    assert (kept.shown(), kept.shown("side")) == ([], [])
    assert kept.shown("", CPU), "the pod's stay"


def test_a_sandbox_that_is_gone_is_forgotten(sim_world: SimWorld) -> None:
    kept = Agent(sim_world)
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.intake.forget(A.id)
    kept.store.remove(A.id)
    kept.store.add(A)
    kept.store.describe(A.id, TWO)
    kept.ask()
    assert kept.shown() == []


@pytest.mark.row("T18")
def test_what_the_settings_leave_out_is_left_out(sim_world: SimWorld) -> None:
    kept = Agent(sim_world, cadvisor_without=("cpu",))
    kept.intake.take_stats({A.id: (BUSY, IDLE)})
    kept.ask()
    assert kept.shown() == []
    assert kept.shown("web", "container_memory_rss") == [80 * MIB]
