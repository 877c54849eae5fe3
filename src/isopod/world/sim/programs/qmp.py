"""The control socket of the simulated QEMU: its machine protocol (QMP), in the commands and words that isopod's driver may use.

One client at a time: the next one waits in the backlog. A client gets a greeting, must negotiate, then gets an answer to each command in
turn, and events as they come. Source: QEMU's qmp-spec and the schema's documentation (7.2).
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from isopod.world.sim.clock import SimClock
from isopod.world.sim.programs.sockets import Backlog, Connection
from isopod.world.sim.vm_faults import Drawn

Reply = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Awaitable[object]]
_GREETING: Final = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "simulated"}, "capabilities": ["oob"]}}
_GARBAGE: Final = b'{"return": {"status": \xff\xfe<html>\r\n'
_LINE_BYTES_MAX: Final = 1 << 20


class QmpError(Exception):
    """What a command is answered with when it fails."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.text = text
        self.kind = kind


class Qmp:
    """The protocol's server.

    Args:
        backlog: Who connects.
        commands: What the monitor can do.
        faults: What goes wrong.
        clock: For the times of events.
    """

    def __init__(self, backlog: Backlog, commands: Mapping[str, Handler], *, faults: Drawn, clock: SimClock) -> None:
        self._backlog = backlog
        self._commands = commands
        self._faults = faults
        self._clock = clock
        self._client: Connection | None = None
        self._is_negotiated = False

    async def serve(self) -> None:
        """Serve one client after the other, for ever."""
        while True:
            self._client, self._is_negotiated = await self._backlog.accept(), False
            await self._converse(self._client)
            self._client.close()
            self._client = None

    def event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell the client, if there is one, that something happened."""
        if self._client is not None and self._is_negotiated and not self._is_mute:
            now_ns = self._clock.now_ns()
            stamp = {"seconds": now_ns // 10**9, "microseconds": now_ns % 10**9 // 1000}
            self._client.write_nowait(_line({"timestamp": stamp, "event": name, **({"data": dict(data)} if data is not None else {})}))

    @property
    def _is_mute(self) -> bool:
        return "qmp_silent" in self._faults

    async def _converse(self, client: Connection) -> None:
        if not self._is_mute:
            await client.write(_GARBAGE if "qmp_garbage" in self._faults else _line(_GREETING))
        buffer = b""
        while data := await client.read():
            buffer += data
            if len(buffer) > _LINE_BYTES_MAX:
                return
            *lines, buffer = buffer.split(b"\n")
            if buffer.strip() and _is_whole(buffer):
                lines, buffer = [*lines, buffer], b""
            for line in lines:
                if line.strip():
                    await self._obey(client, line)

    async def _obey(self, client: Connection, line: bytes) -> None:
        if self._is_mute:
            return
        identity: Reply = {}
        try:
            request = json.loads(line)
            identity = {"id": request["id"]} if "id" in request else {}
            reply: Reply = {"return": await self._execute(request)}
        except QmpError as error:
            reply = {"error": {"class": error.kind, "desc": error.text}}
        except (ValueError, KeyError, TypeError) as error:
            reply = {"error": {"class": "GenericError", "desc": f"Parameter or JSON is wrong: {error}"}}
        if self._faults.qmp_slow_s:
            await asyncio.sleep(self._faults.qmp_slow_s)
        await client.write(_GARBAGE if "qmp_garbage" in self._faults else _line(reply | identity))

    async def _execute(self, request: Mapping[str, Any]) -> object:
        name = request.get("execute")
        if name == "qmp_capabilities":
            if self._is_negotiated:
                raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
            self._is_negotiated = True
            return {}
        if not self._is_negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        handler = self._commands.get(str(name))
        if handler is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        if "qmp_errors" in self._faults:
            raise QmpError("Could not do that, and never can")
        return await handler(request.get("arguments", {}))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


def _is_whole(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
