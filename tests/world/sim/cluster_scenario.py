"""Three machines that talk, store, hang, lose power and are divided, run as a program: prints the digest. Argument: the seed."""

import asyncio
import sys

from isopod.world.disk import OpenFlags
from isopod.world.network import TcpAddress, UdpAddress
from isopod.world.sim import LinkQuality, SimCluster, SimHost


class Gossip(asyncio.Protocol):
    """Passes on what it hears."""

    def __init__(self, heard: list[bytes]) -> None:
        self.heard = heard

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)


async def node(host: SimHost, others: list[str]) -> None:
    world = host.world
    heard: list[bytes] = []
    await world.network.listen(TcpAddress("0.0.0.0", 7000), lambda: Gossip(heard))
    await world.network.open_udp(UdpAddress("0.0.0.0", 9), asyncio.DatagramProtocol)
    sender, _ = await world.network.open_udp(None, asyncio.DatagramProtocol)
    file = await world.disk.open_file("/var/lib/log", OpenFlags.create_or_open())
    await file.allocate(0, 1 << 20)
    await file.sync()
    point = world.failpoints.point("loop")
    lines: dict[str, asyncio.Transport] = {}
    chance = world.random.stream("node")
    for turn in range(200):
        for other in others:
            try:
                if point.armed:
                    await point.hit()
                if other not in lines or lines[other].is_closing():
                    async with asyncio.timeout(0.5):
                        lines[other], _ = await world.network.connect(TcpAddress(other, 7000), lambda: Gossip(heard))
                lines[other].write(world.random.token_hex(chance.randrange(1, 40)).encode())
            except OSError:
                continue
            sender.sendto(b"%d" % turn, (other, 9))
        await file.write_durable(64 * turn, b"%6d %d" % (turn, len(heard)))
        await asyncio.sleep(chance.uniform(0.01, 0.05))


async def main(sim: SimCluster) -> None:
    handles = []
    for host in sim.hosts:
        host.disk.faults.keeps_unsynced = True
        host.failpoints.set("loop", "10%error(EAGAIN)")
        handles.append(host.spawn_node(node(host, [each.address for each in sim.hosts if each is not host])))
    await asyncio.sleep(1)
    sim.fabric.set_all(LinkQuality(loss=0.1, duplication=0.1, reordering=0.1, bytes_per_s=100_000))
    sim.hosts[1].clock.drift_ppm = 500
    await asyncio.sleep(1)
    sim.fabric.partition([["node1"]])
    handles[1].hang()
    await asyncio.sleep(1)
    sim.fabric.heal()
    handles[1].resume()
    sim.fabric.reset("node1", "node2")
    await asyncio.sleep(0.5)
    sim.hosts[2].power_cut()
    sim.hosts[2].spawn_node(node(sim.hosts[2], ["10.99.0.1"]))
    await asyncio.sleep(0.5)
    handles[0].kill()
    await asyncio.sleep(1)


def digest(seed: int) -> str:
    sim = SimCluster(seed, 3)
    sim.loop.start_trace()
    sim.run(main(sim))
    found = sim.loop.trace_digest()
    sim.close()
    return found


if __name__ == "__main__":
    sys.stdout.write(digest(int(sys.argv[1])))
