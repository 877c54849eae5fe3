"""CORS: which other sites' scripts may use this server from a browser.

Allow-lists only: an origin is echoed if it was listed, never because it asked. With credentials there is no "*". Preflights are answered
here and never reach the handler; a browser keeps the answer for `max_age_s`. It is a rule for browsers, not a guard: a request without
Origin, or with one that is not listed, is still answered, just without leave for a script to read it.
Source: the Fetch standard, section 3.2 (HTTP extensions).
"""

from collections.abc import Awaitable, Sequence
from typing import Final

from isopod.net.http.messages import Answer, Handler, Request, Response
from isopod.net.http.middleware import Middleware, finish
from isopod.world.errors import InvalidArgument

PREFLIGHT_AGE_S: Final = 600


def cors(
    origins: Sequence[str],
    *,
    methods: Sequence[str] = ("GET", "HEAD", "POST"),
    headers: Sequence[str] = (),
    exposed: Sequence[str] = (),
    credentials: bool = False,
    max_age_s: int = PREFLIGHT_AGE_S,
) -> Middleware:
    """Return the middleware.

    Args:
        origins: "https://example.org", or "*" alone for any site.
        methods: What scripts may use.
        headers: Which request fields they may set, beyond the harmless ones.
        exposed: Which response fields they may read, beyond the harmless ones.
        credentials: Whether cookies and client certificates may be sent along.
        max_age_s: How long a browser need not ask again.

    Raises:
        InvalidArgument: "*" beside other origins or with credentials, or an origin with a path.
    """
    any_origin = tuple(origins) == ("*",)
    _check(origins, any_origin=any_origin, credentials=credentials)
    allowed = frozenset(origins)
    allowed_methods = frozenset(methods)
    allowed_headers = frozenset(name.lower() for name in headers)
    common = (("access-control-allow-credentials", "true"),) if credentials else ()
    extra = (("access-control-expose-headers", ", ".join(exposed)),) if exposed else ()
    preflight = (
        ("access-control-allow-methods", ", ".join(methods)),
        *((("access-control-allow-headers", ", ".join(headers)),) if headers else ()),
        ("access-control-max-age", str(max_age_s)),
    )

    def is_welcome(origin: str) -> bool:
        return any_origin or origin in allowed

    def leave(origin: str) -> tuple[tuple[str, str], ...]:
        return (("access-control-allow-origin", "*" if any_origin else origin), *common)

    def answer_preflight(request: Request, origin: str, method: str) -> Response:
        wanted = [name.strip().lower() for name in request.headers.combined("access-control-request-headers").split(",") if name.strip()]
        vary = (("vary", "origin, access-control-request-method, access-control-request-headers"),)
        if not is_welcome(origin) or method not in allowed_methods or not allowed_headers.issuperset(wanted):
            return Response.error(403, "not allowed for scripts of that origin", headers=vary)
        return Response(204, (*leave(origin), *preflight, *vary))

    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        origin = request.headers.get("origin")
        if origin is not None and request.method == "OPTIONS":
            method = request.headers.get("access-control-request-method")
            if method is not None:
                return answer_preflight(request, origin, method)

        def add(response: Response) -> Response:
            if not any_origin:
                response.vary("origin")  # also where there is none: a cache must not mix the two
            if origin is not None and is_welcome(origin):
                response.headers = (*response.headers, *leave(origin), *extra)
            return response

        return finish(handler(request), add)

    return middleware


def _check(origins: Sequence[str], *, any_origin: bool, credentials: bool) -> None:
    if any_origin and credentials:
        raise InvalidArgument("CORS origins", "*", "cannot go with credentials", "list the origins")
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if not any_origin and (not scheme or not rest or "/" in rest or "*" in origin):
            raise InvalidArgument("CORS origin", origin, "must be SCHEME://HOST[:PORT]")
