"""Terminal: carries a command's stdio between its supervisor and a client's stream until the command closes its outputs.

The client's side is anything with `receive` and `send` (an RPC call is). Slow clients slow the command down: nothing is buffered here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from isopod.api.messages import AttachInput, AttachOutput, Resize, Signal, Stderr, Stdin, StdinEnd, Stdout
from isopod.engine.isolation import Attached


class Stdio(Protocol):
    """The client's end."""

    async def receive(self) -> AttachInput | None:
        """Return the next item, None when the client sends no more."""

    async def send(self, item: AttachOutput) -> None:
        """Send one item, waiting while the client is slow."""


async def converse(attached: Attached, stdio: Stdio, on_signal: Callable[[int], Awaitable[None]]) -> None:
    """Carry bytes both ways until the command closes its outputs.

    Args:
        attached: The command's stdio; the caller closes it.
        stdio: The client.
        on_signal: Called with the number of each signal the client passes on.

    Cancelling lets go of the command, which runs on.
    """
    inputs = asyncio.ensure_future(_feed(attached, stdio, on_signal))
    try:
        async for output in attached.outputs():
            await stdio.send(Stderr(data=output.data) if output.is_stderr else Stdout(data=output.data))
    finally:
        inputs.cancel()
        await asyncio.gather(inputs, return_exceptions=True)


async def _feed(attached: Attached, stdio: Stdio, on_signal: Callable[[int], Awaitable[None]]) -> None:
    reads = True
    while (item := await stdio.receive()) is not None:
        match item:
            case Stdin(data):
                reads = reads and await attached.write(data)
            case StdinEnd():
                attached.end_input()
            case Resize(rows, columns):
                await attached.resize(rows, columns)
            case Signal(number):
                await on_signal(number)
