"""Sinks: never wait, never grow without bound, tell what was lost; files rotate. And what `logging` says comes through."""

import asyncio
import errno
import json
import logging
import threading
from typing import Any, cast

import pytest

from isopod.runtime.logbridge import bridge_logging
from isopod.runtime.logger import LEVELS, LINE_BYTES_MAX, Logger, current_trace, tracing
from isopod.runtime.logsinks import BoundedSink, FileSink
from isopod.world.disk import Disk, OpenFile
from isopod.world.world import World
from tests.runtime.test_logger import FixedClock, make


class Pipe:
    """A pipe that takes only what there is room for."""

    def __init__(self) -> None:
        self.room = 0
        self.data = b""
        self.broken = False

    def write(self, data: bytes) -> int:
        if self.broken:
            raise BrokenPipeError(32, "gone")
        if not self.room:
            raise BlockingIOError(11, "full")
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)


class NoNewFiles:
    """A disk on which one file can be opened once."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path
        self._n_opened = 0

    def __getattr__(self, name: str) -> Any:  # of the disk
        return getattr(self._disk, name)

    async def open_append(self, path: str, *, mode: int = 0o600) -> OpenFile:
        self._n_opened += path == self._path
        if self._n_opened > 1:
            raise OSError(errno.EMFILE, "too many open files")
        return await self._disk.open_append(path, mode=mode)


async def test_a_full_pipe_holds_up_nobody_and_loses_nothing_that_fits(world: World) -> None:
    pipe = Pipe()
    sink = BoundedSink(pipe.write, n_bytes_max=10_000)
    logger = Logger(sink, world.clock)
    for number in range(20):
        logger.info("x", number=number)
    assert pipe.data == b""
    assert sink.n_bytes_queued > 0
    pipe.room = 7  # in the middle of a line
    logger.info("x", number=20)
    assert pipe.data[:1] == b"{"
    pipe.room = 1 << 20
    while sink.n_bytes_queued:
        await asyncio.sleep(0.01)
    assert [json.loads(line)["number"] for line in pipe.data.splitlines()] == list(range(21))
    assert sink.n_dropped == 0
    await sink.close()


async def test_what_does_not_fit_is_dropped_counted_and_told(world: World) -> None:
    pipe = Pipe()
    sink = BoundedSink(pipe.write, n_bytes_max=500)
    logger = Logger(sink, world.clock)
    for number in range(100):
        logger.info("x", number=number)
    assert sink.n_bytes_queued <= 500
    lost = sink.n_dropped
    assert lost > 80
    pipe.room = 1 << 20
    await sink.close()
    lines = [json.loads(line) for line in pipe.data.splitlines()]
    assert lines[-1] == {"level": "warning", "event": "log.dropped", "n_lines": lost}
    assert len(lines) == 100 - lost + 1
    pipe.broken = True
    logger.info("y")
    assert sink.n_dropped == lost + 1


async def test_closing_gives_up_after_its_time(world: World) -> None:
    sink = BoundedSink(Pipe().write)
    Logger(sink, world.clock).info("x")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await sink.close(0.1)
    assert loop.time() - began < 5
    assert sink.n_bytes_queued > 0


def test_a_sink_works_before_there_is_a_loop() -> None:
    pipe = Pipe()
    sink = BoundedSink(pipe.write)
    logger = Logger(sink, FixedClock())
    logger.info("x")
    pipe.room = 1 << 20
    logger.info("y")
    assert [json.loads(line)["event"] for line in pipe.data.splitlines()] == ["x", "y"]


async def test_files_rotate_and_old_ones_go(world: World, folder: str) -> None:
    path = f"{folder}/app.log"
    sink = FileSink(world.disk, path, n_bytes_max=2000, n_files_max=3)
    await sink.start()
    logger = Logger(sink, world.clock)
    for number in range(200):
        logger.info("x", number=number)
        await asyncio.sleep(0.001)
    await sink.close()
    logger.info("too late")
    assert (sink.n_dropped, await world.disk.list(folder)) == (1, ["app.log", "app.log.1", "app.log.2"])
    numbers = [
        json.loads(line)["number"]
        for name in ("app.log.2", "app.log.1", "app.log")
        for line in (await world.disk.read(f"{folder}/{name}")).splitlines()
    ]
    assert numbers == list(range(numbers[0], 200))
    assert len(numbers) < 200


async def test_a_rotation_that_fails_pushes_no_file_out(world: World, folder: str) -> None:
    """The new file cannot be opened, again and again: what was logged before stays where it is."""
    path = f"{folder}/app.log"
    await world.disk.write(f"{path}.1", b"old\n")
    await world.disk.write(path, b"full" * 100)
    sink = FileSink(cast("Disk", NoNewFiles(world.disk, path)), path, n_bytes_max=100, n_files_max=4)
    await sink.start()
    for _ in range(10):
        sink(b"line\n")
        await asyncio.sleep(0.01)
    await sink.close()
    assert sink.n_dropped == 10
    assert await world.disk.read(f"{path}.2") == b"old\n"
    assert await world.disk.read(f"{path}.1") == b"full" * 100


async def test_a_line_written_while_another_is_goes_out_once(world: World) -> None:
    """As when the watch of stalls logs from its thread while the loop is in the middle of a write."""
    written: list[bytes] = []

    def write(data: bytes) -> int:
        if not written:
            raise BlockingIOError
        if len(written) < 5:
            written.append(b"")
            sink(b"inner %d\n" % len(written))
        written.append(data)
        return len(data)

    sink = BoundedSink(write)
    sink(b"first\n")
    written.append(b"")
    sink(b"second\n")
    await sink.close()
    lines = [line for line in written if line]
    assert sorted(lines) == sorted(set(lines))
    assert [line for line in lines if b"inner" not in line] == [b"first\n", b"second\n"]
    assert len(lines) > 3
    assert (sink.n_bytes_queued, sink.n_dropped) == (0, 0)


async def test_a_disk_that_fails_costs_lines_only(world: World, folder: str) -> None:
    sink = FileSink(world.disk, f"{folder}/app.log", n_bytes_max=10, n_files_max=2, n_queue_bytes_max=1000)
    await sink.start()
    await world.disk.make_directory(f"{folder}/app.log.1/full")  # the rotation cannot put its file there
    logger = Logger(sink, world.clock)
    for _ in range(50):
        logger.info("x")
    assert sink.n_dropped > 0
    logger.info("y")
    await sink.close()
    assert sink.n_dropped > 0
    with pytest.raises(OSError):
        await FileSink(world.disk, f"{folder}/none/app.log").start()


def test_the_level_changes_live_for_all_that_share_a_sink() -> None:
    logger, lines = make("info")
    bound = logger.bind(a=1)
    bound.debug("hidden")
    logger.set_level("debug")
    bound.debug("seen")
    assert (bound.level, [json.loads(line)["event"] for line in lines]) == ("debug", ["seen"])
    for level in LEVELS:
        bound.set_level(level)
        assert logger.level == level


async def test_lines_carry_their_trace_and_what_the_context_says() -> None:
    lines: list[bytes] = []
    group = ["main"]
    logger = Logger(lines.append, FixedClock(), context=lambda: {"shard": 3, "group": group[0]})

    async def inner() -> None:
        await asyncio.sleep(0)
        logger.info("inner")

    with tracing("t-1"):
        task = asyncio.create_task(inner())
        assert current_trace() == "t-1"
    group[0] = "bulk"
    logger.info("outer", group="own")
    await task
    found = [json.loads(line) for line in lines]
    assert [(line["event"], line["shard"], line["group"], line.get("trace")) for line in found] == [
        ("outer", 3, "own", None),
        ("inner", 3, "bulk", "t-1"),
    ]


def test_text_is_one_line_whatever_it_says() -> None:
    lines: list[bytes] = []
    logger = Logger(lines.append, FixedClock(), form="text")
    logger.bind(node="a").warning(
        "container.ended", name="web", code=137, why="two words\nand \x1b[31mred", empty="", password="x", tags=["a"]
    )
    assert lines == [
        b"2023-11-14T22:13:20.123456Z WARNING container.ended node=a name=web code=137 "
        rb'why="two words\nand \u001b[31mred" empty="" password=[redacted] tags=["a"]' + b"\n"
    ]
    logger.info("odd", word="\u202e\x9b31m")
    assert lines[-1].decode().rstrip("\n").isprintable()
    logger.info("long", traceback="x" * 7000, two="é" * 2000, three="é" * 2000, four="é" * 2000)
    assert len(lines[-1]) <= LINE_BYTES_MAX
    assert lines[-1].endswith(b"\n")
    coloured = Logger(lines.append, FixedClock(), form="text", coloured=True)
    coloured.error("x")
    assert b"\x1b[31mERROR  \x1b[0m x" in lines[-1]


def test_what_libraries_log_comes_through() -> None:
    logger, lines = make()
    undo = bridge_logging(logger, level="info", name="tests.bridge")
    library = logging.getLogger("tests.bridge.inner")
    try:
        library.debug("hidden")
        library.info("took %d s", 3)
        try:
            raise ValueError("no")
        except ValueError:
            library.exception("failed")
        library.warning("wrong arguments %d", "x")
        library.log(35, "in between")
        thread = threading.Thread(target=library.error, args=("from a thread",))
        thread.start()
        thread.join()
    finally:
        undo()
    library.propagate = True
    found = [json.loads(line) for line in lines]
    assert [(line["level"], line["message"]) for line in found] == [
        ("info", "took 3 s"),
        ("error", "failed"),
        ("warning", "wrong arguments %d ('x',)"),
        ("warning", "in between"),
        ("error", "from a thread"),
    ]
    assert {line["event"] for line in found} == {"log"}
    assert found[0]["logger"] == "tests.bridge.inner"
    assert "ValueError: no" in found[1]["traceback"]
    assert logging.getLogger("tests.bridge").handlers == []
    debugging = bridge_logging(logger, level="debug", name="tests.bridge")
    library.debug("now seen")
    debugging()
    assert json.loads(lines[-1])["level"] == "debug"


async def test_records_of_other_threads_are_written_by_the_loop() -> None:
    logger, lines = make()
    undo = bridge_logging(logger, level="info", name="tests.bridge")
    try:
        thread = threading.Thread(target=logging.getLogger("tests.bridge").info, args=("from afar",))
        thread.start()
        thread.join()
        assert lines == []
        while not lines:
            await asyncio.sleep(0)
        assert json.loads(lines[0])["message"] == "from afar"
    finally:
        undo()
