"""The messages about what containers use: asked of each, and answered as it is measured now. See `messages`."""

from isopod.api.messages import Message, Status


class StatsRequest(Message, frozen=True, kw_only=True):
    """What to measure; () for all that run."""

    names: tuple[str, ...] = ()
    figures: bool = False
    """Whether `ContainerUsage.figures` are wanted: they cost three files more of each."""


class DeviceUsage(Message, frozen=True, kw_only=True):
    """What a container did on a disk since it started."""

    name: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


class InterfaceUsage(Message, frozen=True, kw_only=True):
    """What a container's network interface carried since it came up."""

    name: str
    received_bytes: int
    received_packets: int
    receive_errors: int
    receive_drops: int
    sent_bytes: int
    sent_packets: int
    send_errors: int
    send_drops: int


class UsageFigures(Message, frozen=True, kw_only=True):
    """More of what a container uses; 0 where the kernel does not say. A machine's are those of its monitor, without interfaces."""

    working_set_bytes: int
    """Memory less the file pages that were not used lately."""
    rss_bytes: int
    """Memory of no file."""
    cache_bytes: int
    swap_bytes: int
    oom_kills: int
    cpu_periods: int
    """Of its limit of processors' time: those in which it ran, and then those in which it had to wait."""
    cpu_throttled_periods: int
    cpu_throttled_ns: int
    devices: tuple[DeviceUsage, ...] = ()
    interfaces: tuple[InterfaceUsage, ...] = ()


class ContainerUsage(Message, frozen=True, kw_only=True):
    """What a container uses now; None where it does not run or the kernel does not say."""

    id: str
    name: str
    status: Status
    memory_bytes: int | None = None
    memory_bytes_max: int | None = None
    cpu_ns: int | None = None
    cpus: float | None = None
    n_pids: int | None = None
    pids_max: int | None = None
    figures: UsageFigures | None = None


class UsageList(Message, frozen=True, kw_only=True):
    """By name."""

    containers: tuple[ContainerUsage, ...]
