"""Static files: a folder served below a wildcard route.

    router.get("/static/*path", static_files(world, "/srv/www"))

Only regular files are served, and only what stands in the folder itself: names that begin with a dot, symbolic links anywhere on the
way, "..", and folders (unless `index` names a file to serve for them) are not found. Files are opened by `Disk.open_file_beneath`, so that
a link put into the folder between the look and the opening leads nowhere either.

GET and HEAD; conditions (ETag, Last-Modified), single and several ranges. Small files are read at once; larger ones go from the disk
to the socket by `Disk.send_file`. A file that changes while it is sent breaks the connection, so that nobody takes a mixture for whole.
Source: RFC 9110 sections 13 to 15.
"""

import asyncio
import errno
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from posixpath import splitext
from typing import Final

from isopod.net.http.messages import Answer, Body, HeaderPairs, HttpError, Request, Response
from isopod.net.http.ranges import Span, Validators, choose_ranges, judge
from isopod.world.disk import DataFile, Disk, FileStat
from isopod.world.errors import BadRecord, Disconnected, from_os_error
from isopod.world.world import World

WHOLE_BYTES_MAX: Final = 64 << 10
"""Up to this size a file is read into memory and sent with its head."""
PIECE_BYTES: Final = 256 << 10
"""A larger one is read, or sent by the kernel, in pieces of this size."""
PATH_PARTS_MAX: Final = 64
NAME_BYTES_MAX: Final = 255
_NOT_FOUND: Final = frozenset((errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENXIO))
"""What opening tells of a link, or of what is no file."""
_SECOND_NS: Final = 1_000_000_000
_DEFAULT_TYPE: Final = "application/octet-stream"
_TYPES: Final = {
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".gif": "image/gif",
    ".htm": "text/html; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/vnd.microsoft.icon",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".ogg": "audio/ogg",
    ".otf": "font/otf",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".toml": "application/toml",
    ".ttf": "font/ttf",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".wav": "audio/wav",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xml": "application/xml",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".zip": "application/zip",
}


class FilePart(AsyncIterable[bytes]):
    """A range of a file, as a response's body. The file is opened when the sending begins, and closed when it ends.

    Args:
        disk: Where the file is.
        root: The folder that it must not lead out of.
        path: Its path in there.
        facts: What it was when the head was written: it must still be that.
        span: Which bytes.
    """

    def __init__(self, disk: Disk, root: str, path: str, *, facts: FileStat, span: Span) -> None:
        self._disk = disk
        self._root = root
        self._path = path
        self._facts = facts
        self._span = span

    async def check(self) -> None:
        """Open and close it: a HEAD is answered as a GET would be. Raises as `send`."""
        (await self._open()).close()

    async def send(self, transport: asyncio.Transport, piece_s: float, on_sent: Callable[[int], None]) -> None:
        """Send it over a connection, past Python where it can be done.

        Args:
            transport: The connection; nobody else writes to it meanwhile.
            piece_s: How long each PIECE_BYTES may take.
            on_sent: Told how many bytes went.

        Raises:
            Disconnected: The peer is too slow, or went.
            OSError: The disk failed.
            BadRecord: The file is not what it was.
        """
        file = await self._open()
        try:
            for start in range(self._span.start, self._span.end, PIECE_BYTES):
                n_bytes = min(PIECE_BYTES, self._span.end - start)
                async with asyncio.timeout(piece_s):
                    n_sent = await self._disk.send_file(file, transport, offset=start, n_bytes=n_bytes)
                if n_sent != n_bytes:
                    raise self._changed()
                on_sent(n_sent)
        except (TimeoutError, ConnectionError) as error:
            raise Disconnected("client", "it did not take the file") from error
        finally:
            file.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over its bytes."""
        file = await self._open()
        try:
            for start in range(self._span.start, self._span.end, PIECE_BYTES):
                n_bytes = min(PIECE_BYTES, self._span.end - start)
                piece = await file.read_at(start, n_bytes)
                if len(piece) != n_bytes:
                    raise self._changed()
                yield piece
        finally:
            file.close()

    async def _open(self) -> DataFile:
        file = await self._disk.open_file_beneath(self._root, self._path)
        try:
            now = await self._disk.stat(f"{self._root}/{self._path}")
            if now is None or _identity(now) != _identity(self._facts):
                raise self._changed()
        except BaseException:
            file.close()
            raise
        return file

    def _changed(self) -> BadRecord:
        return BadRecord(f"{self._root}/{self._path}", "the file changed while it was sent")


class static_files:  # noqa: N801 - used as a function is, a class for its state
    """A handler that serves a folder.

    Args:
        world: For the disk.
        root: The folder.
        index: The file to serve for a folder ("index.html"), or None: folders are not found.
        cache_control: The Cache-Control of what is found, or "".
        param: The wildcard's name.
        shows_hidden: Whether names that begin with a dot are served.
    """

    def __init__(
        self,
        world: World,
        root: str,
        *,
        index: str | None = None,
        cache_control: str = "",
        param: str = "path",
        shows_hidden: bool = False,
    ) -> None:
        self._world = world
        self._root = root.rstrip("/") or "/"
        self._index = index
        self._extra: HeaderPairs = (("cache-control", cache_control),) if cache_control else ()
        self._param = param
        self._shows_hidden = shows_hidden

    async def __call__(self, request: Request) -> Answer:
        """Answer a request."""
        if request.method not in {"GET", "HEAD"}:
            return Response.error(405, f"{request.method} is not allowed here", headers=(("allow", "GET, HEAD"),))
        try:
            found = await self._find(request.params.get(self._param, ""))
            if found is None:
                return Response.error(404, "no such file")
            return await self._answer(request, *found)
        except FileNotFoundError:
            return Response.error(404, "no such file")
        except OSError as error:
            if error.errno in _NOT_FOUND:
                return Response.error(404, "no such file")
            raise from_os_error(error, "read", request.raw_path) from error

    async def _find(self, path: str) -> tuple[str, FileStat] | None:
        """Return where in the folder a path leads and what is there, None if that is not for the public."""
        parts = path.split("/") if path else []
        is_folder = not parts or parts[-1] == ""
        if is_folder:
            parts = parts[:-1]
            if self._index is None:
                return None
            parts.append(self._index)
        if len(parts) > PATH_PARTS_MAX or not all(self._is_public(part) for part in parts):
            return None
        place, facts = "", None
        for number, part in enumerate(parts, 1):
            place = f"{place}/{part}" if place else part
            facts = await self._world.disk.stat(f"{self._root}/{place}")
            if facts is None or facts.is_symlink or facts.is_directory is (number == len(parts)):
                return None
        return (place, facts) if facts is not None else None

    def _is_public(self, part: str) -> bool:
        if not part or part in {".", ".."} or "\0" in part or "/" in part:
            return False
        try:
            n_bytes = len(part.encode())
        except UnicodeEncodeError:
            return False
        return n_bytes <= NAME_BYTES_MAX and (self._shows_hidden or not part.startswith(".") or part == self._index)

    async def _answer(self, request: Request, path: str, facts: FileStat) -> Response:
        now = Validators(f'"{facts.modified_at_ns:x}-{facts.size_bytes:x}-{facts.inode:x}"', facts.modified_at_ns // _SECOND_NS)
        headers = (*now.headers, *self._extra)
        verdict = judge(request.headers, now)
        if verdict == "not_modified":
            return Response(304, headers)
        if verdict == "failed":
            raise HttpError(412, "the file is not what If-Match or If-Unmodified-Since wants", headers=now.headers)
        size = facts.size_bytes
        headers = (*headers, ("accept-ranges", "bytes"), ("x-content-type-options", "nosniff"))
        kind = content_type(path)
        spans = choose_ranges(request.headers, now, size) if request.method == "GET" else None
        if spans is None:
            whole = Span(0, size)
            return await self._part(request, path, facts, span=whole, status=200, headers=(("content-type", kind), *headers))
        if not spans:
            raise HttpError(416, f"the file has {size} bytes", headers=(("content-range", f"bytes */{size}"),))
        if len(spans) == 1:
            only = (("content-type", kind), ("content-range", spans[0].content_range(size)), *headers)
            return await self._part(request, path, facts, span=spans[0], status=206, headers=only)
        return self._parts(path, facts, spans, kind=kind, headers=headers)

    async def _part(self, request: Request, path: str, facts: FileStat, *, span: Span, status: int, headers: HeaderPairs) -> Response:
        part = FilePart(self._world.disk, self._root, path, facts=facts, span=span)
        if request.method == "HEAD":
            await part.check()
            return Response(status, (*headers, ("content-length", str(span.n_bytes))))
        body: Body = part
        if span.n_bytes <= WHOLE_BYTES_MAX:
            body = b"".join([piece async for piece in part])
        else:
            headers = (*headers, ("content-length", str(span.n_bytes)))
        return Response(status, headers, body)

    def _parts(self, path: str, facts: FileStat, spans: Sequence[Span], *, kind: str, headers: HeaderPairs) -> Response:
        """Answer several ranges (multipart/byteranges, RFC 9110 section 14.6)."""
        boundary = self._world.random.token_hex(12)
        size = facts.size_bytes
        frames = [f"--{boundary}\r\ncontent-type: {kind}\r\ncontent-range: {span.content_range(size)}\r\n\r\n".encode() for span in spans]
        end = f"--{boundary}--\r\n".encode()
        n_bytes = sum(map(len, frames)) + sum(span.n_bytes + 2 for span in spans) + len(end)

        async def body() -> AsyncIterator[bytes]:
            for frame, span in zip(frames, spans, strict=True):
                yield frame
                async for piece in FilePart(self._world.disk, self._root, path, facts=facts, span=span):
                    yield piece
                yield b"\r\n"
            yield end

        own = (("content-type", f"multipart/byteranges; boundary={boundary}"), ("content-length", str(n_bytes)))
        return Response(206, (*own, *headers), body())


def content_type(path: str) -> str:
    """Return the media type that a file's name stands for."""
    return _TYPES.get(splitext(path)[1].lower(), _DEFAULT_TYPE)


def _identity(facts: FileStat) -> tuple[int, int, int]:
    return facts.inode, facts.modified_at_ns, facts.size_bytes
