"""URLs as a client uses them: taken apart once, checked, and resolved against a redirect's Location.

Not a browser's URL parser: what is malformed is refused, not repaired, apart from percent-encoding what a request line cannot carry.
Source: RFC 3986; RFC 9110 section 4.2.
"""

import functools
import re
from typing import Final, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from isopod.world.errors import InvalidArgument

PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_WEB: Final = ("http", "https")
SECURE: Final = frozenset({"https", "wss"})
URL_CHARS_MAX: Final = 16 << 10
_KNOWN_MAX: Final = 1024
"""How many URLs are remembered: a client asks for the same ones again and again."""
_KEPT: Final = "/%:=&?~+!$,;'@()*[]-._|"
_CONTROL: Final = re.compile(r"[\x00-\x20\x7f\ud800-\udfff]")
"""And halves of surrogate pairs, which no encoding can say."""
_HOST: Final = re.compile(r"[A-Za-z0-9_.~-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_CLEAN: Final = re.compile(r"[A-Za-z0-9/%:=&?~+!$,;'@()*\[\]._|-]*")


class Url(NamedTuple):
    """Where a request goes. `target` is path and query as they stand in a request line; `host` has no brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Whose cookies, credentials and connections these are."""
        return self[:3]

    @property
    def is_secure(self) -> bool:
        """Whether TLS is spoken."""
        return self.scheme in SECURE

    @property
    def authority(self) -> str:
        """What the Host field says: the port only if it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def host_field(self) -> str:
        """The authority as others may see it: the zone of a link-local address means something on this machine alone (RFC 6874)."""
        return re.sub(r"%[^\]]*\]", "]", self.authority) if "%" in self.host else self.authority

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    def join(self, reference: str) -> "Url":
        """Return what a relative or absolute reference means here. Raises as `parse_url`."""
        return parse_url(
            urljoin(str(self), reference), schemes=(self.scheme, *(("http", "https") if self.scheme in _WEB else ("ws", "wss")))
        )


@functools.lru_cache(maxsize=_KNOWN_MAX)
def parse_url(text: str, *, schemes: tuple[str, ...] = _WEB) -> Url:
    """Take a URL apart.

    Args:
        text: Absolute; a fragment is dropped.
        schemes: Those that make sense here.

    Raises:
        InvalidArgument: It is malformed, of another scheme, or carries a password.
    """
    if len(text) > URL_CHARS_MAX:
        raise InvalidArgument("URL", text[:60] + "...", f"longer than {URL_CHARS_MAX} characters")
    if _CONTROL.search(text):
        raise InvalidArgument("URL", ascii(text)[1:-1], "holds spaces or control characters", "percent-encode them")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument("URL", text, str(error)) from None
    if parts.scheme not in schemes:
        raise InvalidArgument("URL", text, f"must begin with {' or '.join(f'{each}://' for each in schemes)}")
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument("URL", f"{parts.scheme}://...@{parts.hostname}", "carries credentials", "give them as a header: basic_auth()")
    if port == 0:
        raise InvalidArgument("URL", text, "port 0 is nobody's")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not _CLEAN.fullmatch(target):
        target = quote(target, safe=_KEPT)
    host = _host(parts.hostname or "", text)
    if "[" in parts.netloc and ":" not in host:
        raise InvalidArgument("URL", text, "there is no IPv6 address in its brackets")
    return Url(parts.scheme, host, port or PORTS[parts.scheme], target)


def _host(name: str, text: str) -> str:
    if ":" in name:
        name = name.replace("%25", "%", 1)  # RFC 6874: the zone of a link-local address
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            raise InvalidArgument("URL", text, "its host is not a name") from None
    if not _HOST.fullmatch(name):
        raise InvalidArgument("URL", text, "it has no host" if not name else "its host is not a name")
    return name
