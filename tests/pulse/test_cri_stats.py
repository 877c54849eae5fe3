"""What containers use, by their runtime: asked at its time, told by sandbox, and never at the cost of whose the sandboxes are."""

import asyncio
import itertools

import pytest

from isopod.pulse.converter import Converter
from isopod.pulse.cri import Pace
from isopod.pulse.model import ContainerStats, Pod, SandboxStats, Target
from isopod.pulse.pods import ContainerRow, PodRow
from isopod.world.world import World
from tests.pulse.cri_kit import PACE, Watched, started
from tests.pulse.fake_cri import Cri, GrpcCri, MemoryCri, Refused
from tests.pulse.guests import guest

STATS = "v1 ListContainerStats"
WEB = PodRow("sandbox-1", "uid-1", "web", "shop")
DB = PodRow("sandbox-2", "uid-2", "db", "shop")
NGINX = ContainerRow("c1", "sandbox-1", "nginx", "nginx:1.27", 5)
SIDE = ContainerRow("c2", "sandbox-1", "side", "envoy", 6)
MYSQL = ContainerRow("c3", "sandbox-2", "mysql", "mysql:8", 7)
BUSY = ContainerStats("c1", 3_000_000_000, 100, 200, 50, 1000, 7, 1, 4, 4096, 3, "/var/lib/x")
IDLE = ContainerStats("c2", cpu_ns=0, working_set_bytes=0)


def serving(cri: Cri) -> None:
    """Have a runtime list one pod of two containers, and tell of them."""
    cri.behaviour.pods = [WEB]
    cri.behaviour.containers = [NGINX, SIDE]
    cri.behaviour.stats = [BUSY, IDLE]


def stats_of(world: World, cri: Cri, pace: Pace = PACE, *, interval_s: float = 0.1, **told: object) -> Watched:
    return Watched(world, cri, pace, has_stats=True, stats_interval_s=interval_s, **told)


# --- what is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("T17")
async def test_figures_are_told_by_sandbox_with_what_is_absent_absent(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    cri.behaviour.pods = [WEB, DB]
    cri.behaviour.stats += [ContainerStats("of nobody", cpu_ns=1), ContainerStats("")]
    watched = stats_of(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        said = watched.source.statistics().stats
    assert watched.stats[0] == {"sandbox-1": (BUSY, IDLE), "sandbox-2": ()}
    assert (said.state, said.n_containers, said.error) == ("known", 2, "")
    assert watched.pods["sandbox-1"].containers[0].created_ns == 5


@pytest.mark.row("T17", "T12")
async def test_v1alpha2_tells_the_same(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    cri.behaviour.apis = ("v1alpha2",)
    watched = stats_of(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
    assert watched.stats[0] == {"sandbox-1": (BUSY, IDLE)}
    assert cri.behaviour.n("v1alpha2 ListContainerStats") >= 1
    assert cri.behaviour.n(STATS) == 0


@pytest.mark.row("T17")
async def test_a_container_that_is_gone_is_gone_with_the_next_round(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    watched = stats_of(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        cri.behaviour.stats = [IDLE]
        await watched.until(lambda: watched.stats[-1] == {"sandbox-1": (IDLE,)})
        cri.behaviour.pods, cri.behaviour.containers = [DB], [MYSQL]
        await watched.until(lambda: watched.stats[-1] == {"sandbox-2": ()})


@pytest.mark.row("T17")
async def test_only_sandboxes_that_are_shown_are_told_and_without_any_nobody_is_asked(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    cri.behaviour.pods = [WEB, DB]
    cri.behaviour.containers.append(MYSQL)
    cri.behaviour.stats.append(BUSY._replace(id="c3"))
    shown: list[str] = []
    watched = stats_of(world, cri, is_shown=lambda identifier: identifier in shown)
    async with started(cri), watched.running():
        await watched.rounds_more(3)
        assert cri.behaviour.n(STATS) == 0
        shown.append("sandbox-2")
        await watched.until(lambda: watched.stats)
    assert watched.stats[0] == {"sandbox-2": (BUSY._replace(id="c3"),)}


@pytest.mark.row("T12")
async def test_a_runtime_without_containers_is_not_asked_what_they_use(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB]
    watched = stats_of(world, cri)
    async with started(cri), watched.running():
        await watched.rounds_more(3)
    assert cri.behaviour.n(STATS) == 0
    assert watched.source.statistics().stats.state == "unasked"


# --- when it is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.row("T17")
@pytest.mark.virtual_time
async def test_rounds_come_at_their_time_in_the_interval(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    cri.behaviour.delays_s["ListContainerStats"] = 0.3
    watched = stats_of(world, cri, Pace(), interval_s=10.0)
    async with started(cri), watched.running():
        await asyncio.sleep(200)
    at = times(cri)
    assert 19 <= len(at) <= 21
    assert all(b - a == pytest.approx(10.0, abs=0.01) for a, b in itertools.pairwise(at)), "they do not drift"


@pytest.mark.row("T17", "T12")
@pytest.mark.virtual_time
async def test_after_a_slow_round_it_rests_nine_times_as_long(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    cri.behaviour.delays_s["ListContainerStats"] = 4.0
    watched = stats_of(world, cri, Pace(), interval_s=10.0)
    async with started(cri), watched.running():
        await asyncio.sleep(400)
    pauses = [b - a for a, b in itertools.pairwise(times(cri))]
    assert pauses
    assert all(pause >= 40.0 for pause in pauses)


@pytest.mark.row("T17")
@pytest.mark.virtual_time
async def test_new_containers_come_early_but_not_all_the_time(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    watched = stats_of(world, cri, Pace(), interval_s=60.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        for number in range(100):
            cri.behaviour.containers = [NGINX, ContainerRow(f"new-{number}", "sandbox-1", f"new-{number}", "x")]
            watched.source.wake()
            await asyncio.sleep(3.0)
    at = times(cri)
    pauses = [b - a for a, b in itertools.pairwise(at)]
    assert min(pauses) > 14.9
    assert pauses[0] < 20.0


def times(cri: Cri) -> list[float]:
    """Return when it was asked what containers use."""
    behaviour = cri.behaviour
    return [at for at, call in zip(behaviour.at_s, behaviour.calls, strict=True) if call == STATS]


# --- what becomes of the runtime ------------------------------------------------------------------------------------------


@pytest.mark.row("T12", "T17", "K17")
async def test_a_call_that_hangs_has_a_deadline_and_keeps_no_label_waiting(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    cri.behaviour.hung = ("ListContainerStats",)
    watched = stats_of(world, cri, PACE._replace(stats_call_s=0.3, share=0.0))
    async with started(cri), watched.running():
        await watched.until(lambda: cri.behaviour.n(STATS) == 1)
        cri.behaviour.pods = [WEB, DB]
        await watched.until(lambda: len(watched.pods) == 2)
        await watched.until(lambda: watched.source.statistics().stats.n_failed >= 2)
        assert watched.source.statistics().state == "known"
        assert watched.source.statistics().n_failed == 0
        assert "ListContainerStats of" in watched.source.statistics().stats.error
        cri.behaviour.hung = ()
        await watched.until(lambda: watched.stats and watched.stats[-1])
    assert sum(b'"cri.stats_failed"' in line for line in watched.log) == 1, "it is said once"


@pytest.mark.row("T12", "T17", "K17")
@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNKNOWN"])
async def test_a_round_that_fails_keeps_what_is_told_and_leaves_the_connection(pair: tuple[World, Cri], status: str) -> None:
    world, cri = pair
    serving(cri)
    watched = stats_of(world, cri, interval_s=2.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        cri.behaviour.refusals["ListContainerStats"] = Refused(status, "no such cgroup")
        cri.behaviour.containers = [NGINX, SIDE, ContainerRow("c9", "sandbox-1", "new", "x")]  # so that it is asked early
        await watched.until(lambda: watched.source.statistics().stats.n_failed >= 1)
        assert "no such cgroup" in watched.source.statistics().stats.error
    assert watched.source.statistics().n_failed == 0
    assert cri.behaviour.n("v1 Version") == 1
    assert None not in watched.stats


@pytest.mark.row("T17")
async def test_a_runtime_that_does_not_know_the_call_is_asked_again_over_the_next_connection(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    cri.behaviour.unknown = ("ListContainerStats",)
    watched = stats_of(world, cri)
    async with watched.running():
        async with started(cri):
            await watched.until(lambda: watched.stats == [None])
            await watched.rounds_more(4)
            assert cri.behaviour.n(STATS) == 1
            assert watched.source.statistics()[:2] == ("known", "v1")
            assert watched.source.statistics().stats.state == "unsupported"
        await watched.until(lambda: watched.source.statistics().state != "known")
        cri.behaviour.unknown = ()
        async with started(cri):
            await watched.until(lambda: watched.stats[-1] == {"sandbox-1": (BUSY, IDLE)})
    assert watched.stats.count(None) == 1
    assert watched.source.statistics().errors.get("unsupported") is None, "whose the sandboxes are is known all the same"


@pytest.mark.row("T17")
@pytest.mark.virtual_time
async def test_what_no_round_confirms_is_let_go_of_after_three_intervals(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    watched = stats_of(world, cri, Pace(), interval_s=10.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        cri.behaviour.refusals["ListContainerStats"] = Refused("INTERNAL", "no")
        begun_s = asyncio.get_running_loop().time()
        await watched.until(lambda: watched.stats[-1] is None)
        assert 20.0 <= asyncio.get_running_loop().time() - begun_s <= 31.0
        await asyncio.sleep(100)
        assert watched.stats.count(None) == 1, "it is told once"
        cri.behaviour.refusals.clear()
        await watched.until(lambda: watched.stats[-1])


@pytest.mark.row("T17")
@pytest.mark.virtual_time
async def test_what_never_succeeds_is_told_after_three_intervals(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    cri.behaviour.refusals["ListContainerStats"] = Refused("INTERNAL", "no")
    watched = stats_of(world, cri, Pace(), interval_s=10.0)
    async with started(cri), watched.running():
        await asyncio.sleep(25)
        assert watched.stats == []
        await asyncio.sleep(300)
    assert watched.stats == [None]
    assert 30 <= cri.behaviour.n(STATS) <= 50, "it is asked no more often than at the interval"


@pytest.mark.row("T12", "T17")
async def test_a_restart_loses_nothing_and_goes_on(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    watched = stats_of(world, cri, interval_s=0.5)
    async with watched.running():
        for cpu_ns in (10, 20, 30):
            cri.behaviour.stats = [BUSY._replace(cpu_ns=cpu_ns)]
            async with started(cri):
                await watched.until(lambda: watched.stats and watched.stats[-1] == {"sandbox-1": tuple(cri.behaviour.stats)})
            await watched.until(lambda: watched.source.statistics().state != "known")
    assert [list(each) for each in watched.rounds] == [["sandbox-1"]]
    assert None not in watched.stats


@pytest.mark.row("T12", "T17")
async def test_a_connection_that_is_let_go_of_during_the_call_is_a_failure_and_no_end(host_world: World, folder: str) -> None:
    """The runtime hangs in one call and fails in another: who asks whose the sandboxes are connects anew."""
    cri = GrpcCri(f"{folder}/cri.sock")
    serving(cri)
    cri.behaviour.hung = ("ListContainerStats",)
    watched = stats_of(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: cri.behaviour.n(STATS) == 1)
        cri.behaviour.refusals["ListPodSandbox"] = Refused("INTERNAL", "no")
        await watched.until(lambda: watched.source.statistics().stats.n_failed == 1)
        assert "let go of" in watched.source.statistics().stats.error
        cri.behaviour.hung = ()
        cri.behaviour.refusals.clear()
        await watched.until(lambda: watched.stats and watched.stats[-1])


@pytest.mark.row("K17")
async def test_a_receiver_that_fails_does_not_end_the_rounds(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    serving(cri)
    told: list[SandboxStats | None] = []

    def receive(stats: SandboxStats | None) -> None:
        told.append(stats)
        if len(told) == 1:
            raise ValueError("a fault of the receiver")

    watched = stats_of(world, cri, on_stats=receive)
    async with started(cri), watched.running():
        await watched.until(lambda: len(told) >= 2)
    assert any(b'"cri.bug"' in line and b"a fault of the receiver" in line for line in watched.log)


# --- shims that hang ------------------------------------------------------------------------------------------------------


@pytest.mark.row("T12", "T17")
async def test_one_shim_that_hangs_takes_the_figures_of_no_other_sandbox(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB, DB]
    cri.behaviour.containers = [NGINX, SIDE, MYSQL]
    cri.behaviour.stats = [BUSY, IDLE, BUSY._replace(id="c3")]
    cri.behaviour.hung_pods = ("sandbox-2",)
    watched = stats_of(world, cri, PACE._replace(stats_call_s=1.0, stats_each_s=0.5, share=0.0))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        assert watched.stats[-1] == {"sandbox-1": (BUSY, IDLE), "sandbox-2": ()}
        n_calls = cri.behaviour.n(STATS)
        n_told = len(watched.stats)
        await watched.until(lambda: len(watched.stats) > n_told)
        assert cri.behaviour.n(STATS) <= n_calls + 4, "it does not wait for all of them again"
        cri.behaviour.hung_pods = ()
        await watched.until(lambda: watched.stats[-1] == {"sandbox-1": (BUSY, IDLE), "sandbox-2": (BUSY._replace(id="c3"),)})
    assert watched.source.statistics().stats.n_failed == 0


@pytest.mark.row("T12", "T17")
async def test_a_shim_that_hangs_at_first_leaves_its_counters_to_the_runtime(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB, DB]
    cri.behaviour.containers = [NGINX, MYSQL]
    cri.behaviour.stats = [BUSY, BUSY._replace(id="c3")]
    cri.behaviour.hung_pods = ("sandbox-2",)
    converter = Converter()
    converter.await_stats()
    shown: list[tuple[SandboxStats | None, list[bytes]]] = []

    def take(stats: SandboxStats | None) -> None:
        converter.take_stats(stats, now_ns=1)
        families = converter.take(Target("sandbox-2", "go", ""), guest(), watched.pods["sandbox-2"], at_s=1.0, now_ns=5)
        lines = families["container_cpu_usage_seconds_total"].text.splitlines()
        shown.append((stats, [line.rpartition(b" ")[2] for line in lines if b'container="mysql"' in line]))

    watched = stats_of(world, cri, PACE._replace(stats_call_s=1.0, stats_each_s=0.5, share=0.0), on_stats=take)
    async with started(cri), watched.running():
        await watched.until(lambda: shown)
        assert shown[0] == ({"sandbox-1": (BUSY,), "sandbox-2": ()}, [])
        cri.behaviour.hung_pods = ()
        await watched.until(lambda: shown[-1][1])
    assert shown[-1][1] == [b"3"]


@pytest.mark.row("T12", "T17")
async def test_a_container_that_cannot_be_counted_takes_the_figures_of_no_other_sandbox(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB, DB]
    cri.behaviour.containers = [NGINX, SIDE, MYSQL]
    cri.behaviour.stats = [BUSY, IDLE, BUSY._replace(id="c3")]
    cri.behaviour.failed_pods = ("sandbox-2",)
    watched = stats_of(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        assert watched.stats[-1] == {"sandbox-1": (BUSY, IDLE), "sandbox-2": ()}
    assert watched.source.statistics().stats.n_failed == 0
    assert not any(b'"cri.bug"' in line for line in watched.log)


@pytest.mark.row("T12", "T17")
@pytest.mark.virtual_time
async def test_hundreds_that_hang_cost_one_deadline_and_an_answer_for_all_brings_one_call_back(
    memory_pair: tuple[World, MemoryCri],
) -> None:
    world, cri = memory_pair
    cri.behaviour.pods = [PodRow(f"sandbox-{i:03}", f"uid-{i}", f"pod-{i}", "ns") for i in range(300)]
    cri.behaviour.containers = [ContainerRow(f"c-{i}", f"sandbox-{i:03}", "main", "image") for i in range(300)]
    cri.behaviour.stats = [BUSY._replace(id=f"c-{i}") for i in range(300)]
    cri.behaviour.hung_pods = tuple(f"sandbox-{i:03}" for i in range(20))
    watched = stats_of(world, cri, Pace(), interval_s=60.0)
    async with started(cri), watched.running():
        begun_s = asyncio.get_running_loop().time()
        await watched.until(lambda: watched.stats)
        took_s = asyncio.get_running_loop().time() - begun_s
        assert took_s == pytest.approx(20.0 + 3 * 2.0, abs=1.0), "all at once, and then eight by eight those that hang"
        told = watched.stats[0]
        assert told is not None
        assert sum(bool(rows) for rows in told.values()) == 280
        cri.behaviour.hung_pods = ()
        await asyncio.sleep(600)
        n_calls, n_rounds = cri.behaviour.n(STATS), watched.source.statistics().stats.n_rounds
        await asyncio.sleep(600)
        assert cri.behaviour.n(STATS) - n_calls == watched.source.statistics().stats.n_rounds - n_rounds
    assert None not in watched.stats


@pytest.mark.row("T12", "T17")
@pytest.mark.virtual_time
async def test_a_runtime_that_hangs_altogether_fails(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    serving(cri)
    cri.behaviour.pods = [WEB, *(PodRow(f"sandbox-{i}", "u", f"pod-{i}", "ns") for i in range(10, 300))]
    cri.behaviour.containers += [ContainerRow(f"c-{i}", f"sandbox-{i}", "main", "image") for i in range(10, 300)]
    watched = stats_of(world, cri, Pace(), interval_s=60.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
        cri.behaviour.hung = ("ListContainerStats",)
        await asyncio.sleep(120)
        assert watched.source.statistics().stats.n_failed == 1
        assert watched.source.statistics().stats.took_s == pytest.approx(20.0 + 5 * 2.0, abs=1.0)
        assert watched.stats[-1] is not None
        await asyncio.sleep(1000)
    assert watched.stats[-1] is None


# --- hostile answers ------------------------------------------------------------------------------------------------------


def field(number: int, data: bytes) -> bytes:
    """Return a field of bytes of protobuf, of less than 128."""
    return bytes((number << 3 | 2, len(data))) + data


def varint(number: int, value: int) -> bytes:
    """Return a field of a number of protobuf."""
    out = bytearray((number << 3,))
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def wrapped(number: int, value: int) -> bytes:
    """Return a field of an UInt64Value."""
    return field(number, varint(1, value))


C1 = field(1, field(1, b"c1"))
"""The attributes of a container."""


@pytest.mark.row("T12", "T17")
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", ()),
        (field(1, b""), ()),
        (field(1, C1), ()),
        (field(1, C1 + field(2, b"")), ()),
        (field(1, C1 + field(2, varint(1, 99))), ()),
        (field(1, field(2, wrapped(2, 7))), ()),
        (field(1, C1 + field(2, field(2, b""))), (ContainerStats("c1", cpu_ns=0),)),
        (field(1, C1 + field(2, wrapped(2, 0))), (ContainerStats("c1", cpu_ns=0),)),
        (field(1, C1 + field(2, wrapped(2, 2**64 - 1))), (ContainerStats("c1", cpu_ns=2**64 - 1),)),
        (field(1, C1 + field(2, wrapped(2, 5)) + field(2, wrapped(2, 6))), (ContainerStats("c1", cpu_ns=6),)),
        (field(1, C1 + field(2, wrapped(2, 5))) + field(1, C1 + field(2, wrapped(2, 6))), (ContainerStats("c1", cpu_ns=6),)),
        (field(1, C1 + field(3, wrapped(5, 1) + wrapped(6, 2))), (ContainerStats("c1", rss_bytes=1, page_faults=2),)),
        (
            field(1, C1 + field(4, field(2, field(1, b"/a\xff")) + wrapped(3, 9))),
            (ContainerStats("c1", written_bytes=9, mountpoint="/a\ufffd"),),
        ),
        (field(1, C1 + field(4, field(2, field(1, b"/a")))), ()),
        (field(1, C1 + field(6, b"io") + field(15, b"?") + field(5, wrapped(3, 8))), (ContainerStats("c1", swap_bytes=8),)),
        (
            field(1, field(1, field(1, b"c1") + field(2, b"\x0a\x01x") + field(3, b"k")) + field(2, wrapped(2, 7))),
            (ContainerStats("c1", cpu_ns=7),),
        ),
    ],
)
async def test_odd_answers(host_world: World, folder: str, answer: bytes, told: tuple[ContainerStats, ...]) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    serving(cri)
    cri.raw["ListContainerStats"] = answer
    watched = stats_of(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
    assert watched.stats[0] == {"sandbox-1": told}
    assert not any(b'"cri.bug"' in line for line in watched.log)


@pytest.mark.row("T12", "T17", "K17")
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff\x01", b"<html>", b"\x0a\x05\x0a\x10abc", b"\x0a\x04\x12\x02\x12\x09"])
async def test_answers_that_are_none_fail_alone(host_world: World, folder: str, data: bytes) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    serving(cri)
    cri.raw["ListContainerStats"] = data
    watched = stats_of(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().stats.n_failed >= 2)
        assert watched.source.statistics().state == "known"
        assert "cannot be read" in watched.source.statistics().stats.error
        cri.raw.clear()
        await watched.until(lambda: watched.stats and watched.stats[-1])
    assert watched.source.statistics().n_failed == 0
    assert not any(b'"cri.bug"' in line for line in watched.log)


@pytest.mark.row("T12", "T17")
async def test_an_answer_that_is_too_large_fails_alone(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    serving(cri)
    cri.raw["ListContainerStats"] = b"\x0a" + b"\x80" * (65 << 20)
    watched = stats_of(host_world, cri, interval_s=5.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().stats.n_failed >= 1)
    assert "RESOURCE_EXHAUSTED" in watched.source.statistics().stats.error
    assert len(watched.pods) == 1


@pytest.mark.row("T17")
async def test_two_thousand_containers_are_read_at_once(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods = [PodRow(f"sandbox-{i}", f"uid-{i}", f"pod-{i}", "ns") for i in range(1000)]
    cri.behaviour.containers = [ContainerRow(f"c-{i}", f"sandbox-{i // 2}", f"n-{i % 2}", "image") for i in range(2000)]
    cri.behaviour.stats = [BUSY._replace(id=f"c-{i}") for i in range(2000)]
    watched = stats_of(host_world, cri, interval_s=30.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
    told = watched.stats[0]
    assert told is not None
    assert {len(rows) for rows in told.values()} == {2}
    assert len(told) == 1000


@pytest.mark.row("T17")
async def test_what_is_asked_and_with_which_deadline(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    serving(cri)
    watched = stats_of(host_world, cri, interval_s=30.0)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.stats)
    assert cri.requests["ListContainerStats"] == b"", "all containers, in one call"
    assert cri.left_s is not None
    assert 0 < cri.left_s < 21.0, "the runtime is told the deadline"


@pytest.mark.row("T12")
async def test_odd_containers(host_world: World, folder: str) -> None:
    """A name that stands in a label alone; a time before the epoch; one id twice."""
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods = [WEB]
    entry = field(1, b"io.kubernetes.container.name") + field(2, b"named")
    before = bytes((7 << 3, *(0xFF,) * 9, 0x01))
    labelled = field(1, b"c1") + field(2, b"sandbox-1") + field(8, entry) + before
    twice = field(1, b"c2") + field(2, b"sandbox-1") + field(3, field(1, b"side"))
    cri.raw["ListContainers"] = field(1, labelled) + field(1, twice) + field(1, twice + varint(7, 9))
    watched = Watched(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
    assert [tuple(each) for each in watched.pods["sandbox-1"].containers] == [("c1", "named", "", 0), ("c2", "side", "", 9)]
    assert isinstance(watched.pods["sandbox-1"], Pod)
