"""The host's event loops: uvloop, else asyncio's own.

uvloop is looked for when a loop is made, never at import: a machine without it (or with one that cannot be loaded) gets
asyncio's selector loop, and `loop_facts` says why, for `isopod info`.
"""

import asyncio
from importlib import metadata
from typing import Literal

LoopKind = Literal["uvloop", "asyncio"]


def loop_facts() -> tuple[LoopKind, str]:
    """Return the kind of loop that `new_loop("uvloop")` gives here, and why."""
    try:
        import uvloop
    except ImportError as error:
        return "asyncio", f"uvloop cannot be imported: {error}"
    return "uvloop", f"{uvloop.__name__} {metadata.version('uvloop')} is installed"


def new_loop(kind: LoopKind = "uvloop") -> asyncio.AbstractEventLoop:
    """Return a new event loop, not yet set as the current one; who asked for it closes it.

    Args:
        kind: Which one. "uvloop" falls back to asyncio where it is missing; "asyncio" is always asyncio's selector loop.
    """
    if kind == "asyncio" or loop_facts()[0] == "asyncio":
        return asyncio.SelectorEventLoop()
    import uvloop

    return uvloop.new_event_loop()
