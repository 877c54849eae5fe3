"""Connecting: one attempt within a time limit, or several with jittered back-off."""

import asyncio
from typing import Final

from isopod.net.address import format_address
from isopod.net.tcp.connection import Connection, TcpLimits
from isopod.world.errors import DeadlineExceeded, HandshakeFailed, IsopodError, KernelError
from isopod.world.network import Address, ClientTls, TcpOptions
from isopod.world.world import World

BACKOFF_S: Final = 0.1
BACKOFF_S_MAX: Final = 5.0
_DEFAULT_OPTIONS: Final = TcpOptions()


async def connect_tcp(
    world: World, address: Address, *, tls: ClientTls | None = None, limits: TcpLimits | None = None, options: TcpOptions | None = None
) -> Connection:
    """Connect once.

    Args:
        world: The ports.
        address: Where to; a name is resolved by the machine's resolver.
        tls: Secure it.
        limits: Times and bounds.
        options: Of TCP.

    Returns:
        The connection, which the caller closes.

    Raises:
        DeadlineExceeded: It took longer than `connect_s`.
        HandshakeFailed: There is no TLS with that peer.
        KernelError: Nobody listens there, or there is no way.
    """
    limits = limits or TcpLimits()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limits.connect_s or None):
            _, connection = await world.network.connect(
                address, lambda: Connection(limits, loop.call_later), tls=tls, options=options or _DEFAULT_OPTIONS
            )
    except TimeoutError as error:
        if error.errno is not None:  # the kernel gave up first
            raise KernelError("connect to", format_address(address), error.errno) from error
        raise DeadlineExceeded(f"connecting to {format_address(address)}", limits.connect_s) from error
    except OSError as error:
        raise KernelError("connect to", format_address(address), error.errno or 0, hint=error.strerror or "") from error
    assert isinstance(connection, Connection)
    return connection


class TcpClient:
    """Connects to one address, again and again.

    Args:
        world: The ports.
        address: Where to.
        tls: Secure the connections.
        limits: Times and bounds.
        options: Of TCP.
        n_attempts: How often `connect` tries.
    """

    def __init__(
        self,
        world: World,
        address: Address,
        *,
        tls: ClientTls | None = None,
        limits: TcpLimits | None = None,
        options: TcpOptions | None = None,
        n_attempts: int = 3,
    ) -> None:
        self._world = world
        self._address = address
        self._tls = tls
        self._limits = limits
        self._options = options
        self._n_attempts = n_attempts
        self._chance = world.random.stream("net.tcp.client")

    async def connect(self) -> Connection:
        """Connect, waiting a growing, jittered time between attempts. A refused certificate is not tried again.

        Raises:
            IsopodError: As `connect_tcp`, of the last attempt.
        """
        pause_s = BACKOFF_S
        for attempt in range(self._n_attempts):
            try:
                return await connect_tcp(self._world, self._address, tls=self._tls, limits=self._limits, options=self._options)
            except HandshakeFailed:
                raise
            except IsopodError:
                if attempt == self._n_attempts - 1:
                    raise
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, BACKOFF_S_MAX)
        raise AssertionError("unreachable: at least one attempt is made")
