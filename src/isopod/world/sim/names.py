"""Names: the simulation's resolver, a table that the test fills.

Numeric addresses are their own; "localhost" and the machines of a cluster are there from the beginning. Everything else must be `set`,
with what resolving it takes and whether it fails.
"""

import asyncio
import errno
import ipaddress
from collections.abc import Sequence
from typing import Final, NamedTuple

from isopod.world.network import TcpAddress
from isopod.world.sim.fabric import Fabric
from isopod.world.sim.loop import SimLoop

NO_SUCH_NAME: Final = "no such name"


class _Entry(NamedTuple):
    addresses: tuple[str, ...]
    delay_s: float
    fails: bool


class Names:
    """The table, and how often it was asked.

    Args:
        loop: For delays.
        fabric: Whose machines' names resolve too, or None.
    """

    def __init__(self, loop: SimLoop, fabric: Fabric | None = None) -> None:
        self._loop = loop
        self._fabric = fabric
        self._entries: dict[str, _Entry] = {"localhost": _Entry(("127.0.0.1", "::1"), 0.0, fails=False)}
        self.n_lookups = 0

    def set(self, host: str, addresses: Sequence[str], *, delay_s: float = 0.0, fails: bool = False) -> None:
        """Let a name resolve.

        Args:
            host: The name.
            addresses: What it resolves to; none: the resolver says that there is no such name.
            delay_s: How long that takes.
            fails: Whether the resolver itself fails after that time (its servers do not answer).
        """
        self._entries[host.lower()] = _Entry(tuple(addresses), delay_s, fails)

    def knows(self, host: str) -> bool:
        """Return whether a name is in the table."""
        return host.lower() in self._entries or self._machine(host) is not None

    async def resolve(self, host: str, port: int) -> Sequence[TcpAddress]:
        """Return a name's addresses; failures as `Network.resolve`."""
        try:
            return [TcpAddress(str(ipaddress.ip_address(host)), port)]
        except ValueError:
            self.n_lookups += 1
        machine = self._machine(host)
        unset = _Entry(() if machine is None else (machine,), 0.0, fails=False)
        entry = self._entries.get(host.lower(), unset)
        if entry.delay_s:
            await asyncio.sleep(entry.delay_s)
        if entry.fails:
            raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: Temporary failure in name resolution")
        if not entry.addresses:
            raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: Name or service not known", NO_SUCH_NAME)
        return [TcpAddress(address, port) for address in entry.addresses]

    def _machine(self, host: str) -> str | None:
        return None if self._fabric is None else self._fabric.resolve(host.lower())
