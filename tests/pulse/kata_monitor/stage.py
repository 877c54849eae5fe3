"""Stage: plays a scene in a World: folders below two roots, a shim behind each socket, and the asking of whoever watches them.

A shim answers one request a connection, as HTTP/1.1 with a length, and understands no more of a request than its first line.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Final, Self, cast

from isopod.net.http.client import HttpClient
from isopod.pulse.model import SOCKET_NAME
from isopod.world.network import Listener, TcpAddress, UnixAddress
from isopod.world.world import World
from tests.pulse.kata_monitor.scenes import ECHO, Ask, Reply, Scene
from tests.pulse.kata_monitor.seen import Answer, Family, Seen, counts_of, look

NOT_FOUND: Final = Reply(b"404 page not found\n", 404)
ANSWER_S: Final = 30.0


class Stage:
    """A scene's sandboxes. Use it in an `async with`.

    Args:
        world: Where.
        scene: Which.
        folder: Above the two roots, `go` and `rust`.
    """

    def __init__(self, world: World, scene: Scene, folder: str) -> None:
        self._world = world
        self._scene = scene
        self.roots = {name: f"{folder}/{name}" for name in ("go", "rust")}
        self._listeners: list[Listener] = []

    async def __aenter__(self) -> Self:
        for root in self.roots.values():
            await self._world.disk.make_directory(root, mode=0o755)
        for sandbox in self._scene.sandboxes:
            folder = f"{self.roots[sandbox.root]}/{sandbox.id}"
            await self._world.disk.make_directory(folder, mode=0o755)
            if sandbox.replies:
                address = UnixAddress(f"{folder}/{SOCKET_NAME}")
                self._listeners.append(await self._world.network.listen(address, partial(_Shim, sandbox.replies)))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for listener in self._listeners:
            await listener.close()
        for root in self.roots.values():
            await self._world.disk.remove_tree(root)


class Asker:
    """Asks one server a scene's questions. Close it after use.

    Args:
        world: Where.
        address: The server's.
    """

    def __init__(self, world: World, address: TcpAddress) -> None:
        self._client = HttpClient(world, decompresses=False)
        self._address = address
        self.port = address.port

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, ask: Ask) -> Answer:
        """Return an answer as it is on the wire, apart from how it is framed."""
        url = f"http://{self._address.host}:{self._address.port}{ask.target}"
        answer = await self._client.request(
            ask.method, url, headers=ask.headers, timeout_s=ANSWER_S, follows_redirects=False, decompresses=False
        )
        return Answer(answer.status, [(name.lower(), value) for name, value in answer.headers], await answer.read())

    async def text(self, target: str) -> str:
        """Return the body of an answer to GET."""
        return (await self.ask(Ask("", target, "lines"))).body.decode()

    async def see(self, scene: Scene) -> tuple[dict[str, Seen], dict[str, Family]]:
        """Return what a server says to all of a scene's requests, and the families in it by their digests."""
        families: dict[str, Family] = {}
        seen: dict[str, Seen] = {}
        before = counts_of(await self.text("/metrics"))
        for ask in scene.asks:
            assert ask.name not in seen, ask.name
            seen[ask.name] = look(ask, await self.ask(ask), families, before)
        return seen, families


class _Shim(asyncio.Protocol):
    """One connection to a shim."""

    def __init__(self, replies: Mapping[str, Reply]) -> None:
        self._replies = replies
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, _ = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        target = head.split(b" ")[1]
        reply = self._replies.get(target.partition(b"?")[0].decode(), NOT_FOUND)
        if reply.hangs:
            return
        assert self._transport is not None
        self._transport.write(_wire(reply, target))
        self._transport.close()


def _wire(reply: Reply, target: bytes) -> bytes:
    body = reply.body.replace(b"TARGET", target) if reply.body == ECHO else reply.body
    fields = [f"HTTP/1.1 {reply.status} Whatever", f"Content-Type: {reply.kind}", f"Content-Length: {len(body)}", "Connection: close"]
    fields += [f"Content-Disposition: {reply.disposition}"] if reply.disposition else []
    return "\r\n".join([*fields, "", ""]).encode() + body
