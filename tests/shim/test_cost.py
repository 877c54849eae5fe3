"""What a shim costs: memory, and time while nothing happens."""

import contextlib
import time

import pytest

from tests.shim.bench import Bench, cpu_ticks, proportional_bytes, texts, wait_until

pytestmark = pytest.mark.host

PSS_BYTES_MAX = 3 << 20
IDLE_S = 6.0
"""Longer than a heartbeat's interval."""


def test_memory_is_small_and_stays_small(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        idle = proportional_bytes(bench.shim_pid)
        attached = client.open("attach", stdin=False)
        client.response(attached)
        client.begin("start", "wait")
        for _ in range(3):
            stream = client.begin("exec", "flood", str(5 << 20))
            client.read_to_end(stream)
        busy = proportional_bytes(bench.shim_pid)
    print(f"PSS of an idle shim: {idle / 1024:.0f} KiB; after 15 MiB of output: {busy / 1024:.0f} KiB")  # noqa: T201 - to be seen
    assert idle < PSS_BYTES_MAX
    assert busy < PSS_BYTES_MAX


def test_nothing_runs_while_nothing_happens(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready():
        before = cpu_ticks(bench.shim_pid)
        time.sleep(IDLE_S)  # the time itself is what is measured
        assert cpu_ticks(bench.shim_pid) - before <= 1


def test_clients_that_do_not_read_cost_little(bench: Bench) -> None:
    """What waits for them is held once for all, and no more of it than the guest was granted."""
    bench.use_fake().start()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(bench.ready())
        stuck = [stack.enter_context(bench.connect()) for _ in range(100)]
        for one in stuck:
            one.response(one.open("attach", stdin=False))
        client.begin("start", "flood", str(32 << 20))
        stream = client.begin("exec", "echo", "it goes on")
        assert client.read_to_end(stream)[0] == b"it goes on"
        wait_until(lambda: len(texts(bench.log())["stdout"]) > 256 << 10, "the first window of the flood")
        held = proportional_bytes(bench.shim_pid)
        print(f"PSS of a shim with 100 clients that do not read: {held / 1024:.0f} KiB")  # noqa: T201 - to be seen
    assert held < 2 * PSS_BYTES_MAX
