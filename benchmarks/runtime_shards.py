"""Shards: channels and calls between two processes, beside multiprocessing's; and what a second shard is worth.

CPU microseconds are those of both processes together, per round trip of a 64-byte message, or per call. "batched" keeps 256 under way,
"one at a time" waits for each. The peers of the ring are our own socketpair channel and `multiprocessing.Pipe`, whose child echoes as well.

Two shards with the load made inside them: each runs the same small calls to itself and some to its neighbour, as a program whose shards
have their own clients does; the peer is one shard alone. The rate tells about shards only on a machine with two free processors: what the
present one gives is measured beside it by bare loops. The CPU per call is what the second shard costs, whatever else runs.
"""

import asyncio
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from benchmarks._harness import OURS, Contender, Row
from isopod.runtime.logger import Logger
from isopod.runtime.shards import Smp, SmpConfig, SmpService, submit_to
from isopod.wire.service import Method
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.shards import Channel, ChannelKind, ChannelSettings, Link
from isopod.world.world import World

WINDOW: Final = 256
MESSAGE: Final = b"x" * 64
ENTRY: Final = "benchmarks.runtime_shards:echo"
N_BATCHED: Final = 200_000
N_SINGLE: Final = 10_000
N_CALLS: Final = 40_000
LOAD_S: Final = 2.0
N_CLIENTS: Final = 16
"""Of each shard."""
NEIGHBOUR_EVERY: Final = 64
"""Of so many calls of the load, one goes to the other shard."""


class Words(msgspec.Struct, frozen=True):
    """A small request and reply."""

    text: str
    number: int = 0


class Load(msgspec.Struct, frozen=True):
    """Make calls for so long; with how many shards."""

    seconds: float
    n_shards: int


ECHO: Final = Method("bench.echo", Words, Words)
WORK: Final = Method("bench.work", Words, Words)
COUNT: Final = Method("bench.count", Load, int)
CPU: Final = Method("bench.cpu", Words, float)


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows.

    Args:
        quick: A tenth of the work, once.
    """
    scale, n_runs = (10, 1) if quick else (1, 5)
    kinds: list[tuple[str, ChannelKind]] = [(OURS, "ring"), ("our socketpair channel", "socketpair")]
    for name, window, n_messages in (("batched", WINDOW, N_BATCHED // scale), ("one at a time", 1, N_SINGLE // scale)):
        for measure, unit in (("CPU", "us"), ("rate", "1/s")):
            contenders = [Contender(who, _channel(kind, window, n_messages, measure=measure)) for who, kind in kinds]
            contenders.append(Contender("multiprocessing.Pipe", _pipe(window, n_messages, measure=measure)))
            yield Row(f"message there and back, {name}, {measure}", unit, contenders, n_runs)
        spin = Contender(OURS, _channel("ring", window, n_messages, measure="rate", spin_s=0.001))
        still = Contender("our ring without spinning", _channel("ring", window, n_messages, measure="rate"))
        yield Row(f"message there and back, {name}, spinning", "1/s", [spin, still], n_runs)
    for name, window in (("batched", WINDOW), ("one at a time", 1)):
        n_calls = N_CALLS // scale // (1 if window > 1 else 8)
        calls = [Contender(who, _calls(kind, window, n_calls)) for who, kind in kinds]
        yield Row(f"submit_to, {name}, CPU", "us", calls, n_runs)
    for measure, unit in (("rate", "1/s"), ("CPU", "us")):
        contenders = [Contender(OURS, _load(2, measure)), Contender("one shard", _load(1, measure))]
        yield Row(f"calls made inside shards, two and one, {measure}", unit, contenders, n_runs)
    bare = [Contender(OURS, lambda: _bare_loops(2)), Contender("one bare loop", lambda: _bare_loops(1))]
    yield Row("what two processors give: two bare loops", "1/s", bare, n_runs)


# --- channels ---------------------------------------------------------------------------------------------------------


async def echo(world: World, link: Link) -> None:
    """The other process: sends back what comes, and says how much CPU it used when it is asked."""
    ended = asyncio.Event()
    channels: list[Channel] = []

    def on_message(message: bytes, parts: Any) -> None:  # of the link
        if message == b"cpu":
            link.send(str(_own_cpu_s()).encode())
            return
        channel = world.shards.open_channel(parts[0], _settings(message), "bench")
        channels.append(channel)
        _echo_on(channel, ended)

    link.start(on_message, ended.set)
    await ended.wait()
    for channel in channels:
        channel.close()


def _echo_on(channel: Channel, ended: asyncio.Event) -> None:
    def answer(messages: list[bytes]) -> None:
        send = channel.send
        for message in messages:
            send(message)

    channel.start(answer, lambda _: ended.set())


def _channel(kind: ChannelKind, window: int, n_messages: int, *, measure: str, spin_s: float = 0.0) -> Callable[[], float]:
    async def body(world: World) -> float:
        process = await world.shards.start(ENTRY, name="bench", cpu=_second_cpu())
        packed = f"{kind} {spin_s}".encode()
        settings = _settings(packed)
        left, right = world.shards.pair(settings)
        answers: asyncio.Queue[float] = asyncio.Queue()
        process.link.start(lambda message, _: answers.put_nowait(float(message)), lambda: None)
        process.link.send(packed, [right])
        channel = world.shards.open_channel(left, settings, "bench")
        pump = _Pump(channel, window)
        await pump.run(n_messages // 10)
        process.link.send(b"cpu")
        before = await answers.get() + _own_cpu_s()
        began = time.perf_counter()
        await pump.run(n_messages)
        took_s = time.perf_counter() - began
        process.link.send(b"cpu")
        used_s = await answers.get() + _own_cpu_s() - before
        channel.close()
        process.link.close()
        await process.wait()
        return n_messages / took_s if measure == "rate" else used_s / n_messages * 1e6

    return lambda: _run(body)


class _Pump:
    """Keeps a window of messages under way."""

    def __init__(self, channel: Channel, window: int) -> None:
        self._channel = channel
        self._window = window
        self._n_left = 0
        self._n_out = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel.start(self._on_messages, lambda _: None)

    async def run(self, n_messages: int) -> None:
        """Send so many and wait until they are back."""
        self._done = asyncio.get_running_loop().create_future()
        self._n_left = n_messages
        self._n_out = n_messages
        self._send(min(self._window, n_messages))
        await self._done

    def _send(self, count: int) -> None:
        self._n_out -= count
        send = self._channel.send
        for _ in range(count):
            send(MESSAGE)

    def _on_messages(self, messages: list[bytes]) -> None:
        self._n_left -= len(messages)
        if self._n_left:
            self._send(min(len(messages), self._n_out))
        else:
            self._done.set_result(None)


# --- multiprocessing --------------------------------------------------------------------------------------------------


def _pipe(window: int, n_messages: int, *, measure: str) -> Callable[[], float]:
    def sample() -> float:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_pipe_echo, args=(theirs, _second_cpu()))
        child.start()
        theirs.close()
        first = _first_cpu()
        previous = os.sched_getaffinity(0)
        if first is not None:
            os.sched_setaffinity(0, [first])
        try:
            _pump_pipe(ours, window, n_messages // 10)
            before = _pipe_cpu_s(ours) + _own_cpu_s()
            began = time.perf_counter()
            _pump_pipe(ours, window, n_messages)
            took_s = time.perf_counter() - began
            used_s = _pipe_cpu_s(ours) + _own_cpu_s() - before
        finally:
            os.sched_setaffinity(0, previous)
            ours.close()
            child.join()
        return n_messages / took_s if measure == "rate" else used_s / n_messages * 1e6

    return sample


def _pipe_echo(connection: "Connection[bytes, bytes]", cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, [cpu])
    try:
        while True:
            message = connection.recv_bytes()
            connection.send_bytes(str(_own_cpu_s()).encode() if message == b"cpu" else message)
    except EOFError:
        return


def _pipe_cpu_s(connection: "Connection[bytes, bytes]") -> float:
    connection.send_bytes(b"cpu")
    return float(connection.recv_bytes())


def _pump_pipe(connection: "Connection[bytes, bytes]", window: int, n_messages: int) -> None:
    n_out = min(window, n_messages)
    for _ in range(n_out):
        connection.send_bytes(MESSAGE)
    for _ in range(n_messages):
        connection.recv_bytes()
        if n_out < n_messages:
            connection.send_bytes(MESSAGE)
            n_out += 1


# --- calls ------------------------------------------------------------------------------------------------------------


async def serve(smp: Smp) -> None:
    """What every shard of the benchmark serves."""

    async def count(load: Load) -> int:
        return await _make_load(smp, load)

    smp.serve({ECHO: lambda request: request, WORK: _work, COUNT: count, CPU: lambda _: _own_cpu_s()})


async def _make_load(smp: Smp, load: Load) -> int:
    """Call for a while; return how many calls ended."""
    until_s = time.perf_counter() + load.seconds
    request = Words("a small request", 7)
    other = (smp.shard + 1) % load.n_shards

    async def client(number: int) -> int:
        n_done = 0
        n_local = NEIGHBOUR_EVERY * number // N_CLIENTS  # so that not all call the neighbour at the same moment
        while time.perf_counter() < until_s:
            for _ in range(n_local):
                await smp.submit_to(smp.shard, WORK, request)
                # Requests of real clients come one by one, each in a turn of the loop. A local call gives no turn away by itself, and
                # shards that compute for ten milliseconds at a stretch would only wait for each other's answers.
                await asyncio.sleep(0)
            await smp.submit_to(other, WORK, request)
            n_done += n_local + 1
            n_local = NEIGHBOUR_EVERY - 1
        return n_done

    return sum(await asyncio.gather(*(client(number) for number in range(N_CLIENTS))))


async def _work(request: Words) -> Words:
    """Do what a small request costs: some tens of microseconds of Python."""
    counts: dict[str, int] = {}
    for number in range(200):
        counts[request.text[number % 15]] = number
    return Words(request.text, sum(counts.values()))


def _calls(kind: ChannelKind, window: int, n_calls: int) -> Callable[[], float]:
    async def body(world: World) -> float:
        config = SmpConfig(n_shards=2, channel=kind, max_nonlocal_requests=2 * WINDOW)
        async with SmpService(world, config, logger=_quiet(world), services=[serve]):
            request = Words("a small request", 7)

            async def one_after_the_other(count: int) -> None:
                for _ in range(count):
                    await submit_to(1, ECHO, request)

            async def run(count: int) -> None:
                await asyncio.gather(*(one_after_the_other(count // window) for _ in range(window)))

            await run(n_calls // 10)
            before = await submit_to(1, CPU, request) + _own_cpu_s()
            await run(n_calls)
            return (await submit_to(1, CPU, request) + _own_cpu_s() - before) / n_calls * 1e6

    return lambda: _run(body, pins=False)


def _load(n_shards: int, measure: str) -> Callable[[], float]:
    async def body(world: World) -> float:
        async with SmpService(world, SmpConfig(n_shards=n_shards), logger=_quiet(world), services=[serve]):
            load, ask, shards = Load(LOAD_S, n_shards), Words("cpu"), range(n_shards)
            before = sum(await asyncio.gather(*(submit_to(shard, CPU, ask) for shard in shards)))
            n_calls = sum(await asyncio.gather(*(submit_to(shard, COUNT, load) for shard in shards)))
            used_s = sum(await asyncio.gather(*(submit_to(shard, CPU, ask) for shard in shards))) - before
            return n_calls / LOAD_S if measure == "rate" else used_s / n_calls * 1e6

    return lambda: _run(body, pins=False)


def _bare_loops(n_loops: int) -> float:
    """Return the turns a second of so many busy loops that have nothing to do with each other: what this machine's processors can give."""
    loops = [subprocess.Popen([sys.executable, "-c", _BARE_LOOP, str(cpu)], stdout=subprocess.PIPE) for cpu in sorted(_CPUS)[:n_loops]]
    return sum(float(loop.communicate(timeout=30)[0]) for loop in loops)


# --- both -------------------------------------------------------------------------------------------------------------


def _run(body: Callable[[World], Awaitable[float]], *, pins: bool = True) -> float:
    """Run a body on a host loop of its own.

    Args:
        body: What is measured.
        pins: Whether to pin it to the first processor; never where shards are started, which would inherit that one processor.
    """
    loop = new_loop()
    world = make_host_world()
    first = _first_cpu() if pins else None

    async def pinned() -> float:
        if first is not None:
            world.shards.pin(first)
        try:
            return await body(world)
        finally:
            world.shards.unpin()

    coroutine: Coroutine[Any, Any, float] = pinned()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        world.close()
        loop.close()


def _settings(packed: bytes) -> ChannelSettings:
    kind, spin_s = packed.decode().split()
    return ChannelSettings(kind="ring" if kind == "ring" else "socketpair", spin_s=float(spin_s))


def _quiet(world: World) -> Logger:
    return Logger(lambda _: None, world.clock)


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _first_cpu() -> int | None:
    return min(_CPUS) if len(_CPUS) > 1 else None


def _second_cpu() -> int | None:
    return sorted(_CPUS)[1] if len(_CPUS) > 1 else None


_CPUS: Final = frozenset(os.sched_getaffinity(0))
_BARE_LOOP: Final = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
end, n_turns = time.perf_counter() + 1.0, 0
while time.perf_counter() < end:
    for _ in range(1000):
        n_turns += 1
print(n_turns)
"""
