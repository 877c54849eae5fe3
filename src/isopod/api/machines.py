"""The messages about virtual machines: what can be asked of them beyond what is asked of every container. See `messages`."""

from typing import Annotated, Literal

import msgspec

from isopod.api.messages import Container, Message


class VmSnapshotRequest(Message, frozen=True, kw_only=True):
    """Write down what a virtual machine is at this moment, or go back to that."""

    name: str
    snapshot: str = "latest"


class VmSnapshot(Message, frozen=True, kw_only=True):
    """A stored moment of a virtual machine."""

    name: str
    created_at_ns: int
    memory_bytes: int
    """What its memory takes on the disk."""
    disk_bytes: int
    """What its disk takes on the disk."""


class ResizeVm(Message, frozen=True, kw_only=True):
    """Give a virtual machine other memory or processors; None leaves it."""

    name: str
    vcpus: int | None = None
    memory_bytes: int | None = None


class VmBuild(Message, frozen=True, kw_only=True):
    """What was built of a virtual machine's configuration."""

    container: Container
    runner: str
    """What its next start runs."""
    booted: str
    """What was started last, "" if nothing was."""
    is_outdated: bool
    """Whether what runs is another one: a restart makes the difference."""


class VmConsole(Message, frozen=True, kw_only=True):
    """Look at, and type on, a virtual machine's console."""

    name: str
    tail_bytes: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 16384
    """So much of what it showed before comes first."""
    follow: bool = True
    """Whether to stay until the machine or the client ends."""


class VmState(Message, frozen=True, kw_only=True):
    """What a virtual machine does, asked of itself. Fields are None where nothing runs or it does not say."""

    container: Container
    machine: str = "shutdown"
    """What its monitor says: running, paused, shutdown, panicked or unknown."""
    agent: str | None = None
    """The version of the guest's agent, None while it has not answered."""
    guest_kernel: str | None = None
    silent_s: float | None = None
    """How long the guest has said nothing."""
    snapshots: tuple[VmSnapshot, ...] = ()
    why: str = ""
    """Why it is not as it should be."""


class StatPath(Message, frozen=True, kw_only=True):
    """Ask what is at a path of a container."""

    name: str
    path: str
    follow: bool = True
    """Whether a link at its end is followed."""


PathKind = Literal["file", "folder", "link", "other", "nothing"]


class PathFacts(Message, frozen=True, kw_only=True):
    """What is at a path of a container; "nothing" has a folder that is there."""

    kind: PathKind
    path: str
    """Where links led."""
    mode: int
    n_bytes: int


class CopyFrom(Message, frozen=True, kw_only=True):
    """Stream a file or folder of a container as a tar archive."""

    name: str
    path: str


class CopyTo(Message, frozen=True, kw_only=True):
    """Unpack a tar archive, which the client streams, in a folder of a container."""

    name: str
    path: str
