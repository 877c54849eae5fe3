"""Router: which handler answers which method and path.

    router = Router()
    router.get("/", index)
    router.get("/users/:id", show)              # request.params["id"]
    router.route("PUT", "/users/:id", store)
    router.get("/static/*path", files)          # the rest, slashes included

A segment that is written out wins over a `:param`, and that over a `*wildcard`; within that no order matters. HEAD is answered by GET's
handler, OPTIONS by the router, unless there is a handler; another method gets 405 with Allow, another path 404.

Paths are split before they are decoded, and decoded once: "%2F" in a parameter is a slash in its value and no separator. A path with a "."
or ".." segment, however encoded, is refused (400): what a handler gets never climbs out of a folder. A trailing slash matters.
"""

from collections.abc import Awaitable
from typing import Final

from isopod.net.http.messages import Answer, Handler, HttpError, Request, Response, decode_path
from isopod.world.errors import AlreadyExists, InvalidArgument

_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"))
_DOTS: Final = frozenset((".", ".."))


class _Route:
    """The handlers of one pattern; a handler's names of the parameters are its own."""

    __slots__ = ("allow", "handlers", "names", "pattern")

    def __init__(self, pattern: str, names: tuple[str, ...]) -> None:
        self.pattern = pattern
        self.names = names
        self.handlers: dict[str, Handler] = {}
        self.allow = ""

    def add(self, method: str, handler: Handler) -> None:
        self.handlers[method] = handler
        methods = {**dict.fromkeys(self.handlers), "OPTIONS": None}
        if "GET" in methods:
            methods["HEAD"] = None
        self.allow = ", ".join(sorted(methods))


class _Node:
    """One segment of the tree."""

    __slots__ = ("children", "param", "route", "wildcard")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.param: _Node | None = None
        self.wildcard: _Route | None = None
        self.route: _Route | None = None


class Router:
    """A handler made of handlers. Routes are added before it serves, or while it does."""

    def __init__(self) -> None:
        self._root = _Node()
        self._fixed: dict[str, _Route] = {}
        self._routes: list[_Route] = []

    def get(self, pattern: str, handler: Handler) -> None:
        """Answer GET (and HEAD). Raises as `route`."""
        self.route("GET", pattern, handler)

    def post(self, pattern: str, handler: Handler) -> None:
        """Answer POST. Raises as `route`."""
        self.route("POST", pattern, handler)

    def put(self, pattern: str, handler: Handler) -> None:
        """Answer PUT. Raises as `route`."""
        self.route("PUT", pattern, handler)

    def patch(self, pattern: str, handler: Handler) -> None:
        """Answer PATCH. Raises as `route`."""
        self.route("PATCH", pattern, handler)

    def delete(self, pattern: str, handler: Handler) -> None:
        """Answer DELETE. Raises as `route`."""
        self.route("DELETE", pattern, handler)

    def route(self, method: str, pattern: str, handler: Handler) -> None:
        """Answer a method on a pattern.

        Args:
            method: In upper case.
            pattern: "/" and segments, decoded: TEXT, `:NAME` for any one that is not empty, and last `*NAME` for the rest, be it empty.
            handler: Finds the values in `Request.params`.

        Raises:
            InvalidArgument: The method or the pattern makes no sense.
            AlreadyExists: The method has a handler on an equal pattern.
        """
        if method not in _METHODS:
            raise InvalidArgument("method", method, "is none that can be routed")
        node = self._root
        names: list[str] = []
        segments = _segments(pattern)
        for position, segment in enumerate(segments):
            if segment[:1] in {":", "*"}:
                names.append(_name(pattern, segment, names, is_last=position == len(segments) - 1))
            if segment.startswith("*"):
                break
            if segment.startswith(":"):
                node.param = node.param or _Node()
                node = node.param
            else:
                node = node.children.setdefault(segment, _Node())
        found = node.wildcard if segments[-1].startswith("*") else node.route
        if found is None:
            found = _Route(pattern, tuple(names))
            self._routes.append(found)
            if segments[-1].startswith("*"):
                node.wildcard = found
            else:
                node.route = found
                if not names and "%" not in pattern and "?" not in pattern:
                    self._fixed[pattern] = found
        if method in found.handlers:
            raise AlreadyExists("route", f"{method} {pattern}")
        if tuple(names) != found.names:
            raise InvalidArgument("pattern", pattern, f"is {found.pattern} with other names")
        found.add(method, handler)

    def __call__(self, request: Request) -> Answer | Awaitable[Answer]:
        """Answer a request. A `Router` is a `Handler`."""
        route = self._fixed.get(request.target) or self._fixed.get(request.raw_path)
        if route is None:
            if request.target == "*":
                return Response(204, (("allow", self._all_methods()),))
            route = self._find(request)
            if route is None:
                return Response.error(404, "no such resource")
        handler = route.handlers.get(request.method)
        if handler is None:
            handler = _stand_in(route, request)
        return handler(request)

    def _find(self, request: Request) -> _Route | None:
        """Return the route of a path, its parameters set in the request."""
        raw = request.raw_path
        segments = raw[1:].split("/")
        if "%" in raw:
            segments = [decode_path(segment) for segment in segments]
            parts = [part for segment in segments for part in segment.split("/")]
        else:
            parts = segments
        if not _DOTS.isdisjoint(parts):
            raise HttpError(400, "a path with . or .. in it", "ask for the path it stands for")
        values: list[str] = []
        route = _match(self._root, segments, 0, values)
        if route is not None and route.names:
            request.params = dict(zip(route.names, values, strict=True))
        return route

    def _all_methods(self) -> str:
        return ", ".join(sorted({method for route in self._routes for method in route.allow.split(", ")}))


def _match(node: _Node, segments: list[str], depth: int, values: list[str]) -> _Route | None:
    """Find the best route below a node; depth-first, so the cost is bounded by the routes that share the path's beginning."""
    if depth == len(segments):
        return node.route
    segment = segments[depth]
    child = node.children.get(segment)
    if child is not None:
        found = _match(child, segments, depth + 1, values)
        if found is not None:
            return found
    if node.param is not None and segment:
        values.append(segment)
        found = _match(node.param, segments, depth + 1, values)
        if found is not None:
            return found
        values.pop()
    if node.wildcard is not None:
        # No leading slash: joined to a folder it would be a path of its own.
        values.append("/".join(segments[depth:]).lstrip("/"))
    return node.wildcard


def _stand_in(route: _Route, request: Request) -> Handler:
    """Return who answers a method that has no handler."""
    if request.method == "HEAD" and "GET" in route.handlers:
        return route.handlers["GET"]
    allow = (("allow", route.allow),)
    if request.method == "OPTIONS":
        return lambda _: Response(204, allow)
    return lambda _: Response.error(405, f"{request.method} is not allowed here", f"allowed are {route.allow}", headers=allow)


def _segments(pattern: str) -> list[str]:
    segments = pattern[1:].split("/")
    if not pattern.startswith("/") or not _DOTS.isdisjoint(segments):
        raise InvalidArgument("pattern", pattern, "must begin with /, without . and .. in it")
    return segments


def _name(pattern: str, segment: str, names: list[str], *, is_last: bool) -> str:
    name = segment[1:]
    if not name.isidentifier() or name in names:
        raise InvalidArgument("pattern", pattern, f"{segment} needs a name of its own")
    if segment.startswith("*") and not is_last:
        raise InvalidArgument("pattern", pattern, "a wildcard is the last segment")
    return name
