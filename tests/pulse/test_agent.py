"""The whole agent on both Worlds: from folders and sockets to what a scrape shows."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isopod.net.http.client import HttpClient
from isopod.pulse.agent import PulseAgent
from isopod.pulse.demo import Demo, body, identifier_of
from isopod.pulse.model import Pod
from isopod.pulse.settings import PulseSettings
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import UnavailableError
from isopod.world.world import World
from tests.pulse.shims import HUNG, Behaviour, FakeShims
from tests.telemetry.kit import Memo

A, B, C = "a" * 64, "b" * 64, "c" * 64


class Asking:
    """An agent, and a client of it."""

    def __init__(self, agent: PulseAgent, address: str, client: HttpClient, memo: Memo) -> None:
        self.agent = agent
        self.memo = memo
        self._address = address
        self._client = client

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and body."""
        answer = await self._client.get(f"http://{self._address}{path}", timeout_s=20.0)
        return answer.status, (await answer.read()).decode()

    async def put(self, path: str) -> tuple[int, str]:
        """Return status and body of a PUT."""
        answer = await self._client.request("PUT", f"http://{self._address}{path}", timeout_s=20.0)
        return answer.status, (await answer.read()).decode()

    async def values(self, name: str, path: str = "/metrics") -> dict[str, float]:
        """Return a family's values by sandbox."""
        _, text = await self.get(path)
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return {sample.labels["sandbox_id"]: sample.value for sample in families[name].samples} if name in families else {}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the agent does by itself."""
        await wait_for_condition_with_backoff(condition, timeout_s=20.0)

    def up(self, *identifiers: str) -> bool:
        """Whether these sandboxes, and no others, are known and answered."""
        entries = self.agent.store.entries()
        return tuple(entry.id for entry in entries) == identifiers and all(entry.up for entry in entries)


@asynccontextmanager
async def asking(world: World, folder: str, **told: Any) -> AsyncIterator[Asking]:
    settings = PulseSettings(
        **{"listen": "127.0.0.1:0", "runtime_endpoint": "", "go_root": f"{folder}/sbs", "rust_root": f"{folder}/kata", **told}
    )
    memo = Memo(world.clock)
    agent = PulseAgent(world, settings, memo.logger)
    client = HttpClient(world)
    try:
        yield Asking(agent, await agent.start(), client, memo)
    finally:
        await client.close()
        await agent.stop()


@pytest.mark.row("K4")
@pytest.mark.row("K8")
async def test_sandboxes_come_and_go_and_a_scrape_shows_who_is_there(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A)
        await asked.until(lambda: asked.up(A))
        await shims.add(B, body=b"# TYPE kata_shim_threads gauge\nkata_shim_threads 9\n")
        await asked.until(lambda: asked.up(A, B))
        assert await asked.values("kata_shim_threads") == {A: 7, B: 9}
        await shims.remove(A)
        await asked.until(lambda: asked.up(B))
        assert await asked.values("kata_shim_threads") == {B: 9}


@pytest.mark.row("K9")
async def test_the_second_root_is_watched_and_the_first_wins(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as go, FakeShims(world, f"{folder}/kata") as rust, asking(world, folder) as asked:
        await go.add(A, body=b"kata_shim_threads 1\n")
        await rust.add(A, body=b"kata_shim_threads 2\n")
        await rust.add(B, body=b"kata_shim_threads 3\n")
        await asked.until(lambda: asked.up(A, B))
        assert await asked.values("kata_shim_threads") == {A: 1, B: 3}


@pytest.mark.row("T4")
@pytest.mark.virtual_time
@pytest.mark.parametrize("path", ["/metrics", "/metrics/cadvisor", "/top"])
async def test_after_a_pause_a_scrape_shows_figures_of_its_own_time(world: World, folder: str, path: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, pause_after_s=120.0) as asked:
        shim = await shims.add(A, body=lambda n_asked: b"kata_shim_threads %d\n" % n_asked)
        await asked.until(lambda: asked.up(A))
        await asyncio.sleep(3600)
        assert len(shim.asked_s) <= 4
        await asked.get(path)
        assert asyncio.get_running_loop().time() - shim.asked_s[-1] < 1.0
        assert await asked.values("kata_shim_threads") == {A: len(shim.asked_s)}


@pytest.mark.row("K22")
async def test_searching_a_fault_each_request_and_each_scrape_is_a_line(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A)
        await asked.until(lambda: asked.up(A))
        await asked.get("/metrics?pod=x")
        lines = [
            (line["event"], line.get("outcome"), line.get("path")) for line in map(json.loads, asked.memo.lines) if line["level"] == "debug"
        ]
        assert ("pulse.asked", "ok", None) in lines
        assert ("pulse.scraped", None, "/metrics") in lines


@pytest.mark.row("K7")
@pytest.mark.row("K12")
async def test_a_shim_that_never_answers_keeps_nobody_waiting(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, request_s=1.0) as asked:
        await shims.add(A, behaviour=HUNG)
        await shims.add(B)
        await asked.until(lambda: any(entry.id == B and entry.up for entry in asked.agent.store.entries()))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await asked.values("kata_shim_threads") == {B: 7}
        assert loop.time() - began_s < 1.0
        await asked.until(lambda: any(entry.id == A and entry.error == "timeout" for entry in asked.agent.store.entries()))


@pytest.mark.row("K11")
async def test_figures_are_fetched_anew_each_interval(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, interval_s=0.2) as asked:
        shim = await shims.add(A, body=lambda n: b"kata_shim_threads %d\n" % n)
        await asked.until(lambda: len(shim.asked_s) >= 4)
        assert (await asked.values("kata_shim_threads"))[A] >= 3


@pytest.mark.row("K17")
async def test_a_body_of_rubbish_fails_alone_and_is_said(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A, body=b"<html>\nno {metrics here\n")
        await shims.add(B)
        await shims.add(C, behaviour=Behaviour(status=500))
        await asked.until(lambda: [entry.error for entry in asked.agent.store.entries()] == ["unreadable", "", "status"])
        assert await asked.values("kata_shim_threads") == {B: 7}
        status, text = await asked.get("/targets")
        assert status == 200
        assert "unreadable" in text


@pytest.mark.row("K13")
async def test_containers_families_are_made_of_what_the_guest_says(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A, body=body(3, 100.0))
        await asked.until(lambda: asked.up(A))
        _, text = await asked.get("/metrics/cadvisor")
        lines = [line for line in text.splitlines() if line.startswith("container_cpu_usage_seconds_total{")]
        assert lines
        assert lines[0].endswith(" 30")
        assert "kata_" not in text


@pytest.mark.row("K17")
async def test_a_part_that_fails_is_begun_again(world: World, folder: str) -> None:
    async with asking(world, folder) as asked:
        n_runs = 0

        async def part() -> None:
            nonlocal n_runs
            n_runs += 1
            if n_runs < 3:
                raise ZeroDivisionError

            await asyncio.Event().wait()

        asked.agent.n_failures["odd"] = 0
        keeping = asyncio.get_running_loop().create_task(asked.agent.keep("odd", part))
        await asked.until(lambda: n_runs == 3)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert asked.agent.n_failures["odd"] == 2
        assert "ZeroDivisionError" in str(asked.memo.lines)


@pytest.mark.row("T19")
async def test_a_policy_that_is_read_again_over_http_holds_from_the_next_round(world: World, folder: str) -> None:
    path = f"{folder}/policy.yaml"
    await world.disk.write(path, b"{}")
    told: dict[str, Any] = {"policy_file": path, "enable_lifecycle": True, "interval_s": 0.2}
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, **told) as asked:
        shim = await shims.add(A, body=lambda n: b"kata_shim_threads 7\nkata_shim_fds %d\n" % n)
        await asked.until(lambda: asked.up(A))
        assert await asked.values("kata_shim_fds")
        await world.disk.write_atomic(path, b"metric_relabel_configs: [{source_labels: [__name__], regex: kata_shim_fds, action: drop}]\n")
        assert await asked.put("/-/reload") == (200, f"policy {path}: read\n")
        n_asked = len(shim.asked_s)
        await asked.until(lambda: len(shim.asked_s) >= n_asked + 3)
        assert (await asked.values("kata_shim_fds"), await asked.values("kata_shim_threads")) == ({}, {A: 7})
        assert "regex: kata_shim_fds" in (await asked.get("/config"))[1]


async def test_an_address_that_is_taken_is_an_error_and_leaves_nothing(world: World, folder: str) -> None:
    async with asking(world, folder, listen=f"unix:{folder}/pulse.sock"):
        settings = PulseSettings(listen=f"unix:{folder}/pulse.sock", runtime_endpoint="")
        second = PulseAgent(world, settings, Memo(world.clock).logger)
        with pytest.raises(UnavailableError, match="listen on"):
            await second.start()
        await second.stop()


@pytest.mark.row("K26")
async def test_the_demo_serves_sandboxes_and_takes_its_folder_with_it(world: World, folder: str) -> None:
    async with Demo(world, 3, folder=folder) as demo:
        names = [identifier_of(number) for number in (1, 2, 3)]
        memo = Memo(world.clock)
        told = PulseSettings(listen="127.0.0.1:0", runtime_endpoint="", go_root=demo.root, rust_root=f"{folder}/none", interval_s=0.2)
        agent = PulseAgent(world, told, memo.logger, pods=demo.pods)
        client = HttpClient(world)
        try:
            asked = Asking(agent, await agent.start(), client, memo)
            await asked.until(lambda: asked.up(*names))
            threads = await asked.values("kata_shim_threads")
            assert sorted(threads) == names
            _, text = await asked.get("/metrics?pod=app-2&filter_family=kata_shim_threads")
            assert 'cri_namespace="team-1"' in text
            assert text.count("sandbox_id") == 1
            _, url = await asked.get(f"/agent-url?sandbox={names[0]}")
            assert url.strip() == f"unix://{demo.root}/{names[0]}/agent.sock"
        finally:
            await client.close()
            await agent.stop()
        assert await world.disk.stat(demo.root) is not None
    assert await world.disk.stat(demo.root) is None


@pytest.mark.row("K26")
def test_the_demos_counters_only_grow_and_follow_its_number() -> None:
    def user_ms(number: int, up_s: float) -> float:
        families = {family.name: family for family in text_string_to_metric_families(body(number, up_s).decode())}
        (value,) = [sample.value for sample in families["kata_guest_cpu_time"].samples if sample.labels == {"cpu": "total", "item": "user"}]
        return value

    assert user_ms(2, 100.0) == 16_000
    assert user_ms(2, 200.0) == 32_000
    assert user_ms(50, 100.0) == 80_000  # at most one processor


@pytest.mark.row("K10")
@pytest.mark.row("K16")
async def test_whose_a_sandbox_is_shows_as_soon_as_somebody_knows(world: World, folder: str) -> None:
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder) as asked:
        await shims.add(A)
        await asked.until(lambda: asked.up(A))
        _, before = await asked.get("/metrics?filter_family=kata_shim_threads")
        assert 'cri_name=""' in before
        asked.agent.describe("cri", {A: Pod("uid-1", "web", "prod"), B: Pod("uid-2", "other", "prod")})
        _, after = await asked.get("/metrics?filter_family=kata_shim_threads")
        assert f'kata_shim_threads{{sandbox_id="{A}",cri_uid="uid-1",cri_name="web",cri_namespace="prod"}} 7' in after
        asked.agent.describe("cri", {})
        _, still = await asked.get("/metrics?filter_family=kata_shim_threads")
        assert still == after
