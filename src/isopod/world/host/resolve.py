"""Names to addresses by the machine's resolver (getaddrinfo(3): /etc/hosts, DNS, whatever nsswitch.conf says).

getaddrinfo blocks, for seconds when name servers are dead, so it runs in a few threads of its own: neither the loop nor the disk's
threads wait for it, and no more than `N_WAITING_MAX` look-ups are taken on. A cancelled caller leaves at once; the thread ends its call
unseen. Numeric addresses need no thread.
"""

import asyncio
import errno
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, cast

N_THREADS: Final = 4
N_WAITING_MAX: Final = 256
NO_SUCH_NAME: Final = "no such name"
"""The `filename` of an OSError that says the name does not exist, as opposed to a resolver that failed."""

SocketAddress = tuple[str, int] | tuple[str, int, int, int]


class Place(NamedTuple):
    """Where a socket can be bound or connected."""

    family: int
    where: SocketAddress


class HostResolver:
    """A few threads that ask; they start when first needed."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._n_waiting = 0
        self._counting = threading.Lock()

    async def resolve(self, host: str, port: int, *, passive: bool = False, kind: int = socket.SOCK_STREAM) -> Sequence[Place]:
        """Return where a name can be reached, the best first.

        Args:
            host: A name or a numeric address; "" for any (or, to connect, this machine).
            port: The port.
            passive: Whether it is to be bound.
            kind: Of socket.

        Raises:
            OSError: EHOSTUNREACH, EAGAIN: see `Network.resolve`.
        """
        flags = socket.AI_PASSIVE if passive else 0
        try:
            numeric = flags | socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            return _look_up(host or None, port, kind, numeric)
        except socket.gaierror:
            pass
        except UnicodeError as error:
            raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: {error}", NO_SUCH_NAME) from error
        return await self._ask(host, port, flags, kind=kind)

    async def _ask(self, host: str, port: int, flags: int, *, kind: int) -> Sequence[Place]:
        if self._n_waiting >= N_WAITING_MAX:
            raise OSError(errno.EAGAIN, f"cannot resolve {host}: {N_WAITING_MAX} look-ups are waiting")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix="isopod-names")
        with self._counting:
            self._n_waiting += 1
        call = self._threads.submit(_look_up, host, port, kind, flags)
        call.add_done_callback(lambda _: self._on_done())
        try:
            return await asyncio.wrap_future(call)
        except socket.gaierror as error:  # its number is not an errno
            missing = NO_SUCH_NAME if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA) else None
            raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: {error.strerror}", missing) from error
        except UnicodeError as error:
            raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: {error}", NO_SUCH_NAME) from error

    def _on_done(self) -> None:
        with self._counting:  # called in the thread that resolved
            self._n_waiting -= 1

    def close(self) -> None:
        """Start no more look-ups; threads end after their present one."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


def _look_up(host: str | None, port: int, kind: int, flags: int) -> list[Place]:
    found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    places = [Place(family, cast(SocketAddress, where)) for family, _, _, _, where in found]
    if not places:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return list(dict.fromkeys(places))
