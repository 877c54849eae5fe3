"""An echo server over TCP or a Unix socket, with statistics and an idle time-out.

    .venv/bin/python examples/echo_server.py --port 7777
    .venv/bin/python examples/echo_server.py --listen unix:/tmp/echo.sock --idle 30

Try it with `nc 127.0.0.1 7777`. Connections on which nothing moves for the idle time are closed. SIGUSR1 prints the statistics, SIGTERM or
SIGINT ends it: no more connections are accepted, open ones have half a second.
"""

import argparse
import asyncio
import signal

from isopod.net.address import format_address, parse_address
from isopod.net.tcp import Connection, TcpLimits, TcpServer
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import handle_signals, run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import Address

DRAIN_S = 0.5


async def echo(connection: Connection) -> None:
    """Send back what comes, no faster than the peer takes it, until the peer ends."""
    while data := await connection.read():
        connection.write(data)
        await connection.drain()


def report(server: TcpServer) -> None:
    """Print what the server did so far."""
    for name, count in server.statistics()._asdict().items():
        print(f"  {name.removeprefix('n_').replace('_', ' '):<16} {count}", flush=True)


async def serve(address: Address, idle_s: float) -> int:
    """Serve until a signal comes."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, level="warning", form="text")
    coordinator = ShutdownCoordinator(logger, world.clock)
    signals = ShutdownSignals(coordinator, logger)

    server = TcpServer(world, echo, limits=TcpLimits(idle_s=idle_s), group=SchedulingGroup("echo", 500))
    listener = await server.listen(address)

    async def drain() -> None:
        await server.drain(DRAIN_S)

    coordinator.register(ShutdownResource("listener", ShutdownPhase.STOP_ACCEPTING, server.stop_accepting))
    coordinator.register(ShutdownResource("connections", ShutdownPhase.DRAIN_CONNECTIONS, drain))
    coordinator.register(ShutdownResource("server", ShutdownPhase.FINAL_CLEANUP, server.close))
    with handle_signals(signals):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, report, server)
        print(f"listening on {format_address(listener.address)}", flush=True)
        await coordinator.shutdown(await signals.wait())
    report(server)
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="An echo server.")
    parser.add_argument("--port", type=int, default=7777, help="the port on 127.0.0.1; 0 for a free one (default 7777)")
    parser.add_argument("--listen", metavar="ADDRESS", help="HOST:PORT or unix:/PATH, in place of --port")
    parser.add_argument("--idle", type=float, default=60.0, metavar="SECONDS", help="close connections that are idle so long (default 60)")
    arguments = parser.parse_args()
    try:
        address = parse_address(arguments.listen or f"127.0.0.1:{arguments.port}")
        return run(new_loop(), serve(address, arguments.idle))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
