"""The simulated World: one thread, virtual time, memory instead of kernel and disk."""

from isopod.world.sim.cluster import SimCluster
from isopod.world.sim.fabric import LinkQuality
from isopod.world.sim.loop import Deadlock, Runaway
from isopod.world.sim.sim_host import NodeHandle, SimHost
from isopod.world.sim.world import SimWorld, make_sim_world

__all__ = ["Deadlock", "LinkQuality", "NodeHandle", "Runaway", "SimCluster", "SimHost", "SimWorld", "make_sim_world"]
