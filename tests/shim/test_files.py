"""The files a shim writes: the log as its readers expect it, rotation, a full disk, the console's log, the program's last words."""

import asyncio
from pathlib import Path

import pytest

from isopod.api.messages import LogsRequest, Stdout
from isopod.engine.logs import parse_record, read_logs
from isopod.wire.agent import Kind
from isopod.world.world import World
from tests.shim.bench import Bench, small_disk, texts

pytestmark = pytest.mark.host


@pytest.mark.row("V3")
async def test_the_log_reads_as_conmons_does(host_world: World, folder: str) -> None:
    bench = Bench(folder)
    try:
        bench.use_fake("print", console="stdio", agent="none").start().end()
        items = [item async for item in read_logs(host_world, bench.config["log"], LogsRequest(name="c"), ended=_never())]
    finally:
        bench.close()
    assert b"".join(item.data for item in items if isinstance(item, Stdout)) == b"one\ntwo\nhalf"


def _never() -> asyncio.Event:
    return asyncio.Event()


def test_a_full_log_is_begun_anew(bench: Bench) -> None:
    """As conmon does: a new file of the same name, never larger than the limit."""
    bench.config["log_bytes_max"] = 5000
    bench.use_fake().start()
    Path(bench.config["log"]).stat()
    with bench.ready() as client:
        client.begin("start", "flood", "64000")
        bench.end()
    log = Path(bench.config["log"])
    assert 0 < log.stat().st_size <= 5000
    records = [parse_record(line) for line in log.read_bytes().splitlines()]
    assert all(record is not None for record in records)
    assert log.read_text().endswith("64000\n")
    assert not log.with_name("container.log.tmp").exists()


def test_a_log_that_exists_is_gone_on_with(bench: Bench) -> None:
    earlier = "2026-11-20T23:01:27.315608161+00:00 stdout F earlier\n"
    Path(bench.config["log"]).write_text(earlier)
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "echo", "later")
        bench.end()
    assert texts(bench.log())["stdout"] == b"earlier\nlater"


def test_a_full_disk_loses_output_says_how_much_and_stops_nothing(bench: Bench) -> None:
    with small_disk(bench.folder / "disk", 1 << 20) as disk:
        bench.config |= {"log": f"{disk}/log", "console_log": f"{disk}/console.log", "log_bytes_max": 1 << 30}
        bench.use_fake().start()
        with bench.ready() as client:
            attached = client.open("attach", stdin=True)
            client.response(attached)
            client.begin("start", "cat")
            line = b"x" * 999 + b"\n"
            for _ in range(1500):  # half as much again as the disk holds
                client.send(Kind.STDIN, attached, line)
                client.grant(attached, len(client.read_bytes(attached, b"\n")))
            full = Path(f"{disk}/log").read_bytes()
            Path(f"{disk}/log").write_bytes(b"")  # somebody makes room
            client.send(Kind.STDIN, attached, b"there is room again\n")
            client.read_bytes(attached, b"again\n")
            client.send(Kind.STDIN_END, attached)
            client.read_to_end(attached)
        assert bench.end()["kind"] == "command"
        assert all(parse_record(record) is not None for record in full.splitlines())
        n_kept = full.count(b"\n")
        said, rest = Path(f"{disk}/log").read_bytes().lstrip(b"\0").splitlines()
        n_lost = 1000 * (1500 - n_kept)
        assert said.endswith(b" stderr F isopod: %d bytes of the output were lost: No space left on device (os error 28)" % n_lost)
        assert rest.endswith(b" stdout F there is room again")


@pytest.mark.row("V3")
def test_the_consoles_log_keeps_one_file_that_is_full(bench: Bench) -> None:
    bench.config["console_bytes_max"] = 400_000
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "misbehave", "console")
        bench.end()
    kept = [Path(f"{bench.folder}/{name}").read_bytes() for name in ("console.log.1", "console.log")]
    assert all(0 < len(text) <= 400_000 for text in kept)
    numbers = [int(line) for line in b"".join(kept).splitlines()[1:]]
    assert numbers == list(range(numbers[0], 20000))


def test_what_the_program_says_is_bounded(bench: Bench) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo warning number $i: something is wrong here, listen >&2; i=$((i + 1)); done; exit 4"
    bench.use_fake(agent="none")
    bench.config["argv"] = ["/bin/sh", "-c", script]
    bench.start()
    end = bench.end()
    why = "the machine's process ended with 4: warning number 2999: something is wrong here, listen"
    assert (end["code"], end["why"]) == (4, why)
    assert (bench.folder / "vmm.log").stat().st_size <= 64 << 10
