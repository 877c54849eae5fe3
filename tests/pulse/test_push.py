"""Remote write from a store to a receiver: order, ends of series, failures of every kind, bounds, secrets, and Debian's Prometheus."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import pytest

from isopod.net.http.messages import Response
from isopod.pulse.agent import PulseAgent
from isopod.pulse.model import Families, Fragment
from isopod.pulse.push import FLUSH_S, Batch, Pusher, Queue
from isopod.pulse.settings import PulseSettings
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument, IsopodError, UnavailableError
from isopod.world.network import ServerTls, TcpAddress, TlsMaterial
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import authority, client_leaf, server_leaf, server_material
from tests.pulse.prometheus import Prometheus, missing
from tests.pulse.receiver import Cutter, Receiver, Sample
from tests.pulse.server_kit import DB, WEB, Rig
from tests.pulse.shims import FakeShims
from tests.telemetry.kit import Memo

LOAD = "kata_guest_load"
NO_SUCH = 1  # a port where nobody listens
WAIT_S = 60.0
ENDED_S = {"sim": 2.0, "host": 15.0}
"""How long stopping may take; a machine that is busy takes longer, but less than a request may."""


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the pusher does by itself."""
    await wait_for_condition_with_backoff(lambda: bool(condition()), timeout_s=WAIT_S)


class Pushing:
    """A store, a pusher of it, and what it logged. `task` is what runs."""

    def __init__(self, world: World, rig: Rig, settings: PulseSettings) -> None:
        self.rig = rig
        self.memo = Memo(world.clock)
        self.own: Families = {}
        self.pusher = Pusher(world, settings, rig.store, own=lambda: self.own, logger=self.memo.logger)
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Run."""
        self.task = asyncio.get_running_loop().create_task(self.pusher.run())

    async def end(self) -> float:
        """Stop; return how long that took."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return loop.time() - begun_s


@asynccontextmanager
async def pushing(world: World, url: str, *, begins: bool = True, **told: Any) -> AsyncIterator[Pushing]:
    settings = PulseSettings(**{"push_url": url, "push_interval_s": 0.05, "push_timeout_s": 20.0, "view": "kata", **told})
    made = Pushing(world, Rig(world), settings)
    try:
        await made.pusher.open()
        if begins:
            made.begin()
        yield made
    finally:
        await made.end()
        await made.pusher.close()
        await made.rig.client.close()


def last(receiver: Receiver, sandbox: str) -> float | None:
    """Return the value that came last of a sandbox's load: NaN for its end, None if nothing came."""
    values = receiver.times(LOAD, sandbox)
    return values[-1] if values else None


@pytest.mark.row("T20")
async def test_figures_arrive_as_the_specification_says(world: World) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url, push_labels=("cluster=lab",)) as pushed:
        pushed.own = {"kata_pulse_up": Fragment("gauge", b"", b"kata_pulse_up 1\n", 1)}
        pushed.rig.fill("a", WEB, load=0.25)
        await until(lambda: last(receiver, "a"))
        head = receiver.heads[0]
        assert (head["content-encoding"], head["content-type"]) == ("snappy", "application/x-protobuf")
        assert head["x-prometheus-remote-write-version"] == "0.1.0"
        assert head["user-agent"].startswith("isopod-pulse/")
        assert "authorization" not in head
        found = {sample.name: sample for sample in receiver.samples if sample.sandbox}
        assert found[LOAD].value == 0.25
        assert found[LOAD].labels == (
            ("__name__", LOAD),
            ("cluster", "lab"),
            ("cri_name", "web-0"),
            ("cri_namespace", "prod"),
            ("cri_uid", "0d3b"),
            ("item", "load0"),
            ("sandbox_id", "a"),
        )
        assert abs(found[LOAD].at_ms - world.clock.now_ns() / 1e6) < WAIT_S * 1000
        own = [sample for sample in receiver.samples if sample.name == "kata_pulse_up"]
        assert own[0].labels == (("__name__", "kata_pulse_up"), ("cluster", "lab"))


@pytest.mark.row("T20")
async def test_the_view_chooses_what_is_sent(world: World) -> None:
    async def sent(view: str) -> set[str]:
        async with Receiver(world) as receiver, pushing(world, receiver.url, view=view) as pushed:
            pushed.rig.fill("a", WEB)
            await until(lambda: receiver.requests)
            return {sample.name.partition("_")[0] for sample in receiver.samples}

    assert await sent("all") == {"kata", "container"}
    assert await sent("kata") == {"kata"}
    assert await sent("cadvisor") == {"container"}


@pytest.mark.row("T20")
async def test_what_goes_is_said_to_have_ended_exactly_once(world: World) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url) as pushed:
        store = pushed.rig.store
        for each in ("gone", "failing", "stays"):
            pushed.rig.fill(each, WEB, load=1.0, n_lines=2)
        await until(lambda: last(receiver, "gone") and last(receiver, "failing") and last(receiver, "stays"))
        store.remove("gone")
        await until(lambda: math.isnan(last(receiver, "gone") or 0))
        store.fail("failing", "timeout", 3.0)
        store.fail("failing", "timeout", 3.0)
        n_before = len(receiver.times(LOAD, "failing"))
        await until(lambda: len(receiver.times(LOAD, "failing")) > n_before + 4)
        assert not [value for value in receiver.times(LOAD, "failing") if math.isnan(value)], "its last figures are kept for a while"
        store.fail("failing", "timeout", 3.0)
        await until(lambda: math.isnan(last(receiver, "failing") or 0))
        pushed.rig.fill("stays", WEB, load=1.0, n_lines=1)
        await until(lambda: [value for value in receiver.times(LOAD, "stays") if math.isnan(value)])
        n_after = len(receiver.requests)
        await until(lambda: len(receiver.requests) > n_after + 3)
        for sandbox, n_ended in (("gone", 7), ("failing", 7), ("stays", 1)):
            ended = [sample for sample in receiver.samples if sample.sandbox == sandbox and sample.is_stale]
            assert len(ended) == len({sample.labels for sample in ended}) == n_ended, sandbox
        assert {sample.name for sample in receiver.samples if sample.sandbox == "stays" and sample.is_stale} == {LOAD}
        pushed.rig.fill("gone", WEB, load=2.0)
        await until(lambda: last(receiver, "gone") == 2.0)
        assert pushed.pusher.statistics().n_stale == 15


def in_order(samples: list[Sample]) -> bool:
    """Whether each series' samples came in the order of their times, none twice."""
    seen: dict[Any, int] = {}
    for sample in samples:
        if seen.get(sample.labels, -1) >= sample.at_ms:
            return False
        seen[sample.labels] = sample.at_ms
    return True


@pytest.mark.row("T20")
@pytest.mark.parametrize("status", [500, 503, 429])
async def test_what_may_help_later_is_sent_again_and_the_order_is_kept(world: World, status: int) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url) as pushed:
        receiver.answers = [Response.text("not now\nnor later", status)] * 2
        pushed.rig.fill("a", WEB)
        await until(lambda: len(receiver.requests) > 5)
        statistics = pushed.pusher.statistics()
        assert (statistics.n_retries, statistics.n_refused, statistics.n_dropped) == (2, 0, 0)
        assert receiver.n_under_way_max == 1
        assert in_order(receiver.samples)
        gaps = [later - sooner for sooner, later in zip(receiver.came_s, receiver.came_s[1:], strict=False)]
        assert gaps[0] >= 0.25
        assert gaps[1] >= 0.5, "later each time"
        assert pushed.memo.events() == ["pulse.push_failed", "pulse.push_taken"], "once, not for each try"
        assert b"not now" in pushed.memo.lines[0]
        assert b"nor later" not in pushed.memo.lines[0]
    assert statistics.success_s is not None


@pytest.mark.row("T20")
@pytest.mark.parametrize("form", ["seconds", "date", "absurd", "nonsense"])
async def test_retry_after_is_obeyed_within_reason(sim_world: SimWorld, form: str) -> None:
    world = sim_world.world
    value = {
        "seconds": "7",
        "date": formatdate(world.clock.now_ns() / 1e9 + 9, usegmt=True),
        "absurd": "999999999999999",
        "nonsense": "soon",
    }[form]
    low_s, high_s = {"seconds": (7, 8), "date": (7, 10), "absurd": (600, 601), "nonsense": (0.2, 1)}[form]
    async with Receiver(world) as receiver, pushing(world, receiver.url, push_interval_s=1.0) as pushed:
        receiver.answers = [Response.text("slowly", 429, (("retry-after", value),))]
        pushed.rig.fill("a", WEB)
        await wait_for_condition_with_backoff(lambda: len(receiver.came_s) > 1, timeout_s=700)
        assert low_s <= receiver.came_s[1] - receiver.came_s[0] <= high_s


@pytest.mark.row("T20")
@pytest.mark.parametrize("status", [400, 401, 404, 413, 302])
async def test_what_would_be_refused_again_is_let_go_of_and_counted(world: World, status: int) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url) as pushed:
        receiver.answers = [Response(status, (("location", f"http://127.0.0.1:{NO_SUCH}/"),), b"out of order sample")]
        pushed.rig.fill("a", WEB)
        await until(lambda: len(receiver.requests) > 1)
        statistics = pushed.pusher.statistics()
        assert (statistics.n_retries, statistics.n_refused) == (0, 6)
        assert pushed.memo.events()[0] == "pulse.push_refused"
        assert f"status {status}: out of order sample".encode() in pushed.memo.lines[0]


@pytest.mark.row("T20")
async def test_a_receiver_that_resets_and_one_that_is_away_lose_nothing(world: World) -> None:
    receiver = Receiver(world)
    listener = await world.network.listen(TcpAddress("127.0.0.1", 0), Cutter)
    address = listener.address
    assert isinstance(address, TcpAddress)
    receiver.port = address.port
    async with pushing(world, receiver.url) as pushed:
        pushed.rig.fill("a", WEB)
        n_cut = Cutter.n_cut
        await until(lambda: Cutter.n_cut > n_cut + 1)
        await listener.close()
        n_before = pushed.pusher.statistics().n_retries
        await until(lambda: pushed.pusher.statistics().n_retries > n_before + 1)
        n_waiting = pushed.pusher.statistics().n_queued
        assert n_waiting > 1
        await receiver.listen()
        await until(lambda: len(receiver.requests) > n_waiting)
        assert in_order(receiver.samples)
        statistics = pushed.pusher.statistics()
        assert (statistics.n_dropped, statistics.n_refused) == (0, 0)
        assert pushed.memo.events()[-1] == "pulse.push_taken"
        await receiver.hang_up()


@pytest.mark.row("T20")
async def test_a_receiver_that_hangs_costs_one_deadline(world: World) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url, push_timeout_s=1.0) as pushed:
        receiver.answers = [None]
        pushed.rig.fill("a", WEB)
        await until(lambda: len(receiver.requests) > 1)
        assert pushed.pusher.statistics().n_retries == 1
        assert receiver.came_s[1] - receiver.came_s[0] >= 1.0
        assert in_order(receiver.samples)
        assert receiver.n_under_way_max <= 2, "the one given up may not have ended yet at the receiver's"


@pytest.mark.row("T20")
async def test_of_a_full_queue_the_oldest_goes_first(world: World) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url, push_queue_bytes_max=2000) as pushed:
        receiver.answers = [Response.text("no", 500)] * 3
        pushed.rig.fill("a", WEB)
        await until(lambda: pushed.pusher.statistics().n_dropped)
        assert pushed.pusher.statistics().queued_bytes <= 2000
        await until(lambda: len(receiver.requests) > 3)
        assert in_order(receiver.samples)
        assert pushed.memo.events().count("pulse.push_queue_full") == 1
        times = sorted({sample.at_ms for sample in receiver.samples})
        assert len(times) > 3


async def test_a_queue_keeps_what_is_being_sent_and_drops_what_is_larger_than_itself() -> None:
    queue = Queue(10)
    batches = [Batch(bytes([number]) * 4, number, 0) for number in range(5)]
    assert queue.put(batches[0])
    assert await queue.hold() is batches[0]
    assert queue.put(batches[1])
    assert not queue.put(batches[2])
    assert (len(queue), queue.n_bytes, queue.n_dropped_samples) == (2, 8, 1)
    queue.release(done=False)
    assert not queue.put(batches[3])
    assert await queue.hold() is batches[2]
    queue.release(done=True)
    assert not queue.put(Batch(b"x" * 11, 100, 0))
    assert (len(queue), queue.n_bytes, queue.n_dropped_samples) == (0, 0, 1 + 0 + 3 + 100)


@pytest.mark.row("T20")
async def test_a_receiver_that_is_not_trusted_gets_nothing_until_it_is(world: World, folder: str) -> None:
    path = f"{folder}/ca.crt"
    await world.disk.write_atomic(path, authority("another authority").certificate)
    async with (
        Receiver(world, ServerTls(server_material())) as receiver,
        pushing(world, receiver.url, push_ca_file=path, push_queue_bytes_max=4096) as pushed,
    ):
        pushed.rig.fill("a", WEB)
        await until(lambda: pushed.pusher.statistics().n_retries)
        assert not receiver.heads
        assert pushed.memo.events()[0] == "pulse.push_failed"
        await world.disk.write_atomic(path, authority().certificate)
        await until(lambda: receiver.requests)
        assert "pulse.push_tls_read" in pushed.memo.events()


@pytest.mark.row("T20")
async def test_a_certificate_is_shown_to_who_asks_for_one(world: World, folder: str) -> None:
    leaf, server = client_leaf(), server_leaf()
    for name, content in (("ca", authority().certificate), ("crt", leaf.certificate), ("key", leaf.key)):
        await world.disk.write(f"{folder}/{name}", content)
    material = TlsMaterial(server.certificate, server.key, authority().certificate, client_auth="required")
    files: dict[str, Any] = {"push_ca_file": f"{folder}/ca", "push_cert_file": f"{folder}/crt", "push_key_file": f"{folder}/key"}
    async with Receiver(world, ServerTls(material)) as receiver, pushing(world, receiver.url, **files) as pushed:
        pushed.rig.fill("a", WEB)
        await until(lambda: receiver.requests)


@pytest.mark.row("T20")
@pytest.mark.parametrize("kind", ["token", "basic"])
async def test_secrets_are_sent_followed_and_never_logged(world: World, folder: str, kind: str) -> None:
    path = f"{folder}/secret"
    first, second = ("first-secret", "second-secret") if kind == "token" else ("me:first-secret", "me:second:secret")
    headers = {
        "token": ("Bearer first-secret", "Bearer second-secret"),
        "basic": ("Basic bWU6Zmlyc3Qtc2VjcmV0", "Basic bWU6c2Vjb25kOnNlY3JldA=="),
    }[kind]
    await world.disk.write(path, f"{first}\nanother line\n".encode())
    async with Receiver(world) as receiver:
        files: dict[str, Any] = {f"push_{kind}_file": path}
        async with pushing(world, f"{receiver.url}?key=query-secret", **files) as pushed:
            told = [Response.text(f"you sent {headers[0]} and {first}", status) for status in (500, 400)]
            receiver.answers = [*told]
            pushed.rig.fill("a", WEB)
            await until(lambda: receiver.requests)
            assert {head["authorization"] for head in receiver.heads} == {headers[0]}
            await world.disk.write_atomic(path, second.encode())
            await until(lambda: receiver.heads[-1]["authorization"] == headers[1])
            await world.disk.write_atomic(path, b"\n")
            n_before = len(receiver.requests)
            await until(lambda: "pulse.push_secret_not_read" in pushed.memo.events() and len(receiver.requests) > n_before + 2)
            assert receiver.heads[-1]["authorization"] == headers[1], "the one before stays"
            await receiver.hang_up()
            await until(lambda: pushed.memo.events()[-1] == "pulse.push_failed")
        logged = b"".join(pushed.memo.lines)
    assert b"you sent" in logged
    assert b"secret" not in logged.replace(f"{folder}/secret".encode(), b"").replace(b"pulse.push_secret_not_read", b"").replace(
        b"secret file", b""
    ).replace(b"wants the secret", b"")
    assert headers[0].encode() not in logged


@pytest.mark.parametrize(
    ("content", "kind", "error"),
    [
        (None, "token", UnavailableError),
        (b"\nlate", "token", InvalidArgument),
        (b"\xff\xfe\n", "token", InvalidArgument),
        (b"no colon\n", "basic", InvalidArgument),
        (None, "ca", IsopodError),
        (b"no certificate", "ca", InvalidArgument),
    ],
)
async def test_files_that_make_no_sense_keep_the_agent_from_starting(
    world: World, folder: str, content: bytes | None, kind: str, error: type[IsopodError]
) -> None:
    if content is not None:
        await world.disk.write(f"{folder}/file", content)
    told: dict[str, Any] = {f"push_{kind}_file": f"{folder}/file", "go_root": f"{folder}/sbs", "rust_root": f"{folder}/kata"}
    settings = PulseSettings(listen="127.0.0.1:0", runtime_endpoint="", push_url="https://127.0.0.1:1/", **told)
    agent = PulseAgent(world, settings, Memo(world.clock).logger)
    with pytest.raises(error):
        await agent.start()
    await agent.stop()


@pytest.mark.row("T20")
async def test_what_is_queued_is_sent_when_the_agent_stops(world: World) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url, begins=False, push_interval_s=3600.0) as pushed:
        pushed.rig.fill("a", WEB)
        pushed.begin()
        await asyncio.sleep(0)  # run has begun, and its sender with the next turn
        await asyncio.sleep(0)
        for _ in range(3):
            await pushed.pusher.collect()
        assert await pushed.end() < ENDED_S[world.name]
        assert len(receiver.requests) == 3
        assert in_order(receiver.samples)
        assert not [sample for sample in receiver.samples if sample.is_stale], "an agent that ends may begin again"


@pytest.mark.row("T20")
@pytest.mark.parametrize("how", ["hangs", "refuses", "waits"])
async def test_a_receiver_that_is_no_good_does_not_hold_the_agents_end(world: World, how: str) -> None:
    async with Receiver(world) as receiver, pushing(world, receiver.url) as pushed:
        answers = {"hangs": None, "refuses": Response.text("no", 500), "waits": Response.text("no", 503, (("retry-after", "300"),))}
        receiver.answers = [answers[how]] * 500
        pushed.rig.fill("a", WEB)
        await until(lambda: receiver.heads and pushed.pusher.statistics().n_queued > 1)
        took_s = await pushed.end()
        assert took_s < (ENDED_S[world.name] if how == "hangs" else FLUSH_S)


async def test_a_clock_that_is_set_back_makes_no_older_samples(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with Receiver(world) as receiver, pushing(world, receiver.url, begins=False) as pushed:
        pushed.rig.fill("a", WEB)
        await pushed.pusher.collect()
        await pushed.pusher.collect()  # in the same millisecond
        pushed.begin()
        await until(lambda: len(receiver.requests) > 1)
        assert in_order(receiver.samples)


@pytest.mark.row("T20", "T22")
async def test_an_agent_pushes_and_tells_how_that_goes(world: World, folder: str) -> None:
    async with Receiver(world) as receiver, FakeShims(world, f"{folder}/sbs") as shims:
        settings = PulseSettings(
            listen="127.0.0.1:0",
            runtime_endpoint="",
            go_root=f"{folder}/sbs",
            rust_root=f"{folder}/kata",
            push_url=receiver.url,
            push_interval_s=0.1,
        )
        agent = PulseAgent(world, settings, Memo(world.clock).logger)
        try:
            await agent.start()
            await shims.add("a" * 64)
            await until(lambda: receiver.times("kata_shim_threads", "a" * 64))
            values = {sample.name: sample.value for sample in receiver.samples if dict(sample.labels).get("outcome", "sent") == "sent"}
            await until(lambda: any(s.name == "kata_pulse_push_last_success_timestamp_seconds" for s in receiver.samples))
            assert receiver.times("kata_pulse_sandbox_up", "a" * 64)[-1] == 1
            sent = [s.value for s in receiver.samples if s.name == "kata_pulse_push_samples_total" and ("outcome", "sent") in s.labels]
            assert sent == sorted(sent)
            assert sent[-1] > 0
            assert values["kata_pulse_push_retries_total"] == 0
            await shims.remove("a" * 64)
            await until(lambda: math.isnan(receiver.times("kata_shim_threads", "a" * 64)[-1]))
        finally:
            await agent.stop()


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.row("T20")
@pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()} (Debian: prometheus)")
async def test_prometheus_takes_it_and_what_went_is_stale_at_once(host_world: World, folder: str) -> None:
    async with Prometheus(host_world, folder, {}, receives=True) as prometheus:
        told: dict[str, Any] = {"push_interval_s": 0.5, "push_labels": ("job=pulse",), "view": "all"}
        async with pushing(host_world, prometheus.write_url, **told) as pushed:
            pushed.rig.fill("a", WEB, load=0.25)
            pushed.rig.fill("b", DB, load=0.5)

            async def load() -> dict[str, float]:
                found = await prometheus.query(f'{LOAD}{{job="pulse",cri_namespace="prod"}}')
                return {labels["sandbox_id"]: value for labels, value in found}

            async def shows(expected: dict[str, float]) -> None:
                async with asyncio.timeout(WAIT_S):
                    while await load() != expected:
                        await asyncio.sleep(0.1)

            await shows({"a": 0.25, "b": 0.5})
            quantile = "histogram_quantile(0.5, sum by (le) (kata_shim_rpc_durations_histogram_milliseconds_bucket))"
            assert [value for _, value in await prometheus.query(quantile)] == [1.0]
            memory = await prometheus.query("container_memory_usage_bytes")
            assert sorted((labels["pod"], value) for labels, value in memory) == [("db-0", 4096.0), ("web-0", 4096.0)]
            pushed.rig.store.remove("a")
            await shows({"b": 0.5})
            assert [labels["pod"] for labels, _ in await prometheus.query("container_memory_usage_bytes")] == ["db-0"]
            pushed.rig.fill("a", WEB, load=0.75)
            await shows({"a": 0.75, "b": 0.5})
            statistics = pushed.pusher.statistics()
            assert (statistics.n_refused, statistics.n_dropped) == (0, 0)
            assert pushed.memo.events() == []
