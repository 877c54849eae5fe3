"""Peers for tests: a shim and a QEMU that say what a test tells them to, over the World's own sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from isopod.wire.agent import Decoder, Frame, Kind, encode, encode_json
from isopod.world.network import UnixAddress
from isopod.world.world import World

Script = Callable[["ShimPeer", Frame], None]
"""What a shim does with a frame that is no credit."""


class ShimPeer(asyncio.Protocol):
    """One connection of a client, seen from the shim."""

    def __init__(self, script: Script, everyone: "list[ShimPeer]") -> None:
        self._script = script
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self.frames: list[Frame] = []
        self.credit: dict[int, int] = {}
        self.is_closed = asyncio.Event()
        everyone.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            self.frames.append(frame)
            if frame.kind is Kind.CREDIT:
                self.credit[frame.stream] = self.credit.get(frame.stream, 0) + frame.number()
            else:
                self._script(self, frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed.set()

    def send(self, kind: Kind, stream: int, payload: bytes = b"") -> None:
        self.raw(encode(kind, stream, payload))

    def say(self, kind: Kind, stream: int, value: object) -> None:
        self.raw(encode_json(kind, stream, value))

    def ok(self, stream: int, **facts: Any) -> None:
        self.say(Kind.RESPONSE, stream, {"ok": facts})

    def refuse(self, stream: int, code: str, message: str) -> None:
        self.say(Kind.RESPONSE, stream, {"error": {"code": code, "message": message}})

    def raw(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def received(self, kind: Kind) -> list[Frame]:
        return [frame for frame in self.frames if frame.kind is kind]


@asynccontextmanager
async def shim(world: World, path: str, script: Script) -> AsyncIterator[list[ShimPeer]]:
    """Serve a shim's socket; yields the connections made so far."""
    everyone: list[ShimPeer] = []
    listener = await world.network.listen(UnixAddress(path), lambda: ShimPeer(script, everyone))
    try:
        yield everyone
    finally:
        await listener.close()
        for peer in everyone:
            peer.close()
        for peer in everyone:
            await peer.is_closed.wait()


def answering(answers: Mapping[str, Callable[[ShimPeer, Frame], None]]) -> Script:
    """Return a script that answers requests by their op, and refuses others."""

    def script(peer: ShimPeer, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST:
            answer = answers.get(frame.json()["op"])
            if answer is None:
                peer.refuse(frame.stream, "unsupported", "no such operation")
            else:
                answer(peer, frame)

    return script


class QmpPeer(asyncio.Protocol):
    """One connection to a QEMU that answers from a table; "events" are sent before the answer."""

    def __init__(self, answers: Mapping[str, Any], calls: list[dict[str, Any]], everyone: "list[QmpPeer]") -> None:
        self._answers = answers
        self._calls = calls
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self.is_closed = asyncio.Event()
        everyone.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self.write(self._answers.get("greeting", {"QMP": {"version": {}, "capabilities": []}}))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._answer(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed.set()

    def write(self, value: Any) -> None:
        assert self._transport is not None
        self._transport.write(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\r\n")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, call: dict[str, Any]) -> None:
        self._calls.append(call)
        answer = self._answers.get(call["execute"], {})
        if callable(answer):
            answer(self, call)
        elif isinstance(answer, str):
            self.write({"error": {"class": "GenericError", "desc": answer}, "id": call["id"]})
        else:
            self.write({"return": answer, "id": call["id"]})


@asynccontextmanager
async def qemu(world: World, path: str, answers: Mapping[str, Any]) -> AsyncIterator[list[dict[str, Any]]]:
    """Serve a QEMU's control socket; yields the commands that came."""
    calls: list[dict[str, Any]] = []
    everyone: list[QmpPeer] = []
    listener = await world.network.listen(UnixAddress(path), lambda: QmpPeer(answers, calls, everyone))
    try:
        yield calls
    finally:
        await listener.close()
        for peer in everyone:
            peer.close()
        for peer in everyone:
            await peer.is_closed.wait()
