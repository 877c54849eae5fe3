"""TLS in the simulation: the real handshake over simulated streams, with certificates judged by the simulated clock.

OpenSSL draws its own randomness, so the bytes on the wire differ from run to run, and an ECDSA signature by a byte or two in length. So
that a run stays a function of its seed all the same, what is sent during a handshake is delivered in whole pieces (`StreamEnd.may_split`);
afterwards the length of a record follows from that of its data.
"""

import asyncio
import ssl

from isopod.world.network import ClientTls, ProtocolFactory, ServerTls
from isopod.world.sim.clock import SimClock
from isopod.world.tls import check_validity, ignore_clock
from isopod.world.tls_stream import TlsStream, secure_client, securing


class SimTls:
    """Makes the streams of secured connections.

    Args:
        clock: The time that certificates are judged by.
    """

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock

    def server(self, factory: ProtocolFactory, tls: ServerTls) -> ProtocolFactory:
        """Return a factory for the connections of a listener."""
        make = securing(factory, tls, self._check)

        def prepare() -> asyncio.BaseProtocol:
            ignore_clock(tls.context)
            return make()

        return prepare

    def client(self, protocol: asyncio.BaseProtocol, tls: ClientTls, host: str | None) -> "tuple[TlsStream, asyncio.Future[None]]":
        """Return a client's stream and the end of its handshake."""
        ignore_clock(tls.context)
        return secure_client(protocol, tls, host, check=self._check)

    def _check(self, secured: ssl.SSLObject) -> None:
        check_validity(secured, self._clock.now_ns() / 1e9)
