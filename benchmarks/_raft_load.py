"""A load on isopod's replicated store by its Python client, told as one line of JSON: the counterpart of benchmarks/etcd_load/main.go.

`python -m benchmarks._raft_load ADDRESS,ADDRESS,... write|read|pulse|status N_AT_ONCE SECONDS`

write and read: that many at once, over and over, after a warm-up. pulse: one write after the other, each until it is answered; tells the
longest silence between two answers. status: who leads, as every address says it.
"""

import asyncio
import resource
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from isopod.api.store import StoreClient
from isopod.net.address import parse_address
from isopod.world.errors import IsopodError
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import Address

VALUE: Final = b"v" * 256
KEYS: Final = 10_007
WARM_S: Final = 0.5


class Outcome(msgspec.Struct, frozen=True):
    """What a load found."""

    n: int = 0
    seconds: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    client_s: float = 0.0
    gap_ms: float = 0.0


class Seen(msgspec.Struct, frozen=True):
    """How one node sees the store; zeros for one that does not answer."""

    node: int = 0
    leader: int = 0
    applied: int = 0


async def run(store: StoreClient, what: str, n_at_once: int, for_s: float) -> Outcome:
    """Write or read, that many at once."""
    took: list[float] = []
    now = time.perf_counter

    async def work(number: int, until_s: float) -> None:
        began = now()
        while began < until_s:
            number = (number * 1103515245 + 12345) % KEYS
            key = f"key{number:06d}"
            if what == "write":
                await store.put(key, VALUE)
            else:
                await store.get(key)
            ended = now()
            took.append(ended - began)
            began = ended

    began, cpu_s = now(), _cpu_s()
    await asyncio.gather(*(work(number, began + for_s) for number in range(n_at_once)))
    seconds, client_s = now() - began, _cpu_s() - cpu_s
    took.sort()
    return Outcome(len(took), seconds, took[len(took) // 2] * 1e3, took[len(took) * 99 // 100] * 1e3, client_s)


async def pulse(store: StoreClient, for_s: float) -> Outcome:
    """Write one after the other; return the longest silence."""
    await store.put("pulse", VALUE)
    print("ready", flush=True)
    began = last = time.perf_counter()
    gap_s = 0.0
    n_done = 0
    while last - began < for_s:
        try:
            await store.put("pulse", VALUE)
        except IsopodError:
            continue
        now = time.perf_counter()
        gap_s = max(gap_s, now - last)
        last = now
        n_done += 1
    return Outcome(n=n_done, seconds=last - began, gap_ms=gap_s * 1e3)


async def look(addresses: Sequence[Address]) -> list[Seen]:
    """Ask each node."""
    seen: list[Seen] = []
    for address in addresses:
        async with StoreClient(make_host_world(), [address], plaintext=True) as store:
            try:
                status = await store.status(timeout_s=1.0)
                seen.append(Seen(status.node, status.leader, status.applied))
            except IsopodError:
                seen.append(Seen())
    return seen


async def main(argv: Sequence[str]) -> None:
    """Do as the arguments say."""
    addresses = [parse_address(text) for text in argv[0].split(",")]
    found: object
    if argv[1] == "status":
        found = await look(addresses)
    else:
        async with StoreClient(make_host_world(), addresses, plaintext=True) as store:
            if argv[1] == "pulse":
                found = await pulse(store, float(argv[3]))
            else:
                await run(store, argv[1], int(argv[2]), WARM_S)
                found = await run(store, argv[1], int(argv[2]), float(argv[3]))
    print(msgspec.json.encode(found).decode(), flush=True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main(sys.argv[1:]))
