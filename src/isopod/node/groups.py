"""The node's scheduling groups: what its loop's time is divided between.

The API comes before all else, then figures; what takes seconds (importing and loading images) gets what is left, so
that a `ps` does not wait for an `import`. Heartbeats and consensus will have a latency group here.
"""

from typing import Final

from isopod.runtime.scheduling import Priority, SchedulingGroup

RPC: Final = SchedulingGroup("rpc", 1000)
METRICS: Final = SchedulingGroup("metrics", 200)
BULK: Final = SchedulingGroup("bulk", 100, priority=Priority.BACKGROUND)
