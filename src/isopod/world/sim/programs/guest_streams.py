"""The streams that a simulated guest's agent serves: a command with its stdio, an archive on its way out, an archive on its way in.

A stream sends on credit only: what does not fit waits where it is, in a command's pipe in the end. After CLOSE its output is dropped.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from isopod.world.sim.machine import Machine
from isopod.world.sim.pipes import Channel, ReadEnd, WriteEnd, open_pipe, wait_any
from isopod.world.sim.programs.frames import PAYLOAD_BYTES_MAX, WINDOW_BYTES, Frame, Kind, of_credit, of_object
from isopod.world.sim.table import SIGKILL, SimProcess
from isopod.world.sim.terminal import Terminal

Send = Callable[[Frame], Awaitable[None]]
_PIECE_BYTES: Final = 32 << 10
_SCREEN_BYTES_MAX: Final = 128 << 10
"""What a terminal may hold, each newline become two bytes."""
_END_OF_INPUT: Final = b"\x04"


class Stream(Protocol):
    """Something that takes frames."""

    async def take(self, frame: Frame) -> None:
        """Deal with one frame from the host."""

    def drop(self) -> None:
        """The host is another one now: it hears no more of this."""


class Command:
    """A command that runs in the guest.

    Args:
        machine: The machine.
        send: Sends a frame to the host.
        stream: Its stream.
        process: Its process, which has no stdio yet.
        obeys_credit: Whether it sends no more than was granted.
    """

    def __init__(self, machine: Machine, send: Send, stream: int, process: SimProcess, *, obeys_credit: bool = True) -> None:
        self.process = process
        self._obeys_credit = obeys_credit
        self._machine = machine
        self._send = send
        self._stream = stream
        self._credit = WINDOW_BYTES
        self._is_dropped = False
        self._terminal: Terminal | None = None
        self._stdin: WriteEnd | None = None
        self._feed = bytearray()
        self._feed_ends = False
        self._changed = Channel()
        self._outputs: list[tuple[Kind, ReadEnd]] = []

    def connect(self, us: SimProcess, *, terminal: bool, stdin: bool, size: tuple[int, int]) -> None:
        """Give the process its stdio: a terminal, or pipes."""
        process = self.process
        if terminal:
            self._terminal = process.terminal = Terminal(us.owner)
            self._terminal.rows, self._terminal.columns = size
            self._terminal.on_signal = self._signal_foreground
            process.stdin, process.stdout = process.terminal.open(process.owner)
            process.stderr = process.stdout.dup(process.owner)
            return
        if stdin:
            process.stdin, self._stdin = open_pipe(process.owner, us.owner)
        out, process.stdout = open_pipe(us.owner, process.owner)
        err, process.stderr = open_pipe(us.owner, process.owner)
        self._outputs = [(Kind.STDOUT, out), (Kind.STDERR, err)]

    async def carry(self, was_out_of_memory: Callable[[], bool]) -> dict[str, object]:
        """Carry its outputs until it ended, then say how; return what was said."""
        loop = asyncio.get_running_loop()
        ended = loop.create_task(self.process.wait())
        ended.add_done_callback(lambda _: self._changed.wake())
        feeding = loop.create_task(self._feed_stdin())
        channels = [self._changed, *(end.channel for _, end in self._outputs)]
        channels += [self._terminal.output] if self._terminal is not None else []
        while True:
            if await self._carry_once():
                continue
            if ended.done() and not self._has_more():
                break
            await wait_any(channels)
        feeding.cancel()
        for _, end in self._outputs:
            end.close()
        status = ended.result()
        code, number = (status, None) if status >= 0 else (128 - status, -status)
        facts: dict[str, object] = {"code": code, "signal": number, "out_of_memory": number == SIGKILL and was_out_of_memory()}
        if not self._is_dropped:
            await self._send(of_object(Kind.EXIT, self._stream, facts))
        return facts

    async def take(self, frame: Frame) -> None:
        """Deal with one frame from the host."""
        match frame.kind:
            case Kind.STDIN:
                self._feed += frame.payload
            case Kind.STDIN_END:
                self._feed_ends = True
            case Kind.CREDIT:
                self._credit += frame.number()
            case Kind.CLOSE:
                self._is_dropped = True
            case Kind.SIGNAL:
                self.signal(frame.payload[0] if frame.payload else 0)
            case Kind.RESIZE if self._terminal is not None and len(frame.payload) == 4:
                rows, columns = (int.from_bytes(frame.payload[at : at + 2], "little") for at in (0, 2))
                self._terminal.resize(rows, columns)
        self._changed.wake()

    def drop(self) -> None:
        """The host is another one now: it hears no more of this."""
        self._is_dropped = True
        self._changed.wake()

    def revive(self) -> None:
        """A new host hears of it again, from now on, as of the main command."""
        self._is_dropped = False
        self._credit = WINDOW_BYTES

    def signal(self, number: int) -> None:
        """Signal it."""
        if number:
            self._machine.table.signal(self.process, number)

    def _signal_foreground(self, number: int) -> None:
        members = [each for each in self._machine.table.live() if each.terminal is self._terminal]
        if members:
            self._machine.table.signal(members[-1], number)

    def _has_more(self) -> bool:
        return not self._is_dropped and (
            any(end.channel.data for _, end in self._outputs) or (self._terminal is not None and bool(self._terminal.output.data))
        )

    async def _carry_once(self) -> bool:
        """Move what there is and the credit allows; return whether anything moved."""
        moved = False
        if self._terminal is not None and self._terminal.output.data and (self._credit >= _SCREEN_BYTES_MAX or self._is_dropped):
            moved = await self._emit(Kind.STDOUT, self._terminal.take())
        for kind, end in self._outputs:
            room = min(_PIECE_BYTES, self._credit) if not self._is_dropped else _PIECE_BYTES
            if end.channel.data and room:
                moved = await self._emit(kind, await end.read_at_most(room)) or moved
        return moved

    async def _emit(self, kind: Kind, data: bytes) -> bool:
        for start in range(0, len(data), PAYLOAD_BYTES_MAX):
            piece = data[start : start + PAYLOAD_BYTES_MAX]
            if not self._is_dropped:
                self._credit -= len(piece) if self._obeys_credit else 0
                await self._send(Frame(kind, self._stream, piece))
        return bool(data)

    async def _feed_stdin(self) -> None:
        """Hand input to the command as fast as it takes it, and grant the host as much again."""
        while True:
            data = bytes(self._feed[:_PIECE_BYTES])
            del self._feed[: len(data)]
            if data:
                await self._type(data)
                if not self._is_dropped:
                    await self._send(of_credit(self._stream, len(data)))
            elif self._feed_ends:
                self._end_input()
                return
            else:
                await self._changed.wait()

    async def _type(self, data: bytes) -> None:
        if self._terminal is not None:
            self._terminal.feed(data)
        elif self._stdin is not None:
            try:
                await self._stdin.write(data)
            except BrokenPipeError:
                self._end_input()

    def _end_input(self) -> None:
        if self._terminal is not None:
            self._terminal.feed(_END_OF_INPUT)
        elif self._stdin is not None:
            self._stdin.close()
            self._stdin = None


class Sending:
    """Bytes on their way to the host.

    Args:
        send: Sends a frame.
        stream: The stream.
        data: All of it.
    """

    def __init__(self, send: Send, stream: int, data: bytes) -> None:
        self._send = send
        self._stream = stream
        self._data = data
        self._credit = WINDOW_BYTES
        self._is_dropped = False
        self._changed = Channel()

    async def run(self) -> None:
        """Send everything."""
        rest = memoryview(self._data)
        while rest and not self._is_dropped:
            n_bytes = min(len(rest), self._credit, PAYLOAD_BYTES_MAX)
            if n_bytes:
                self._credit -= n_bytes
                await self._send(Frame(Kind.DATA, self._stream, bytes(rest[:n_bytes])))
                rest = rest[n_bytes:]
            else:
                await self._changed.wait()
        if not self._is_dropped:
            await self._send(Frame(Kind.DATA_END, self._stream))

    async def take(self, frame: Frame) -> None:
        """Deal with one frame from the host."""
        if frame.kind is Kind.CREDIT:
            self._credit += frame.number()
        elif frame.kind is Kind.CLOSE:
            self._is_dropped = True
        self._changed.wake()

    def drop(self) -> None:
        """The host is another one now."""
        self._is_dropped = True
        self._changed.wake()


class Receiving:
    """Bytes on their way from the host.

    Args:
        send: Sends a frame.
        stream: The stream.
    """

    def __init__(self, send: Send, stream: int) -> None:
        self.done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        """All of them; None if the host gave up."""
        self._send = send
        self._stream = stream
        self._data = bytearray()

    async def take(self, frame: Frame) -> None:
        """Deal with one frame from the host."""
        if frame.kind is Kind.DATA:
            self._data += frame.payload
            await self._send(of_credit(self._stream, len(frame.payload)))
        elif frame.kind in (Kind.DATA_END, Kind.CLOSE) and not self.done.done():
            self.done.set_result(bytes(self._data) if frame.kind is Kind.DATA_END else None)

    def drop(self) -> None:
        """The host is another one now."""
        if not self.done.done():
            self.done.set_result(None)
