"""`isopod pulse` and `isopod pulse demo`: the metrics agent in the foreground, on the host, until SIGTERM or SIGINT.

Errors go to standard error as the two lines every isopod command prints; events as JSON lines. A second signal ends it at once.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from isopod.node.main import describe
from isopod.pulse.agent import PulseAgent
from isopod.pulse.demo import Demo
from isopod.pulse.model import Pod
from isopod.pulse.options import read_settings
from isopod.pulse.settings import Given, PulseSettings
from isopod.runtime.logger import Logger
from isopod.runtime.logsinks import BoundedSink
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import InvalidArgument, IsopodError
from isopod.world.host import console, daemon
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World

STOP_S: Final = 2.0
"""How long answers that are under way may take to end."""
DEMO_MAX: Final = 1000
LISTEN_VARIABLES: Final = ("KATA_PULSE_LISTEN", "ISOPOD_PULSE_LISTEN")
"""The agent's variables that the demo heeds too, as `isopod top` does; of the others it has its own."""

_Work = Callable[[World, Logger], Coroutine[Any, Any, int]]


def main(words: Sequence[str]) -> int:
    """Run an agent.

    Args:
        words: Flags and values.

    Returns:
        The exit code: 0 after a signal, else that of the error.
    """
    try:
        given = read_settings(words, daemon.environment())
    except IsopodError as error:
        return _complain(error)
    return _run(given.settings.log_level, lambda world, logger: _serve(world, given, logger))


def demo(sandboxes: str, listen: str) -> int:
    """Run an agent over sandboxes that are made up.

    Args:
        sandboxes: How many, as it was said; "" for three.
        listen: Where it serves; "" for what a variable of LISTEN_VARIABLES says, else the default.

    Returns:
        The exit code.
    """
    n_sandboxes = sandboxes or "3"
    if not (n_sandboxes.isascii() and n_sandboxes.isdigit()) or not 1 <= int(n_sandboxes[:9]) <= DEMO_MAX:
        return _complain(InvalidArgument("--sandboxes", n_sandboxes, f"want a whole number from 1 to {DEMO_MAX}"))
    environment = daemon.environment()
    try:
        given = read_settings(
            ("--listen-address", listen) if listen else (),
            {name: environment[name] for name in LISTEN_VARIABLES if name in environment},
        )
    except IsopodError as error:
        return _complain(error)
    return _run("info", lambda world, logger: _serve_demo(world, int(n_sandboxes), given, logger))


# --- inside -----------------------------------------------------------------------------------------------------------


def _complain(error: IsopodError) -> int:
    daemon.write_stderr(describe(error).encode(errors="replace"))
    return error.exit_code


def _run(log_level: str, work: _Work) -> int:
    daemon.set_umask()
    daemon.keep_much()
    loop = new_loop("uvloop")
    world = make_host_world()
    sink = BoundedSink(daemon.write_some_stderr)
    logger = Logger(sink, world.clock)
    logger.set_level(log_level)  # type: ignore[arg-type]  # the settings have checked it

    async def root() -> int:
        try:
            return await work(world, logger)
        finally:
            await sink.close()

    try:
        return daemon.run(loop, root())
    except IsopodError as error:
        return _complain(error)
    finally:
        world.close()


async def _serve(world: World, given: Given, logger: Logger, *, pods: Mapping[str, Pod] | None = None, greeting: str = "") -> int:
    agent = PulseAgent(world, given.settings, logger, pods=pods, origins=given.origins)
    coordinator = ShutdownCoordinator(logger, world.clock)
    coordinator.register(ShutdownResource("pulse", ShutdownPhase.STOP_ACCEPTING, agent.stop, timeout_s=STOP_S))
    signals = ShutdownSignals(coordinator, logger)
    with daemon.handle_signals(signals), daemon.on_hangup(agent.reload):
        try:
            address = await agent.start()
            if greeting:
                console.write_all(console.STDOUT, f"{greeting.format(address=address)}\n".encode())
            reason = await signals.wait()
        except BaseException:
            await agent.stop()
            raise
        await coordinator.shutdown(reason)
    return 0


async def _serve_demo(world: World, n_sandboxes: int, told: Given, logger: Logger) -> int:
    async with Demo(world, n_sandboxes, folder=daemon.environment().get("TMPDIR") or "/tmp") as shown:  # noqa: S108 - the custom
        settings = PulseSettings(
            listen=told.settings.listen, runtime_endpoint="", interval_s=5.0, go_root=shown.root, rust_root=f"{shown.root}-none"
        )
        own = dict.fromkeys(("runtime_endpoint", "interval_s", "go_root", "rust_root"), "the demo")
        given = Given(settings, {**told.origins, **own})
        return await _serve(
            world, given, logger, pods=shown.pods, greeting="serving on http://{address}: try curl http://{address}/metrics"
        )
