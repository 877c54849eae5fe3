"""Syntax: what a request's head says, and which heads are refused.

Works on a head that llhttp (strict) has found well formed: it has refused bare LF and CR, NUL and other controls, obs-fold, space before a
colon, bad or several Content-Length fields, and Content-Length beside Transfer-Encoding. Here is the rest of what RFC 9112 wants
from a server that must not be talked into seeing other messages than the proxy before it does: one valid Host, "chunked" as the only
transfer coding and only in 1.1, the forms of the target, one space each in the request line, no other versions.

A head's rest, from its version on, mostly is the same for each request of a connection: `Facts` of it are kept by the connection and not
worked out again.
"""

import re
from typing import Final, NamedTuple

from isopod.net.http.headers import Headers
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HttpError

HEAD_END: Final = b"\r\n\r\n"
_DIGITS_MAX: Final = 18
# RFC 3986 section 3.2.2: a name, an IPv4 address or an IP literal, and a port. An empty Host is legal (RFC 9112 section 3.2).
_HOST: Final = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\]|\[v[0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+\])(?::[0-9]{0,5})?"
)
_ABSOLUTE: Final = re.compile(r"(https?)://([^/?#]+)([^#]*)", re.IGNORECASE)
_REQUEST_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^ ]+) HTTP/([0-9])\.([0-9])\r\n")
# In the beginning of a head: a line feed without its CR, a CR without its LF, or a control character.
_BROKEN: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Facts(NamedTuple):
    """What the version and the header section say."""

    headers: Headers
    version: str
    host: str | None
    keep_alive: bool
    content_length: int
    """0 if there is none."""
    is_chunked: bool
    expects_continue: bool
    wants_upgrade: bool
    has_body: bool
    """Whether body bytes follow the head."""
    is_simple: bool
    """A 1.1 request after which the connection goes on."""
    is_plain: bool
    """And one without a body or a wish to switch protocols."""


def parse_facts(rest: bytes, limits: HttpLimits) -> Facts:
    """Return what a head's rest says.

    Args:
        rest: " HTTP/1.1", CRLF and the header section with its end.
        limits: For `header_fields_max`.

    Raises:
        HttpError: 400, 417, 431 or 505.
    """
    version = _version(rest[: rest.index(b"\r\n")])
    if rest.count(b"\r\n") - 2 > limits.header_fields_max:
        raise HttpError(431, f"more than {limits.header_fields_max} header fields")
    headers = Headers.from_section(rest[rest.index(b"\r\n") :])
    coding = _one(headers, "transfer-encoding")
    length = _one(headers, "content-length")
    if coding is not None and (version == "1.0" or length is not None or coding.lower() != "chunked"):
        raise HttpError(400, "a Transfer-Encoding other than a single chunked")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) <= _DIGITS_MAX):
        raise HttpError(400, "a malformed Content-Length")
    n_bytes = int(length or 0)
    tokens = [token.strip().lower() for token in headers.combined("connection").split(",")]
    wants_upgrade = version == "1.1" and "upgrade" in tokens and "upgrade" in headers
    keep_alive = "close" not in tokens and (version == "1.1" or "keep-alive" in tokens)
    return Facts(
        headers=headers,
        version=version,
        host=_host(headers, version),
        keep_alive=keep_alive,
        content_length=n_bytes,
        is_chunked=coding is not None,
        expects_continue=_expects_continue(headers, version),
        wants_upgrade=wants_upgrade,
        has_body=coding is not None or n_bytes > 0,
        is_simple=keep_alive and version == "1.1",
        is_plain=keep_alive and version == "1.1" and not wants_upgrade and coding is None and n_bytes == 0 and "upgrade" not in headers,
    )


def parse_target(method: str, target: str, host: str | None) -> str:
    """Return the target in origin form (or "*").

    Args:
        method: The method.
        target: As it was sent.
        host: The Host field's value.

    Raises:
        HttpError: 400: a form that this method may not have, or an authority that is not the Host field's; 501: CONNECT.
    """
    if "#" in target or " " in target:
        raise HttpError(400, "a malformed request target")
    if method == "CONNECT":
        if not _HOST.fullmatch(target) or ":" not in target:
            raise HttpError(400, "CONNECT wants HOST:PORT")
        raise HttpError(501, "this server is no proxy")
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not _HOST.fullmatch(absolute[2]) or absolute[2].startswith(":"):
        raise HttpError(400, "a malformed request target")
    if host is not None and absolute[2].lower() != host.lower():
        raise HttpError(400, "the request target and the Host field name different hosts")
    rest = absolute[3]
    if not rest and method == "OPTIONS":
        return "*"
    return rest if rest.startswith("/") else "/" + rest


def check_size(head: bytes, target: str, limits: HttpLimits) -> None:
    """Refuse what is too long.

    Raises:
        HttpError: 414 or 431.
    """
    if len(target) > limits.target_bytes_max:
        raise HttpError(414, f"a request target of more than {limits.target_bytes_max} bytes")
    if len(head) > limits.head_bytes_max:
        raise HttpError(431, f"a head of more than {limits.head_bytes_max} bytes")


def is_broken(beginning: bytes | bytearray | memoryview) -> bool:
    """Return whether this beginning of a head can have no good end, so that its peer need not wait for the time-out."""
    return _BROKEN.search(beginning) is not None


def explain_refusal(head: bytes) -> HttpError:
    """Return the answer to a head that llhttp has refused: 501 or 505 if only the method or the version was at fault, else 400."""
    line = _REQUEST_LINE.match(head)
    if line is not None and line[3] != b"1":
        return HttpError(505, "this server speaks HTTP/1.1")
    if line is not None and line[1].isupper() and line[1] not in _KNOWN_METHODS:
        return HttpError(501, "an unknown method")
    return HttpError(400, "a malformed request")


_KNOWN_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"))


def _version(text: bytes) -> str:
    if text == b" HTTP/1.1":
        return "1.1"
    if text == b" HTTP/1.0":
        return "1.0"
    if text.startswith(b" HTTP/"):
        raise HttpError(505, "this server speaks HTTP/1.1")
    raise HttpError(400, "a malformed request line")


def _one(headers: Headers, name: str) -> str | None:
    values = headers.get_all(name)
    if len(values) > 1:
        raise HttpError(400, f"more than one {name.title()} field")
    return values[0] if values else None


def _host(headers: Headers, version: str) -> str | None:
    host = _one(headers, "host")
    if host is None and version == "1.1":
        raise HttpError(400, "no Host field")
    if host is not None and not _HOST.fullmatch(host):
        raise HttpError(400, "a malformed Host field")
    return host


def _expects_continue(headers: Headers, version: str) -> bool:
    expectation = headers.combined("expect")
    if not expectation or version == "1.0":  # RFC 9110 section 10.1.1: ignored in 1.0
        return False
    if expectation.lower() != "100-continue":
        raise HttpError(417, f"an unknown expectation: {expectation[:64]}")
    return True
