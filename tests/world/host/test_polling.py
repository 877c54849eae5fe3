"""The polling loop: it spins after work, sleeps when idle, and answers like the others."""

import asyncio
import selectors
import socket
import threading
import time

import pytest

from isopod.world.host.loop import new_loop
from isopod.world.host.polling import PollingSelector

pytestmark = pytest.mark.row("S7")


def used_s(selector: PollingSelector, timeout_s: float) -> tuple[float, float]:
    """Return the CPU and wall time of one select without events."""
    cpu_s, wall_s = time.thread_time(), time.monotonic()
    assert selector.select(timeout_s) == []
    return time.thread_time() - cpu_s, time.monotonic() - wall_s


def test_it_spins_while_there_was_work_and_then_sleeps() -> None:
    selector = PollingSelector(0.05)
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    theirs.send(b"x")
    assert selector.select(1) != []
    ours.recv(1)
    cpu_s, wall_s = used_s(selector, 0.2)
    assert wall_s >= 0.199
    assert 0.01 < cpu_s < 0.15  # about the 0.05 s of spinning
    idle = PollingSelector(0.0)
    idle.register(ours, selectors.EVENT_READ)
    cpu_s, wall_s = used_s(idle, 0.2)
    assert wall_s >= 0.199
    assert cpu_s < 0.01
    for each in (selector, idle):
        each.close()
    ours.close()
    theirs.close()


def test_a_spinning_selector_sees_what_comes_and_lets_other_threads_run() -> None:
    selector = PollingSelector(5.0)
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    assert selector.select(0) == []
    thread = threading.Thread(target=theirs.send, args=(b"x",))
    thread.start()
    began_s = time.monotonic()
    assert selector.select(5.0) != []
    assert time.monotonic() - began_s < 4
    thread.join()
    selector.close()
    ours.close()
    theirs.close()


def test_timers_are_punctual_and_an_idle_loop_uses_no_cpu() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await asyncio.sleep(0.05)
        assert 0.049 <= loop.time() - began_s < 5
        cpu_s = time.thread_time()
        await asyncio.sleep(0.3)
        assert time.thread_time() - cpu_s < 0.03

    loop = new_loop("polling", spin_s=0.001)
    loop.run_until_complete(main())
    loop.close()
