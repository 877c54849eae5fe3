"""What the RPC benchmark's loads share: run calls for a time, and tell rate, median latency and the server's CPU as one line of JSON.

Runs in two interpreters, ours and the peers', so it imports nothing but the standard library.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

WARM_S: Final = 0.3
TICKS: Final = os.sysconf("SC_CLK_TCK")

Act = Callable[[], Awaitable[int]]
"""One operation; returns how much was done (calls, or bytes)."""


def cpu_s(pid: int) -> float:
    """Return the CPU time, user and system, that all threads of a process have used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def run(act: Act, *, n_at_once: int, for_s: float, pid: int) -> None:
    """Run `act` over and over in `n_at_once` tasks, and print what it cost.

    Args:
        act: The operation.
        n_at_once: How many at a time.
        for_s: How long, after a warm-up.
        pid: The server.
    """
    took_ns: list[int] = []

    async def work(until_s: float) -> int:
        n_done = 0
        while time.perf_counter() < until_s:
            began_ns = time.perf_counter_ns()
            n_done += await act()
            if n_at_once == 1:
                took_ns.append(time.perf_counter_ns() - began_ns)
        return n_done

    async def all_work(seconds: float) -> int:
        until_s = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(work(until_s) for _ in range(n_at_once))))

    await all_work(WARM_S)
    took_ns.clear()
    server_s, began_s = cpu_s(pid), time.perf_counter()
    n_done = await all_work(for_s)
    seconds = time.perf_counter() - began_s
    server_s = cpu_s(pid) - server_s
    took_ns.sort()
    median_us = took_ns[len(took_ns) // 2] / 1000 if took_ns else 0.0
    print(json.dumps({"n": n_done, "seconds": seconds, "server_s": server_s, "p50_us": median_us}), flush=True)
