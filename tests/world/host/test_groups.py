"""Scheduling groups on the host's real loops: shares, starvation, and that everything asyncio promises still holds.

The loops, their I/O and their timers are real; the time by which groups are measured is the test's own, and a step takes what it adds to
it. What else the machine does meanwhile therefore changes no figure. Real times are in `benchmarks/runtime_sched.py`.
"""

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import pytest

from isopod.world.errors import Exhausted
from isopod.world.fair_queue import QUOTA_NS
from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.loops import CURRENT, GROUPS_MAX, GroupLoop, GroupStatistics, Priority, SchedulingGroup

KINDS: tuple[LoopKind, ...] = ("uvloop", "asyncio", "polling")
each_kind = pytest.mark.parametrize("kind", KINDS)


STEP_NS: Final = 20_000


class StepClock:
    """Time that passes only in steps, as much as each says."""

    def __init__(self) -> None:
        self._now_ns = 1_000_000

    def __call__(self) -> int:
        return self._now_ns

    def spend(self, took_ns: int = STEP_NS) -> None:
        self._now_ns += took_ns

    async def spin(self, until_ns: int) -> int:
        """Be busy until a moment; return the number of steps."""
        n_steps = 0
        while self._now_ns < until_ns:
            self.spend()
            n_steps += 1
            await asyncio.sleep(0)
        return n_steps


@contextmanager
def opened(
    kind: LoopKind, *, grouped: bool = True, debug: bool = False, clock_ns: Callable[[], int] = time.monotonic_ns
) -> Iterator[asyncio.AbstractEventLoop]:
    loop = new_loop(kind, clock_ns=clock_ns)
    loop.set_debug(debug)
    assert isinstance(loop, GroupLoop)
    if grouped:
        loop.account()
    try:
        yield loop
    finally:
        loop.close()


def accounts(loop: asyncio.AbstractEventLoop) -> dict[str, GroupStatistics]:
    assert isinstance(loop, GroupLoop)
    return {account.name: account for account in loop.group_statistics()}


async def spin(stop: asyncio.Event) -> None:
    while not stop.is_set():
        await asyncio.sleep(0)


async def race(clock: StepClock, groups: list[SchedulingGroup], *, n_tasks: int, for_ns: int) -> dict[str, int]:
    """Keep each group busy with tasks; return how many steps each did."""
    loop, until_ns = asyncio.get_running_loop(), clock() + for_ns
    tasks = {group.name: [loop.create_task(clock.spin(until_ns), context=group.context()) for _ in range(n_tasks)] for group in groups}
    return {name: sum([await task for task in mine]) for name, mine in tasks.items()}


@pytest.mark.row("S3")
@each_kind
def test_two_groups_get_time_by_their_shares(kind: LoopKind) -> None:
    async def main() -> None:
        n_steps = await race(clock, [SchedulingGroup("big", 1000), SchedulingGroup("small", 200)], n_tasks=50, for_ns=1_000_000_000)
        found = accounts(asyncio.get_running_loop())
        assert n_steps["big"] / n_steps["small"] == pytest.approx(5, rel=0.02)
        assert found["big"].run_s / found["small"].run_s == pytest.approx(5, rel=0.02)
        for name, account in found.items():
            assert account.run_s == pytest.approx(n_steps.get(name, 0) * STEP_NS / 1e9)
            assert account.run_s + account.wait_s + account.starve_s == pytest.approx(1.0, rel=0.001)
        assert found["small"].starve_s == pytest.approx(5 / 6, rel=0.02)
        assert found["big"].starve_s == pytest.approx(1 / 6, rel=0.1)

    clock = StepClock()
    with opened(kind, clock_ns=clock) as loop:
        loop.run_until_complete(main())


@pytest.mark.row("S3")
@each_kind
def test_every_level_gets_its_turn(kind: LoopKind) -> None:
    async def main() -> None:
        groups = [SchedulingGroup(level.name.lower(), 1000, priority=level) for level in Priority]
        n_steps = await race(clock, groups, n_tasks=4, for_ns=2_000_000_000)
        for lower, higher in pairwise(groups):
            # The least gets some 300 steps, in portions of four: its tasks.
            assert n_steps[higher.name] / n_steps[lower.name] == pytest.approx(4, rel=0.05)

    clock = StepClock()
    with opened(kind, clock_ns=clock) as loop:
        loop.run_until_complete(main())


@pytest.mark.row("S3")
@each_kind
def test_a_heartbeat_is_not_kept_waiting_by_busy_tasks(kind: LoopKind) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        bulk, urgent = SchedulingGroup("bulk", 1000), SchedulingGroup("urgent", 10, latency_s=0.001)
        delays_ns: list[int] = []
        woken_at_ns = [clock()]

        def tick(woken: asyncio.Future[None]) -> None:
            if clock() < woken_at_ns[-1] + 5_000_000:
                loop.call_later(0, tick, woken)
                return
            woken_at_ns.append(clock())
            woken.set_result(None)

        async def beat() -> None:
            for _ in range(40):  # together 4 ms: far more than its shares, and within the burst that a latency group may be ahead
                woken: asyncio.Future[None] = loop.create_future()
                tick(woken)
                await woken
                delays_ns.append(clock() - woken_at_ns[-1])
                clock.spend(100_000)
            for task in tasks:
                task.cancel()

        tasks = [loop.create_task(clock.spin(1 << 62), context=bulk.context()) for _ in range(400)]
        await loop.create_task(beat(), context=urgent.context())
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}
        # From the wake-up to the step: without groups it is a whole round of 400 tasks, 8 ms.
        assert max(delays_ns) < 2_000_000

    clock = StepClock()
    with opened(kind, clock_ns=clock) as loop:
        loop.run_until_complete(main())


@each_kind
def test_without_a_clock_of_its_own_a_loop_takes_the_machines(kind: LoopKind) -> None:
    async def main() -> GroupStatistics:
        while accounts(asyncio.get_running_loop())["main"].run_s < 0.001:
            await asyncio.sleep(0)
        return accounts(asyncio.get_running_loop())["main"]

    before_s = time.monotonic()
    with opened(kind) as loop:
        account = loop.run_until_complete(main())
        assert 0.001 <= account.run_s <= account.run_s + account.wait_s + account.starve_s <= time.monotonic() - before_s


def test_a_loop_without_groups_is_the_plain_one() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert "call_soon" not in vars(loop)
        assert accounts(loop) == {}
        SchedulingGroup("first").context()
        assert "call_soon" in vars(loop)
        await asyncio.sleep(0)
        assert accounts(loop)["main"].n_steps > 0

    with opened("uvloop", grouped=False) as loop:
        loop.run_until_complete(main())


@each_kind
def test_a_group_entered_outside_of_the_loop_counts(kind: LoopKind) -> None:
    async def main() -> str:
        await asyncio.sleep(0)
        return CURRENT.get().name

    group = SchedulingGroup("early")
    context = group.context()
    with opened(kind, grouped=False) as loop:
        assert loop.run_until_complete(loop.create_task(main(), context=context)) == "early"
        with group.active():
            assert loop.run_until_complete(main()) == "early"
        assert accounts(loop)["early"].n_steps >= 4


@each_kind
def test_failures_go_to_the_exception_handler_and_stop_nobody(kind: LoopKind) -> None:
    seen: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(divmod, 1, 0)
        loop.call_soon(seen.append, "after")
        while "after" not in seen:
            await asyncio.sleep(0)

    with opened(kind) as loop:
        loop.set_exception_handler(lambda _, context: seen.append(context))
        loop.run_until_complete(main())
    failure, after = seen
    assert isinstance(failure["exception"], ZeroDivisionError)
    assert "divmod" in failure["message"]
    assert after == "after"


@each_kind
@pytest.mark.parametrize("debug", [False, True])
def test_handles_can_be_cancelled_and_described(kind: LoopKind, debug: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen: list[int] = []
        first = loop.call_soon(seen.append, 1)
        second = loop.call_soon(seen.append, 2)
        assert isinstance(first, asyncio.Handle)
        assert "append" in repr(first)
        first.cancel()
        first.cancel()
        assert (first.cancelled(), second.cancelled()) == (True, False)
        assert "cancelled" in repr(first)
        while not seen:
            await asyncio.sleep(0)
        assert seen == [2]

    with opened(kind, debug=debug) as loop:
        loop.run_until_complete(main())


@each_kind
def test_other_threads_may_call(kind: LoopKind) -> None:
    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        group = SchedulingGroup("spin")
        spinning = loop.create_task(spin(stop), context=group.context())
        seen: list[int] = []

        def call() -> None:
            for number in range(100):
                loop.call_soon_threadsafe(seen.append, number)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.001), loop).result(20)
            loop.call_soon_threadsafe(stop.set)

        thread = threading.Thread(target=call)
        thread.start()
        await spinning
        thread.join()
        assert seen == list(range(100))

    with opened(kind) as loop:
        loop.run_until_complete(main())


@each_kind
@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_loop_and_loses_no_step(kind: LoopKind, kind_of_error: type[BaseException]) -> None:
    seen: list[int] = []

    def interrupt() -> None:
        raise kind_of_error

    with opened(kind) as loop:
        loop.call_soon(interrupt)
        loop.call_soon(seen.append, 1)
        with pytest.raises(kind_of_error):
            loop.run_forever()
        loop.call_soon(seen.append, 2)
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert seen == [1, 2]


@each_kind
def test_it_can_be_stopped_and_run_again(kind: LoopKind) -> None:
    seen: list[int] = []
    other = SchedulingGroup("other")

    async def value(number: int) -> int:
        await asyncio.sleep(0)
        return number

    with opened(kind) as loop:
        assert loop.run_until_complete(value(1)) == 1
        loop.call_soon(loop.stop)
        loop.call_soon(seen.append, 1, context=other.context())
        loop.run_forever()
        assert loop.run_until_complete(value(2)) == 2
        task = loop.create_task(value(3), context=other.context())
        assert loop.run_until_complete(task) == 3
        assert seen == [1]
        with pytest.raises(RuntimeError, match="before"):
            loop.call_soon(loop.stop)
            loop.run_until_complete(loop.create_future())


@each_kind
def test_a_closed_loop_refuses(kind: LoopKind) -> None:
    with opened(kind) as loop:
        loop.call_soon(print)
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            loop.call_soon(print)
        coroutine = asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="closed"):
            loop.create_task(coroutine)
        coroutine.close()


@each_kind
def test_debug_mode_refuses_what_asyncio_refuses(kind: LoopKind, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        coroutine = asyncio.sleep(0)
        with pytest.raises(TypeError, match="coroutines"):
            loop.call_soon(coroutine)  # type: ignore[arg-type]
        coroutine.close()
        with pytest.raises(TypeError, match="callable"):
            loop.call_soon(1)  # type: ignore[arg-type]
        errors: list[BaseException] = []

        def elsewhere() -> None:
            try:
                loop.call_soon(print)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "Non-thread-safe" in str(errors[0])
        loop.slow_callback_duration = 0.01
        burnt = loop.create_future()
        loop.call_soon(burn, burnt)
        await burnt

    def burn(burnt: "asyncio.Future[None]") -> None:
        until_s = time.monotonic() + 0.02
        while time.monotonic() < until_s:
            pass
        burnt.set_result(None)

    with opened(kind, debug=True) as loop:
        loop.run_until_complete(main())
    assert any("burn" in record.getMessage() and "took" in record.getMessage() for record in caplog.records)


@each_kind
def test_io_goes_on_between_steps(kind: LoopKind) -> None:
    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        spinning = [loop.create_task(spin(stop), context=SchedulingGroup("spin").context()) for _ in range(20)]
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for number in range(20):
            writer.write(b"%d\n" % number)
            assert await reader.readline() == b"%d\n" % number
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        stop.set()
        for task in spinning:
            await task

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    with opened(kind) as loop:
        loop.run_until_complete(asyncio.wait_for(main(), 20))


@each_kind
def test_yielding_lets_io_happen(kind: LoopKind) -> None:
    """A step that queues itself again runs in the next turn, so that a loop of `sleep(0)` sees what the kernel has."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert isinstance(loop, GroupLoop)
        before = loop.n_turns()
        for _ in range(50):
            await asyncio.sleep(0)
        assert loop.n_turns() - before >= 50
        writer.close()
        await writer.wait_closed()

    with opened(kind) as loop:
        server = loop.run_until_complete(asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0))
        loop.run_until_complete(main())
        server.close()
        loop.run_until_complete(server.wait_closed())


@each_kind
def test_context_variables_are_kept_apart(kind: LoopKind) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="none")

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def child(mine: str) -> str:
            name.set(mine)
            await asyncio.sleep(0)
            return f"{name.get()} in {CURRENT.get().name}"

        one, two = SchedulingGroup("one"), SchedulingGroup("two")
        tasks = [loop.create_task(child(str(number)), context=(one, two)[number % 2].context()) for number in range(4)]
        assert [await task for task in tasks] == ["0 in one", "1 in two", "2 in one", "3 in two"]
        assert name.get() == "none"
        inherited: list[str] = []
        with one.active():
            loop.call_soon(lambda: inherited.append(CURRENT.get().name))
            loop.call_later(0.001, lambda: inherited.append(CURRENT.get().name))
            task = asyncio.create_task(child("x"))
        assert await task == "x in one"
        while len(inherited) < 2:
            await asyncio.sleep(0.001)
        assert (inherited, CURRENT.get().name) == (["one", "one"], "main")

    with opened(kind) as loop:
        loop.run_until_complete(main())


def test_the_number_of_groups_is_bounded() -> None:
    async def main() -> None:
        for number in range(GROUPS_MAX - 1):
            SchedulingGroup(f"g{number}").context()
        with pytest.raises(Exhausted), SchedulingGroup("more").active():
            pass

    with opened("uvloop") as loop:
        loop.run_until_complete(main())


def test_a_loop_with_groups_is_forgotten_when_closed() -> None:
    import weakref

    loop = new_loop("asyncio")
    assert isinstance(loop, GroupLoop)
    loop.account()
    loop.call_soon(print)
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None


@each_kind
@pytest.mark.parametrize("grouped", [False, True])
def test_need_preempt(kind: LoopKind, grouped: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, GroupLoop)
        loop.need_preempt()
        await asyncio.sleep(0)
        assert not loop.need_preempt()
        clock.spend(QUOTA_NS - 1)
        assert not loop.need_preempt()
        clock.spend(1)
        assert loop.need_preempt()
        await asyncio.sleep(0)
        assert not loop.need_preempt()

    clock = StepClock()
    with opened(kind, grouped=grouped, clock_ns=clock) as loop:
        loop.run_until_complete(main())
