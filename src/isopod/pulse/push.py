"""Push: what a scrape would show, sent to a receiver of Prometheus' remote write 1.0 at an interval of the agent's own.

    every interval: Store.view -> Encoder (`write_request`) -> snappy -> Queue -> POST, one at a time, in order

A receiver that is slow, away or wrong costs the agent a queue of bounded size and nothing else. What comes of a request:

    2xx                        sent
    5xx, 429, network, TLS     sent again, later each time; `Retry-After` is waited for, up to a bound
    else (400, 401, 3xx, ...)  refused: let go of and counted, since the same again would be refused again
    queue full                 the oldest requests are dropped and counted

A sandbox that went, a series that vanished and figures that expired get the marker of a series that ended, in the round in which they are
missed first. A request that is dropped or refused takes its markers with it. The agent's own end marks nothing: it may be begun anew.
When it is told to stop it sends what is queued for FLUSH_S more.

Passwords and tokens stand in files that are read again before a request is sent, so that a new one holds at once; they are never logged,
also not where a receiver repeats them. Redirects are not followed: they could carry figures to somebody else.
Source: Prometheus Remote-Write 1.0 specification; RFC 9110 section 10.2.3 (Retry-After).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

from cramjam import snappy

from isopod import __version__
from isopod.net.http.client import ClientLimits, ClientResponse, HttpClient, basic_auth, bearer_auth
from isopod.net.http.url import parse_url
from isopod.net.tls import ClientTls, ReloadingTls, TlsFiles, open_client_tls
from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.labels import block, given_labels
from isopod.pulse.model import Families, Query, ViewName
from isopod.pulse.own import PushFacts
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Store
from isopod.pulse.write_request import Encoder, Request, Row
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import maybe_yield
from isopod.runtime.tasks import TaskGroup
from isopod.world.clock import Clock
from isopod.world.disk import Disk
from isopod.world.errors import InvalidArgument, IsopodError, UnavailableError, from_os_error
from isopod.world.world import World

PAUSE_FIRST_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
RETRY_AFTER_MAX_S: Final = 600.0
"""No receiver keeps the agent waiting for longer."""
FLUSH_S: Final = 1.5
SAY_S: Final = 60.0
"""How often a failure that lasts is logged."""
SECRET_BYTES_MAX: Final = 4096
_SHOWN_CHARS: Final = 200
_HEADERS: Final = (
    ("content-encoding", "snappy"),
    ("content-type", "application/x-protobuf"),
    ("x-prometheus-remote-write-version", "0.1.0"),
)


class Batch(NamedTuple):
    """A request as it is sent."""

    body: bytes
    n_samples: int
    n_stale: int


class Queue:
    """Requests that wait, in order.

    Args:
        n_bytes_max: Of their bodies together.
    """

    def __init__(self, n_bytes_max: int) -> None:
        self._n_bytes_max = n_bytes_max
        self._batches: deque[Batch] = deque()
        self._filled = asyncio.Event()
        self._is_held = False
        self.n_bytes = 0
        self.n_dropped_samples = 0

    def __len__(self) -> int:
        return len(self._batches)

    def put(self, batch: Batch) -> bool:
        """Add a request; return False if one was dropped for it. The one that is being sent is not."""
        self._batches.append(batch)
        self.n_bytes += len(batch.body)
        self._filled.set()
        is_kept = True
        while self.n_bytes > self._n_bytes_max and len(self._batches) > self._is_held:
            is_kept = False
            self.n_dropped_samples += self._take(int(self._is_held)).n_samples
        return is_kept

    async def hold(self) -> Batch:
        """Return the oldest request, which stays in its place until it is released; wait for one if there is none."""
        while not self._batches:
            self._filled.clear()
            await self._filled.wait()
        self._is_held = True
        return self._batches[0]

    def release(self, *, done: bool) -> None:
        """Let the oldest request go, or have it wait again."""
        self._is_held = False
        if done:
            self._take(0)

    def _take(self, index: int) -> Batch:
        batch = self._batches[index]
        del self._batches[index]
        self.n_bytes -= len(batch.body)
        return batch


class _Outcome(NamedTuple):
    """What came of a request that was not taken."""

    kind: str
    """A status, or an error's code."""
    why: str
    is_final: bool
    wait_s: float = 0.0
    """How long the receiver wants to be left alone."""


class Secret:
    """What a file holds, read whenever it is asked for.

    Args:
        disk: Where the file is.
        path: Its first line is the secret.
        is_pair: Whether that is a user and a password with a colon between them.
        logger: Told when it cannot be read; what it held before then stays.
    """

    def __init__(self, disk: Disk, path: str, logger: Logger, *, is_pair: bool = False) -> None:
        self._disk = disk
        self._path = path
        self._is_pair = is_pair
        self._logger = logger
        self._is_read = True
        self.text = ""

    async def open(self) -> None:
        """Read it for the first time.

        Raises:
            UnavailableError: It cannot be read.
            InvalidArgument: There is none in it.
        """
        self.text = await self._read()

    async def refresh(self) -> None:
        """Read it again."""
        try:
            self.text = await self._read()
        except IsopodError as error:
            if self._is_read:
                self._logger.warning("pulse.push_secret_not_read", why=error.message)
            self._is_read = False
        else:
            self._is_read = True

    async def _read(self) -> str:
        try:
            content = await self._disk.read(self._path, n_bytes_max=SECRET_BYTES_MAX)
        except OSError as error:
            failure = from_os_error(error, "read the secret", self._path)
            raise UnavailableError(failure.message, failure.hint) from error
        try:
            text = content.partition(b"\n")[0].strip().decode()
        except UnicodeDecodeError:
            text = ""
        if not text or not text.isprintable():
            raise InvalidArgument("secret file", self._path, "wants the secret as its first line: text that can be printed")
        if self._is_pair and ":" not in text:
            raise InvalidArgument("secret file", self._path, "wants USER:PASSWORD as its first line")
        return text


class Pusher:
    """Sends the figures of a store on.

    Args:
        world: The ports.
        settings: Where to, how often, and with what.
        store: The figures.
        own: Makes the agent's own families.
        logger: Told when requests begin to fail and when they are taken again.
    """

    def __init__(self, world: World, settings: PulseSettings, store: Store, *, own: Callable[[], Families], logger: Logger) -> None:
        self._world = world
        self._settings = settings
        self._store = store
        self._own = own
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._random = world.random.stream("pulse-push")
        self._shown = _without_query(settings.push_url)
        self._encoder = Encoder(given_labels(settings.push_labels))
        self._queue = Queue(settings.push_queue_bytes_max)
        self._token = Secret(world.disk, settings.push_token_file, logger) if settings.push_token_file else None
        self._basic = Secret(world.disk, settings.push_basic_file, logger, is_pair=True) if settings.push_basic_file else None
        self._tls: ReloadingTls[ClientTls] | None = None
        self._client: HttpClient | None = None
        self._at_ms = 0
        self._n_failures = 0
        """Tries in a row that were not taken."""
        self._said = ""
        """The kind of failure that was logged last, "" since requests are taken."""
        self._said_s = 0.0
        self._is_dropping = False
        self._n_sent = self._n_stale = self._n_refused = self._n_retries = self._n_bytes = 0
        self._success_s: float | None = None

    async def open(self) -> None:
        """Read the files that requests need.

        Raises:
            UnavailableError: One cannot be read.
            InvalidArgument: One makes no sense.
        """
        told = self._settings
        for secret in (self._token, self._basic):
            if secret is not None:
                await secret.open()
        if parse_url(told.push_url).is_secure:
            files = TlsFiles(told.push_cert_file, told.push_key_file, told.push_ca_file)
            self._tls = await open_client_tls(self._world, files, report=self._report_tls)
        self._client = HttpClient(
            self._world,
            limits=ClientLimits(connections_max=1, first_byte_s=told.push_timeout_s, total_s=told.push_timeout_s),
            tls=None if self._tls is None else self._tls.tls,
            headers=(("user-agent", f"isopod-pulse/{__version__}"),),
            decompresses=False,
        )

    async def close(self) -> None:
        """Close connections, and follow files no more."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        tls, self._tls = self._tls, None
        if tls is not None:
            await tls.close()

    async def run(self) -> None:
        """Send until cancelled; then what is queued, for as long as FLUSH_S. Opened before."""
        async with TaskGroup("pulse push") as group:
            group.create_task(self._send_on())
            next_s = self._loop.time()
            while True:
                next_s = max(next_s + self._settings.push_interval_s, self._loop.time())
                await asyncio.sleep(next_s - self._loop.time())
                await self.collect()

    async def collect(self) -> None:
        """Put the figures of this moment into the queue."""
        # A clock that was set back makes no samples older than those that were sent: a receiver would refuse them.
        self._at_ms = max(self._world.clock.now_ns() // 1_000_000, self._at_ms + 1)
        own = self._own()
        await maybe_yield()
        await self._encoder.encode(rows(self._store, self._settings.view, own), self._at_ms, self._put)

    def statistics(self) -> PushFacts:
        """Return what was done so far."""
        return PushFacts(
            n_sent=self._n_sent,
            n_stale=self._n_stale,
            n_refused=self._n_refused,
            n_dropped=self._queue.n_dropped_samples,
            n_retries=self._n_retries,
            n_bytes=self._n_bytes,
            n_queued=len(self._queue),
            queued_bytes=self._queue.n_bytes,
            success_s=self._success_s,
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _put(self, request: Request) -> None:
        body = bytes(snappy.compress_raw(request.body))
        if self._queue.put(Batch(body, request.n_samples, request.n_stale)):
            self._is_dropping = False
            return
        if not self._is_dropping:
            self._logger.warning("pulse.push_queue_full", n_bytes=self._queue.n_bytes, n_dropped_samples=self._queue.n_dropped_samples)
        self._is_dropping = True

    async def _send_on(self) -> None:
        try:
            while True:
                pause_s = await self._send_oldest()
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    while len(self._queue) and await self._send_oldest() is None:
                        pass
            raise

    async def _send_oldest(self) -> float | None:
        """Send the oldest request; return how long to wait if it is to be sent again, None else."""
        batch = await self._queue.hold()
        is_done = False
        try:
            self._n_retries += self._n_failures > 0
            failure = await self._post(batch)
            is_done = failure is None or failure.is_final
        finally:
            self._queue.release(done=is_done)
        if failure is None:
            self._taken(batch)
            return None
        self._complain(failure)
        if failure.is_final:
            self._n_failures = 0
            self._n_refused += batch.n_samples
            return None
        longest_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(self._n_failures, 16))
        self._n_failures += 1
        return float(max(failure.wait_s, longest_s * (1 - self._random.random() / 2)))

    async def _post(self, batch: Batch) -> _Outcome | None:
        """Send a request; return None if it was taken."""
        assert self._client is not None, "open comes first"
        headers = (*_HEADERS, *await self._credentials())
        try:
            answer = await self._client.request("POST", self._settings.push_url, headers=headers, body=batch.body, follows_redirects=False)
        except IsopodError as error:
            return _Outcome(error.code, error.message, is_final=False)
        async with answer:
            if answer.is_success:
                return None
            why = f"status {answer.status}: {await _words(answer)}"
            may_repeat = answer.status == 429 or answer.status >= 500
            wait_s = _retry_after_s(answer.headers.get("retry-after") or "", self._world.clock) if may_repeat else 0.0
            return _Outcome(str(answer.status), why, is_final=not may_repeat, wait_s=wait_s)

    async def _credentials(self) -> tuple[tuple[str, str], ...]:
        if self._token is not None:
            await self._token.refresh()
            return (bearer_auth(self._token.text),)
        if self._basic is not None:
            await self._basic.refresh()
            user, _, password = self._basic.text.partition(":")
            return (basic_auth(user, password),)
        return ()

    def _taken(self, batch: Batch) -> None:
        self._n_failures = 0
        self._n_sent += batch.n_samples
        self._n_stale += batch.n_stale
        self._n_bytes += len(batch.body)
        self._success_s = self._world.clock.now_ns() / 1e9
        if self._said:
            self._said = ""
            self._logger.info("pulse.push_taken", url=self._shown)

    def _complain(self, failure: _Outcome) -> None:
        """Log a failure, unless one of its kind was logged lately."""
        now_s = self._loop.time()
        if failure.kind == self._said and now_s - self._said_s < SAY_S:
            return
        self._said, self._said_s = failure.kind, now_s
        why = failure.why
        for secret in self._secrets():
            why = why.replace(secret, "...")
        self._logger.warning("pulse.push_refused" if failure.is_final else "pulse.push_failed", url=self._shown, why=why)

    def _secrets(self) -> Iterator[str]:
        if self._token is not None:
            yield self._token.text
        if self._basic is not None:
            user, _, password = self._basic.text.partition(":")
            yield self._basic.text
            yield basic_auth(user, password)[1].partition(" ")[2]
            if password:
                yield password

    def _report_tls(self, error: IsopodError | None) -> None:
        if error is None:
            self._logger.info("pulse.push_tls_read")
        else:
            self._logger.warning("pulse.push_tls_not_read", why=error.message)


def rows(store: Store, which: ViewName, own: Families) -> Iterator[Row]:
    """Iterate over the lines that a scrape would show now, by what they begin with; what comes meanwhile changes none of them.

    Args:
        store: Of which sandboxes.
        which: Which of their families.
        own: The agent's own families.
    """
    kinds = store.view(Query(view=which), own).chosen.kinds
    merged = {} if store.merged is None or which == "cadvisor" else store.merged.families()
    held = [(each.id, each.pod, each.begun.block, each.families, each.containers) for each in store.entries()]

    def texts(families: Families) -> list[bytes]:
        return [each.text for name, each in families.items() if kinds.get(name) == each.kind]

    def made() -> Iterator[Row]:
        yield Row(b"", [*texts(own), *texts({name: each for name, each in merged.items() if name not in own})])
        for identifier, pod, begun, families, containers in held:
            if which != "cadvisor" and families:
                yield Row(begun, texts(families))
            if which != "kata" and containers:
                yield Row(block(cadvisor_labels(identifier, pod)), texts(containers))

    return made()


async def _words(answer: ClientResponse) -> str:
    """Return the first line of what a receiver says, as far as it is worth showing."""
    piece = b""
    with suppress(IsopodError):
        async with aclosing(answer.stream()) as pieces:
            piece = await anext(pieces, b"")
    line = piece.decode("utf-8", "replace").strip().partition("\n")[0][:_SHOWN_CHARS]
    return "".join(c if c.isprintable() else "?" for c in line) or answer.reason


def _retry_after_s(value: str, clock: Clock) -> float:
    """Return how long a receiver wants to be left alone: seconds, or until a date."""
    if value.isascii() and value.isdecimal():
        return min(float(value[:9]), RETRY_AFTER_MAX_S)
    try:
        left_s = parsedate_to_datetime(value).timestamp() - clock.now_ns() / 1e9
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, left_s), RETRY_AFTER_MAX_S)


def _without_query(url: str) -> str:
    """Return a URL as it may be logged: some receivers are told who asks behind the question mark."""
    return str(parse_url(url)).partition("?")[0]
