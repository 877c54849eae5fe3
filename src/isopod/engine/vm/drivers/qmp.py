"""QMP: QEMU's control protocol, one JSON object a line.

A connection begins with a greeting and `qmp_capabilities`; then commands are answered one after the other, with events in between. QEMU is
outside of the guest, but a guest that took it over must harm nobody: lines have a bound, what is no answer ends the connection, and every
call has a deadline.
Source: QEMU's docs/interop/qmp-spec.txt and qemu-qmp-ref(7), version 7.2.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from isopod.world.errors import RuntimeFailed
from isopod.world.network import UnixAddress
from isopod.world.world import World

LINE_BYTES_MAX: Final = 1 << 20
EVENTS_MAX: Final = 256
"""Events kept for `wait_event`; older ones are dropped."""
COMMAND_TIMEOUT_S: Final = 10.0


class _Error(msgspec.Struct):
    desc: str = ""


class _Line(msgspec.Struct):
    """Whatever stands on a line. `returned` is unset where there is none: null is an answer too."""

    greeting: Any = msgspec.field(default=None, name="QMP")
    returned: Any = msgspec.field(default=msgspec.UNSET, name="return")
    error: _Error | None = None
    id: int | None = None
    event: str = ""
    data: dict[str, Any] = {}


class Lines(asyncio.Protocol):
    """A connection as a queue of lines."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self.why = ""
        """Why it ended, if the other side broke the rules."""

    async def next(self) -> bytes | None:
        """Return the next line, None at the end."""
        while not self._lines:
            if self._transport is None:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._lines.popleft()

    def write(self, line: bytes) -> None:
        """Send a line, if the connection still lives."""
        if self._transport is not None:
            self._transport.write(line + b"\r\n")

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()
        self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """Cut bytes into lines."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        self._lines += [bytes(line) for line in lines if line.strip()]
        if len(rest) > LINE_BYTES_MAX or len(self._lines) > EVENTS_MAX * 4:
            self.why = "more than anybody asked for"
            self.close()
        self._arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the reader see the end."""
        self._transport = None
        self._arrived.set()


class Qmp:
    """An open connection. Made by `connect`, closed by who made it. One call at a time.

    Args:
        lines: The connection, its greeting read.
        name: The machine's name, for errors.
    """

    def __init__(self, lines: Lines, name: str) -> None:
        self._lines = lines
        self._name = name
        self._lock = asyncio.Lock()
        self._n_calls = 0
        self._events: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=EVENTS_MAX)

    @classmethod
    async def connect(cls, world: World, path: str, name: str) -> "Qmp":
        """Connect, and agree on the plain protocol.

        Args:
            world: Where QEMU runs.
            path: Its control socket.
            name: The machine's name, for errors.

        Raises:
            RuntimeFailed: Nobody answers, or not as QEMU does.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                _, lines = await world.network.connect(UnixAddress(path), Lines)
                assert isinstance(lines, Lines), "the factory made it"
                qmp = cls(lines, name)
                try:
                    await qmp._greet()
                except BaseException:
                    lines.close()
                    raise
                return qmp
        except TimeoutError as error:
            raise RuntimeFailed("reach QEMU of", name, f"no answer within {COMMAND_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise RuntimeFailed("reach QEMU of", name, error.strerror or "it does not listen") from error

    async def execute(self, command: str, *, deadline_s: float = COMMAND_TIMEOUT_S, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Raises:
            RuntimeFailed: QEMU refused, is gone, or did not answer in time.
        """
        try:
            async with asyncio.timeout(deadline_s), self._lock:
                return await self._execute(command, arguments)
        except TimeoutError as error:
            self.close()  # a late answer would be taken for the next command's
            raise RuntimeFailed(command, self._name, f"no answer within {deadline_s:g} s") from error

    async def wait_event(self, *names: str, deadline_s: float) -> tuple[str, Mapping[str, Any]]:
        """Return the next event of one of these names, also one that came before.

        Raises:
            RuntimeFailed: QEMU is gone, or there is none in time.
        """
        try:
            async with asyncio.timeout(deadline_s), self._lock:
                while True:
                    while self._events:
                        event = self._events.popleft()
                        if event[0] in names:
                            return event
                    await self._next("wait for an event of")
        except TimeoutError as error:
            raise RuntimeFailed("wait for", self._name, f"no {' or '.join(names)} within {deadline_s:g} s") from error

    def close(self) -> None:
        """Close; the machine goes on."""
        self._lines.close()

    async def _greet(self) -> None:
        line = await self._next("greet")
        if not isinstance(line.greeting, dict):
            raise RuntimeFailed("greet", self._name, "what listens there is not QEMU")
        await self._execute("qmp_capabilities", {})

    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        self._n_calls += 1
        number = self._n_calls
        request = {"execute": command, "id": number, **({"arguments": dict(arguments)} if arguments else {})}
        self._lines.write(msgspec.json.encode(request))
        while True:
            line = await self._next(command)
            if line.id != number:
                continue
            if line.error is not None:
                raise RuntimeFailed(command, self._name, " ".join(line.error.desc.split())[:1000] or "refused without a reason")
            if line.returned is not msgspec.UNSET:
                return line.returned

    async def _next(self, action: str) -> _Line:
        """Return the next line; an event is kept as well."""
        text = await self._lines.next()
        if text is None:
            raise RuntimeFailed(action, self._name, self._lines.why or "QEMU closed its control socket")
        try:
            line = msgspec.json.decode(text, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._lines.close()
            raise RuntimeFailed(action, self._name, f"QEMU's words make no sense: {error}") from error
        if line.event:
            self._events.append((line.event, line.data))
        return line
