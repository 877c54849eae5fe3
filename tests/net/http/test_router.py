"""The routing table."""

from collections.abc import Awaitable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.http import Answer, HttpError, Request, Response
from isopod.net.http.router import Router
from isopod.world.errors import AlreadyExists, InvalidArgument

pytestmark = pytest.mark.row("S13")


def named(name: str) -> object:
    """A handler that says which it is, and its parameters."""
    return lambda request: Response.text(" ".join([name, *(f"{k}={v}" for k, v in request.params.items())]))


def table(*routes: str) -> Router:
    router = Router()
    for route in routes:
        method, _, pattern = route.partition(" ")
        router.route(method, pattern, named(route))  # type: ignore[arg-type]
    return router


def ask(router: Router, method: str, target: str) -> Response:
    answer: Answer | Awaitable[Answer] = router(Request(method, target))
    assert isinstance(answer, Response)
    return answer


ROUTES = (
    "GET /",
    "GET /users",
    "POST /users",
    "GET /users/:id",
    "DELETE /users/:id",
    "GET /users/me",
    "GET /users/:id/posts/:post",
    "GET /users/me/posts/first",
    "GET /static/*path",
    "GET /static/logo.png",
    "GET /a/:x/c",
    "GET /a/b/*rest",
)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/", "GET /"),
        ("/?a=b", "GET /"),
        ("/users", "GET /users"),
        ("/users?x=/y", "GET /users"),
        ("/users/7", "GET /users/:id id=7"),
        ("/users/me", "GET /users/me"),
        ("/users/%6De", "GET /users/me"),
        ("/users/me/posts/2", "GET /users/:id/posts/:post id=me post=2"),
        ("/users/me/posts/first", "GET /users/me/posts/first"),
        ("/users/a%2Fb", "GET /users/:id id=a/b"),
        ("/users/a%252Fb", "GET /users/:id id=a%2Fb"),
        ("/users/%C3%A9", "GET /users/:id id=\u00e9"),
        ("/users/a+b", "GET /users/:id id=a+b"),
        ("/static/", "GET /static/*path path="),
        ("/static/a/b.css", "GET /static/*path path=a/b.css"),
        ("/static/logo.png", "GET /static/logo.png"),
        ("/static//etc/passwd", "GET /static/*path path=etc/passwd"),
        ("/static/...", "GET /static/*path path=..."),
        ("/a/b/c", "GET /a/b/*rest rest=c"),
        ("/a/b/c/d", "GET /a/b/*rest rest=c/d"),
        ("/a/z/c", "GET /a/:x/c x=z"),
    ],
)
def test_the_best_route_wins(target: str, expected: str) -> None:
    assert ask(table(*ROUTES), "GET", target).body == expected.encode()


@pytest.mark.parametrize("target", ["/nothing", "/users/", "/users//posts/1", "/users/7/posts", "//", "/a/z/d", "/Users"])
def test_others_are_not_found(target: str) -> None:
    assert ask(table(*ROUTES), "GET", target).status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../etc/passwd",
        "/static/a/../../b",
        "/static/%2e%2e/etc/passwd",
        "/static/%2E./x",
        "/static/..%2f..%2fetc%2fpasswd",
        "/static/a%2f..%2fb",
        "/static/.",
        "/users/..",
        "/users/%00",
        "/users/%",
        "/users/%4",
        "/users/%zz",
        "/users/%ff",
        "/users/%c0%ae%c0%ae",
    ],
)
def test_paths_that_climb_or_do_not_decode_are_refused(path: str) -> None:
    with pytest.raises(HttpError) as caught:
        ask(table(*ROUTES), "GET", path)

    assert caught.value.status == 400


def test_methods() -> None:
    router = table(*ROUTES)
    refused = ask(router, "PUT", "/users/7")
    options = ask(router, "OPTIONS", "/users/7")

    assert (refused.status, refused.header("allow")) == (405, "DELETE, GET, HEAD, OPTIONS")
    assert (options.status, options.header("allow")) == (204, "DELETE, GET, HEAD, OPTIONS")
    assert ask(router, "OPTIONS", "*").header("allow") == "DELETE, GET, HEAD, OPTIONS, POST"
    assert ask(router, "HEAD", "/users/7").body == b"GET /users/:id id=7"
    assert ask(router, "DELETE", "/users/7").body == b"DELETE /users/:id id=7"
    assert ask(router, "HEAD", "/nothing").status == 404
    assert ask(table("HEAD /x", "OPTIONS /x"), "OPTIONS", "/x").body == b"OPTIONS /x"
    assert ask(table("POST /x"), "HEAD", "/x").status == 405


def test_shorthands() -> None:
    router = Router()
    for method in ("get", "post", "put", "patch", "delete"):
        getattr(router, method)("/x", named(method))

    assert [ask(router, method, "/x").body for method in ("GET", "POST", "PUT", "PATCH", "DELETE")] == [
        b"get",
        b"post",
        b"put",
        b"patch",
        b"delete",
    ]


@pytest.mark.parametrize("route", ["GET x", "GET /a/../b", "GET /:", "GET /:a/:a", "GET /*a/b", "GET /:a-b", "BREW /x", "get /x"])
def test_patterns_that_make_no_sense(route: str) -> None:
    with pytest.raises(InvalidArgument):
        table(route)


def test_equal_routes() -> None:
    with pytest.raises(AlreadyExists):
        table("GET /a/:x", "GET /a/:x")
    with pytest.raises(InvalidArgument):
        table("GET /a/:x", "POST /a/:y")


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not {".", ".."} & set(text.split("/"))))
def test_any_parameter_comes_back(value: str) -> None:
    try:
        target = "/users/" + quote(value, safe="")
    except UnicodeEncodeError:
        return  # a lone surrogate is no text

    assert ask(table("GET /users/:id"), "GET", target).body == f"GET /users/:id id={value}".encode()
