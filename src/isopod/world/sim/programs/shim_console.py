"""The console as the simulated shim keeps it: logged, looked through for the kernel's last words, shown to whoever asks."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

from isopod.world.sim.programs.container_log import ConsoleLog
from isopod.world.sim.programs.frames import PAYLOAD_BYTES_MAX, Frame, Kind, of_credit
from isopod.world.sim.programs.hardware import Wire
from isopod.world.sim.programs.shim_feed import Feed
from isopod.world.sim.programs.shim_guest import Asker
from isopod.world.sim.programs.sockets import Connection

_PANIC: Final = re.compile(rb"^(?:\[[^\]]*\] )?Kernel panic - not syncing: ([^\r\n]*)\r?\n", re.MULTILINE)
_SCANNED_BYTES: Final = 1024


class Console:
    """The console.

    Args:
        log: Where it goes first.
        on_panic: Told once, when the guest's kernel panicked.
    """

    def __init__(self, log: ConsoleLog, on_panic: Callable[[], None]) -> None:
        self.panic = ""
        """The kernel's last words."""
        self.wire: Wire | None = None
        self._log = log
        self._on_panic = on_panic
        self._caught_up = asyncio.Event()
        self._feed = Feed(self._caught_up.set)
        self._askers: list[Asker] = []
        self._writers: list[Asker] = []
        self._scanned = b""
        self._is_closed = False

    async def read(self) -> None:
        """Read it to its end, as fast as those who look at it."""
        while self.wire is not None and (data := await self.wire.incoming.read()):
            self._log.write(data)
            self._scan(data)
            for start in range(0, len(data), PAYLOAD_BYTES_MAX):
                self._feed.publish(Kind.STDOUT, data[start : start + PAYLOAD_BYTES_MAX])
            while self._feed.is_lagging and not self._is_closed:
                self._caught_up.clear()
                await self._caught_up.wait()

    def open(self, asker: Asker, request: dict[str, Any]) -> None:
        """Show it to a client: its end first, then what comes."""
        self._askers.append(asker)
        if request.get("write"):
            self._writers.append(asker)
        tail = self._log.tail(int(request.get("tail") or 0))
        self._feed.add(*asker)
        for start in range(0, len(tail), PAYLOAD_BYTES_MAX):
            self._feed.publish_to(*asker, tail[start : start + PAYLOAD_BYTES_MAX])

    def is_open(self, asker: Asker) -> bool:
        """Return whether a client looks at it on that stream."""
        return asker in self._askers

    async def hear(self, asker: Asker, frame: Frame) -> None:
        """Deal with a frame from somebody who looks at it."""
        match frame.kind:
            case Kind.CREDIT:
                self._feed.grant(*asker, frame.number())
            case Kind.CLOSE:
                self._feed.remove(*asker)
            case Kind.STDIN if self.wire is not None and asker in self._writers:
                await self.wire.outgoing.write(frame.payload)
                asker.connection.write_nowait(of_credit(asker.stream, len(frame.payload)).encode())

    def forget(self, client: Connection) -> None:
        """A client is gone."""
        self._feed.remove(client)
        self._askers = [each for each in self._askers if each.connection is not client]
        self._writers = [each for each in self._writers if each.connection is not client]

    def close(self) -> None:
        """Wait for nobody any more: the machine is gone."""
        self._is_closed = True
        self._feed.close()
        self._caught_up.set()

    def _scan(self, data: bytes) -> None:
        text = self._scanned + data
        self._scanned = text[-_SCANNED_BYTES:]
        found = _PANIC.search(text)
        if found is not None and not self.panic:
            self.panic = " ".join(found[1].decode(errors="replace").split())
            self._on_panic()
