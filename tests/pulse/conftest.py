"""The rig of whole nodes, as the tests of nodes have it."""

from tests.node.conftest import host_rig, rig

__all__ = ["host_rig", "rig"]
