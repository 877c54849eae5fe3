"""Model: what the parts of pulse say to one another.

Discovery and the runtime endpoint say which sandboxes there are and whose they are (`Pod`), the reader makes families of a shim's text
(`Fragment`), the store keeps them by sandbox. Nothing here does anything.

A fragment is the text of one family of one sandbox, labelled and ready to be sent: the aggregate of all sandboxes is made by putting the
fragments of a family one behind another. What was made of them for a coding is kept by sandbox (`Row`), so that a scrape joins and does
not compute.
"""

from typing import Final, Literal, NamedTuple

import msgspec

Kind = Literal["counter", "gauge", "histogram", "summary", "untyped"]
Labels = tuple[tuple[str, str], ...]
Runtime = Literal["go", "rust", "isopod"]
"""Who serves a sandbox's figures: Kata's shim in Go, the one in Rust, or isopod's node (a container, which has no shim)."""
Source = Literal["cri", "isopod"]
ViewName = Literal["all", "kata", "cadvisor", "resource"]

SOCKET_NAME: Final = "shim-monitor.sock"
ID_BYTES_MAX: Final = 128


class Root(NamedTuple):
    """A folder in which each sandbox has one, with its shim's socket. Of two roots with one sandbox the first in order wins."""

    path: str
    runtime: Runtime


class Container(NamedTuple):
    """A container of a pod, as its runtime lists it. `image` is the reference it was made from; `created_ns` 0 is unknown."""

    id: str
    name: str
    image: str
    created_ns: int = 0


class ContainerStats(NamedTuple):
    """What a container has used, as its runtime counts it; None for what the runtime does not say."""

    id: str
    cpu_ns: int | None = None
    working_set_bytes: int | None = None
    usage_bytes: int | None = None
    rss_bytes: int | None = None
    available_bytes: int | None = None
    """What its memory limit leaves; 0 without a limit."""
    page_faults: int | None = None
    major_page_faults: int | None = None
    swap_bytes: int | None = None
    written_bytes: int | None = None
    """What its writable layer takes."""
    written_inodes: int | None = None
    mountpoint: str = ""
    """Of the filesystem on which that layer is."""


SandboxStats = dict[str, tuple[ContainerStats, ...]]
"""By sandbox, what its containers have used; empty for one of whose containers the runtime says nothing."""


class Pod(NamedTuple):
    """Whose a sandbox is. Only labels and annotations of the allow-lists are kept. `created_ns` counts from the epoch, 0 for unknown."""

    uid: str
    name: str
    namespace: str
    source: Source = "cri"
    runtime_handler: str = ""
    created_ns: int = 0
    labels: Labels = ()
    annotations: Labels = ()
    containers: tuple[Container, ...] = ()


class LocalDevice(NamedTuple):
    """What a container did on a disk since it started."""

    name: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


class LocalInterface(NamedTuple):
    """What a container's interface carried since it came up."""

    name: str
    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int
    receive_errors: int = 0
    receive_drops: int = 0
    send_errors: int = 0
    send_drops: int = 0


class LocalContainer(NamedTuple):
    """A container of an isopod node, which has no shim to ask, and its figures. Limits are 0 for none."""

    id: str
    pod: Pod
    started_ns: int
    cpu_s: float
    memory_bytes: int
    memory_limit_bytes: int
    n_processes: int
    interfaces: tuple[LocalInterface, ...] = ()
    devices: tuple[LocalDevice, ...] = ()
    cpus: float = 0.0
    """How many processors' time it may take; 0 for no limit."""
    processes_max: int = 0
    details: "LocalDetails | None" = None
    """None where the node does not measure them."""


class LocalDetails(NamedTuple):
    """More of what a container's control group counts; 0 where a controller is missing."""

    working_set_bytes: int = 0
    """Memory less the file pages that were not used lately."""
    rss_bytes: int = 0
    """Memory of no file."""
    cache_bytes: int = 0
    swap_bytes: int = 0
    n_oom_kills: int = 0
    """How often the kernel killed one of its processes for want of memory."""
    n_periods: int = 0
    """Of its limit of processors' time: those in which it ran."""
    n_throttled_periods: int = 0
    throttled_s: float = 0.0


class Target(NamedTuple):
    """A sandbox whose shim can be asked."""

    id: str
    runtime: Runtime
    socket: str


class Fragment(msgspec.Struct, eq=False, gc=False):
    """One family of one sandbox. There are a hundred thousand of them: they refer to nothing that refers to them.

    Args:
        kind: Its type.
        help: Its help, as it stands behind `# HELP name `, escapes included.
        text: Its sample lines in text format 0.0.4, each ended by a newline; no comment lines.
        n_series: Its lines.
        open_text: The same in OpenMetrics where that differs (exemplars, timestamps in seconds), else None.
    """

    kind: Kind
    help: bytes
    text: bytes
    n_series: int
    open_text: bytes | None = None


class Row:
    """Families that go together, mostly those of a sandbox: never changed, but for what is packed of them.

    Args:
        fragments: In the order of names.
    """

    __slots__ = ("differing", "fragments", "packs", "texts")

    def __init__(self, fragments: tuple[Fragment, ...]) -> None:
        self.fragments = fragments
        self.differing = tuple([column for column, each in enumerate(fragments) if each.open_text is not None])
        """Which of them are others in OpenMetrics."""
        self.texts = tuple([each.text for each in fragments])
        self.packs: dict[str, bytes] = {}
        """By coding, all of them packed (`core.pack`)."""


Families = dict[str, Fragment]
"""By name, in the order of names."""

Values = dict[str, tuple[tuple[tuple[str, ...], float], ...]]
"""By family: each sample's values of the labels that were asked for, in their order, and the figure."""


class Reading(NamedTuple):
    """What the reader made of one body.

    Args:
        families: What is sent on.
        values: Figures of the families that were asked for, without the labels that were added.
        n_series: Lines kept.
        dropped: Lines left out, by reason.
    """

    families: Families
    values: Values
    n_series: int
    dropped: dict[str, int]


class Query(NamedTuple):
    """What a scrape wants. Empty fields want all.

    Args:
        view: Which families.
        sandbox: One id.
        namespace: One namespace.
        pod: One pod's name.
        prefixes: Families whose name begins so.
        names: Families of these very names.
        matches: Series selectors in Prometheus' syntax; a series is wanted if any of them matches.
    """

    view: ViewName = "all"
    sandbox: str = ""
    namespace: str = ""
    pod: str = ""
    prefixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    matches: tuple[str, ...] = ()
