"""The main command as the simulated shim keeps it: its output to the log and to those attached, their input to it, and its end."""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from isopod.world.sim.programs.container_log import ContainerLog
from isopod.world.sim.programs.frames import MAIN_STREAM, Frame, Kind, of_credit, of_object
from isopod.world.sim.programs.shim_feed import Feed
from isopod.world.sim.programs.shim_guest import Asker, Streams
from isopod.world.sim.programs.sockets import Connection

MainState = Literal["none", "asked", "running", "exited"]


class MainCommand:
    """The main command.

    Args:
        log: Where its output goes first.
        streams: The channel's streams: its own is one of them.
        send: Sends a frame to the guest, waiting while too many wait before it.
        send_soon: The same without waiting.
    """

    def __init__(
        self, log: ContainerLog, streams: Streams, *, send: Callable[[Frame], Awaitable[None]], send_soon: Callable[[Frame], None]
    ) -> None:
        self.state: MainState = "none"
        self.exit: dict[str, Any] | None = None
        self._log = log
        self._streams = streams
        self._send = send
        self._send_soon = send_soon
        self._output = Feed(self._pay_output)
        self._owed_bytes = 0
        self._attached: list[Asker] = []
        self._before_start: list[Frame] = []
        self._typed: deque[tuple[Asker, int]] = deque()

    # -- the guest -------------------------------------------------------------------------------------------------------------------

    def found(self) -> None:
        """The guest was started before, by another shim, and says that it runs or has ended."""
        if self.state == "none":
            self.state = "running"
            self._streams.open_main(None, is_agreed=True)

    async def start(self, asker: Asker, request: dict[str, Any]) -> None:
        """Ask the guest to start it."""
        self.state = "asked"
        self._streams.open_main(asker)
        await self._send(of_object(Kind.REQUEST, MAIN_STREAM, request))

    def take(self, frame: Frame) -> None:
        """Deal with a frame of its stream. Raises BadFrame."""
        asker = self._streams.take(frame)
        match frame.kind:
            case Kind.RESPONSE:
                self.state = "running" if "ok" in frame.object() else "none"
                if asker is not None:
                    asker.connection.write_nowait(frame._replace(stream=asker.stream).encode())
                waiting, self._before_start = self._before_start, []
                for each in waiting if self.state == "running" else ():
                    self._send_soon(each)
            case Kind.STDOUT | Kind.STDERR:
                self._owed_bytes += len(frame.payload)
                self.publish(frame.kind, frame.payload)
                if not self._output.is_lagging:
                    self._pay_output()
            case Kind.CREDIT:
                self._pay_input(frame.number())
            case Kind.EXIT:
                self.state, self.exit = "exited", frame.object()
                self._output.publish(Kind.EXIT, frame.payload)

    def publish(self, kind: Kind, data: bytes) -> None:
        """Log what it wrote, and tell those attached."""
        self._log.write("stderr" if kind is Kind.STDERR else "stdout", data)
        self._output.publish(kind, data)

    def end(self, code: int, *, out_of_memory: bool) -> None:
        """The machine is gone: tell those attached how it ended, unless the guest has told."""
        if self.exit is None:
            self._output.publish(Kind.EXIT, msgspec.json.encode({"code": code, "signal": None, "out_of_memory": out_of_memory}))

    # -- clients ---------------------------------------------------------------------------------------------------------------------

    def attach(self, asker: Asker) -> None:
        """Let a client hear it, and type."""
        self._attached.append(asker)
        self._output.add(*asker)

    def forget(self, client: Connection) -> None:
        """A client is gone."""
        self._output.remove(client)
        self._attached = [each for each in self._attached if each.connection is not client]

    def is_attached(self, asker: Asker) -> bool:
        """Return whether a client's stream is one that hears it."""
        return asker in self._attached

    async def hear(self, asker: Asker, frame: Frame) -> None:
        """Deal with a frame from somebody attached; what comes before the start waits for it."""
        match frame.kind:
            case Kind.CREDIT:
                self._output.grant(*asker, frame.number())
            case Kind.CLOSE:
                self._output.remove(*asker)
            case Kind.STDIN | Kind.STDIN_END | Kind.RESIZE | Kind.SIGNAL:
                if frame.kind is Kind.STDIN:
                    self._typed.append((asker, len(frame.payload)))
                passed = frame._replace(stream=MAIN_STREAM)
                if self.state in ("none", "asked"):
                    self._before_start.append(passed)
                elif self.state == "running":
                    await self._send(passed)

    # -- credit ----------------------------------------------------------------------------------------------------------------------

    def _pay_output(self) -> None:
        """Nobody lags: the guest may send as much again as was handed on."""
        owed, self._owed_bytes = self._owed_bytes, 0
        if owed and self._streams.grant(MAIN_STREAM, owed):
            self._send_soon(of_credit(MAIN_STREAM, owed))

    def _pay_input(self, n_bytes: int) -> None:
        """The command took input: who typed it may type as much again."""
        while n_bytes and self._typed:
            asker, typed = self._typed.popleft()
            paid = min(typed, n_bytes)
            n_bytes -= paid
            if paid < typed:
                self._typed.appendleft((asker, typed - paid))
            asker.connection.write_nowait(of_credit(asker.stream, paid).encode())
