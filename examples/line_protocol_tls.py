"""A line protocol over TCP and over TLS, from one registry of protocols, with certificates of our own authority.

    .venv/bin/python examples/line_protocol_tls.py --port 7000 --tls-port 7001 --folder certificates

    nc 127.0.0.1 7000
    openssl s_client -quiet -connect 127.0.0.1:7001 -CAfile certificates/ca.crt

Each line is answered with what stands in it, turned round; "who" says who asks, "quit" ends. The certificates are made anew at each start.
Files that are put in their place while it runs are taken over by themselves, without a restart. SIGTERM or SIGINT ends it.
"""

import argparse
import os

from isopod.net.address import format_address, parse_address
from isopod.net.ca import Authority, Subject, write_issued
from isopod.net.line import line_server
from isopod.net.protocols import Endpoints, ProtocolRegistry
from isopod.net.tcp import Connection
from isopod.net.tls import TlsFiles, open_server_tls
from isopod.runtime.logger import Logger
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import IsopodError
from isopod.world.host.daemon import handle_signals, run, write_stderr
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World

DRAIN_S = 0.5


async def make_certificates(world: World, folder: str) -> TlsFiles:
    """Make an authority and a certificate for this machine's loopback; return where they are."""
    files = TlsFiles(f"{folder}/tls.crt", f"{folder}/tls.key", f"{folder}/ca.crt")
    await world.disk.make_directory(folder)
    authority = Authority.create(world, "example authority")
    await world.disk.write(files.authorities, authority.certificate)
    issued = authority.issue(Subject("line", dns_names=("localhost",), addresses=("127.0.0.1",)))
    await write_issued(world, issued, certificate=files.certificate, key=files.key)
    return files


def answer(line: str, connection: Connection) -> str:
    """Answer one line."""
    return f"you are {connection.peer}" if line == "who" else line[::-1]


async def serve(host: str, ports: tuple[int, int], folder: str) -> int:
    """Serve until a signal comes."""
    world = make_host_world()
    logger = Logger(write_stderr, world.clock, form="text")
    coordinator = ShutdownCoordinator(logger, world.clock)
    signals = ShutdownSignals(coordinator, logger)
    files = await make_certificates(world, folder)
    reloading = await open_server_tls(
        world, files, report=lambda error: logger.info("tls.reloaded", error=None if error is None else error.message)
    )
    registry = ProtocolRegistry()
    registry.register("line", lambda world: line_server(world, answer))
    endpoints = Endpoints(world, registry)
    coordinator.register(ShutdownResource("connections", ShutdownPhase.DRAIN_CONNECTIONS, lambda: endpoints.drain(DRAIN_S)))
    coordinator.register(ShutdownResource("endpoints", ShutdownPhase.FINAL_CLEANUP, endpoints.close))
    coordinator.register(ShutdownResource("certificates", ShutdownPhase.FINAL_CLEANUP, reloading.close))
    try:
        with handle_signals(signals):
            plain = await endpoints.listen(parse_address(f"{host}:{ports[0]}"), protocol="line")
            secure = await endpoints.listen(parse_address(f"{host}:{ports[1]}"), protocol="line", tls=reloading.tls)
            print(f"listening on {format_address(plain.address)}", flush=True)
            print(f"listening with TLS on {format_address(secure.address)}, trust {files.authorities}", flush=True)
            await signals.wait()
    finally:
        await coordinator.shutdown("the end")
    world.close()
    return 0


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="A line protocol over TCP and TLS.")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7000, help="for TCP; 0 for a free one (default 7000)")
    parser.add_argument("--tls-port", type=int, default=7001, help="for TLS; 0 for a free one (default 7001)")
    parser.add_argument("--folder", default="certificates", help="where the certificates are put (default: certificates)")
    arguments = parser.parse_args()
    try:
        ports = (arguments.port, arguments.tls_port)
        return run(new_loop(), serve(arguments.host, ports, os.path.abspath(arguments.folder)))
    except (IsopodError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
