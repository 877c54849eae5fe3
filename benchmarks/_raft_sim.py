"""How fast a simulated cluster of three nodes runs: `python -m benchmarks._raft_sim idle|load SECONDS` prints virtual seconds per second.

The nodes are whole: real heartbeats, RPC, Raft core and journal, on the simulation's network, disks and clocks. "load" is 100 operations a
virtual second of a client on a fourth machine, one in four a write.
"""

import asyncio
import sys
import time
from typing import Final

from isopod.api.store import StoreClient
from isopod.cluster.member import ClusterConfig, ClusterNode
from isopod.cluster.members.config import PeerSpec
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.network import TcpAddress
from isopod.world.sim.cluster import SimCluster
from isopod.world.sim.sim_host import SimHost

N_NODES: Final = 3
PORT: Final = 7000
OPS_PER_S: Final = 100
TOKEN: Final = "a-secret-of-the-simulation-0123456789"


async def live(host: SimHost, number: int, peers: tuple[PeerSpec, ...], nodes: dict[int, ClusterNode]) -> None:
    """Be a node, for ever."""
    world = host.world
    config = ClusterConfig(
        data_dir="/data", node_id=number, bind=f"{host.address}:{PORT}", peers=peers, token=TOKEN, security="plaintext", voters_max=N_NODES
    )
    node = ClusterNode(world, config, Logger(lambda _: None, world.clock), Registry())
    await node.start()
    nodes[number] = node
    await asyncio.get_running_loop().create_future()


async def work(cluster: SimCluster, for_s: float) -> None:
    """Ask for something a hundred times a second."""
    addresses = [TcpAddress(host.address, PORT) for host in cluster.hosts[:N_NODES]]
    loop = asyncio.get_running_loop()
    async with StoreClient(cluster.hosts[-1].world, addresses, plaintext=True) as store:
        began = loop.time()
        for number in range(int(for_s * OPS_PER_S)):
            await asyncio.sleep(max(0.0, began + number / OPS_PER_S - loop.time()))
            if number % 4:
                await store.get(f"k{number % 97}")
            else:
                await store.put(f"k{number % 97}", b"v" * 256)


async def form(nodes: dict[int, ClusterNode]) -> None:
    """Wait until all vote."""
    while len(nodes) < N_NODES or any(len(node.status().voters) < N_NODES for node in nodes.values()):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.1)


def main(what: str, for_s: float) -> float:
    """Return virtual seconds per second."""
    cluster = SimCluster(12345, N_NODES + 1, n_events_max=1 << 40)
    nodes: dict[int, ClusterNode] = {}
    peers = tuple(PeerSpec(number, f"{host.address}:{PORT}") for number, host in enumerate(cluster.hosts[:N_NODES], 1))
    try:
        for number, host in enumerate(cluster.hosts[:N_NODES], 1):
            host.spawn_node(live(host, number, peers, nodes), name=f"node{number}")
        cluster.run(form(nodes))
        began = time.process_time()
        cluster.run(asyncio.sleep(for_s) if what == "idle" else work(cluster, for_s))
        return for_s / (time.process_time() - began)
    finally:
        cluster.close()


if __name__ == "__main__":
    print(main(sys.argv[1], float(sys.argv[2])))
