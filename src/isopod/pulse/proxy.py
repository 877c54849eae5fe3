"""Proxy: what is asked of a sandbox's own shim while its client waits: the agent's URL, and Go's /debug pages.

Nothing else is passed on. A sandbox is found by its id among those that are known, so that an id is never part of a path. A request has a
deadline and a bound, and at most SHIM_REQUESTS_MAX are under way. What a shim answers is not trusted: of its header fields two are kept,
its body cannot run a script in the reader's browser, and another status than 200 is a failure of the shim.

/debug/* is off unless settings say otherwise: profiles tell much, and cost the sandbox time.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol
from urllib.parse import quote, urlencode

from isopod.net.http.messages import HeaderPairs, HttpError, Request, Response
from isopod.pulse.model import ID_BYTES_MAX
from isopod.pulse.pages import printable, text
from isopod.pulse.security import HEADERS
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimAnswer, ShimError
from isopod.pulse.store import Entry, Store

AGENT_URL: Final = "/agent-url"
AGENT_URL_BYTES_MAX: Final = 4096
DEBUG_VARS: Final = "/debug/vars"
PPROF: Final = "/debug/pprof/"
DEBUG_BYTES_MAX: Final = 64 << 20
PROFILE_S_MAX: Final = 120.0
"""The longest profile or trace that may be asked for."""
SHIM_REQUESTS_MAX: Final = 8
GO_PPROF: Final[HeaderPairs] = (("x-go-pprof", "1"),)
STOPPED: Final = "sandbox may be stopped or deleted"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_HREF: Final = re.compile(rb"""<a href=(['"]?)([A-Za-z0-9_]+)\?([A-Za-z0-9_]+=[A-Za-z0-9_]+)\1>""")
_KEPT: Final = ("content-type", "content-disposition")
_TYPES: Final = {
    "symbol": (("content-type", "text/plain; charset=utf-8"),),
    "trace": (("content-type", "application/octet-stream"), ("content-disposition", 'attachment; filename="trace"')),
}
_SECONDS: Final = {"profile": 30.0, "trace": 1.0}
_POLICY: Final[HeaderPairs] = (("content-security-policy", "default-src 'none'; sandbox"), ("cache-control", "no-store"), *HEADERS)


class Shims(Protocol):
    """Who asks shims: `ShimClient`."""

    async def get(self, socket: str, path: str, *, timeout_s: float, n_bytes_max: int) -> ShimAnswer:
        """Return a shim's answer; ShimError without one."""


class Wanted(NamedTuple):
    """Which sandbox a request is about, and what else it says."""

    entry: Entry
    others: tuple[tuple[str, str], ...]


class Proxy:
    """Asks shims.

    Args:
        store: Knows the sandboxes.
        client: Reaches them.
        settings: The deadline, and whether /debug is passed on.
    """

    def __init__(self, store: Store, client: Shims, settings: PulseSettings) -> None:
        self._store = store
        self._client = client
        self._settings = settings
        self._places = asyncio.Semaphore(SHIM_REQUESTS_MAX)

    async def agent_url(self, request: Request) -> Response:
        """Return the URL under which a sandbox's agent is reached.

        Raises:
            HttpError: 400 without an id, 404 for one that is not known or has no shim, 502 if the shim does not say, 503 for too many.
        """
        entry = self.sandbox(request).entry
        return text(await self.agent_url_of(entry) + "\n")

    async def agent_url_of(self, entry: Entry) -> str:
        """Return the URL of a sandbox's agent. Raises as `agent_url`, but for 400."""
        answer = await self.agent_url_answer(entry)
        found = printable(answer.body.decode("utf-8", "replace").strip())
        if answer.status != 200 or not found:
            said = f"status {answer.status}" if answer.status != 200 else "nothing"
            raise HttpError(502, f"the shim of sandbox {entry.id} does not say its agent's URL: it answered {said}")
        return found

    async def agent_url_answer(self, entry: Entry) -> ShimAnswer:
        """Return what a shim answers to the question for its agent's URL. Raises as `page_of`."""
        return await self._ask(entry, AGENT_URL, timeout_s=self._settings.request_s, n_bytes_max=AGENT_URL_BYTES_MAX)

    async def debug(self, request: Request) -> Response:
        """Pass a request for a debug page on.

        Raises:
            HttpError: 404 if that is off or there is no such page or sandbox, 400 without an id, 502 if the shim fails, 503 for too many.
        """
        if not self._settings.pprof:
            raise HttpError(404, "debug pages of shims are not passed on", "start the agent with --pprof")
        wanted = self.sandbox(request)
        path = request.path
        if not is_debug_page(path):
            raise HttpError(404, f"no such page: {path}")
        query = urlencode((("sandbox", wanted.entry.id), *wanted.others))
        answer = await self.page_of(wanted.entry, path, query, seconds_of(path, wanted.others))
        if answer.status != 200:
            raise HttpError(502, f"the shim of sandbox {wanted.entry.id} answered status {answer.status}")
        return page(answer, path, wanted.entry.id)

    async def page_of(self, entry: Entry, path: str, query: str, seconds: float) -> ShimAnswer:
        """Return a debug page as the shim gives it.

        Args:
            entry: Whose.
            path: One that `is_debug_page`.
            query: For the shim, encoded.
            seconds: How long the shim will measure.

        Raises:
            HttpError: 404, it has no shim; 502, it cannot be asked; 503, too many are.
        """
        timeout_s = self._settings.request_s + min(PROFILE_S_MAX, seconds)
        target = quote(path, safe="/") + (f"?{query}" if query else "")
        return await self._ask(entry, target, timeout_s=timeout_s, n_bytes_max=DEBUG_BYTES_MAX)

    def sandbox(self, request: Request) -> Wanted:
        """Return which sandbox is meant.

        Raises:
            HttpError: 400: there is no id, or what cannot be one; 404: it is not known.
        """
        return self.sandbox_of(request.query_pairs())

    def sandbox_of(self, pairs: Sequence[tuple[str, str]]) -> Wanted:
        """Return which sandbox a query's fields mean. Raises as `sandbox`."""
        identifier = next((value for name, value in pairs if name == "sandbox"), "")
        if not identifier:
            raise HttpError(400, "which sandbox?", "add ?sandbox=ID; GET /sandboxes lists the ids")
        if not is_identifier(identifier):
            raise HttpError(400, f"no id of a sandbox: {printable(identifier[:ID_BYTES_MAX])}", "GET /sandboxes lists the ids")
        entry = self._store.get(identifier)
        if entry is None:
            raise HttpError(404, f"no such sandbox: {identifier}", "GET /sandboxes lists those there are")
        return Wanted(entry, tuple(pair for pair in pairs if pair[0] != "sandbox"))

    async def _ask(self, entry: Entry, target: str, *, timeout_s: float, n_bytes_max: int) -> ShimAnswer:
        if not entry.socket:
            raise HttpError(404, f"sandbox {entry.id} has no shim", "it is a container of isopod's: isopod inspect says more")
        if self._places.locked():
            raise HttpError(503, "too many questions to shims at once", headers=(("retry-after", "1"),))
        async with self._places:
            try:
                return await self._client.get(entry.socket, target, timeout_s=timeout_s, n_bytes_max=n_bytes_max)
            except ShimError as error:
                raise HttpError(502, f"the shim of sandbox {entry.id} does not answer: {error.message}") from error


def page(answer: ShimAnswer, path: str, identifier: str) -> Response:
    """Return a shim's debug page as it is shown: the links of the index lead to the same sandbox."""
    body = answer.body
    if path == PPROF:
        word = quote(identifier, safe="").encode()
        body = _HREF.sub(lambda found: b"<a href=%b%b?sandbox=%b&%b%b>" % (found[1], found[2], word, found[3], found[1]), body)
    kept: dict[str, str] = dict(_TYPES.get(path.removeprefix(PPROF), ()))
    for name in _KEPT:
        value = next((value for key, value in answer.headers if key.lower() == name), "")
        if value and value.isascii() and value.isprintable():
            kept[name] = value
    kept.setdefault("content-type", "text/plain; charset=utf-8")
    return Response(200, (*kept.items(), *_POLICY), body)


def is_debug_page(path: str) -> bool:
    """Return whether a path is one of Go's debug pages."""
    return path == DEBUG_VARS or (path.startswith(PPROF) and _NAME.fullmatch(path.removeprefix(PPROF)) is not None)


def is_identifier(word: str) -> bool:
    """Return whether a word can be a sandbox's id: no way to other folders, nothing that cannot be seen."""
    return word not in {".", ".."} and "/" not in word and word.isprintable() and len(word.encode("utf-8", "replace")) <= ID_BYTES_MAX


def seconds_of(path: str, pairs: tuple[tuple[str, str], ...]) -> float:
    """Return how long the shim will measure for a debug page: what ?seconds= says, else Go's default.

    Args:
        path: The page.
        pairs: The query's fields.
    """
    told = next((value for name, value in pairs if name == "seconds"), "")
    if told.isascii() and told.isdigit() and len(told) <= 4:
        return float(told)
    return _SECONDS.get(path.removeprefix(PPROF), 0.0)
