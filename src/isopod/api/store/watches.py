"""ClientWatch: a stream of changes that survives its connections.

When a connection ends, the stream goes on from the revision behind the last that was told, on whichever node answers: nothing is missed and
nothing told twice. It ends for good only when the caller leaves it, or when the store has forgotten the changes it would go on with.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final, Self

import msgspec

from isopod.api.messages import Empty
from isopod.api.store import methods
from isopod.api.store.messages import Entry, KvChanges, KvWatch
from isopod.api.store.nodes import Nodes
from isopod.net.rpc.client_call import ClientCall
from isopod.world.errors import Disconnected, IsopodError

PAUSE_FIRST_S: Final = 0.02
PAUSE_MAX_S: Final = 1.0
CONNECT_S: Final = 5.0
SILENCES_MAX: Final = 3
"""A node that was silent for so many intervals of progress is left for another."""


class ClientWatch:
    """Use as `async with client.watch(...) as watch: async for changes in watch: ...`.

    Args:
        nodes: The way to the store.
        request: What is watched.
        chance: Draws from 0 to 1, for pauses.
    """

    def __init__(self, nodes: Nodes, request: KvWatch, chance: Callable[[], float]) -> None:
        self.revision = max(0, request.from_revision - 1)
        """How far it is: all changes up to this revision were told."""
        self.n_resumed = 0
        self._nodes = nodes
        self._request = request
        self._chance = chance
        self._stack: AsyncExitStack | None = None
        self._call: ClientCall[Empty] | None = None
        self._n_failed = 0
        self._is_begun = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._leave()

    def __aiter__(self) -> Self:
        """Iterate over what changes."""
        return self

    async def __anext__(self) -> KvChanges:
        """Return the next changes, or how far the stream is.

        Raises:
            RevisionCompacted: The store has forgotten the changes behind `revision`: read the state again.
            IsopodError: The store refused to go on.
        """
        while True:
            try:
                return await self._next()
            except IsopodError as error:
                await self._leave()
                if not error.retryable:
                    raise
                self._n_failed += 1
                pause_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** (self._n_failed - 1))
            await asyncio.sleep(pause_s * (1 - 0.5 * self._chance()))

    async def _next(self) -> KvChanges:
        call = self._call or await self._open()
        entries: list[Entry] = []
        while True:
            part = await self._receive(call)
            entries += part.entries
            if not part.more:
                break
        changes = msgspec.structs.replace(part, entries=entries)
        self._n_failed = 0
        self._is_begun = True
        self.revision = max(self.revision, changes.revision)
        return changes

    async def _receive(self, call: ClientCall[Empty]) -> KvChanges:
        try:
            async with asyncio.timeout(self._request.progress_s * SILENCES_MAX + 1.0):
                item: Any = await call.receive()  # of what the method streams
        except TimeoutError:
            raise Disconnected("the store", "a watched node fell silent") from None
        if item is None:
            await call.reply()
            raise Disconnected("the store", "a node ended the watch")
        changes: KvChanges = item
        return changes

    async def _open(self) -> ClientCall[Empty]:
        request = self._request
        if self._is_begun:
            request = msgspec.structs.replace(request, from_revision=self.revision + 1)
            self.n_resumed += 1
        self._stack = AsyncExitStack()
        self._call = await self._stack.enter_async_context(self._nodes.open(methods.KV_WATCH, request, timeout_s=CONNECT_S))
        return self._call

    async def _leave(self) -> None:
        stack, self._stack, self._call = self._stack, None, None
        if stack is not None:
            await stack.aclose()
