"""The rig of whole nodes, as the tests of nodes have it, and what tests of a container runtime's sources share."""

from tests.node.conftest import host_rig, rig
from tests.pulse.cri_kit import memory_pair, pair

__all__ = ["host_rig", "memory_pair", "pair", "rig"]
