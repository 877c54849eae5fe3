"""Container logs: records, tails, cursors, following over rotation, and damage (row R8)."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.api.messages import Cursor, LogOutput, LogsRequest, Stderr, Stdout
from isopod.engine.logs import BLOCK_BYTES, CURSOR_FROM_START, LINE_BYTES_MAX, Decoder, find_tail, parse_record, parse_stamp, read_logs
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk, FileStat
from isopod.world.errors import KernelError
from isopod.world.world import World

SECOND_NS = 1_000_000_000
START_NS = 1_795_215_687_000_000_000  # 2026-11-20T23:01:27Z


def stamp(number: int) -> str:
    return f"2026-11-20T23:01:27.{number:09d}+00:00"


def line(text: str, *, number: int = 0, stream: str = "stdout", tag: str = "F") -> bytes:
    return f"{stamp(number)} {stream} {tag} {text}\n".encode()


def lines(first: int, last: int) -> bytes:
    return b"".join(line(f"line {n}", number=n) for n in range(first, last))


def ended() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def text_of(items: Sequence[LogOutput]) -> bytes:
    return b"".join(item.data for item in items if not isinstance(item, Cursor))


def last_cursor(items: Sequence[LogOutput]) -> int:
    return next(item.position for item in reversed(items) if isinstance(item, Cursor))


async def collect(world: World, path: str, request: LogsRequest | None = None, *, logger: Logger | None = None) -> list[LogOutput]:
    found = []
    async with aclosing(read_logs(world, path, request or LogsRequest(name="c"), ended=ended(), logger=logger)) as items:
        async for item in items:
            found.append(item)
    return found


async def append(world: World, path: str, data: bytes) -> None:
    file = await world.disk.open_append(path)
    await file.append(data)
    file.close()


# --- records ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200 * 365 * 86400), st.integers(0, 999_999_999), st.integers(-14 * 60, 14 * 60))
def test_time_stamps_agree_with_datetime(seconds: int, nanoseconds: int, zone_minutes: int) -> None:
    moment = datetime(1970, 1, 2, tzinfo=UTC) + timedelta(seconds=seconds)
    local = moment.astimezone(timezone(timedelta(minutes=zone_minutes))).isoformat()
    text = f"{local[:19]}.{nanoseconds:09d}{local[19:]}"
    assert parse_stamp(text.encode()) == (seconds + 86400) * SECOND_NS + nanoseconds


@pytest.mark.parametrize(
    "text, nanoseconds",
    [("2026-11-20T23:01:27Z", 0), ("2026-11-20T23:01:27.5Z", 500_000_000), ("2026-11-21T00:01:27.000000001+01:00", 1)],
)
def test_time_stamps_may_be_short(text: str, nanoseconds: int) -> None:
    assert parse_stamp(text.encode()) == START_NS + nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-11-20",
        "2026-11-20T23:01:27",
        "2026-13-20T23:01:27Z",
        "2026-02-30T23:01:27Z",
        "2026-11-20T24:01:27Z",
        "2026-11-20T23:61:27Z",
        "2026-11-20 23:01:27Z",
        "2026-11-20T23:01:2xZ",
        "2026-11-20T23:01:27.Z7",
        "2026-11-20T23:01:27.0123456789Z",
        "2026-11-20T23:01:27+0100",
        "2026-11-20T23:01:27+ab:cd",
        "x" * 35,
        "-026-11-20T23:01:27Z",
    ],
)
def test_what_is_no_time_stamp(text: str) -> None:
    assert parse_stamp(text.encode()) is None


def test_a_record() -> None:
    record = parse_record(f"{stamp(5)} stderr P:x some  text ".encode())
    assert record is not None
    assert (record.time_ns, record.stream, record.is_partial, record.text) == (START_NS + 5, Stderr, True, b"some  text ")
    empty = parse_record(f"{stamp(5)} stdout F ".encode())
    assert empty is not None and empty.text == b""


@pytest.mark.parametrize("rest", ["stdout F", "stdin F x", "stdout X x", "stdout  x", "stdout FF x", "", "F x"])
def test_what_is_no_record(rest: str) -> None:
    assert parse_record(f"{stamp(0)} {rest}".encode()) is None


# --- decoder ----------------------------------------------------------------------------------------------------------

MIXED = [
    line("one"),
    line("two"),
    line("oops", stream="stderr"),
    line("half ", tag="P"),
    line("warn", stream="stderr"),
    line("rest", tag="F"),
    line("", tag="F"),
    line("open end", tag="P"),
]


def test_neighbours_of_one_stream_are_one_item_and_partials_are_joined() -> None:
    assert Decoder().feed(b"".join(MIXED)) == [
        Stdout(b"one\ntwo\n"),
        Stderr(b"oops\n"),
        Stdout(b"half "),
        Stderr(b"warn\n"),
        Stdout(b"rest\n\nopen end"),
    ]


def test_time_stamps_stand_at_the_beginning_of_lines_only() -> None:
    at = stamp(0).encode()
    assert Decoder(timestamps=True).feed(b"".join(MIXED[3:7])) == [
        Stdout(at + b" half "),
        Stderr(at + b" warn\n"),
        Stdout(b"rest\n" + at + b" \n"),
    ]


def test_earlier_records_are_dropped() -> None:
    assert Decoder(since_ns=START_NS + 7).feed(lines(5, 9)) == [Stdout(b"line 7\nline 8\n")]


def test_damage_is_skipped_and_counted() -> None:
    decoder = Decoder()
    assert decoder.feed(b"garbage\n\n" + line("good") + b"\xff\xfe\n" + line("better") + b"half a li") == [Stdout(b"good\nbetter\n")]
    assert (decoder.n_invalid, decoder.n_held_bytes) == (3, 9)
    decoder.end_file()
    assert (decoder.n_invalid, decoder.n_held_bytes) == (4, 0)


def test_a_line_without_end_takes_no_memory() -> None:
    decoder = Decoder()
    for _ in range(64):
        assert decoder.feed(b"x" * BLOCK_BYTES) == []
        assert decoder.n_held_bytes <= LINE_BYTES_MAX
    assert decoder.is_skipping
    assert decoder.feed(b"end\n" + line("good")) == [Stdout(b"good\n")]
    assert (decoder.n_invalid, decoder.is_skipping) == (1, False)


@given(st.data())
def test_blocks_may_end_anywhere(data: st.DataObject) -> None:
    whole = b"".join(MIXED) + b"junk\n" + lines(0, 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    decoder = Decoder()
    items = [item for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True) for item in decoder.feed(whole[begin:end])]
    reference = Decoder().feed(whole)
    for stream in (Stdout, Stderr):
        assert b"".join(i.data for i in items if type(i) is stream) == b"".join(i.data for i in reference if type(i) is stream)
    assert (decoder.n_invalid, decoder.n_held_bytes) == (1, 0)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("R8")
async def test_all_that_was_written(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, b"".join(MIXED))
    items = await collect(world, path)
    assert [type(item).__name__ for item in items] == ["Stdout", "Stderr", "Stdout", "Stderr", "Stdout", "Cursor"]
    assert text_of(items) == b"one\ntwo\noops\nhalf warn\nrest\n\nopen end"


async def test_no_log_is_an_empty_one(world: World, folder: str) -> None:
    assert await collect(world, f"{folder}/none") == []
    await world.disk.write(f"{folder}/log", b"")
    assert await collect(world, f"{folder}/log") == []


async def test_an_unreadable_log_is_an_error(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/log")
    with pytest.raises(KernelError):
        await collect(world, f"{folder}/log")


async def test_skipped_lines_are_reported(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/log", b"junk\njunk\n" + line("x"))
    said: list[bytes] = []
    assert text_of(await collect(world, f"{folder}/log", logger=Logger(said.append, world.clock))) == b"x\n"
    assert len(said) == 1 and b'"n_lines":2' in said[0] and b"log_lines_skipped" in said[0]


@pytest.mark.parametrize("tail, first", [(0, 20_000), (1, 19_999), (7, 19_993), (5000, 15_000), (20_000, 0), (90_000, 0)])
async def test_the_tail_of_a_large_log(world: World, folder: str, tail: int, first: int) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 20_000))
    found = text_of(await collect(world, path, LogsRequest(name="c", tail=tail)))
    assert found == b"".join(f"line {n}\n".encode() for n in range(first, 20_000))


@pytest.mark.parametrize(
    "tail, text",
    [
        (0, b""),
        (1, b"open end"),
        (2, b"\nopen end"),
        (3, b"rest\n\nopen end"),
        (4, b"half warn\nrest\n\nopen end"),
        (5, b"oops\nhalf warn\nrest\n\nopen end"),
    ],
)
async def test_the_tail_counts_lines_not_records(world: World, folder: str, tail: int, text: bytes) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, b"junk\n" + b"".join(MIXED) + b"half a li")
    assert text_of(await collect(world, path, LogsRequest(name="c", tail=tail))) == text


@given(st.lists(st.sampled_from(["F", "P"]), max_size=30), st.integers(0, 12))
def test_a_tail_is_the_end_of_the_whole(tags: list[str], n_lines: int) -> None:
    class Memory:
        def __init__(self, data: bytes) -> None:
            self.data = data

        async def read_at(self, offset: int, n_bytes: int) -> bytes:
            return self.data[offset : offset + n_bytes]

        async def append(self, data: bytes | bytearray | memoryview) -> None:
            raise AssertionError("a log is only read")

        async def sync(self) -> None:
            raise AssertionError("a log is only read")

        def size_bytes(self) -> int:
            return len(self.data)

        def close(self) -> None:
            raise AssertionError("a log is only read")

    log = b"".join(line(f"{n}.", tag=tag) for n, tag in enumerate(tags))
    whole = text_of(Decoder().feed(log))
    offset = asyncio.run(find_tail(Memory(log), n_lines))
    expected = b"".join(whole.splitlines(keepends=True)[-n_lines:]) if n_lines else b""
    assert text_of(Decoder().feed(log[offset:])) == expected


async def test_since(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 50))
    assert text_of(await collect(world, path, LogsRequest(name="c", since_ns=START_NS + 48))) == b"line 48\nline 49\n"
    assert text_of(await collect(world, path, LogsRequest(name="c", since_ns=START_NS + 48, tail=1))) == b"line 49\n"
    assert text_of(await collect(world, path, LogsRequest(name="c", since_ns=START_NS + SECOND_NS))) == b""


async def test_a_cursor_goes_on_where_its_batch_ended(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 5000) + b"half a li")
    items = await collect(world, path)
    n_batches = sum(isinstance(item, Cursor) for item in items)
    assert n_batches > 2
    sent = b""
    for item in items:
        if isinstance(item, Cursor):
            rest = text_of(await collect(world, path, LogsRequest(name="c", cursor=item.position, tail=3)))
            assert sent + rest == text_of(items)
        else:
            sent += item.data


async def test_a_cursor_of_another_file_begins_anew(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 10))
    cursor = last_cursor(await collect(world, path))
    await world.disk.write_atomic(path, lines(100, 200))
    assert text_of(await collect(world, path, LogsRequest(name="c", cursor=cursor))).startswith(b"line 100\n")
    for strange in (1, 5, cursor + 1, (1 << 63) - 1, CURSOR_FROM_START):
        assert text_of(await collect(world, path, LogsRequest(name="c", cursor=strange))).startswith(b"line 100\n")


async def test_a_cursor_of_a_file_of_the_same_shape_begins_anew(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, b"".join(line(f"old {n}", number=n) for n in range(5)))
    cursor = last_cursor(await collect(world, path))
    await world.disk.write_atomic(path, b"".join(line(f"new {n}", number=n + 5) for n in range(9)))
    assert text_of(await collect(world, path, LogsRequest(name="c", cursor=cursor))).startswith(b"new 0\n")


# --- following --------------------------------------------------------------------------------------------------------


class Follower:
    """A client that follows, and can be asked to wait for what it should get."""

    def __init__(self, world: World, path: str, request: LogsRequest) -> None:
        self.ended = asyncio.Event()
        self.items: list[LogOutput] = []
        self._news = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(world, path, request))

    async def _run(self, world: World, path: str, request: LogsRequest) -> None:
        async with aclosing(read_logs(world, path, request, ended=self.ended)) as items:
            async for item in items:
                self.items.append(item)
                self._news.set()

    async def wait_ready(self) -> None:
        await self._wait(lambda: bool(self.items))

    async def wait_text(self, text: bytes) -> None:
        await self._wait(lambda: text_of(self.items).endswith(text) and isinstance(self.items[-1], Cursor))

    async def _wait(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def finish(self) -> bytes:
        self.ended.set()
        await asyncio.wait_for(self.task, 40)
        return text_of(self.items)

    async def cut(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


FOLLOW = LogsRequest(name="c", follow=True)


@pytest.mark.row("R8")
async def test_a_follower_gets_what_is_written_and_ends_with_the_container(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 3))
    follower = Follower(world, path, FOLLOW)
    await follower.wait_text(b"line 2\n")
    for number in range(3, 30):
        await append(world, path, lines(number, number + 1))
        await follower.wait_text(f"line {number}\n".encode())
    await append(world, path, lines(30, 33))
    assert await follower.finish() == b"".join(f"line {n}\n".encode() for n in range(33))


async def test_a_follower_of_an_ended_container_reads_all(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 3))
    found = [item async for item in read_logs(world, path, FOLLOW, ended=ended())]
    assert text_of(found) == b"line 0\nline 1\nline 2\n"


async def test_a_log_that_begins_later_is_followed(world: World, folder: str) -> None:
    path = f"{folder}/log"
    follower = Follower(world, path, LogsRequest(name="c", follow=True, tail=0))
    await follower.wait_ready()
    assert follower.items == [Cursor(CURSOR_FROM_START)]
    await append(world, path, lines(0, 2))
    await follower.wait_text(b"line 0\nline 1\n")
    assert await follower.finish() == b"line 0\nline 1\n"


async def test_a_half_written_line_is_waited_for(world: World, folder: str) -> None:
    path = f"{folder}/log"
    half = line("slow")
    await world.disk.write(path, lines(0, 1) + half[:40])
    follower = Follower(world, path, FOLLOW)
    await follower.wait_text(b"line 0\n")
    await append(world, path, half[40:-1])
    await append(world, path, b"\n" + lines(1, 2)[:-3])
    await follower.wait_text(b"slow\n")
    assert await follower.finish() == b"line 0\nslow\n"


async def test_a_replaced_file_is_followed_after_its_end(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 2))
    follower = Follower(world, path, FOLLOW)
    await follower.wait_text(b"line 1\n")
    await append(world, path, lines(2, 4))
    await world.disk.write(f"{path}.tmp", lines(4, 6))
    await world.disk.rename(f"{path}.tmp", path)
    await follower.wait_text(b"line 5\n")
    await append(world, path, lines(6, 7))
    assert await follower.finish() == b"".join(f"line {n}\n".encode() for n in range(7))


class MeddlingDisk:
    """A disk on which something happens right before the next `stat`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.before_stat: list[Callable[[], Awaitable[None]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    async def stat(self, path: str) -> FileStat | None:
        while self.before_stat:
            await self.before_stat.pop()()
        return await self._disk.stat(path)


async def test_what_is_written_right_before_the_replacement_is_read(world: World, folder: str) -> None:
    path, disk = f"{folder}/log", MeddlingDisk(world.disk)
    await world.disk.write(path, lines(0, 2))
    follower = Follower(dataclasses.replace(world, disk=cast(Disk, disk)), path, FOLLOW)
    await follower.wait_text(b"line 1\n")

    async def replace() -> None:
        await append(world, path, lines(3, 4))
        await world.disk.write(f"{path}.tmp", lines(4, 5))
        await world.disk.rename(f"{path}.tmp", path)

    disk.before_stat.append(replace)  # the follower has read to the end, and looks whether the file is still the same
    await append(world, path, lines(2, 3))
    await follower.wait_text(b"line 4\n")
    assert await follower.finish() == b"".join(f"line {n}\n".encode() for n in range(5))


async def test_a_cut_file_is_read_from_its_start(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 50))
    follower = Follower(world, path, LogsRequest(name="c", follow=True, tail=1))
    await follower.wait_text(b"line 49\n")
    await world.disk.write(path, lines(50, 51))
    await follower.wait_text(b"line 50\n")
    assert await follower.finish() == b"line 49\nline 50\n"


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3, 4, 5, 6]])
async def test_followers_that_are_cut_off_lose_and_double_nothing(world: World, folder: str, cuts: list[int]) -> None:
    path = f"{folder}/log"
    written, seen, cursor = 0, b"", 0
    for number in [*cuts, 99]:
        follower = Follower(world, path, LogsRequest(name="c", follow=True, tail=0, cursor=cursor))
        await follower.wait_ready()
        await append(world, path, lines(written, written + number))
        written += number
        await follower.wait_text(f"line {written - 1}\n".encode())
        await append(world, path, lines(written, written + 40))
        written += 40
        await follower.cut()
        cursor = last_cursor(follower.items)
        counted = max(index for index, item in enumerate(follower.items) if isinstance(item, Cursor))
        seen += text_of(follower.items[: counted + 1])
    seen += text_of(await collect(world, path, LogsRequest(name="c", cursor=cursor)))
    assert seen == b"".join(f"line {n}\n".encode() for n in range(written))


async def test_leaving_early_leaves_no_task_and_no_watch(world: World, folder: str) -> None:
    path = f"{folder}/log"
    await world.disk.write(path, lines(0, 9000))
    async with aclosing(read_logs(world, path, FOLLOW, ended=asyncio.Event())) as items:
        async for item in items:
            if isinstance(item, Stdout):
                break
    assert len(asyncio.all_tasks()) == 1
