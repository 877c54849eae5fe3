"""The simulated World: one thread, virtual time, memory instead of kernel and disk."""

from isopod.world.sim.loop import Deadlock, Runaway
from isopod.world.sim.world import NodeHandle, SimWorld, make_sim_world

__all__ = ["Deadlock", "NodeHandle", "Runaway", "SimWorld", "make_sim_world"]
