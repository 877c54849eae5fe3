"""Middleware: functions around a handler.

    def timing(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        answer = handler(request)
        return finish(answer, lambda response: mark(response))

    server = HttpServer(world, chain(router, request_id(world), access_log(logger, world), compress()), ...)

`chain` puts the first one outermost. While every part is a plain function the whole is one, and stays on the fast path: `finish` applies
a function at once to an answer that is there, and later to one that is awaited. Errors of the tree that a handler raises become their
responses inside the chain, so that middleware sees them as such; bugs pass through it as exceptions.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from isopod.net.http.failures import RETRY_AFTER_S, answer_error
from isopod.net.http.messages import Answer, Handler, Request, Response, Upgrade
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument, IsopodError
from isopod.world.world import World

Middleware = Callable[[Request, Handler], Answer | Awaitable[Answer]]
"""Takes a request and the handler inside it; calls it, or answers itself."""

REQUEST_ID_CHARS_MAX: Final = 64
_ID_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_NANO: Final = 1e-9


def chain(handler: Handler, *middleware: Middleware) -> Handler:
    """Return a handler with middleware around it.

    Args:
        handler: The innermost.
        *middleware: The outermost first.
    """
    whole: Handler = partial(_answering, handler)
    for each in reversed(middleware):
        whole = partial(_through, each, whole)
    return whole


def finish(answer: Answer | Awaitable[Answer], change: Callable[[Response], Response]) -> Answer | Awaitable[Answer]:
    """Return the answer with a function applied to its response; an Upgrade passes as it is."""
    if isinstance(answer, Response):
        return change(answer)
    return answer if isinstance(answer, Upgrade) else _finish_later(answer, change)


def request_id(world: World, *, header: str = "x-request-id", trusts_client: bool = False) -> Middleware:
    """Give every request an id: in `request.state["request_id"]`, and in a header of the response.

    Args:
        world: For chance.
        header: The field's name.
        trusts_client: Take the client's own id if it is short and harmless.
    """

    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        found = request.headers.get(header) if trusts_client else None
        if not found or len(found) > REQUEST_ID_CHARS_MAX or not _ID_CHARS.issuperset(found):
            found = world.random.token_hex(8)
        request.state["request_id"] = number = found

        def add(response: Response) -> Response:
            response.set_header(header, number)
            return response

        return finish(handler(request), add)

    return middleware


def access_log(logger: Logger, world: World) -> Middleware:
    """Log one line "http.access" per request: method, path (without its query), status, duration, size, peer, and its id if it has one.

    The duration is that until the handler's answer; a streamed body has no size here.
    """

    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        began_ns = world.clock.monotonic_ns()

        def log(status: int, n_bytes: int | None) -> None:
            facts: dict[str, object] = {} if request._state is None else {k: v for k, v in request._state.items() if k == "request_id"}
            logger.info(
                "http.access",
                method=request.method,
                path=request.raw_path,
                status=status,
                duration_s=(world.clock.monotonic_ns() - began_ns) * _NANO,
                n_bytes=n_bytes,
                peer=_peer(request),
                **facts,
            )

        def log_answer(answer: Answer) -> Answer:
            if isinstance(answer, Upgrade):
                log(101, None)
            else:
                log(answer.status, len(answer.body) if isinstance(answer.body, bytes) else None)
            return answer

        try:
            answer = handler(request)
        except BaseException:
            log(500, None)
            raise
        if isinstance(answer, Response | Upgrade):
            return log_answer(answer)
        return _log_later(answer, log_answer, log)

    return middleware


def limit_concurrency(n_max: int, *, n_waiting_max: int = 0, wait_s: float = 1.0, retry_after_s: int = RETRY_AFTER_S) -> Middleware:
    """Let so many requests be answered at once; others wait a while, or get a 503 with Retry-After.

    Counts what is awaited: a plain function's answer takes no time that another could want. A streamed body is not counted any more.

    Args:
        n_max: Inside at once.
        n_waiting_max: How many may wait for a place.
        wait_s: For how long.
        retry_after_s: What the refused are told.

    Raises:
        InvalidArgument: `n_max` is less than 1.
    """
    if n_max < 1:
        raise InvalidArgument("n_max", n_max, "must be at least 1")
    places = asyncio.Semaphore(n_max)
    n_waiting = 0
    refusal = (("retry-after", str(retry_after_s)),)

    async def inside(request: Request, handler: Handler) -> Answer:
        nonlocal n_waiting
        if places.locked():
            if n_waiting >= n_waiting_max:
                return Response.error(503, "too many requests at once", headers=refusal)
            n_waiting += 1
            try:
                async with asyncio.timeout(wait_s):
                    await places.acquire()
            except TimeoutError:
                return Response.error(503, "too many requests at once", headers=refusal)
            finally:
                n_waiting -= 1
        else:
            await places.acquire()
        try:
            answer = handler(request)
            return answer if isinstance(answer, Response | Upgrade) else await answer
        finally:
            places.release()

    return inside


def limit_rate(world: World, per_s: float, *, burst: int, retry_after_s: int = RETRY_AFTER_S) -> Middleware:
    """Let so many requests a second pass (a token bucket); the others get a 503 with Retry-After.

    Args:
        world: For time.
        per_s: The lasting rate.
        burst: How many may come at once after a pause.
        retry_after_s: What the refused are told.

    Raises:
        InvalidArgument: Rate or burst is not above 0.
    """
    if not per_s > 0 or burst < 1:
        raise InvalidArgument("rate", f"{per_s}/{burst}", "rate and burst must be above 0")
    refusal = (("retry-after", str(retry_after_s)),)
    now_ns = world.clock.monotonic_ns
    n_tokens, filled_ns = float(burst), now_ns()

    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        nonlocal n_tokens, filled_ns
        now = now_ns()
        n_tokens = min(float(burst), n_tokens + (now - filled_ns) * _NANO * per_s)
        filled_ns = now
        if n_tokens < 1:
            return Response.error(503, "too many requests", headers=refusal)
        n_tokens -= 1
        return handler(request)

    return middleware


def _through(middleware: Middleware, handler: Handler, request: Request) -> Answer | Awaitable[Answer]:
    return middleware(request, handler)


def _answering(handler: Handler, request: Request) -> Answer | Awaitable[Answer]:
    """Call the innermost handler; make responses of the errors that have one."""
    try:
        answer = handler(request)
    except IsopodError as error:
        known = answer_error(error)
        if known is None:
            raise
        return known
    return answer if isinstance(answer, Response | Upgrade) else _answer_later(answer)


async def _answer_later(answer: Awaitable[Answer]) -> Answer:
    try:
        return await answer
    except IsopodError as error:
        known = answer_error(error)
        if known is None:
            raise
        return known


async def _finish_later(answer: Awaitable[Answer], change: Callable[[Response], Response]) -> Answer:
    settled = await answer
    return change(settled) if isinstance(settled, Response) else settled


async def _log_later(answer: Awaitable[Answer], log_answer: Callable[[Answer], Answer], log: Callable[[int, int | None], None]) -> Answer:
    try:
        settled = await answer
    except BaseException:
        log(500, None)
        raise
    return log_answer(settled)


def _peer(request: Request) -> str:
    peer = request.peer
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) > 1 else str(peer)
