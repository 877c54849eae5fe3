"""Security: who may ask, and how much: TLS from files that may change, bearer tokens, names of this machine, bounds.

- TLS (`open_tls`) is that of `isopod.net.tls`: the files' folders are watched, a change is taken up for new connections, and files that do
  not fit each other leave what was shown before. With a client authority each client must show a certificate of it.
- A token (`Token`) stands in a file and comes with each request as `Authorization: Bearer TOKEN`. It is compared in a time that does not
  depend on where it differs, read again when the file's folder changes, and never logged. /healthz and /readyz need none: they tell
  nothing of sandboxes, and those who ask (a kubelet) have nowhere to keep one.
- On a loopback address only requests that name this machine are answered, else a page of any site could read all this with the browser
  of somebody on this machine (DNS rebinding). kata-monitor has no such guard, and so has strict mode none.
- A Unix socket's file is open to its owner and group alone.
"""

import asyncio
import hmac
import os
from typing import Final

from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HeaderPairs, HttpError, Request
from isopod.net.tls import ReloadingTls, ServerTls, TlsFiles, TlsRules, open_server_tls
from isopod.pulse.settings import PulseSettings
from isopod.runtime.logger import Logger
from isopod.telemetry.web import names_this_machine
from isopod.world.errors import InvalidArgument, IsopodError, from_os_error
from isopod.world.world import World

SOCKET_MODE: Final = 0o660
TOKEN_BYTES_MAX: Final = 4096
DEBOUNCE_S: Final = 0.2
WATCH_RETRY_S: Final = 5.0
OPEN_PATHS: Final = frozenset(("/healthz", "/readyz"))
"""What needs no token."""
LIMITS: Final = HttpLimits(
    head_bytes_max=16 << 10,
    target_bytes_max=8 << 10,
    body_bytes_max=64 << 10,
    handler_s=180.0,
    idle_s=120.0,
    connections_max=512,
)
"""A scrape is a head without a body. Keep-alive outlasts a Prometheus' usual interval of a minute."""
HEADERS: Final[HeaderPairs] = (("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"))
CHALLENGE: Final[HeaderPairs] = (("www-authenticate", 'Bearer realm="isopod pulse"'),)
_VERSIONS: Final = {"VersionTLS12": "1.2", "VersionTLS13": "1.3"}


async def open_tls(world: World, settings: PulseSettings, logger: Logger) -> ReloadingTls[ServerTls] | None:
    """Return what the listener presents, None if it speaks no TLS. The caller closes it.

    Args:
        world: The ports.
        settings: Name the files.
        logger: Told of reloads.

    Raises:
        InvalidArgument: The files make no context.
        UnavailableError: They cannot be read.
    """
    if not settings.tls_cert_file:
        return None

    def report(error: IsopodError | None) -> None:
        if error is None:
            logger.info("pulse.tls_read", certificate=settings.tls_cert_file)
        else:
            logger.warning("pulse.tls_not_read", why=error.message)

    return await open_server_tls(
        world,
        TlsFiles(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file),
        rules=TlsRules(
            client_auth="required" if settings.tls_client_ca_file else "none",
            alpn=("http/1.1",),
            minimum_version="1.3" if _VERSIONS[settings.tls_min_version] == "1.3" else "1.2",
            cipher_suites=settings.tls_cipher_suites,
        ),
        report=report,
    )


class Token:
    """The token of a file, kept up to date between `open` and `close`.

    Args:
        world: Its disk.
        path: The file's; its first line is the token, blanks at its ends left out.
        logger: Told when it changed, or cannot be read; the one before then stays.
    """

    def __init__(self, world: World, path: str, logger: Logger) -> None:
        self._disk = world.disk
        self._path = path
        self._logger = logger
        self._token = b""
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the file, and follow it.

        Raises:
            UnavailableError: It cannot be read.
            InvalidArgument: There is no token in it.
        """
        self._token = await self._read()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="pulse token")

    async def close(self) -> None:
        """Follow it no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def fits(self, authorization: str) -> bool:
        """Return whether an Authorization field carries the token."""
        scheme, _, given = authorization.strip().partition(" ")
        if scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)

    async def _read(self) -> bytes:
        try:
            content = await self._disk.read(self._path, n_bytes_max=TOKEN_BYTES_MAX)
        except OSError as error:
            raise from_os_error(error, "read", self._path) from error
        token = content.partition(b"\n")[0].strip()
        if not token or not token.isascii() or b" " in token:
            raise InvalidArgument(
                "token file", self._path, "wants a token as its first line: ASCII without blanks", "`openssl rand -hex 32`"
            )
        return token

    async def _follow(self) -> None:
        said = ""
        while True:
            try:
                async with self._disk.watch(os.path.dirname(self._path) or "/") as watch:
                    said = await self._look(said)  # for what happened before the watch began
                    async for name in watch:
                        await asyncio.sleep(DEBOUNCE_S)
                        said = await self._look(said)
                        if not name:  # events were lost, or the folder is gone: watch anew
                            break
            except OSError as error:
                self._logger.warning("pulse.secret_not_watched", why=str(error))
            await asyncio.sleep(WATCH_RETRY_S)

    async def _look(self, said: str) -> str:
        """Read the file again; return what was said about why that failed, "" if it did not."""
        try:
            found = await self._read()
        except IsopodError as error:
            if error.message != said:
                self._logger.warning("pulse.secret_not_read", why=error.message)
            return error.message
        if found != self._token:
            self._token = found
            self._logger.info("pulse.secret_read", file=self._path)
        return ""


def check(request: Request, token: Token | None, *, strict: bool = False) -> None:
    """Refuse who may not ask.

    Args:
        request: What is asked.
        token: What must come with it, None for nothing.
        strict: Whether any name of this machine will do.

    Raises:
        HttpError: 401 without the token, 421 for another machine's name.
    """
    if not strict and not names_this_machine(request):
        raise HttpError(421, "this is not the name of this machine", "ask for it by its address, or as localhost")
    if token is not None and request.raw_path not in OPEN_PATHS and not token.fits(request.headers.get("authorization") or ""):
        raise HttpError(401, "a bearer token is wanted", "send the token's file content as Authorization: Bearer TOKEN", headers=CHALLENGE)
