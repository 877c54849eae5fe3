"""The polling loop: it spins after work, sleeps when idle, and answers like the others.

How long it spins is measured with a clock of the test's own, on which every look at it takes a tenth of a millisecond.
"""

import asyncio
import selectors
import socket
import threading

import pytest

from isopod.world.host.loop import AsyncioLoop, new_loop
from isopod.world.host.polling import PollingSelector

pytestmark = pytest.mark.row("S7")


class Looks:
    """Time that passes when it is asked for."""

    def __init__(self, look_s: float = 0.0001) -> None:
        self.n_looks = 0
        self._look_s = look_s

    def __call__(self) -> float:
        self.n_looks += 1
        return self.n_looks * self._look_s

    def of_select(self, selector: PollingSelector, timeout_s: float) -> int:
        """Return how often one select without events looked."""
        before = self.n_looks
        assert selector.select(timeout_s) == []
        return self.n_looks - before


def test_it_spins_while_there_was_work_and_then_sleeps() -> None:
    looks, idle_looks = Looks(), Looks()
    selector = PollingSelector(0.05, clock_s=looks)
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    theirs.send(b"x")
    assert selector.select(1) != []
    ours.recv(1)
    assert 500 <= looks.of_select(selector, 0.1) <= 505  # the 0.05 s of spinning; the rest asleep
    idle = PollingSelector(0.0, clock_s=idle_looks)
    idle.register(ours, selectors.EVENT_READ)
    assert idle_looks.of_select(idle, 0.1) <= 3
    for each in (selector, idle):
        each.close()
    ours.close()
    theirs.close()


def test_a_spinning_selector_sees_what_comes_and_lets_other_threads_run() -> None:
    selector = PollingSelector(5.0, clock_s=Looks(0.0))  # it would spin for ever
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    assert selector.select(0) == []
    thread = threading.Thread(target=theirs.send, args=(b"x",))
    thread.start()
    assert selector.select(5.0) != []
    thread.join()
    selector.close()
    ours.close()
    theirs.close()


def test_an_idle_loop_sleeps() -> None:
    async def main() -> int:
        await asyncio.sleep(0.05)
        before = looks.n_looks
        await asyncio.sleep(0.3)
        return looks.n_looks - before

    looks = Looks()
    loop = AsyncioLoop(PollingSelector(0.001, clock_s=looks))
    assert loop.run_until_complete(main()) <= 100  # ten of spinning, a few around each sleep
    loop.close()


def test_timers_do_not_come_early() -> None:
    async def main() -> float:
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        return asyncio.get_running_loop().time() - began_s

    loop = new_loop("polling", spin_s=0.001)
    assert loop.run_until_complete(main()) >= 0.049
    loop.close()
