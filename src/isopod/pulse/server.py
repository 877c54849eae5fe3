"""Server: the agent's HTTP face.

    GET /                       what there is
    GET /metrics                figures; ?sandbox= ?namespace= ?pod= ?family=NAME,... ?filter_family=PREFIX,... ?match[]=SELECTOR
                                ?view=all|kata|cadvisor
    GET /metrics/cadvisor       figures under cAdvisor's names alone
    GET /metrics/resource       the kubelet's short list
    GET /sandboxes              whose they are, how old their figures
    GET /targets                how asking each of them goes
    GET /top                    what they use
    GET /config                 which settings and which policy hold
    PUT /-/reload               read policy, TLS files, token and users again; only with --enable-lifecycle (`lifecycle`)
    GET /agent-url?sandbox=ID   where a sandbox's agent is reached
    GET /healthz                200 while the agent lives
    GET /readyz                 200 while anything is watched, else 503
    GET /debug/...              of a sandbox's shim; only with --pprof

HEAD is answered as GET without the body, other methods with 405, other paths with 404. Every failure is told as text, with a hint.

- No sandbox: /metrics shows the agent's own families, 200; an empty machine is no failure.
- ?sandbox=ID of one that is not known: 404. Known, but without figures (not asked yet, or failing too long): 503 with Retry-After and
  the reason, since asking again later may help and an empty answer would look like a sandbox that does nothing.
- ?namespace= and ?pod= that fit nothing: an empty answer, 200; a scrape job of a namespace must not fail while it is empty.
- The agent's own families are left out where figures of sandboxes are chosen: of ?sandbox=, ?namespace=, ?pod= the families by sandbox
  (kata_pulse_sandbox_*) stay, for those sandboxes; ?family= and ?filter_family= have them only if a word of theirs begins with
  kata_monitor or kata_pulse.
- An ETag stands for the sandboxes' figures; the agent's own, which change with every scrape, do not count.

With `strict_compat` it is all as in `strict`. Not here: what is shown (`store`), how (`render`), who may ask (`security`).
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, cast

from isopod import __version__
from isopod.net.http.failures import answer_error
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import Answer, HttpError, Request, Response
from isopod.net.http.server import HttpServer
from isopod.net.http.status import status_of
from isopod.net.tls import ReloadingTls, ServerTls
from isopod.pulse import pages
from isopod.pulse.config_page import config_of, config_page
from isopod.pulse.formats import negotiate
from isopod.pulse.lifecycle import RELOAD, Lifecycle, Read
from isopod.pulse.merge import Told
from isopod.pulse.model import Families, Query, ViewName
from isopod.pulse.own import Facts, Own
from isopod.pulse.policy import PolicyFile
from isopod.pulse.proxy import Proxy, Shims
from isopod.pulse.resource import scrape_error
from isopod.pulse.scrape import Scrapes
from isopod.pulse.security import LIMITS, SOCKET_MODE, Guard, check_tls, listen_failure, open_tls
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Store
from isopod.pulse.strict import Strict, readiness
from isopod.pulse.workers import Workers, n_shards
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import IsopodError
from isopod.world.network import Address, UnixAddress, parse_address
from isopod.world.world import World

DRAIN_S: Final = 1.5
"""How long answers under way may take once the agent is to stop."""
METHODS: Final = frozenset(("GET", "HEAD"))
ALLOW: Final = (("allow", "GET, HEAD"),)
RETRY_AFTER_S_MAX: Final = 60
VIEWS: Final = frozenset(("all", "kata", "cadvisor"))
OWN_PREFIXES: Final = ("kata_monitor", "kata_pulse")
DEBUG: Final = "/debug/"
ROUTES: Final = {
    "/metrics": "Figures of all sandboxes; ?sandbox= ?namespace= ?pod= ?family= ?filter_family= ?match[]= ?view= choose.",
    "/metrics/cadvisor": "Figures under cAdvisor's names alone.",
    "/metrics/resource": "CPU and memory of pods, as a kubelet lists them.",
    "/sandboxes": "The sandboxes there are, whose they are, and how old their figures are.",
    "/targets": "How asking each sandbox goes.",
    "/top": "What each sandbox uses.",
    "/config": "Which settings and which policy hold, and where they came from.",
    RELOAD: "PUT: read policy, TLS files, token and users again; with --enable-lifecycle alone.",
    "/agent-url": "The URL of a sandbox's agent; ?sandbox= says whose.",
    "/healthz": "200 while the agent lives.",
    "/readyz": "200 while sandboxes are watched for.",
    "/debug/vars": "Variables of a sandbox's shim; with --pprof alone.",
    "/debug/pprof/": "Profiles of a sandbox's shim; with --pprof alone.",
}


async def _nothing(_: float) -> None:
    """Nobody is left alone."""


class PulseServer:
    """Serves what the store holds. Start it once, and stop it.

    Args:
        world: The ports.
        settings: Where, for whom, and what.
        store: What is shown; its clock is the loop's.
        client: Asks shims, for /agent-url and /debug.
        facts: What the agent's other parts say of themselves now.
        attend: Has shims asked that were left alone while nobody wanted figures, and waits for them, at most so long.
        policy: The policy's file, None if there is none.
        origins: Who gave settings that are no defaults, by name; for /config.
        logger: Where it reports.
        limits: What it bears from its clients.
    """

    def __init__(
        self,
        world: World,
        settings: PulseSettings,
        store: Store,
        client: Shims,
        *,
        facts: Callable[[], Facts] = Facts,
        attend: Callable[[float], Awaitable[None]] = _nothing,
        policy: PolicyFile | None = None,
        origins: Mapping[str, str] | None = None,
        logger: Logger,
        limits: HttpLimits = LIMITS,
    ) -> None:
        self._world = world
        self._settings = settings
        self._store = store
        self._facts = facts
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._server = HttpServer(world, self._answer, logger=logger, metrics=Registry(), limits=limits)
        self._tls: ReloadingTls[ServerTls] | None = None
        self._guard = Guard(world, settings, logger)
        self._policy = policy
        self._origins = origins or {}
        self._lifecycle = Lifecycle(self._read_again, is_enabled=settings.enable_lifecycle)
        self.workers: Workers | None = None
        self.own = Own(world, store, version=__version__)
        self._scrapes = Scrapes(store, self.own, logger, attend=attend)
        self._proxy = Proxy(store, client, settings)
        self._strict = Strict(store, self.own, self._scrapes, proxy=self._proxy, facts=facts, settings=settings)
        self._routes: dict[str, Callable[[Request], Response | Awaitable[Response]]] = {
            "/": self._index,
            "/metrics": self._metrics,
            "/metrics/cadvisor": partial(self._scrape, view="cadvisor"),
            "/metrics/resource": partial(self._scrape, view="resource"),
            "/sandboxes": self._sandboxes,
            "/targets": self._targets,
            "/top": self._top,
            "/config": self._config,
            "/agent-url": self._proxy.agent_url,
            "/healthz": lambda _: pages.text("ok\n"),
            "/readyz": lambda _: readiness(self._facts()),
        }

    async def start(self) -> str:
        """Read the files of TLS, of the token and of the users, and listen.

        Returns:
            Where, with the real port.

        Raises:
            InvalidArgument: The files make no sense.
            UnavailableError: They cannot be read, or the address is taken.
        """
        settings = self._settings
        await self._guard.open()
        n = n_shards(settings, self._world)
        if n == 1:
            self._tls = await open_tls(self._world, settings, self._logger)
        try:
            address = await self._listen(parse_address(settings.listen), n)
        except OSError as error:
            raise listen_failure(error, settings.listen) from error
        return f"unix:{address.path}" if isinstance(address, UnixAddress) else _shown(address.host, address.port)

    async def _listen(self, address: Address, n: int) -> Address:
        if n == 1:
            tls = None if self._tls is None else self._tls.tls
            return (await self._server.listen(address, tls=tls, mode=SOCKET_MODE)).address
        self.workers = Workers(self._world, self._settings, self._answer, self._logger)
        return await self.workers.start(address, n)

    async def stop(self) -> None:
        """Accept no more, let answers under way end for DRAIN_S, then cut what is left. May be called without `start`."""
        if self.workers is not None:
            await self.workers.stop()
        await self._server.drain(DRAIN_S)
        await self._server.close()
        if self._tls is not None:
            await self._tls.close()
        await self._guard.close()

    # --- who asks what --------------------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer | Awaitable[Answer]:
        try:
            pending = self._guard.check(request, strict=self._is_strict(request))
            answer = self._begin(request) if pending is None else self._later(pending, request)
        except IsopodError as error:
            return _told(error)
        return answer if isinstance(answer, Response) else _settled(answer)

    async def _later(self, pending: Awaitable[None], request: Request) -> Response:
        """Answer once it is known that this may be asked."""
        await pending
        answer = self._begin(request)
        return answer if isinstance(answer, Response) else await answer

    def _is_strict(self, request: Request) -> bool:
        """Return whether it is answered as kata-monitor would; what it has not, and was asked for, is not."""
        settings = self._settings
        return settings.strict_compat and not (settings.enable_lifecycle and request.path == RELOAD)

    def _begin(self, request: Request) -> Response | Awaitable[Response]:
        return self._strict.answer(request) if self._is_strict(request) else self._route(request)

    def _route(self, request: Request) -> Response | Awaitable[Response]:
        path = request.path
        handler = self._routes.get(path)
        if handler is None and path.startswith(DEBUG):
            handler = self._proxy.debug
        if path == RELOAD:
            return self._lifecycle.answer(request)
        if handler is None:
            raise HttpError(404, f"no such page: {path}", "GET / lists what there is")
        if request.method not in METHODS:
            raise HttpError(405, f"{request.method} is not answered here", "GET and HEAD are", headers=ALLOW)
        return handler(request)

    # --- figures --------------------------------------------------------------------------------------------------------------------

    async def _metrics(self, request: Request) -> Response:
        view = _first(request, "view") or self._settings.view
        if view not in VIEWS:
            raise HttpError(400, f"no such view: {pages.printable(view[:64])}", "choose one of: all, kata, cadvisor")
        return await self._scrape(request, view=cast("ViewName", view))

    async def _scrape(self, request: Request, *, view: ViewName) -> Response:
        query = query_of(request, view)
        accept, coding = request.headers.combined("accept"), request.headers.combined("accept-encoding")
        return await self._scrapes.answer(request, query, lambda: self._own_families(query), chosen=negotiate(accept, coding))

    def _own_families(self, query: Query) -> Families | Told:
        """Return the agent's own families that go with figures.

        Raises:
            HttpError: 503: there are none of the sandbox that is wanted.
        """
        if query.sandbox:
            self._expect_figures(query.sandbox)
        if query.view == "resource":
            return scrape_error(failed=False)
        if query.view == "cadvisor" or not may_have_own(query):
            return {}
        if query.sandbox or query.namespace or query.pod:
            return self.own.of_sandboxes(self._store.wanted(query))
        return self.own.told(self._facts())

    def _expect_figures(self, identifier: str) -> None:
        """Refuse to show a sandbox that has no figures; one that is not known is the store's matter."""
        entry = self._store.get(identifier)
        if entry is None or entry.families or entry.containers:
            return
        why = f"its shim does not answer ({entry.error})" if entry.error else "it was not asked yet"
        after_s = min(RETRY_AFTER_S_MAX, max(1, round(self._settings.interval_s)))
        hint = "GET /targets says more"
        raise HttpError(503, f"no figures of sandbox {identifier}: {why}", hint, headers=(("retry-after", str(after_s)),))

    # --- pages ----------------------------------------------------------------------------------------------------------------------

    def _index(self, request: Request) -> Response:
        return pages.index(_kind(request), ROUTES)

    def _sandboxes(self, request: Request) -> Response:
        now_s = self._loop.time()
        return pages.sandboxes(_kind(request), [pages.sandbox_row(entry, now_s) for entry in self._store.entries()])

    def _targets(self, request: Request) -> Response:
        now_s = self._loop.time()
        return pages.targets(_kind(request), [pages.target_row(entry, now_s) for entry in self._store.entries()])

    async def _top(self, request: Request) -> Response:
        await self._scrapes.attend(math.inf)
        return pages.top(_kind(request), self._facts().rows())

    def _config(self, request: Request) -> Response:
        policy = None if self._policy is None else self._policy.state()
        return config_page(_kind(request), config_of(__version__, self._settings, self._origins, policy))

    # --- what is read again ---------------------------------------------------------------------------------------------------------

    def _read_again(self) -> Mapping[tuple[str, str], Read]:
        """Return what lies in files, by what it is and its file."""
        parts: dict[tuple[str, str], Read] = {}
        if self._policy is not None:
            parts["policy", self._policy.path] = self._policy.reload
        if self._settings.tls_cert_file:
            parts["TLS certificate", self._settings.tls_cert_file] = self._reload_tls
        for what, file in self._guard.files().items():
            parts[what, file.path] = file.reload
        return parts

    async def _reload_tls(self) -> None:
        await check_tls(self._world, self._settings)
        if self._tls is not None:
            await self._tls.reload()
        if self.workers is not None:
            self.workers.reload()


def query_of(request: Request, view: ViewName) -> Query:
    """Return what a request for figures wants.

    Args:
        request: Its fields are read; those not known are left aside, as scrape jobs may send any.
        view: Which families.

    Raises:
        HttpError: 400: the query of the URL is malformed.
    """
    first: dict[str, str] = {}
    matches: list[str] = []
    names: list[str] = []
    for name, value in request.query_pairs():
        if name in {"match[]", "match"}:
            matches.append(value)
        elif name == "family":
            names += _words(value)
        else:
            first.setdefault(name, value)
    return Query(
        view=view,
        sandbox=first.get("sandbox", ""),
        namespace=first.get("namespace", ""),
        pod=first.get("pod", ""),
        prefixes=tuple(_words(first.get("filter_family", ""))),
        names=tuple(sorted(dict.fromkeys(names))),
        matches=tuple(matches),
    )


def may_have_own(query: Query) -> bool:
    """Return whether a query can fit the agent's own families; for most that choose families it plainly cannot."""
    if query.prefixes and not any(prefix.startswith(OWN_PREFIXES) for prefix in query.prefixes):
        return False
    if query.names and not any(name.startswith(OWN_PREFIXES) for name in query.names):
        return False
    return not query.matches or any(selector.strip().startswith(("{", *OWN_PREFIXES)) for selector in query.matches)


def _words(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _first(request: Request, name: str) -> str:
    return next((value for key, value in request.query_pairs() if key == name), "")


def _kind(request: Request) -> pages.PageKind:
    return pages.choose(_first(request, "format"), request.headers.combined("accept"))


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _told(error: IsopodError) -> Response:
    """Return an error as text.

    Raises:
        IsopodError: It is a bug of ours, which the server logs and answers.
    """
    known = answer_error(error)
    if known is None:
        raise error
    kept = tuple(pair for pair in known.headers if pair[0].lower() not in {"content-type"})
    status = error.status if isinstance(error, HttpError) else status_of(error)
    return pages.error_text(status, error.message, error.hint, kept)


async def _settled(answer: Awaitable[Response]) -> Response:
    try:
        return await answer
    except IsopodError as error:
        return _told(error)
