"""Strict: kata-monitor's face to the letter, for those who moved tools and rules over and want to change nothing.

    every path it does not know     200, the index, by any method; a path that is not in its shortest form 307 to that
    /metrics                        own metrics, then all sandboxes; with filter_family without its own, prefixes taken as they are
    /metrics?sandbox=ID             the shim's own answer, no labels added, never packed; 500 and a text without one
    /sandboxes, /                   HTML only if Accept has the very element text/html
    /agent-url                      the shim's answer and a line end, whatever its status; 400 and a text else
    /readyz                         each root and whether it is there; 503 if none is
    /debug/vars, /debug/pprof/*     the shim's; 400 and X-Go-Pprof without a sandbox, 500 for a shim that cannot be reached

Formats are text and delimited protobuf, codings gzip; families are kata_*, with the labels sandbox_id, cri_uid, cri_name, cri_namespace
(first in a line, not last as kata-monitor writes them: their order has no meaning) and go_*, process_* renamed to kata_shim_*.

Not kept, for they break those who read: two headers for one family and one family twice (filter_family=a,ab), an answer that ends in the
middle at a type that differs, a whole sandbox left out for one bad line. Nor are shims asked while a client waits: ?sandbox=ID is what the
shim said last. /debug stays off without --pprof. There are no kata_monitor_go_* families, since this is no Go program. A query's fields are
read as Go reads them: what is malformed is left aside.

Source: kata-monitor 0.3.0 of Kata 4.1.0 as observed: tests/pulse/test_kata_monitor.py compares with it, and lists all that differs.
"""

import math
import posixpath
import re
from collections.abc import Callable
from typing import Final
from urllib.parse import quote, unquote, unquote_plus

from isopod.net.http.messages import HeaderPairs, HttpError, Request, Response
from isopod.pulse.formats import Coding, Format, choose_coding, choose_format
from isopod.pulse.model import Query
from isopod.pulse.own import Facts, Own
from isopod.pulse.pages import endpoint_lines, error_text, escaped, text
from isopod.pulse.proxy import DEBUG_VARS, GO_PPROF, PPROF, STOPPED, Proxy, is_debug_page, page, seconds_of
from isopod.pulse.scrape import Scrapes
from isopod.pulse.security import HEADERS
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimError
from isopod.pulse.store import Entry, Store

ENDPOINTS: Final = {
    "/metrics": "Metrics of all sandboxes, or of one.",
    "/sandboxes": "The sandboxes there are.",
    "/agent-url": "The URL of a sandbox's agent.",
    "/debug/vars": "Variables of a sandbox's shim.",
    "/debug/pprof/": "Profiles of a sandbox's shim.",
    "/debug/pprof/cmdline": "The command line of a sandbox's shim.",
    "/debug/pprof/profile": "A CPU profile of a sandbox's shim.",
    "/debug/pprof/symbol": "Symbols of a sandbox's shim.",
    "/debug/pprof/trace": "A trace of a sandbox's shim.",
}
FIELDS_MAX: Final = 1000
"""Of a query: those behind are not read."""
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LINKED: Final = ("/metrics", "/sandboxes")
_PLAIN: Final = (("content-type", "text/plain; charset=utf-8"), *HEADERS)
_HTML: Final[HeaderPairs] = (("content-type", "text/html"), ("content-security-policy", "default-src 'none'"), *HEADERS)


class Strict:
    """Answers as kata-monitor does.

    Args:
        store: The sandboxes.
        own: Counts scrapes.
        scrapes: Answers them.
        proxy: Asks shims.
        facts: What else is known.
        settings: Whether /debug is passed on.
    """

    def __init__(
        self, store: Store, own: Own, scrapes: Scrapes, *, proxy: Proxy, facts: Callable[[], Facts], settings: PulseSettings
    ) -> None:
        self._store = store
        self._own = own
        self._scrapes = scrapes
        self._proxy = proxy
        self._facts = facts
        self._settings = settings

    async def answer(self, request: Request) -> Response:
        """Answer a request, by whatever method it comes."""
        elsewhere = shortest(request.raw_path)
        if elsewhere:
            return _redirect(request, elsewhere)
        path = unquote(request.raw_path)
        if path == "/metrics":
            return await self._metrics(request)
        if path == "/sandboxes":
            return self._sandboxes(request)
        if path == "/agent-url":
            return await self._agent_url(request)
        if path == "/readyz":
            return readiness(self._facts())
        if path == DEBUG_VARS or path.startswith(PPROF):
            return await self._debug(request, path)
        return _index(request)

    async def _metrics(self, request: Request) -> Response:
        pairs = fields_of(request.query)
        identifier = next((value for name, value in pairs if name == "sandbox"), "")
        if identifier:
            return await self._raw(identifier)
        prefixes = next((value for name, value in pairs if name == "filter_family"), "")
        query = Query(view="kata", prefixes=tuple(prefixes.split(",")) if prefixes else ())
        return await self._scrapes.answer(
            request,
            query,
            lambda: {} if prefixes else self._own.families(self._facts(), strict=True),
            chosen=chosen(request),
        )

    async def _raw(self, identifier: str) -> Response:
        began_ns = self._own.begin()
        await self._scrapes.attend(math.inf)
        entry = self._store.get(identifier)
        body = None if entry is None else entry.raw
        self._own.end(began_ns, failed=False, n_bytes=len(body or b""))  # kata-monitor counts these, but none as failed
        if body is not None:
            return Response(200, _PLAIN, body)
        if entry is None:
            return error_text(500, f"no such sandbox: {identifier}")
        return error_text(500, f"no figures of sandbox {identifier}: {entry.error or 'it was not asked yet'}")

    def _sandboxes(self, request: Request) -> Response:
        entries = [entry for entry in self._store.entries() if entry.runtime != "isopod"]
        if not wants_html(request):
            return text("".join(f"{entry.id}\n" for entry in entries))
        items = "".join(_item(entry) for entry in entries)
        return Response(200, _HTML, f"<h1>Sandbox list</h1>\n<ul>\n{items}</ul>\n".encode())

    async def _agent_url(self, request: Request) -> Response:
        try:
            entry = self._proxy.sandbox_of(fields_of(request.query)).entry
            answer = await self._proxy.agent_url_answer(entry)
        except HttpError as error:
            return error_text(400, error.message)
        return Response(200, _PLAIN, answer.body + b"\n")

    async def _debug(self, request: Request, path: str) -> Response:
        if not self._settings.pprof:
            return error_text(404, "debug pages of shims are not passed on", "start the agent with --pprof")
        try:
            wanted = self._proxy.sandbox_of(fields_of(request.query))
        except HttpError:
            return text(f"{STOPPED}\n", 400, GO_PPROF)
        if not is_debug_page(path):
            return error_text(404, f"no such page: {path}", headers=GO_PPROF)
        try:
            answer = await self._proxy.page_of(wanted.entry, path, request.query, seconds_of(path, wanted.others))
        except HttpError as error:
            if isinstance(error.__cause__, ShimError) and error.__cause__.word == "gone":
                return text(f"{STOPPED}\n", 400, GO_PPROF)
            return error_text(500, f"failed to request {path}: {error.message}", headers=GO_PPROF)
        return page(answer, path, wanted.entry.id)


def chosen(request: Request) -> tuple[Format, Coding]:
    """Return in which form kata-monitor would answer: no OpenMetrics, no zstd, and a scheme of escaping is always named."""
    format_ = choose_format(_without(request.headers.combined("accept"), ("application/openmetrics-text", "application/*")))
    if "; escaping=" not in format_.content_type:
        format_ = Format(format_.name, f"{format_.content_type}; escaping=underscores")
    return format_, choose_coding(_without(request.headers.combined("accept-encoding"), ("zstd", "x-gzip", "*")))


def wants_html(request: Request) -> bool:
    """Return whether an Accept field has the element text/html: without a weight, and without a blank before it."""
    return any("text/html" in field.split(",") for field in request.headers.get_all("accept"))


def shortest(path: str) -> str:
    """Return the path to which Go's multiplexer sends whoever asks for this one, "" if it is well as it is.

    Args:
        path: As it was sent, percent-encoded.
    """
    if not path.startswith("/"):
        return ""
    short = posixpath.normpath("/" + path.lstrip("/"))
    if short == PPROF.rstrip("/") or (path.endswith("/") and short != "/"):
        short += "/"
    return "" if short == path else short


def fields_of(query: str) -> list[tuple[str, str]]:
    """Return a query's fields as Go's library reads them: one with a semicolon or a malformed escape is as if it were not there."""
    found = []
    for field in query.split("&", FIELDS_MAX)[:FIELDS_MAX]:
        if field and ";" not in field and not _BAD_ESCAPE.search(field):
            name, _, value = field.partition("=")
            found.append((unquote_plus(name), unquote_plus(value)))
    return found


def readiness(facts: Facts) -> Response:
    """Return each root, and whether it is there; 503 if none is."""
    lines = "".join(f"{path} {'available' if is_there else 'unavailable'}\n" for path, is_there in facts.roots.items())
    return text(lines, 200 if any(facts.roots.values()) else 503)


def _redirect(request: Request, path: str) -> Response:
    target = path + (f"?{request.query}" if request.query else "")
    if request.method not in {"GET", "HEAD"}:
        return Response(307, (("location", target), *HEADERS))
    body = f'<a href="{escaped(target)}">Temporary Redirect</a>.\n\n'
    return Response(307, (("location", target), ("content-type", "text/html; charset=utf-8"), *_HTML[1:]), body.encode())


def _index(request: Request) -> Response:
    if not wants_html(request):
        return text("Available HTTP endpoints:\n" + endpoint_lines(ENDPOINTS))
    items = []
    for path, told in ENDPOINTS.items():
        name = f"<a href='{path}'>{path}</a>" if path in _LINKED else path
        items.append(f"<li><b>{name}</b>: {escaped(told)}\n</li>")
    return Response(200, _HTML, f"<h1>Available HTTP endpoints:</h1>\n<ul>{''.join(items)}</ul>".encode())


def _item(entry: Entry) -> str:
    word = quote(entry.id, safe="")
    links = (
        (f"/debug/pprof/?sandbox={word}", "pprof"),
        (f"/metrics?sandbox={word}", "metrics"),
        (f"/agent-url?sandbox={word}", "agent-url"),
    )
    return f"<li>{escaped(entry.id)}: " + ", ".join(f"<a href='{path}'>{name}</a>" for path, name in links) + "</li>\n"


def _without(field: str, names: tuple[str, ...]) -> str:
    """Return a list-valued field without the elements of these names."""
    return ",".join(element for element in field.split(",") if element.partition(";")[0].strip().lower() not in names)
