"""A scenario that touches every port, run as a program: prints the digest of its events. Argument: the seed."""

import asyncio
import functools
import io
import sys
import tarfile

from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld, make_sim_world


class Echo(asyncio.Protocol):
    """Sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Count(asyncio.Protocol):
    """Counts what it gets."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes
        self.done = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.left -= len(data)
        if not self.left:
            self.done.set_result(None)


async def talk(sim: SimWorld, path: str) -> None:
    listener = await sim.world.network.listen(UnixAddress(path), Echo)
    transports = []
    for size in (10, 1000, 300_000):
        transport, protocol = await sim.world.network.connect(UnixAddress(path), functools.partial(Count, size))
        transport.write(b"x" * size)
        assert isinstance(protocol, Count)
        await protocol.done
        transports.append(transport)
    for transport in transports:
        transport.close()
    await listener.close()


async def store(sim: SimWorld, folder: str) -> None:
    disk = sim.world.disk
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("b", "a", "d/c"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    await disk.make_directory(folder)
    await disk.write_atomic(f"{folder}/layer.tar", buffer.getvalue())
    await disk.unpack_layer(f"{folder}/layer.tar", f"{folder}/layer")
    await disk.pack_layer(f"{folder}/layer", f"{folder}/again.tar")


async def compute(sim: SimWorld) -> None:
    for _ in range(3):
        done = await sim.world.processes.run(["/usr/bin/crun", "--version"])
        assert done.returncode == 0


async def main(sim: SimWorld) -> None:
    kernel = sim.world.kernel
    await sim.world.disk.make_directory("/run/ns")
    await asyncio.gather(
        talk(sim, "/run/a.sock"),
        talk(sim, "/run/b.sock"),
        store(sim, "/var/lib/x"),
        compute(sim),
        kernel.create_bridge("br0", "10.1.0.1/24"),
        *(kernel.create_namespace(f"/run/ns/{number}") for number in range(5)),
    )


def digest(seed: int) -> str:
    sim = make_sim_world(seed)
    sim.loop.start_trace()
    sim.run(main(sim))
    found = sim.loop.trace_digest()
    sim.close()
    return found


if __name__ == "__main__":
    sys.stdout.write(digest(int(sys.argv[1])))
