"""Serving by several processes: the same answers as by one, whatever becomes of workers and clients."""

import asyncio
import gzip
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from isopod.net.tls import TlsFiles
from isopod.pulse.own import Facts
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimAnswer
from isopod.pulse.workers import n_shards
from isopod.world.errors import InvalidArgument
from isopod.world.network import ClientTls
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import authority, client_material, server_leaf
from tests.net.http.kit import Peer
from tests.pulse.server_kit import ROOTS, WEB, Rig

WAIT_S = 30.0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def pids(rig: Rig) -> list[int]:
    workers = rig.server.workers
    assert workers is not None
    return workers.pids()


@pytest.mark.row("K24")
@pytest.mark.parametrize("shards", [1, 2])
async def test_answers_are_the_same_by_one_and_by_several(world: World, shards: int) -> None:
    async with Rig(world, shards=shards) as rig:
        assert (rig.server.workers is None) is (shards == 1)
        for number in range(30):
            rig.fill(f"s{number:02}", WEB, n_lines=200)
        socket = rig.add("new")
        rig.shims.answers[socket, "/agent-url"] = ShimAnswer(200, (), b"vsock://3:1024")
        answers = await asyncio.gather(*(rig.ask("/metrics?filter_family=kata_guest") for _ in range(8)))
        assert {(answer.status, len(answer.body), answer.body.count(b"kata_guest_load{")) for answer in answers} == {
            (200, len(answers[0].body), 6000)
        }
        packed = await rig.ask("/metrics?filter_family=kata_guest", accept_encoding="gzip")
        assert gzip.decompress(packed.body) == answers[0].body
        head = await rig.ask("/metrics", "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert (await rig.ask("/metrics", if_none_match=head.headers["etag"])).status == 304
        for path, status in (
            ("/", 200),
            ("/sandboxes", 200),
            ("/healthz", 200),
            ("/readyz", 200),
            ("/agent-url?sandbox=new", 200),
            ("/metrics?sandbox=new", 503),
            ("/metrics?sandbox=nobody", 404),
            ("/nowhere", 404),
        ):
            assert (await rig.ask(path)).status == status, path
        assert (await rig.ask("/metrics", host="evil.example")).status == 421
        assert rig.server.own.n_in_flight == 0


@pytest.mark.row("K24")
def test_the_default_comes_from_the_processors(sim_world: SimWorld) -> None:
    n_cpus = sum(len(node.cpus) for node in sim_world.world.shards.topology())
    assert n_shards(PulseSettings(), sim_world.world) == min(4, max(1, n_cpus // 8))
    assert n_shards(PulseSettings(shards=3), sim_world.world) == 3
    for wrong in (-1, 65):
        with pytest.raises(InvalidArgument, match="from 0 to 64"):
            PulseSettings(shards=wrong)


@pytest.mark.row("K24", "T21")
async def test_workers_speak_tls_and_ask_for_tokens(world: World, folder: str) -> None:
    files = TlsFiles(f"{folder}/tls.crt", f"{folder}/tls.key")
    leaf = server_leaf()
    for path, content in ((files.certificate, leaf.certificate), (files.key, leaf.key), (f"{folder}/token", b"a-token\n")):
        await world.disk.write(path, content)
    async with Rig(world, shards=2, tls_cert_file=files.certificate, tls_key_file=files.key, token_file=f"{folder}/token") as rig:
        rig.fill("a", WEB)
        await rig.trust(ClientTls(client_material()))
        assert (await rig.ask("/metrics")).status == 401
        assert b"kata_guest_load" in (await rig.ask("/metrics", authorization="Bearer a-token")).body
    await world.disk.write(files.key, b"no key")
    rig = Rig(world, shards=2, tls_cert_file=files.certificate, tls_key_file=files.key)
    with pytest.raises(InvalidArgument, match="not PEM"):
        await rig.__aenter__()
    assert authority().certificate


@pytest.mark.row("K24")
async def test_a_client_that_goes_ends_its_scrape(world: World) -> None:
    async with Rig(world, shards=2) as rig:
        for number in range(100):
            rig.fill(f"s{number:03}", WEB, n_lines=1000)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await peer.until(lambda data: data)
        peer.transport.pause_reading()
        assert rig.server.own.n_in_flight == 1, "what is made is bounded by what is taken"
        peer.close()
        await until(lambda: rig.server.own.n_in_flight == 0)
        assert rig.server.own.n_failed == 1


@pytest.mark.row("K24")
@pytest.mark.parametrize("shards", [1, 2])
async def test_an_answer_that_fails_is_logged_whoever_serves(world: World, shards: int) -> None:
    def fail() -> list[Any]:
        raise RuntimeError("an odd failure")

    async with Rig(world, shards=shards, facts=Facts(roots=ROOTS, rows=fail)) as rig:
        assert (await rig.ask("/top?secret=word")).status == 500
        await until(lambda: "http.handler_failed" in rig.memo.events())
        (line,) = [line for line in rig.memo.lines if b"http.handler_failed" in line]
        told = json.loads(line)
        assert (told["level"], told["method"], told["path"], told["error"]) == ("error", "GET", "/top", "RuntimeError: an odd failure")
        assert "in fail" in told["traceback"] and "word" not in line.decode()
        assert (await rig.ask("/healthz")).status == 200


@pytest.mark.virtual_time
async def test_an_answer_that_is_not_taken_in_time_is_cut(world: World) -> None:
    async with Rig(world, shards=2) as rig:
        for number in range(100):
            rig.fill(f"s{number:03}", WEB, n_lines=1000)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.transport.pause_reading()
        peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n")
        await asyncio.sleep(5.0)
        assert (rig.server.own.n_in_flight, rig.server.own.n_failed) == (0, 1)
        peer.transport.resume_reading()
        assert not (await peer.until_end()).endswith(b"0\r\n\r\n")
        peer.close()


@pytest.mark.row("K24", "K17")
@pytest.mark.host
async def test_a_worker_that_is_killed_is_started_again(host_world: World) -> None:
    async with Rig(host_world, shards=2) as rig:
        rig.fill("a", WEB)
        first = pids(rig)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(pids(rig)) == 2 and not {*first} & {*pids(rig)})
        assert (await rig.ask("/metrics?sandbox=a")).status == 200
        assert "pulse.worker_died" in rig.memo.events()
        last = pids(rig)
    for pid in last:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.row("K24", "T21")
async def test_the_way_down_takes_at_most_two_seconds(world: World) -> None:
    rig: Any = Rig(world, shards=2)
    await rig.__aenter__()
    for number in range(100):
        rig.fill(f"s{number:03}", WEB, n_lines=1000)
    peer = Peer()
    await world.network.connect(rig.address, lambda: peer)
    peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await peer.until(lambda data: data)
    assert peer.transport is not None
    peer.transport.pause_reading()
    began_s = asyncio.get_running_loop().time()
    await rig.server.stop()
    assert asyncio.get_running_loop().time() - began_s <= 2.5, "two, and what a busy machine adds"
    peer.close()
    await rig.client.close()
