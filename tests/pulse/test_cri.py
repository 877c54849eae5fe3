"""CriSource: the pods are known as soon as the runtime says them, and stay known whatever becomes of it."""

import asyncio
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.cri import Pace, Runtime, socket_path
from isopod.pulse.cri_client import FILE, Messages, load_messages
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Container, Pod
from isopod.pulse.pods import VALUE_CHARS_MAX, ContainerRow, PodRow, join, wanted
from isopod.world.errors import BadRecord, InvalidArgument, ToolMissing
from isopod.world.world import World
from tests.pulse.cri_kit import PACE, Watched, started
from tests.pulse.fake_cri import Cri, GrpcCri, MemoryCri, Refused

ROOT = Path(__file__).parents[2]
WEB = PodRow(
    "sandbox-1",
    "uid-1",
    "web",
    "shop",
    runtime_handler="kata-qemu",
    created_ns=1_700_000_000_000_000_000,
    labels=(("app", "web"), ("tier", "front")),
    annotations=(("team", "blue"), ("note", "n")),
)
DB = PodRow("sandbox-2", "uid-2", "db", "shop")
NGINX = ContainerRow("c1", "sandbox-1", "nginx", "docker.io/library/nginx:1.27")


# --- what is told ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("K10", "T12")
async def test_pods_are_told_with_everything_that_is_kept_of_them(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [DB, WEB]
    cri.behaviour.containers = [NGINX, ContainerRow("c0", "sandbox-1", "init", "busybox"), ContainerRow("cx", "unknown", "x", "y")]
    watched = Watched(world, cri, pod_labels=("app", "missing"), pod_annotations=("team",))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().state == "known")
        said = watched.source.statistics()
    assert watched.pods == {
        "sandbox-2": Pod("uid-2", "db", "shop"),
        "sandbox-1": Pod(
            "uid-1",
            "web",
            "shop",
            source="cri",
            runtime_handler="kata-qemu",
            created_ns=1_700_000_000_000_000_000,
            labels=(("app", "web"),),
            annotations=(("team", "blue"),),
            containers=(Container("c0", "init", "busybox"), Container("c1", "nginx", "docker.io/library/nginx:1.27")),
        ),
    }
    assert (said.state, said.api, said.runtime, said.n_pods, said.n_containers, said.error) == ("known", "v1", "fake 1.0", 2, 2, "")


@pytest.mark.row("T12")
async def test_a_runtime_that_knows_v1alpha2_only_is_asked_by_that(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.apis = ("v1alpha2",)
    cri.behaviour.pods = [WEB]
    watched = Watched(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
        await watched.rounds_more(2)
        assert watched.source.statistics().api == "v1alpha2"
    assert watched.pods["sandbox-1"].name == "web"
    assert cri.behaviour.calls[:3] == ["v1 Version", "v1alpha2 Version", "v1alpha2 ListPodSandbox"]
    assert cri.behaviour.n("v1 Version") == 1, "v1 is tried once for each connection"


@pytest.mark.row("T12")
async def test_a_runtime_that_is_upgraded_is_asked_by_v1_again(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.apis = ("v1alpha2",)
    cri.behaviour.pods = [WEB]
    watched = Watched(world, cri)
    async with watched.running():
        async with started(cri):
            await watched.until(lambda: watched.source.statistics()[:2] == ("known", "v1alpha2"))
        cri.behaviour.apis = ("v1",)
        async with started(cri):
            await watched.until(lambda: watched.source.statistics()[:2] == ("known", "v1"))
    assert [list(each) for each in watched.rounds] == [["sandbox-1"]]


@pytest.mark.row("T12", "K17")
async def test_a_socket_behind_which_there_is_no_cri_is_an_error_with_a_hint(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.apis = ()
    watched = Watched(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().errors.get("unsupported", 0) >= 2)
        cri.behaviour.apis = ("v1",)
        await watched.until(lambda: watched.rounds)
    assert any(b'"cri.failed"' in line and b"cri plugin disabled" in line for line in watched.log)


@pytest.mark.row("T12")
async def test_only_a_change_is_told(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    watched = Watched(world, cri)
    async with started(cri), watched.running():
        await watched.rounds_more(2)
        cri.behaviour.pods = [WEB]
        await watched.rounds_more(2)
        cri.behaviour.containers = [NGINX]
        await watched.rounds_more(2)
        cri.behaviour.pods = []
        await watched.rounds_more(2)
    assert [{key: len(pod.containers) for key, pod in each.items()} for each in watched.rounds] == [
        {},
        {"sandbox-1": 0},
        {"sandbox-1": 1},
        {},
    ]


# --- what becomes of the runtime ------------------------------------------------------------------------------------------


@pytest.mark.row("K10", "T12", "K17")
async def test_a_runtime_that_comes_late_is_found(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB]
    watched = Watched(world, cri)
    async with watched.running():
        await watched.rounds_more(2)
        assert watched.source.statistics().state == "away"
        assert watched.rounds == []
        async with started(cri):
            await watched.until(lambda: watched.rounds)
    assert [line for line in watched.log if b'"cri.failed"' in line and b"no such socket" in line][1:] == [], "it is said once"
    assert watched.source.statistics().errors.keys() >= {"not_started"}


@pytest.mark.row("K10", "T12", "K17")
async def test_a_restart_loses_no_label(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB, DB]
    watched = Watched(world, cri)
    async with watched.running():
        for _ in range(3):
            async with started(cri):
                n_known = sum(b'"cri.known"' in line for line in watched.log)
                await watched.until(lambda: sum(b'"cri.known"' in line for line in watched.log) > n_known)  # noqa: B023
            await watched.until(lambda: watched.source.statistics().state != "known")
        cri.behaviour.pods = [WEB]
        async with started(cri):
            await watched.until(lambda: len(watched.pods) == 1)
    assert [sorted(each) for each in watched.rounds] == [["sandbox-1", "sandbox-2"], ["sandbox-1"]], "what is away says nothing"


@pytest.mark.row("T12", "K17")
@pytest.mark.parametrize("method", ["Version", "ListPodSandbox", "ListContainers"])
async def test_each_call_has_a_deadline(pair: tuple[World, Cri], method: str) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB]
    cri.behaviour.hung = (method,)
    watched = Watched(world, cri, PACE._replace(call_s=0.2))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().errors.get("deadline_exceeded", 0) >= 2)
        assert watched.rounds == [], "half an answer is none"
        assert any(b'"cri.failed"' in line and f"{method} of".encode() in line for line in watched.log)
        cri.behaviour.hung = ()
        await watched.until(lambda: watched.rounds)
    assert watched.source.statistics().n_pods == 1


@pytest.mark.row("T12", "K17")
@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNKNOWN"])
async def test_a_failing_round_keeps_what_is_known(pair: tuple[World, Cri], status: str) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB]
    watched = Watched(world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
        cri.behaviour.refusal = Refused(status, "server is not initialized yet")
        cri.behaviour.pods = []
        await watched.until(lambda: watched.source.statistics().n_failed >= 3)
        assert "server is not initialized yet" in watched.source.statistics().error
        assert watched.source.statistics().n_pods == 1
        cri.behaviour.refusal, cri.behaviour.pods = None, [WEB, DB]
        await watched.until(lambda: len(watched.rounds) > 1)
    assert [sorted(each) for each in watched.rounds] == [["sandbox-1"], ["sandbox-1", "sandbox-2"]]


@pytest.mark.row("T12")
@pytest.mark.virtual_time
async def test_pauses_after_failures_double_and_vary_and_have_an_end(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    cri.behaviour.refusal = Refused("INTERNAL", "no")
    watched = Watched(world, cri, Pace())
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().n_failed >= 3)
        await asyncio.sleep(600)
    pauses = [b - a for a, b in itertools.pairwise(cri.behaviour.at_s)]
    assert 0.25 <= pauses[0] <= 0.5 < pauses[2] <= 2.0
    assert all(15 <= pause <= 30 for pause in pauses[-5:])
    assert len({round(pause, 3) for pause in pauses[-5:]}) > 1, "machines that were started together do not ask together"


@pytest.mark.row("T12")
@pytest.mark.virtual_time
async def test_a_slow_runtime_is_asked_less_often(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    cri.behaviour.delay_s = 0.5
    watched = Watched(world, cri, Pace())
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
        for _ in range(200):
            watched.source.wake()
            await asyncio.sleep(0.1)
    assert 1 <= cri.behaviour.n("v1 ListPodSandbox") <= 4, "a round of one second rests nine, however often it is woken"


# --- waking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.row("T12")
@pytest.mark.virtual_time
async def test_wakes_are_put_together(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    watched = Watched(world, cri, Pace())
    async with started(cri), watched.running():
        await asyncio.sleep(100)
        n_before = cri.behaviour.n("v1 ListPodSandbox")
        for _ in range(1000):
            watched.source.wake()
            await asyncio.sleep(0.0001)
        cri.behaviour.pods = [WEB]
        begun_s = asyncio.get_running_loop().time()
        await watched.until(lambda: watched.pods)
        assert asyncio.get_running_loop().time() - begun_s < 0.5
        assert cri.behaviour.n("v1 ListPodSandbox") - n_before <= 3


@pytest.mark.row("T12")
@pytest.mark.virtual_time
async def test_after_a_wake_it_asks_often_and_then_ever_less(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    watched = Watched(world, cri, Pace())
    async with started(cri), watched.running():
        await asyncio.sleep(200)
        before = len(cri.behaviour.calls)
        watched.source.wake()
        await asyncio.sleep(200)
    at = [when for when, call in zip(cri.behaviour.at_s[before:], cri.behaviour.calls[before:], strict=True) if "Pod" in call]
    pauses = [b - a for a, b in itertools.pairwise(at)]
    assert pauses[0] < 0.3
    assert [round(pause) for pause in pauses[-3:]] == [20, 20, 20]
    assert len(at) < 20


@pytest.mark.row("T12")
@pytest.mark.virtual_time
async def test_a_runtime_that_fails_is_not_hammered_by_wakes(memory_pair: tuple[World, MemoryCri]) -> None:
    world, cri = memory_pair
    cri.behaviour.refusal = Refused("UNAVAILABLE", "no")
    watched = Watched(world, cri, Pace())
    async with started(cri), watched.running():
        for _ in range(1000):
            watched.source.wake()
            await asyncio.sleep(0.01)
        assert len(cri.behaviour.calls) <= 30


# --- hostile answers ------------------------------------------------------------------------------------------------------


@pytest.mark.row("T12", "K17")
async def test_a_receiver_that_fails_does_not_end_the_source(pair: tuple[World, Cri]) -> None:
    world, cri = pair
    cri.behaviour.pods = [WEB]
    told: list[dict[str, Pod]] = []

    def receive(pods: dict[str, Pod]) -> None:
        told.append(pods)
        if len(told) == 1:
            raise ValueError("a fault of the receiver")

    watched = Watched(world, cri, on_pods=receive)
    async with started(cri), watched.running():
        await watched.until(lambda: len(told) == 2)
    assert watched.source.statistics().errors == {"bug": 1}
    assert any(b'"cri.bug"' in line and b"a fault of the receiver" in line for line in watched.log)


@pytest.mark.row("T12", "K17")
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff\x01", b"<html>", b"\x0a\x05\x0a\x10abc"])
async def test_answers_that_are_none_are_errors_of_the_tree(host_world: World, folder: str, data: bytes) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods = [WEB]
    watched = Watched(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
        cri.raw["ListPodSandbox"] = data
        await watched.until(lambda: watched.source.statistics().errors.get("protocol_violation", 0) >= 1)
        cri.raw.clear()
        await watched.until(lambda: watched.source.statistics().state == "known")
    assert len(watched.rounds) == 1
    assert not any(b'"cri.bug"' in line for line in watched.log)


@pytest.mark.row("T12")
async def test_one_pod_with_bytes_that_are_no_text_spoils_no_other(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods = [WEB, DB]
    cri.raw["ListPodSandbox"] = cri.encoded("ListPodSandbox").replace(b"blue", b"bl\xff\xfe")
    watched = Watched(host_world, cri, pod_annotations=("team",))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
    assert watched.pods["sandbox-1"].annotations == (("team", "bl\ufffd\ufffd"),)
    assert watched.pods["sandbox-2"].name == "db"


@pytest.mark.row("T12")
async def test_an_answer_that_is_too_large_is_refused(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.raw["ListPodSandbox"] = b"\x0a" + b"\x80" * (65 << 20)
    watched = Watched(host_world, cri)
    async with started(cri), watched.running():
        await watched.until(lambda: watched.source.statistics().errors.get("peer", 0) >= 1)
    assert "RESOURCE_EXHAUSTED" in watched.source.statistics().error


async def test_a_socket_of_another_kind_of_server_is_an_error(host_world: World, folder: str) -> None:
    """Something that takes connections and says nonsense, or nothing."""
    path = f"{folder}/cri.sock"

    class Nonsense(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:  # uvloop's own
            transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            transport.close()

    server = await asyncio.get_running_loop().create_unix_server(Nonsense, path)
    watched = Watched(host_world, GrpcCri(path), PACE._replace(call_s=1.0))
    async with watched.running():
        await watched.until(lambda: watched.source.statistics().n_failed >= 2)
    assert watched.source.statistics().errors.keys() <= {"disconnected", "deadline_exceeded"}
    server.close()
    await server.wait_closed()


# --- grpcio ---------------------------------------------------------------------------------------------------------------


@pytest.mark.row("T12")
async def test_what_is_asked(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    watched = Watched(host_world, cri, PACE._replace(call_s=5.0))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
    assert cri.requests == {"Version": b"\x0a\x050.1.0", "ListPodSandbox": b"", "ListContainers": b"\x0a\x04\x12\x02\x08\x01"}
    assert cri.left_s is not None
    assert 0 < cri.left_s < 6.0, "the runtime is told the deadline"


async def test_paths_with_blanks_and_signs(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/a b#c%20d.sock")
    cri.behaviour.pods = [WEB]
    # The server's own address is a URI too: it listens beside, and the odd name is a link to it.
    odd, cri.path = cri.path, f"{folder}/plain.sock"
    async with started(cri):
        Path(odd).symlink_to(cri.path)
        cri_odd = GrpcCri(odd)
        watched = Watched(host_world, cri_odd)
        async with watched.running():
            await watched.until(lambda: watched.rounds)
    assert list(watched.pods) == ["sandbox-1"]


@pytest.mark.row("T12")
async def test_the_loop_is_the_agents_own(host_world: World, folder: str) -> None:
    """grpcio's asyncio client on uvloop, in this thread: what it tells is told between two turns of this loop."""
    import threading

    import uvloop

    cri = GrpcCri(f"{folder}/cri.sock")
    seen: list[tuple[asyncio.AbstractEventLoop, int]] = []
    watched = Watched(host_world, cri, on_pods=lambda _: seen.append((asyncio.get_running_loop(), threading.get_ident())))
    async with started(cri), watched.running():
        await watched.until(lambda: seen)
    assert seen == [(asyncio.get_running_loop(), threading.get_ident())]
    assert isinstance(seen[0][0], uvloop.Loop)


async def test_two_thousand_pods_are_read_at_once(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    many = tuple((f"key-{i}", "v" * 40) for i in range(20))
    cri.behaviour.pods = [PodRow(f"sandbox-{i}", f"uid-{i}", f"pod-{i}", "ns", labels=many, annotations=many) for i in range(2000)]
    cri.behaviour.containers = [ContainerRow(f"c-{i}", f"sandbox-{i}", "main", "image") for i in range(2000)]
    watched = Watched(host_world, cri, pod_labels=("key-7",))
    async with started(cri), watched.running():
        await watched.until(lambda: watched.rounds)
    assert len(watched.pods) == 2000
    assert watched.pods["sandbox-1999"].labels == (("key-7", "v" * 40),)


IMPORTS = """
import asyncio, sys
from isopod.pulse.cri import CriSource
from isopod.pulse.local import LocalSource
from isopod.runtime.logger import Logger
from isopod.world.host.world import make_host_world

async def main(path):
    world = make_host_world()
    source = CriSource(world, path, on_pods=print, logger=Logger(lambda line: None, world.clock))
    task = asyncio.get_running_loop().create_task(source.run())
    while not source.statistics().n_rounds:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.close()

asyncio.run(main(sys.argv[1]))
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("grpc", "google")))
"""


@pytest.mark.row("T4")
def test_an_agent_whose_runtime_is_not_there_loads_no_grpcio(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "none.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout == "[]\n"


def test_the_compiled_protocol_is_what_the_sources_say(tmp_path: Path) -> None:
    target = tmp_path / "set"
    command = ["protoc", f"--proto_path={ROOT}/proto/cri", "--include_imports", f"--descriptor_set_out={target}", "cri.proto"]
    subprocess.run(command, check=True, timeout=60)
    assert Path(FILE).read_bytes() == target.read_bytes(), "make setup"


async def test_a_protocol_that_was_not_compiled_is_told(host_world: World, folder: str) -> None:
    with pytest.raises(ToolMissing, match=r"cri\.binpb") as missing:
        await load_messages(host_world.disk, f"{folder}/cri.binpb")
    assert "protobuf-compiler" in missing.value.hint
    for data in (b"\xff", b"", b"\x0a\x03\x0a\x01x"):
        with pytest.raises(BadRecord, match="does not describe the CRI"):
            Messages(data)


# --- endpoints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("/run/containerd/containerd.sock", "/run/containerd/containerd.sock"),
        ("unix:///run/crio/crio.sock", "/run/crio/crio.sock"),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("//run/x.sock", "//run/x.sock"),
    ],
)
def test_endpoints(endpoint: str, path: str) -> None:
    assert socket_path(endpoint) == path


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("tcp://127.0.0.1:10010", "tcp is not spoken"),
        ("http://x", "http is not spoken"),
        ("npipe:////./pipe/containerd", "npipe is not spoken"),
        ("127.0.0.1:10010", "absolute path"),
        ("run/x.sock", "absolute path"),
        ("unix://run/x.sock", "absolute path"),
        ("unix://", "absolute path"),
        ("", "absolute path"),
        ("/run/\0", "absolute path"),
        ("/" + "x" * 107, "at most 107"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        socket_path(endpoint)


# --- pods -----------------------------------------------------------------------------------------------------------------


def test_two_names_that_would_be_one_label_are_one() -> None:
    want = wanted(["app.kubernetes.io/name", "app-kubernetes-io/name", "", "x"], ["a.b", "a/b"])
    assert want == (("app.kubernetes.io/name", "x"), ("a.b",))


def test_values_are_cut_and_ids_checked() -> None:
    rows = [PodRow("", "u", "n", "s"), PodRow("x" * 129, "u", "n", "s"), PodRow("ok", "u", "n", "s", labels=(("a", "v" * 5000),))]
    found = join(rows, [], wanted(["a"], []), pods_max=10)
    assert list(found) == ["ok"]
    assert found["ok"].labels == (("a", "v" * VALUE_CHARS_MAX),)


def test_of_too_many_pods_the_first_are_kept() -> None:
    rows = [PodRow(f"p{i}", "u", "n", "s") for i in range(5)] + [PodRow("p0", "u", "again", "s")]
    found = join(rows, [], wanted([], []), pods_max=3)
    assert list(found) == ["p0", "p1", "p2"]
    assert found["p0"].name == "again"


@given(
    names=st.lists(st.text(max_size=8), max_size=6),
    pairs=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=12),
)
def test_whatever_is_allowed_no_label_stands_twice(names: list[str], pairs: list[tuple[str, str]]) -> None:
    row = PodRow("x", "u", "n", "s", labels=tuple(pairs), annotations=tuple(pairs))
    pod = join([row], [], wanted(names, names), pods_max=1)["x"]
    labels = [name for name, _ in kata_labels("x", pod)]
    assert len(labels) == len(dict.fromkeys(labels))


def test_a_runtime_is_what_the_source_takes() -> None:
    from isopod.pulse.cri_client import GrpcRuntime

    assert {name for name in vars(Runtime) if not name.startswith("_")} <= set(dir(GrpcRuntime))
