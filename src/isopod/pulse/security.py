"""Security: who may ask, and how much: TLS from files that may change, tokens and passwords, names of this machine, bounds.

- TLS (`open_tls`) is that of `isopod.net.tls`: the files' folders are watched, a change is taken up for new connections, and files that do
  not fit each other leave what was shown before. With a client authority each client must show a certificate of it.
- A token (`Token`) stands in a file and comes with each request as `Authorization: Bearer TOKEN`. It is compared in a time that does not
  depend on where it differs, read again when the file's folder changes, and never logged. Users with passwords are `basic_auth`'s.
  Of a token and a password one is enough; a certificate, where one is demanded, is needed besides. /healthz and /readyz need neither
  token nor password: they tell nothing of sandboxes, and those who ask (a kubelet) have nowhere to keep one.
- On a loopback address only requests that name this machine are answered, else a page of any site could read all this with the browser
  of somebody on this machine (DNS rebinding). kata-monitor has no such guard, and so has strict mode none. What changes something is
  refused to other sites' pages everywhere, by their Origin.
- A Unix socket's file is open to its owner and group alone.
"""

import errno
import hmac
from collections.abc import Awaitable
from functools import partial
from typing import Final, NoReturn

from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HeaderPairs, HttpError, Request
from isopod.net.tls import ReloadingTls, ServerTls, TlsFiles, TlsRules, open_server_tls, read_material
from isopod.pulse.basic_auth import BasicAuth, Users
from isopod.pulse.followed import READ_HINT, Followed
from isopod.pulse.settings import PulseSettings
from isopod.runtime.logger import Logger
from isopod.telemetry.web import names_this_machine
from isopod.world.errors import InvalidArgument, IsopodError, UnavailableError, from_os_error
from isopod.world.world import World

SOCKET_MODE: Final = 0o660
TOKEN_BYTES_MAX: Final = 4096
OPEN_PATHS: Final = frozenset(("/healthz", "/readyz"))
"""What needs neither token nor password."""
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
BEARER: Final = ("www-authenticate", 'Bearer realm="isopod pulse"')
BASIC: Final = ("www-authenticate", 'Basic realm="isopod pulse", charset="UTF-8"')
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

    files, rules = tls_of(settings)
    try:
        return await open_server_tls(world, files, rules=rules, report=report)
    except UnavailableError as error:
        error.hint = error.hint or READ_HINT
        raise


def tls_of(settings: PulseSettings) -> tuple[TlsFiles, TlsRules]:
    """Return which files the listener's TLS is made of, and how."""
    files = TlsFiles(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    return files, TlsRules(
        client_auth="required" if settings.tls_client_ca_file else "none",
        alpn=("http/1.1",),
        minimum_version="1.3" if _VERSIONS[settings.tls_min_version] == "1.3" else "1.2",
        cipher_suites=settings.tls_cipher_suites,
    )


class Token:
    """The token of a file, kept up to date between `open` and `close`.

    Args:
        world: Its disk.
        path: The file's; its first line is the token, blanks at its ends left out.
        logger: Told when it changed, or cannot be read; the one before then stays.
    """

    def __init__(self, world: World, path: str, logger: Logger) -> None:
        self.file: Final = Followed(world.disk, path, partial(parse_token, path=path), logger=logger, n_bytes_max=TOKEN_BYTES_MAX)

    async def open(self) -> None:
        """Read the file, and follow it.

        Raises:
            UnavailableError: It cannot be read.
            InvalidArgument: There is no token in it.
        """
        await self.file.open()

    async def close(self) -> None:
        """Follow it no more."""
        await self.file.close()

    def fits(self, authorization: str) -> bool:
        """Return whether an Authorization field carries the token."""
        scheme, _, given = authorization.strip().partition(" ")
        token = self.file.value
        if scheme.lower() != "bearer" or token is None:
            return False
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), token)


def parse_token(content: bytes, path: str) -> bytes:
    """Return the token of a file.

    Raises:
        InvalidArgument: There is none in it.
    """
    token = content.partition(b"\n")[0].strip()
    if not token or not token.isascii() or b" " in token:
        raise InvalidArgument("token file", path, "wants a token as its first line: ASCII without blanks", "`openssl rand -hex 32`")
    return token


class Guard:
    """Who may ask, between `open` and `close`: whoever fulfils one of the schemes that are configured, everybody if none is.

    Args:
        world: The ports.
        settings: Name the files.
        logger: Told of those that change.
    """

    def __init__(self, world: World, settings: PulseSettings, logger: Logger) -> None:
        self._token = Token(world, settings.token_file, logger) if settings.token_file else None
        self._basic = BasicAuth(world, settings.basic_auth_file, logger) if settings.basic_auth_file else None

    async def open(self) -> None:
        """Read the files, and follow them. Raises as `Followed.open`."""
        for each in (self._token, self._basic):
            if each is not None:
                await each.open()

    async def close(self) -> None:
        """Follow them no more."""
        for each in (self._token, self._basic):
            if each is not None:
                await each.close()

    def files(self) -> dict[str, Followed[bytes] | Followed[Users]]:
        """Return the files by what they are."""
        found: dict[str, Followed[bytes] | Followed[Users]] = {}
        if self._token is not None:
            found["token"] = self._token.file
        if self._basic is not None:
            found["basic auth"] = self._basic.file
        return found

    def check(self, request: Request, *, strict: bool = False) -> Awaitable[None] | None:
        """Refuse who may not ask.

        Args:
            request: What is asked.
            strict: Whether any name of this machine will do.

        Returns:
            None if that is settled, else what settles it: it is to be awaited before the request is answered.

        Raises:
            HttpError: 401 without what is wanted, 421 for another machine's name, 429 for too many passwords.
        """
        if not strict and not names_this_machine(request):
            raise HttpError(421, "this is not the name of this machine", "ask for it by its address, or as localhost")
        if (self._token is None and self._basic is None) or request.raw_path in OPEN_PATHS:
            return None
        given = request.headers.get("authorization") or ""
        if self._token is not None and self._token.fits(given):
            return None
        fits = False if self._basic is None else self._basic.fits(given, _peer(request))
        if isinstance(fits, bool):
            return None if fits else self._refuse()
        return self._settle(fits)

    async def _settle(self, fits: Awaitable[bool]) -> None:
        if not await fits:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._basic is None:
            hint = "send the token's file content as Authorization: Bearer TOKEN"
            raise HttpError(401, "a bearer token is wanted", hint, headers=(BEARER,))
        if self._token is None:
            raise HttpError(401, "a user and a password are wanted", "send them by basic auth: curl --user USER:PASSWORD", headers=(BASIC,))
        hint = "send Authorization: Bearer TOKEN, or basic auth: curl --user USER:PASSWORD"
        raise HttpError(401, "a bearer token, or a user and a password, are wanted", hint, headers=(BEARER, BASIC))


def check_origin(request: Request) -> None:
    """Refuse a request that changes something if a page of another site makes it, with the reader's rights.

    Raises:
        HttpError: 403: its Origin is another than what was asked.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != (request.headers.get("host") or "").lower():
        raise HttpError(403, "another site's page may not ask for this", "ask without a browser: curl")


async def check_tls(world: World, settings: PulseSettings) -> None:
    """Look whether the files for TLS can be used now.

    Raises:
        InvalidArgument: They make no context.
        UnavailableError: They cannot be read.
    """
    files, rules = tls_of(settings)
    ServerTls(await read_material(world, files, rules))


def listen_failure(error: OSError, listen: str) -> UnavailableError:
    """Return why it cannot be listened somewhere, and what helps."""
    hints = {
        errno.EADDRINUSE: "another program listens there: end it, or choose another address with --listen-address",
        errno.EADDRNOTAVAIL: "this machine has no such address: 0.0.0.0 stands for all it has",
        errno.EACCES: "choose a port above 1023, or a folder that this process may write to",
        errno.ENOENT: "make the folder of the socket first",
    }
    failure = from_os_error(error, "listen on", listen)
    failure.hint = failure.hint or hints.get(error.errno or 0, "")
    return failure


def _peer(request: Request) -> str:
    return str(request.peer[0]) if isinstance(request.peer, tuple) else str(request.peer)
