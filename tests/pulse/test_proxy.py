"""What is asked of shims while a client waits: the agent's URL and Go's debug pages, and nothing else."""

import asyncio

import pytest

from isopod.pulse.model import Target
from isopod.pulse.proxy import SHIM_REQUESTS_MAX, is_debug_page, is_identifier, seconds_of
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimAnswer, ShimClient, ShimError
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.server_kit import Rig
from tests.pulse.shims import AGENT_URL, HUNG, FakeShims

INDEX = b"<a href='heap?debug=1'>heap</a> <a href=\"goroutine?debug=2\">g</a> <a href='http://x/y?z=1'>x</a> <a href=trace?seconds=5>t</a>"


def says(body: bytes, status: int = 200, **headers: str) -> ShimAnswer:
    return ShimAnswer(status, tuple((name.replace("_", "-").title(), value) for name, value in headers.items()), body)


@pytest.mark.row("K20")
async def test_the_agents_url_comes_from_the_shim(world: World, folder: str) -> None:
    """Over a real socket, from discovery's path to the answer."""
    client = ShimClient(world, PulseSettings())
    async with FakeShims(world, f"{folder}/sbs") as shims, Rig(world, client=client, request_s=2.0) as rig:
        good = await shims.add("good")
        rig.store.add(Target("good", "go", good.socket))
        rig.store.add(Target("gone", "go", f"{folder}/sbs/gone/shim-monitor.sock"))
        answer = await rig.ask("/agent-url?sandbox=good")
        assert (answer.status, answer.headers["content-type"], answer.body) == (200, "text/plain; charset=utf-8", AGENT_URL + b"\n")
        missing = await rig.ask("/agent-url?sandbox=gone")
        assert missing.status == 502
        assert missing.text.startswith("the shim of sandbox gone does not answer: ")
        assert [path for _, _, path in shims.requests] == ["/agent-url"]
        await client.close()


@pytest.mark.row("K20", "K12")
@pytest.mark.virtual_time
async def test_a_shim_that_hangs_is_given_up(world: World, folder: str) -> None:
    client = ShimClient(world, PulseSettings())
    async with FakeShims(world, f"{folder}/sbs") as shims, Rig(world, client=client, request_s=2.0) as rig:
        hung = await shims.add("hung", behaviour=HUNG)
        rig.store.add(Target("hung", "go", hung.socket))
        began_s = asyncio.get_running_loop().time()
        assert (await rig.ask("/agent-url?sandbox=hung")).status == 502
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(2.0, abs=0.1)
        await client.close()


@pytest.mark.row("K20", "K19")
async def test_what_is_wrong_about_an_agents_url_is_told(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world) as rig:
        socket = rig.add("a")
        rig.add("plain", "isopod")
        url = (socket, "/agent-url")
        for query, status, text in (
            ("", 400, "which sandbox?"),
            ("?sandbox=", 400, "which sandbox?"),
            ("?other=a", 400, "which sandbox?"),
            ("?sandbox=..%2Fa", 400, "no id of a sandbox: ../a"),
            ("?sandbox=..", 400, "no id of a sandbox: .."),
            ("?sandbox=a%00", 400, "no id of a sandbox: a\\x00"),
            ("?sandbox=" + "a" * 129, 400, "no id of a sandbox"),
            ("?sandbox=b", 404, "no such sandbox: b"),
            ("?sandbox=plain", 404, "has no shim"),
        ):
            answer = await rig.ask(f"/agent-url{query}")
            assert (answer.status, text in answer.text) == (status, True), query
        assert rig.shims.asked == []
        for said, text in (
            (says(b"rpc error", 500), "it answered status 500"),
            (says(b"  \n"), "it answered nothing"),
            (ShimError("timeout", "no answer within 3 s"), "does not answer: no answer within 3 s"),
        ):
            rig.shims.answers[url] = said
            answer = await rig.ask("/agent-url?sandbox=a")
            assert (answer.status, text in answer.text) == (502, True)
        rig.shims.answers[url] = says(b"vsock://3:1024\x1b[2J\n<script>")
        assert (await rig.ask("/agent-url?sandbox=a")).text == "vsock://3:1024\\x1b[2J\\n<script>\n"


async def test_so_many_questions_at_once_and_no_more(world: World) -> None:
    async with Rig(world) as rig:
        rig.shims.gate = asyncio.Event()
        socket = rig.add("a")
        rig.shims.answers[socket, "/agent-url"] = says(b"u")
        waiting = [asyncio.ensure_future(rig.ask("/agent-url?sandbox=a")) for _ in range(SHIM_REQUESTS_MAX)]
        async with asyncio.timeout(20):
            while len(rig.shims.asked) < SHIM_REQUESTS_MAX:
                await asyncio.sleep(0.01)
        answer = await rig.ask("/agent-url?sandbox=a")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        rig.shims.gate.set()
        assert {(await each).status for each in waiting} == {200}
        assert (await rig.ask("/agent-url?sandbox=a")).status == 200


@pytest.mark.row("T14")
async def test_debug_pages_are_off_by_default(world: World) -> None:
    async with Rig(world) as rig:
        rig.add("a")
        for path in ("/debug/vars", "/debug/pprof/", "/debug/pprof/profile"):
            answer = await rig.ask(f"{path}?sandbox=a")
            assert (answer.status, "--pprof" in answer.text) == (404, True)
        assert rig.shims.asked == []


@pytest.mark.row("T14")
async def test_debug_pages_are_passed_on(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world, pprof=True) as rig:
        socket = rig.add("a b")
        answers = rig.shims.answers
        answers[socket, "/debug/pprof/?sandbox=a+b"] = says(INDEX, content_type="text/html; charset=utf-8", set_cookie="x=y", server="shim")
        answer = await rig.ask("/debug/pprof/?sandbox=a%20b")
        assert answer.status == 200
        assert answer.body == (
            b"<a href='heap?sandbox=a%20b&debug=1'>heap</a> <a href=\"goroutine?sandbox=a%20b&debug=2\">g</a> "
            b"<a href='http://x/y?z=1'>x</a> <a href=trace?sandbox=a%20b&seconds=5>t</a>"
        )
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert {"set-cookie", "server"}.isdisjoint(answer.headers)
        answers[socket, "/debug/pprof/heap?sandbox=a+b&debug=1"] = says(INDEX)
        heap = await rig.ask("/debug/pprof/heap?debug=1&sandbox=a%20b")
        assert (heap.body, heap.headers["content-type"]) == (INDEX, "text/plain; charset=utf-8"), "only the index has links"
        answers[socket, "/debug/pprof/trace?sandbox=a+b&seconds=2"] = says(b"\x00go", content_disposition="bad\x01value")
        trace = await rig.ask("/debug/pprof/trace?sandbox=a%20b&seconds=2")
        assert (trace.headers["content-type"], trace.headers["content-disposition"]) == (
            "application/octet-stream",
            'attachment; filename="trace"',
        )
        answers[socket, "/debug/vars?sandbox=a+b"] = says(b"{}", content_type="application/json")
        assert (await rig.ask("/debug/vars?sandbox=a%20b")).headers["content-type"] == "application/json"


@pytest.mark.row("T14", "K19")
async def test_what_is_wrong_about_debug_pages_is_told(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world, pprof=True) as rig:
        socket = rig.add("a")
        for path, status in (
            ("/debug/pprof/", 400),
            ("/debug/pprof/?sandbox=b", 404),
            ("/debug/pprof/?sandbox=%2e%2e", 400),
            ("/debug/pprof/heap%2F..%2Fx?sandbox=a", 404),
            ("/debug/pprof/a/b?sandbox=a", 404),
            ("/debug/pprof/%0d%0aX?sandbox=a", 404),
            ("/debug/other?sandbox=a", 404),
        ):
            assert (await rig.ask(path)).status == status, path
        assert rig.shims.asked == []
        rig.shims.answers[socket, "/debug/vars?sandbox=a"] = says(b"404 page not found", 404)
        answer = await rig.ask("/debug/vars?sandbox=a")
        assert (answer.status, answer.text) == (502, "the shim of sandbox a answered status 404\n")
        rig.shims.answers[socket, "/debug/vars?sandbox=a"] = ShimError("refused", "cannot connect")
        assert (await rig.ask("/debug/vars?sandbox=a")).status == 502


async def test_a_profile_gets_its_time_and_not_more(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world, pprof=True, request_s=3.0) as rig:
        socket = rig.add("a")
        for page, query, timeout_s in (
            ("profile", "", 33.0),
            ("profile", "&seconds=5", 8.0),
            ("profile", "&seconds=9999", 123.0),
            ("profile", "&seconds=1e9", 33.0),
            ("trace", "", 4.0),
            ("heap", "", 3.0),
        ):
            rig.shims.asked.clear()
            rig.shims.answers[socket, f"/debug/pprof/{page}?sandbox=a{query}"] = says(b"p")
            assert (await rig.ask(f"/debug/pprof/{page}?sandbox=a{query}")).status == 200
            assert rig.shims.asked[0][2] == timeout_s, (page, query)


def test_ids_pages_and_seconds() -> None:
    assert all(is_identifier(word) for word in ("a", "6f1e" * 16, "a b", "ä", "...", "a.b"))
    assert not any(is_identifier(word) for word in (".", "..", "a/b", "/", "a\0", "a\n", "ä" * 65, "a" * 129))
    assert all(is_debug_page(f"/debug/{word}") for word in ("vars", "pprof/", "pprof/heap", "pprof/threadcreate"))
    assert not any(
        is_debug_page(word) for word in ("/debug/", "/debug/pprof", "/debug/pprof/a/b", "/debug/pprof/a b", "/debug/vars/", "/metrics")
    )
    assert seconds_of("/debug/pprof/profile", (("seconds", "-1"),)) == 30.0
