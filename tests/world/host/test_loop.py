"""The host's loops."""

import asyncio
import builtins

import pytest

from isopod.world.host.loop import loop_facts, new_loop
from isopod.world.host.world import make_host_world


def test_uvloop_is_used_where_it_is() -> None:
    kind, why = loop_facts()
    assert kind == "uvloop"
    assert "is installed" in why
    loop = new_loop()
    assert any(base.__module__.startswith("uvloop") for base in type(loop).__mro__)
    loop.close()


def test_asyncio_on_request() -> None:
    loop = new_loop("asyncio")
    assert isinstance(loop, asyncio.SelectorEventLoop)
    loop.close()


def test_asyncio_where_uvloop_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_uvloop(name: str, *arguments: object, **keywords: object) -> object:
        if name == "uvloop":
            raise ImportError("no module named uvloop")
        return real(name, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_uvloop)
    assert loop_facts() == ("asyncio", "uvloop cannot be imported: no module named uvloop")
    loop = new_loop("uvloop")
    monkeypatch.undo()
    assert isinstance(loop, asyncio.SelectorEventLoop)
    loop.close()


def test_a_world_starts_no_thread_and_closes() -> None:
    import threading

    n_threads = threading.active_count()
    world = make_host_world()
    assert threading.active_count() == n_threads
    assert world.name == "host"
    world.close()
