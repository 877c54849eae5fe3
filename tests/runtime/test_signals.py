"""Signals to a real process: graceful, forced, described; and that the way down reaches its end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

import msgspec
import pytest

from tests.project.sources import PROJECT

pytestmark = [pytest.mark.row("S6")]

LIMIT_S: Final = 20.0
CHILD: Final = """
import asyncio, sys
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.host import daemon
from isopod.world.host.clock import HostClock
from isopod.world.host.loop import new_loop

async def main(slow_s, stubborn):
    clock = HostClock()
    logger = Logger(daemon.write_stderr, clock, level="debug")
    coordinator = ShutdownCoordinator(logger, clock)
    metrics = Registry()
    metrics.counter("isopod_probe_total", "Probes.").inc(3)

    async def quick():
        logger.info("child.quick")

    async def slow():
        logger.info("child.draining")
        try:
            await asyncio.sleep(slow_s)
        except asyncio.CancelledError:
            logger.info("child.cancelled")
            if stubborn:
                await asyncio.sleep(1000)
            raise

    coordinator.register(ShutdownResource("listener", ShutdownPhase.STOP_ACCEPTING, quick))
    coordinator.register(ShutdownResource("calls", ShutdownPhase.DRAIN_CONNECTIONS, slow, force=lambda: logger.info("child.forced")))
    coordinator.register(ShutdownResource("files", ShutdownPhase.FINAL_CLEANUP, quick, force=lambda: logger.info("child.files")))
    signals = ShutdownSignals(coordinator, logger, metrics)
    with daemon.handle_signals(signals):
        logger.info("child.ready")
        report = await coordinator.shutdown(await signals.wait())
    logger.info("child.end", outcomes=dict(report.outcomes), reason=report.reason)
    return 0

sys.exit(daemon.run(new_loop(sys.argv[3]), main(float(sys.argv[1]), sys.argv[2] == "stubborn")))
"""


class Child:
    """The process and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stderr is not None
        self.process = process
        self._stderr: IO[bytes] = process.stderr
        self.lines: list[dict[str, Any]] = []

    def read_until(self, event: str) -> dict[str, Any]:
        """Read log lines up to the first of that event."""
        for raw in self._stderr:
            line = msgspec.json.decode(raw)
            self.lines.append(line)
            if line["event"] == event:
                return line  # type: ignore[no-any-return]
        raise AssertionError(f"no {event} in {self.lines}")

    def end(self) -> int:
        """Read the rest, wait, return the exit status."""
        self.lines += [msgspec.json.decode(raw) for raw in self._stderr]
        return self.process.wait(LIMIT_S)

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.process.pid, signum)


@contextmanager
def started(*, slow_s: float = 0.0, stubborn: bool = False, kind: str = "uvloop") -> Iterator[Child]:
    argv = [sys.executable, "-c", CHILD, str(slow_s), "stubborn" if stubborn else "", kind]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, env=environment)
    child = Child(process)
    try:
        child.read_until("child.ready")
        yield child
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("kind", ["uvloop", "asyncio", "polling"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_goes_down_in_order(kind: str, signum: signal.Signals) -> None:
    with started(kind=kind) as child:
        child.send(signum)
        assert child.end() == 0
    last = child.lines[-1]
    assert (last["event"], last["reason"]) == ("child.end", signum.name)
    assert last["outcomes"] == {"listener": "closed", "calls": "closed", "files": "closed"}


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_second_signal_forces_and_the_process_still_ends_in_order(kind: str, stubborn: bool) -> None:
    with started(slow_s=1000, stubborn=stubborn, kind=kind) as child:
        child.send(signal.SIGTERM)
        child.read_until("child.draining")
        child.send(signal.SIGTERM)
        assert child.end() == 0
    events = [line["event"] for line in child.lines]
    assert child.lines[-1]["outcomes"] == {"listener": "closed", "calls": "forced", "files": "forced"}
    assert [event for event in events if event in ("child.cancelled", "child.forced", "child.files")] == [
        "child.cancelled",
        "child.forced",
        "child.files",
    ]
    assert ("shutdown.stuck" in events) is stubborn


def test_sigquit_waits_for_nothing() -> None:
    with started(slow_s=1000) as child:
        child.send(signal.SIGQUIT)
        assert child.end() == 0
    assert child.lines[-1]["reason"] == "SIGQUIT"
    assert set(child.lines[-1]["outcomes"].values()) == {"forced"}


def test_status_and_metrics_are_logged_on_request() -> None:
    with started(slow_s=1000) as child:
        child.send(signal.SIGUSR1)
        status = child.read_until("signal.status")
        assert (status["begun"], status["registered"]) == (False, ["listener", "calls", "files"])
        child.send(signal.SIGUSR2)
        assert child.read_until("signal.metrics")["values"] == {"isopod_probe_total": 3}
        child.send(signal.SIGTERM)
        child.read_until("child.draining")
        child.send(signal.SIGUSR1)
        status = child.read_until("signal.status")
        assert (status["begun"], status["phase"], status["closing"]) == (True, "drain_connections", ["calls"])
        child.send(signal.SIGTERM)
        assert child.end() == 0


def test_a_third_signal_kills_what_does_not_answer() -> None:
    with started(slow_s=1000, stubborn=True) as child:
        child.send(signal.SIGTERM)
        child.read_until("child.draining")
        child.send(signal.SIGTERM)
        child.read_until("signal.force")
        child.send(signal.SIGTERM)
        assert child.end() == -signal.SIGTERM
