"""Which processors there are, on which memory nodes, and on which of them this process runs.

A process that is pinned before it allocates has its memory on its processor's node: Linux gives a page to the node of the processor that
touches it first, and nothing else needs to be asked for. Sources: sched(7), Documentation/admin-guide/mm/numaperf.rst,
Documentation/ABI/stable/sysfs-devices-node, Documentation/admin-guide/mm/numa_memory_policy.rst.
"""

import os
from collections.abc import Sequence
from typing import Final

from isopod.world.shards import NumaNode

NODES: Final = "/sys/devices/system/node"


def read_topology(folder: str = NODES) -> list[NumaNode]:
    """Return the nodes that have processors of ours, by number; one node with all of them where the kernel tells nothing.

    Args:
        folder: Where the kernel shows its nodes.
    """
    allowed = os.sched_getaffinity(0)
    try:
        numbers = sorted(int(name[4:]) for name in os.listdir(folder) if name.startswith("node") and name[4:].isdecimal())
    except OSError:
        numbers = []
    nodes: list[NumaNode] = []
    for number in numbers:
        try:
            with open(f"{folder}/node{number}/cpulist", encoding="ascii") as file:
                cpus = parse_cpu_list(file.read())
        except (OSError, ValueError):
            continue
        usable = tuple(cpu for cpu in cpus if cpu in allowed)
        if usable:
            nodes.append(NumaNode(number, usable))
    known = [cpu for node in nodes for cpu in node.cpus]
    if sorted(known) != sorted(allowed):  # half a picture is worse than none
        return [NumaNode(0, tuple(sorted(allowed)))]
    return nodes


def parse_cpu_list(text: str) -> Sequence[int]:
    """Return the numbers of a kernel list such as "0-3,8,10-11".

    Raises:
        ValueError: It is not one.
    """
    found: list[int] = []
    for piece in text.strip().split(","):
        if piece:
            first, dash, last = piece.partition("-")
            found.extend(range(int(first), int(last if dash else first) + 1))
    return found
