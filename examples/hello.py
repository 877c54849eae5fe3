"""Hello: a reactor, a task, a timer, a future, and a clean end.

    .venv/bin/python examples/hello.py --every 0.5
    .venv/bin/python examples/hello.py --times 3

It greets once per period until SIGTERM or SIGINT (Ctrl-C), or so many times; then it says what the reactor did.
"""

import argparse
import asyncio
import signal

from isopod.runtime.future import Promise, make_future
from isopod.runtime.reactor import Reactor
from isopod.world.host.loop import new_loop


class Greeter:
    """Says hello again and again.

    Args:
        reactor: Whose timer it uses.
        times: How often; 0 for ever.
    """

    def __init__(self, reactor: Reactor, times: int) -> None:
        self._timer = reactor.timer(self._greet)
        self._times = times
        self._n_said = 0
        self._done: Promise[int] = Promise()

    async def run(self, period_s: float) -> int:
        """Greet until it was said often enough; return how often."""
        self._timer.arm_periodic(period_s, delay_s=0)
        try:
            return await self._done.get_future()
        finally:
            self._timer.cancel()

    def _greet(self) -> None:
        self._n_said += 1
        print(f"hello, {self._n_said}", flush=True)
        if self._n_said == self._times:
            self._timer.cancel()
            self._done.set_value(self._n_said)


async def serve(reactor: Reactor, arguments: argparse.Namespace) -> None:
    """Greet until it is done; `reactor.stop` cancels this."""
    for number in (signal.SIGTERM, signal.SIGINT):
        reactor.loop.add_signal_handler(number, reactor.stop, number.name)
    greeting = reactor.spawn(Greeter(reactor, arguments.times).run(arguments.every), name="greeter")
    try:
        print(await make_future(greeting).map(lambda times: f"said it {times} times"))
    except asyncio.CancelledError:
        print(f"stopped: {reactor.stopping.reason}")
        raise
    finally:
        stats = reactor.statistics()
        print(
            f"{stats.n_timers_fired} timers fired, {stats.n_steps} steps in {stats.elapsed_s:.2f} s, {stats.idle_share:.0%} idle",
            flush=True,
        )


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="A greeting per period, on a reactor.")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="the period (default 1)")
    parser.add_argument("--times", type=int, default=0, metavar="N", help="how often (default: until it is stopped)")
    arguments = parser.parse_args()
    Reactor(new_loop()).run(lambda reactor: serve(reactor, arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
