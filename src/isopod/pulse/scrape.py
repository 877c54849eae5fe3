"""Scrape: one answer of figures: which are wanted, in which form, and streamed within the time that its reader gives.

    request -> query, own families -> Store.view -> format and coding by Accept -> ETag? 304 -> pieces

An answer that is small is sent whole, with its length; a large one in pieces as they are joined, so that its first byte does not wait for
its last. Nobody is asked anything: what is shown was collected before.

Time: a Prometheus says with X-Prometheus-Scrape-Timeout-Seconds how long it waits. An answer that is not taken within that, less a margin,
is cut: the connection is aborted without the end of the body, so that every reader can tell, and the scrape counts as failed. The same
holds for one whose reader goes. Figures that end in the middle as if they were whole are the one thing that must not be sent.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final

from isopod.net.http.messages import HeaderPairs, HttpError, Request, Response
from isopod.pulse.formats import Coding, Format
from isopod.pulse.merge import Told
from isopod.pulse.model import Families, Query
from isopod.pulse.own import Own
from isopod.pulse.render import etag, render
from isopod.pulse.security import HEADERS
from isopod.pulse.store import Store
from isopod.runtime.logger import Logger

TIMEOUT_HEADER: Final = "x-prometheus-scrape-timeout-seconds"
SCRAPE_S: Final = 120.0
"""How long an answer may take if its reader does not say."""
MARGIN_S: Final = 0.5
MARGIN_PART: Final = 0.1
"""Of the reader's time, the smaller of both is left to the way."""
WHOLE_BYTES: Final = 64 << 10
"""Up to this size an answer is sent in one piece."""
SCRAPES_MAX: Final = 64
"""So many answers at once: each holds a few pieces in memory."""
RETRY_S: Final = 1


class Scrapes:
    """Answers scrapes.

    Args:
        store: What is shown.
        own: Counts them.
        logger: Told of those that were cut.
        attend: Has shims asked that were left alone, and waits for them, at most so long.
    """

    def __init__(self, store: Store, own: Own, logger: Logger, *, attend: Callable[[float], Awaitable[None]]) -> None:
        self.attend = attend
        self._store = store
        self._own = own
        self._logger = logger

    async def answer(
        self,
        request: Request,
        query: Query,
        families: Callable[[], Families | Told],
        *,
        chosen: tuple[Format, Coding],
        headers: HeaderPairs = (),
    ) -> Response:
        """Answer one scrape. Counting is the caller's until it returns; `Counted` counts the rest.

        Args:
            request: Who asks.
            query: For what.
            families: Makes the agent's own families that go with it.
            chosen: The form and the coding.
            headers: Sent with the answer.

        Raises:
            NotFound: There is no such sandbox.
            InvalidArgument: A selector is malformed.
            HttpError: 503, so many scrapes are under way.
        """
        own = self._own
        due_s = asyncio.get_running_loop().time() + time_left_s(request)
        began_ns = own.begin()
        n_bytes = 0
        try:
            if own.n_in_flight > SCRAPES_MAX:
                hint = "scrape less often, or fewer at once"
                raise HttpError(503, "too many scrapes at once", hint, headers=(("retry-after", str(RETRY_S)),))
            await self.attend((due_s - asyncio.get_running_loop().time()) / 2)
            await own.refresh()
            at_ns = own.now_ns()
            view = self._store.view(query, families())
            own.spend("view", at_ns)
            format_, coding = chosen
            tag = etag(view, format_, coding)
            fields = (*fields_of(format_, coding), ("etag", tag), *headers)
            if is_known(request, tag):
                response = Response(304, fields)
            elif request.method == "HEAD":
                response = Response(200, fields, _Nothing())
            else:
                pieces = _timed(render(view, format_, coding), own)
                stream = Stream(pieces, due_s, lambda failed, n: self._ended(request, began_ns, failed=failed, n_bytes=n))
                body = await stream.whole(WHOLE_BYTES)
                if body is None:
                    return Response(200, fields, stream)
                n_bytes = len(body)
                response = Response(200, fields, body)
        except BaseException:
            own.end(began_ns, failed=True)
            raise
        self._ended(request, began_ns, failed=False, n_bytes=n_bytes)
        return response

    def _ended(self, request: Request, began_ns: int, *, failed: bool, n_bytes: int) -> None:
        self._own.end(began_ns, failed=failed, n_bytes=n_bytes)
        took_s = (self._own.now_ns() - began_ns) / 1e9
        self._logger.debug("pulse.scraped", path=request.raw_path, query=request.query, bytes=n_bytes, took_s=round(took_s, 6))
        if failed:
            self._logger.warning("pulse.scrape_cut", path=request.raw_path, n_bytes=n_bytes, peer=str(request.peer))


class Stream:
    """The pieces of an answer, cut at its time. Ends itself once: by its end, by `aclose`, or when its time is over.

    Args:
        pieces: What is sent.
        due_s: The loop's time by which it must have been taken.
        on_end: Told whether it failed, and how many bytes were sent; not called while `whole` has all of it.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], due_s: float, on_end: Callable[[bool, int], None]) -> None:
        self._pieces = pieces
        self._on_end = on_end
        self._due_s = due_s
        self._first: list[bytes] = []
        self._n_bytes = 0
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None
        self._task = asyncio.current_task()

    async def whole(self, n_bytes_max: int) -> bytes | None:
        """Return everything if it is not more than so much, else None: then this is to be iterated over."""
        n_bytes = 0
        try:
            async for piece in self._pieces:
                self._first.append(piece)
                n_bytes += len(piece)
                if n_bytes > n_bytes_max:
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_at(max(self._due_s, loop.time()), self._expire)
                    return None
        except BaseException:
            await self._pieces.aclose()
            raise
        return b"".join(self._first)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._first:
            piece = self._first.pop(0)
        else:
            try:
                piece = await anext(self._pieces)
            except StopAsyncIteration:
                self._end(failed=False)
                raise
        self._n_bytes += len(piece)
        return piece

    async def aclose(self) -> None:
        """End it, wherever it is."""
        self._end(failed=True)
        await self._pieces.aclose()

    def _expire(self) -> None:
        """Cut the connection: cancelling its task aborts it. A response that nobody took any more is only counted."""
        self._end(failed=True)
        if self._task is not None:
            self._task.cancel()

    def _end(self, *, failed: bool) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._on_end(failed, self._n_bytes)


def fields_of(format_: Format, coding: Coding) -> HeaderPairs:
    """Return the header fields of an answer in a form and a coding."""
    fields: HeaderPairs = (("content-type", format_.content_type), ("vary", "accept, accept-encoding"), ("cache-control", "no-cache"))
    return fields + (() if coding == "identity" else (("content-encoding", coding),)) + HEADERS


def time_left_s(request: Request) -> float:
    """Return how long an answer may take, in seconds."""
    text = request.headers.get(TIMEOUT_HEADER) or ""
    try:
        told_s = float(text) if len(text) <= 32 and "_" not in text else 0.0
    except ValueError:
        told_s = 0.0
    if not (math.isfinite(told_s) and told_s > 0):
        return SCRAPE_S
    return min(SCRAPE_S, told_s - min(MARGIN_S, told_s * MARGIN_PART))


def is_known(request: Request, tag: str) -> bool:
    """Return whether the client has what this tag stands for (RFC 9110 section 13.1.2: weak comparison)."""
    field = request.headers.combined("if-none-match")
    known = [word.strip().removeprefix("W/") for word in field.split(",")]
    return field.strip() == "*" or tag.removeprefix("W/") in known


async def _timed(pieces: AsyncIterator[bytes], own: Own) -> AsyncGenerator[bytes, None]:
    """Pass pieces on, and count the time that making them takes."""
    source = aiter(pieces)
    try:
        while True:
            began_ns = own.now_ns()
            try:
                piece = await anext(source)
            except StopAsyncIteration:
                return
            finally:
                own.spend("render", began_ns)
            yield piece
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


class _Nothing:
    """Stands for the body of an answer to HEAD: it is framed as a stream's, and never sent."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration
