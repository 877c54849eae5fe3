"""Static files: what is found, conditions, ranges, and what must never be served."""

import dataclasses
import email.parser
import email.policy
import os
import socket
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.http import Handler, Request, Response
from isopod.net.http.encode import http_date, parse_http_date
from isopod.net.http.headers import Headers
from isopod.net.http.middleware import chain
from isopod.net.http.ranges import Validators, choose_ranges
from isopod.net.http.router import Router
from isopod.net.http.static import static_files
from isopod.world.disk import Disk, FileStat
from isopod.world.world import World
from tests.net.http.kit import GET, ask, serving, talk

pytestmark = pytest.mark.row("S13")

LARGE = bytes(range(256)) * 4096


async def prepare(world: World, folder: str) -> str:
    root = f"{folder}/www"
    for path in (root, f"{root}/sub", f"{root}/.git"):
        await world.disk.make_directory(path)
    await world.disk.write(f"{root}/a.txt", b"0123456789")
    await world.disk.write(f"{root}/empty.css", b"")
    await world.disk.write(f"{root}/large.bin", LARGE)
    await world.disk.write(f"{root}/sub/index.html", b"<p>index")
    await world.disk.write(f"{root}/.env", b"secret")
    await world.disk.write(f"{root}/.git/config", b"secret")
    await world.disk.write(f"{folder}/outside", b"secret")
    return root


def site(world: World, root: str, **options: str) -> Handler:
    router = Router()
    router.get("/f/*path", static_files(world, root, **options))  # type: ignore[arg-type]
    return chain(router)


async def test_files_are_served(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root, cache_control="max-age=60"), folder) as server:
        small, empty, large, index = [
            await ask(server, target=f"/f/{name}") for name in ("a.txt", "empty.css", "large.bin", "sub/index.html")
        ]
        head = await ask(server, "HEAD", "/f/large.bin")

    assert (small.status, small.body, small.headers["content-type"]) == (200, b"0123456789", "text/plain; charset=utf-8")
    assert small.headers["cache-control"] == "max-age=60" and small.headers["x-content-type-options"] == "nosniff"
    assert parse_http_date(small.headers["last-modified"]) is not None and small.headers["accept-ranges"] == "bytes"
    assert (empty.status, empty.body, empty.headers["content-length"]) == (200, b"", "0")
    assert large.body == LARGE and large.headers["content-type"] == "application/octet-stream" and index.body == b"<p>index"
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(LARGE)))


@pytest.mark.parametrize(
    "path",
    ["nothing", "", "sub", "sub/", ".env", ".git/config", "a.txt/", "a.txt/x", "sub//index.html", "x" * 300, "a.txt%2f", "outside"],
)
async def test_what_is_not_for_the_public_is_not_found(world: World, folder: str, path: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        assert (await ask(server, target=f"/f/{path}")).status == 404


@pytest.mark.parametrize("path", ["../outside", "%2e%2e/outside", "..%2foutside", "sub/../../outside", "%2fetc%2fpasswd%00"])
async def test_nothing_climbs_out(world: World, folder: str, path: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        got = await ask(server, target=f"/f/{path}")
        direct = await static_files(world, root)(_with_path(path))

    assert got.status in {400, 404} and b"secret" not in got.body
    assert isinstance(direct, Response) and direct.status == 404


def _with_path(path: str) -> Request:
    request = Request("GET", "/")
    request.params = {"path": path}
    return request


@pytest.mark.host
async def test_links_and_pipes_are_not_found(host_world: World, folder: str) -> None:
    root = await prepare(host_world, folder)
    os.symlink(f"{folder}/outside", f"{root}/link")
    os.symlink(folder, f"{root}/up")
    os.symlink("a.txt", f"{root}/inside")
    os.mkfifo(f"{root}/pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{root}/socket")
    names = ("link", "up/outside", "inside", "pipe", "socket")
    async with serving(host_world, site(host_world, root), folder) as server:
        statuses = [(await ask(server, method, f"/f/{name}")).status for name in names for method in ("GET", "HEAD")]

    assert statuses == [404] * 10


async def test_an_index_if_asked_for(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root, index="index.html"), folder) as server:
        got = [(await ask(server, target=f"/f/{name}")).status for name in ("sub/", "sub", "")]

    assert got == [200, 404, 404]


async def test_other_methods(world: World, folder: str) -> None:
    answer = await static_files(world, folder)(Request("POST", "/"))

    assert isinstance(answer, Response) and (answer.status, answer.header("allow")) == (405, "GET, HEAD")


async def test_conditions(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        first = await ask(server, target="/f/a.txt")
        tag, date = first.headers["etag"], first.headers["last-modified"]
        before = http_date((parse_http_date(date) or 0) - 10)

        async def status(headers: str, method: str = "GET") -> int:
            return (await ask(server, method, "/f/a.txt", headers)).status

        found = {
            headers: await status(headers)
            for headers in (
                f"If-None-Match: {tag}\r\n",
                f'If-None-Match: "x", W/{tag}\r\n',
                "If-None-Match: *\r\n",
                'If-None-Match: "x"\r\n',
                f'If-None-Match: "x"\r\nIf-Modified-Since: {date}\r\n',
                f"If-Modified-Since: {date}\r\n",
                f"If-Modified-Since: {before}\r\n",
                "If-Modified-Since: yesterday\r\n",
                f"If-Match: {tag}\r\n",
                "If-Match: *\r\n",
                'If-Match: "x"\r\n',
                f"If-Unmodified-Since: {date}\r\n",
                f"If-Unmodified-Since: {before}\r\n",
            )
        }
        unmodified = await ask(server, "HEAD", "/f/a.txt", f"If-None-Match: {tag}\r\n")
        await world.disk.write(f"{root}/a.txt", b"changed now")
        changed = await ask(server, target="/f/a.txt", headers=f"If-None-Match: {tag}\r\n")

    assert list(found.values()) == [304, 304, 304, 200, 200, 304, 200, 200, 200, 200, 412, 200, 412]
    assert (unmodified.status, unmodified.headers["etag"], unmodified.body) == (304, tag, b"")
    assert (changed.status, changed.body) == (200, b"changed now")


@pytest.mark.parametrize(
    ("wanted", "status", "body", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("BYTES = 1-2", 206, b"12", "bytes 1-2/10"),
        ("bytes=0-2,2-5", 206, b"012345", "bytes 0-5/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=5-4", 200, b"0123456789", None),
        ("bytes=x-4", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("lines=0-3", 200, b"0123456789", None),
        ("bytes=" + ",".join(f"{n}-{n}" for n in range(0, 40, 2)), 200, b"0123456789", None),
    ],
)
async def test_ranges(world: World, folder: str, wanted: str, status: int, body: bytes | None, content_range: str | None) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        got = await ask(server, target="/f/a.txt", headers=f"Range: {wanted}\r\n")

    assert (got.status, got.headers.get("content-range")) == (status, content_range)
    assert body is None or got.body == body


async def test_several_ranges(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        got = await ask(server, target="/f/large.bin", headers="Range: bytes=0-9, 300000-599999, -5\r\n")

    assert got.status == 206 and int(got.headers["content-length"]) == len(got.body) and got.is_whole
    head = f"content-type: {got.headers['content-type']}\r\n\r\n".encode()
    parts = list(email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + got.body).iter_parts())
    ranges = [part["content-range"] for part in parts]
    size = len(LARGE)
    assert ranges == [f"bytes 0-9/{size}", f"bytes 300000-599999/{size}", f"bytes {size - 5}-{size - 1}/{size}"]
    frames = got.body.split(b"--" + got.headers["content-type"].partition("boundary=")[2].encode())
    assert [frame.partition(b"\r\n\r\n")[2][:-2] for frame in frames[1:-1]] == [LARGE[:10], LARGE[300000:600000], LARGE[-5:]]


async def test_a_large_range_and_if_range(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    async with serving(world, site(world, root), folder) as server:
        first = await ask(server, "HEAD", "/f/large.bin")
        conditions = [first.headers["etag"], first.headers["last-modified"], '"other"', f"W/{first.headers['etag']}", http_date(0)]
        got = [
            await ask(server, target="/f/large.bin", headers=f"Range: bytes=100000-899999\r\nIf-Range: {each}\r\n") for each in conditions
        ]

    assert [each.status for each in got] == [206, 206, 200, 200, 200]
    assert got[0].body == got[1].body == LARGE[100000:900000] and got[2].body == LARGE


async def test_a_file_that_changed_under_way_is_not_sent_as_whole(world: World, folder: str) -> None:
    root = await prepare(world, folder)
    files = static_files(world, root)

    async def handler(request: Request) -> Response:
        request.params = {"path": "large.bin"}
        answer = await files(request)
        await world.disk.write(f"{root}/large.bin", b"other")
        assert isinstance(answer, Response)
        return answer

    async with serving(world, handler, folder) as server:
        data = await talk(server, GET)
        assert LARGE[:10] not in data and b"other" not in data
        assert len(server.events("http.handler_failed")) == 1


@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 12_000)), min_size=1, max_size=8))
def test_ranges_are_inside_apart_and_cover_what_was_asked(size: int, asked: list[tuple[int, int]]) -> None:
    specs = [(min(pair), max(pair)) for pair in asked]
    headers = Headers([("range", "bytes=" + ",".join(f"{start}-{end}" for start, end in specs))])
    spans = choose_ranges(headers, Validators('"x"', 0), size)

    assert spans is not None
    wanted = {n for start, end in specs for n in range(start, min(end + 1, size))}
    sent = [n for span in spans for n in range(span.start, span.end)]
    assert len(sent) == len(set(sent)) and wanted == set(sent)
    assert all(0 <= span.start < span.end <= size for span in spans)


class _RacedDisk:
    """A disk on which somebody puts a link in a folder's place after each look, and takes it away before the next."""

    def __init__(self, disk: Disk, folder: str, away: str) -> None:
        self._disk = disk
        self._folder = folder
        self._away = away

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    async def stat(self, path: str) -> FileStat | None:
        self.put_back()
        found = await self._disk.stat(path)
        os.rename(self._folder, self._away)
        os.symlink(f"{self._away}-secret", self._folder)
        return found

    def put_back(self) -> None:
        if os.path.islink(self._folder):
            os.unlink(self._folder)
            os.rename(self._away, self._folder)


@pytest.mark.host
@pytest.mark.parametrize("n_bytes", [10, 100_000])
async def test_a_link_put_there_after_the_look_leads_nowhere(host_world: World, folder: str, n_bytes: int) -> None:
    """The link's file has the size, time and number of the one that was looked at (a hard link), so only the way tells them apart."""
    root = await prepare(host_world, folder)
    os.mkdir(f"{folder}/away-secret")
    await host_world.disk.write(f"{root}/sub/file", b"x" * n_bytes)
    os.link(f"{root}/sub/file", f"{folder}/away-secret/file")
    disk = _RacedDisk(host_world.disk, f"{root}/sub", f"{folder}/away")
    raced = dataclasses.replace(host_world, disk=cast("Disk", disk))
    async with serving(host_world, site(raced, root), folder) as server:
        data = await talk(server, b"GET /f/sub/file HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    disk.put_back()

    assert b"xxxxx" not in data and (n_bytes > 64 << 10 or data.startswith(b"HTTP/1.1 404"))
