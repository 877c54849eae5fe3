"""The opening handshake of WebSocket, both sides, without any I/O.

A server answers 405 or 400 to what is no upgrade at all, 426 to another version, 403 to a page of a foreign origin. A client checks the
accept token, and that it got nothing it did not ask for. Source: RFC 6455 section 4; RFC 9110 section 7.8.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from isopod.net.http.headers import Headers
from isopod.net.http.messages import HeaderPairs, HttpError, Request
from isopod.net.http.websocket.deflate import NAME as DEFLATE
from isopod.net.http.websocket.deflate import DeflateParameters, accept_offer, read_answer
from isopod.world.errors import ProtocolViolation

VERSION: Final = "13"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES: Final = 16
_SPEAKS: Final[HeaderPairs] = (("upgrade", "websocket"),)
"""What a 426 must say (RFC 9110 section 15.5.22)."""
DEFLATE_OFFER: Final = f"{DEFLATE}; client_max_window_bits"


class Agreed(NamedTuple):
    """What a handshake settled. `headers` go into the server's answer."""

    subprotocol: str
    deflate: DeflateParameters | None
    headers: HeaderPairs = ()


def accept_token(key: str) -> str:
    """Return the `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key`."""
    return base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()).decode("ascii")


def accept(request: Request, *, subprotocols: Sequence[str], origins: Sequence[str] | None, offers_deflate: bool) -> Agreed:
    """Check a client's handshake and choose what to agree on.

    Args:
        request: What came.
        subprotocols: Ours, the preferred first; without a common one none is spoken.
        origins: Pages that may connect ("https://example.org"), "null" included if wanted; None: those served by this host itself.
            Programs send no Origin and are not judged by it.
        offers_deflate: Whether permessage-deflate may be agreed on.

    Raises:
        HttpError: 405, 400, 426 or 403: what the peer is to be answered.
    """
    headers = request.headers
    if request.method != "GET":
        raise HttpError(405, "a WebSocket begins with GET", headers=(("allow", "GET"),))
    if request.version != "1.1" or "websocket" not in _words(headers.combined("upgrade")):
        raise HttpError(426, "this is a WebSocket", "connect with ws:// or wss://", headers=_SPEAKS)
    if "upgrade" not in _words(headers.combined("connection")):
        raise HttpError(400, "Connection does not say Upgrade")
    if headers.get_all("sec-websocket-version") != [VERSION]:
        raise HttpError(426, "only version 13 is spoken", headers=(*_SPEAKS, ("sec-websocket-version", VERSION)))
    keys = headers.get_all("sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise HttpError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    _check_origin(request, origins)
    answer = [("sec-websocket-accept", accept_token(keys[0]))]
    offered = [word.strip() for word in headers.combined("sec-websocket-protocol").split(",")]
    subprotocol = next((name for name in subprotocols if name in offered), "")
    if subprotocol:
        answer.append(("sec-websocket-protocol", subprotocol))
    deflate = accept_offer(headers.combined("sec-websocket-extensions")) if offers_deflate else None
    if deflate is not None:
        answer.append(("sec-websocket-extensions", deflate.header()))
    return Agreed(subprotocol, deflate, tuple(answer))


def client_headers(key: str, *, subprotocols: Iterable[str], offers_deflate: bool) -> HeaderPairs:
    """Return the fields of a client's handshake."""
    pairs = [("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-key", key), ("sec-websocket-version", VERSION)]
    wanted = ", ".join(subprotocols)
    if wanted:
        pairs.append(("sec-websocket-protocol", wanted))
    if offers_deflate:
        pairs.append(("sec-websocket-extensions", DEFLATE_OFFER))
    return tuple(pairs)


def check_answer(headers: Headers, key: str, *, subprotocols: Sequence[str], offered_deflate: bool, peer: str) -> Agreed:
    """Check a server's 101.

    Raises:
        ProtocolViolation: It is not the answer to our handshake.
    """
    if "websocket" not in _words(headers.combined("upgrade")) or "upgrade" not in _words(headers.combined("connection")):
        raise ProtocolViolation(peer, "its 101 does not switch to websocket")
    if headers.get_all("sec-websocket-accept") != [accept_token(key)]:
        raise ProtocolViolation(peer, "Sec-WebSocket-Accept is not the answer to our key")
    chosen = headers.get_all("sec-websocket-protocol")
    if len(chosen) > 1 or (chosen and chosen[0] not in subprotocols):
        raise ProtocolViolation(peer, f"it chose the subprotocol {', '.join(chosen)!r}, which was not offered")
    extensions = headers.combined("sec-websocket-extensions")
    deflate = read_answer(extensions) if extensions and offered_deflate else None
    if extensions and deflate is None:
        raise ProtocolViolation(peer, f"it chose the extension {extensions!r}, which was not offered")
    return Agreed(chosen[0] if chosen else "", deflate)


def _words(value: str) -> list[str]:
    return [word.strip().lower() for word in value.split(",")]


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def _check_origin(request: Request, origins: Sequence[str] | None) -> None:
    """Refuse pages of other sites: the browser sends our cookies along with their connections. Raises HttpError."""
    found = request.headers.get_all("origin")
    if not found:
        return
    allowed = [f"{request.scheme}://{request.headers.get('host', '')}".lower()] if origins is None else [each.lower() for each in origins]
    if len(found) > 1 or ("*" not in allowed and found[0].lower() not in allowed):
        raise HttpError(403, f"pages of {found[0][:200]} may not connect")
