"""WebSocket from the client's side: connect, check the answer, and talk as on a server (`WebSocket`).

Redirects are not followed: where a socket goes is the caller's decision. Source: RFC 6455 section 4.1.
"""

import asyncio
import base64
from collections.abc import Iterable, Sequence
from typing import Final

from isopod.net.http.client import HttpClient
from isopod.net.http.client_messages import ClientLimits
from isopod.net.http.url import parse_url
from isopod.net.http.websocket import handshake
from isopod.net.http.websocket.connection import MaskKeys, WebSocket, WebSocketLimits
from isopod.net.http.websocket.deflate import Deflate
from isopod.runtime.timers import TimerWheel
from isopod.world.errors import InvalidArgument, ProtocolViolation
from isopod.world.network import Address, ClientTls
from isopod.world.world import World

CONNECT_TIMEOUT_S: Final = 10.0
_SCHEMES: Final = ("ws", "wss")
_OURS: Final = frozenset(
    {"upgrade", "connection", "sec-websocket-key", "sec-websocket-version", "sec-websocket-protocol", "sec-websocket-extensions"}
)


async def connect_websocket(
    world: World,
    url: str,
    *,
    headers: Iterable[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    tls: ClientTls | None = None,
    address: Address | None = None,
    limits: WebSocketLimits = WebSocketLimits(),  # noqa: B008 - immutable
    compresses: bool = False,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> WebSocket:
    """Open a WebSocket. The caller closes it.

    Args:
        world: Whose network and chance.
        url: "ws://host/path" or "wss://host/path".
        headers: More fields of the handshake: `origin`, `authorization`.
        subprotocols: What we speak, the preferred first; `subprotocol` says what the server chose, "" for none.
        tls: Whom to trust; None trusts the machine's roots.
        address: Connect there instead of to the URL's host.
        limits: Bounds.
        compresses: Whether to offer permessage-deflate.
        timeout_s: For connecting and the handshake.

    Raises:
        InvalidArgument: The URL or a field is malformed.
        HttpError: The server answered with this status instead of switching.
        ProtocolViolation: Its answer is not one to our handshake.
        Disconnected, DeadlineExceeded, HandshakeFailed: No connection.
    """
    fields = tuple(headers)
    taken = [name for name, _ in fields if name.lower() in _OURS]
    if taken:
        raise InvalidArgument("header name", taken[0], "the handshake sets it itself")
    parse_url(url, schemes=_SCHEMES)
    key = base64.b64encode(bytes.fromhex(world.random.token_hex(16))).decode("ascii")
    ours = handshake.client_headers(key, subprotocols=subprotocols, offers_deflate=compresses)
    fields += tuple(pair for pair in ours if pair[0] not in ("upgrade", "connection"))
    client = HttpClient(
        world, limits=ClientLimits(total_s=timeout_s, first_byte_s=timeout_s, connect_s=timeout_s), tls=tls, decompresses=False
    )
    try:
        upgraded = await client.upgrade(url, "websocket", headers=fields, address=address)
    finally:
        await client.close()
    transport = upgraded.transport
    try:
        agreed = handshake.check_answer(
            upgraded.response.headers,
            key,
            subprotocols=subprotocols,
            offered_deflate=compresses,
            peer=parse_url(url, schemes=_SCHEMES).authority,
        )
    except ProtocolViolation:
        transport.abort()
        raise
    deflate = None if agreed.deflate is None else Deflate(agreed.deflate, is_client=True)
    wheel = TimerWheel(asyncio.get_running_loop())
    ws = WebSocket(transport, wheel, limits, keys=MaskKeys(world), subprotocol=agreed.subprotocol, deflate=deflate, clock=world.clock)
    transport.set_protocol(ws)
    ws.begin(upgraded.leftover)
    transport.resume_reading()
    return ws
