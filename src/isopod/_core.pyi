"""Types of the Rust core (`rust/core`), checked against the built module by stubtest. Long calls release the GIL."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, final

from _typeshed import ReadableBuffer, WriteableBuffer

class ArchiveError(Exception):
    """An archive entry is unsafe, damaged, or over a limit. args = (entry, why)."""

class NotIndexable(Exception):
    """A layer is fine, but cannot be kept as an EROFS index over its archive. args = (entry, why)."""

class RingError(Exception):
    """A ring shared with another process is damaged, or a message does not fit it. args = (why,)."""

class CorePanicked(RuntimeError):
    """The Raft core hit a broken assumption; its state is unknown and the process must end. args = (why,)."""

@final
class RaftCore:
    """One member's part in the consensus. The contract and the meaning of the tuples is in `isopod.cluster.raft.core`."""

    def __new__(cls, config: object) -> Self:
        """Make one from a `CoreConfig`. ValueError: settings or what was written make no sense."""

    def tick(self, n: int) -> int: ...
    def step_many(self, messages: Sequence[bytes]) -> list[tuple[int, int, str]]: ...
    def propose(self, data: Sequence[bytes]) -> int | str: ...
    def propose_conf_change(self, data: bytes) -> int | str: ...
    def apply_conf_change(self, data: bytes) -> tuple[Any, ...]: ...  # the fields of ConfState
    def read_index(self, context: bytes) -> None: ...
    def transfer_leader(self, to: int) -> None: ...
    def campaign(self) -> None: ...
    def forget_leader(self) -> None: ...
    def ready(self) -> tuple[Any, ...] | None: ...  # the fields of Ready
    def on_persisted(self, number: int) -> None: ...
    def applied_to(self, index: int) -> None: ...
    def compact(self, index: int) -> None: ...
    def snapshot_made(self, index: int, data: bytes) -> None: ...
    def snapshot_wanted(self) -> bool: ...
    def report_unreachable(self, peer: int) -> None: ...
    def report_snapshot(self, peer: int, ok: bool) -> None: ...
    def ticks_until_event(self) -> int: ...
    def status(self) -> tuple[Any, ...]: ...  # the fields of CoreStatus

def raft_decode_records(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Take the records of a log apart: (index, term, kind, data), kind 0 for a command, 1 for a change of members, -1 for a snapshot."""

def raft_describe_message(data: bytes) -> tuple[str, int, int, int, int, int, int, bool, int, int]:
    """Return (kind, sender, to, term, log term, index, commit, reject, number of entries, index of the snapshot) of a message."""

def raft_encode_conf_change(changes: Sequence[tuple[str, int]], context: bytes, joint: bool, auto_leave: bool) -> bytes:
    """Encode a change of members."""

def raft_decode_conf_change(data: bytes) -> tuple[tuple[tuple[str, int], ...], bytes, bool, bool]:
    """Return the arguments of `raft_encode_conf_change`."""

@final
class Ring:
    """One end of a pair of rings in a memfd of `create_ring`. `side` is 0 at one end, 1 at the other. The descriptor may be closed then."""

    def __new__(cls, fd: int, side: int, message_bytes_max: int) -> Self: ...
    def push(self, messages: list[bytes]) -> tuple[int, bool]:
        """Write the messages of a list until the ring is full; returns how many are wholly written, and whether to wake the peer.

        If not all were, the first that was not must come first the next time; the peer wakes us when there is room.
        """

    def pop(self, n_bytes_max: int) -> tuple[list[bytes], bool]:
        """Take messages until the ring is empty or `n_bytes_max` are exceeded; returns them, and whether to wake the peer."""

    def may_sleep(self) -> bool:
        """Ask to be woken for the next message; False if there is one already."""

def create_ring(n_bytes: int) -> int:
    """Make the memfd of a pair of rings, `n_bytes` each way (a power of two, 4 KiB to 1 GiB); returns its descriptor, close-on-exec."""

def apply_mask(data: bytes, key: bytes) -> bytes:
    """Return `data` combined by XOR with the 4 bytes of `key`, repeated. ValueError: the key has another length."""

def crc32c(data: ReadableBuffer, start: int = 0) -> int:
    """Return the CRC-32C (RFC 3720) of `data`; with `start` the sum of what came before it, that of both."""

def exposition_read(
    body: bytes,
    block: bytes,
    names: Sequence[str],
    rules: tuple[int, int, Sequence[tuple[bytes, bytes]], float],
    wanted: Mapping[str, Sequence[str]],
) -> tuple[
    list[tuple[str, Any, bytes, bytes, int, bytes | None]],  # the second is a `Kind` of isopod.pulse.model
    dict[str, tuple[tuple[tuple[str, ...], float], ...]],
    int,
    dict[str, int],
]:
    """Read metrics as text; `isopod.pulse.core.read` says how. Keeps the GIL, as all of this family do.

    Returns (families, figures asked for, lines kept, lines left out by reason), the families as (name, kind, help, text, number of lines,
    text in OpenMetrics if that differs), ordered by name. `block` comes first in each line's labels, which have the `names`. `rules`: bytes
    of a line, lines kept, (beginning of a name, its replacement), and from what value on a figure has wrapped.
    """

def exposition_protobuf(name: str, kind: str, help_text: bytes, texts: Sequence[bytes]) -> bytes:
    """Encode one family as a length-delimited io.prometheus.client.MetricFamily. ValueError: there is no such kind."""

def pack(coding: str, sources: Sequence[bytes | int], before: bytes) -> bytes:
    """Pack texts, and pieces of the pack before by their numbers; `isopod.pulse.core.pack` says how. ValueError: no such coding.

    OSError: there is no such piece before.
    """

def gather(packs: list[bytes], number: int, first: int, n_bytes_wanted: int) -> tuple[bytes, int, int, int]:
    """Join the pieces of one number from a pack on until there are so many bytes; returns (joined, CRC-32, bytes they hold, next pack).

    IndexError: a pack has no such piece.
    """

def combine_crc32(pieces: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of pieces one behind another, of which each is given by its own and its number of bytes."""

def unpack_layer(
    fd: int,
    target: str,
    offset: int,
    n_bytes: int | None,
    unpacked_bytes_max: int,
    n_entries_max: int,
    entry_bytes_max: int,
    path_bytes_max: int,
    ratio_max: int,
    progress: Callable[[int], None] | None,
) -> tuple[str, str, int, int, int]:
    """Unpack a layer; returns (blob digest, diff id, blob bytes, unpacked bytes, entries). See `isopod.world.disk.Disk.unpack_layer`."""

def index_layer(
    fd: int,
    tar_fd: int,
    index_fd: int,
    offset: int,
    n_bytes: int | None,
    unpacked_bytes_max: int,
    n_entries_max: int,
    entry_bytes_max: int,
    path_bytes_max: int,
    ratio_max: int,
    progress: Callable[[int], None] | None,
) -> tuple[tuple[str, str, int, int, int], tuple[int, int, str]]:
    """Write a layer as a plain tar and an EROFS index over it; returns what `unpack_layer` does, then (tar bytes, index bytes, index
    digest). See `isopod.world.disk.Disk.index_layer`."""

def pack_layer(
    source: str,
    fd: int,
    n_bytes_max: int,
    entry_bytes_max: int,
    progress: Callable[[int], None] | None,
) -> tuple[str, int, int]:
    """Write a folder in overlayfs form as an OCI layer tar; returns (diff id, bytes, entries). See `isopod.world.disk.Disk.pack_layer`."""

def index_archive(fd: int) -> list[tuple[str, int, int, str]]:
    """List an uncompressed tar's regular files and links: (name, data offset, bytes, link target)."""

def sha256_file(fd: int) -> str:
    """Return "sha256:..." of all bytes of a file from its start."""

def remove_tree(path: str) -> None:
    """Remove a folder and all in it without following links and without crossing a mount (EBUSY)."""

def tree_bytes(path: str) -> int:
    """Return allocated bytes below a folder, hard links once."""

def mount_overlay(target: str, lowers: Sequence[str], upper: str, work: str, volatile: bool) -> None:
    """Mount an overlay through fsopen(2)/fsconfig(2)/move_mount(2)."""

def mount_tmpfs(target: str, n_bytes: int) -> None:
    """Mount a tmpfs of a bounded size, nosuid, nodev."""

def mount_erofs(target: str, index: str, tar: str | None) -> None:
    """Mount an EROFS file read-only, with the file its data lies in if that is another."""

def erofs_supported() -> bool:
    """Return whether fsopen(2) knows "erofs"."""

def bind_mount(source: str, target: str) -> None:
    """Bind `source` on `target`."""

def make_private(target: str) -> None:
    """Make the mount at `target` private."""

def make_slave_recursive(target: str) -> None:
    """Make the mounts at and below `target` slaves."""

def unmount(target: str, detach: bool) -> None:
    """umount2(2) with UMOUNT_NOFOLLOW, and MNT_DETACH on request."""

def overlay_supported() -> bool:
    """Return whether fsopen(2) knows "overlay"."""

def unshare_mounts() -> None:
    """unshare(CLONE_NEWNS) for the calling process; it must have one thread."""

def enter_mount_namespace(fd: int) -> None:
    """setns(fd, CLONE_NEWNS); the process must have one thread."""

def create_network_namespace(path: str) -> None:
    """Make a network namespace in a helper thread, loopback up, and pin it at the new file `path`."""

def list_links() -> list[tuple[int, str, str, bool, int]]:
    """Return (index, name, kind, up, master index) of the links in the current network namespace, kind "" if none."""

def create_bridge(name: str, address: str) -> None:
    """Make a bridge that is up and carries `address` ("10.88.0.1/24"); what exists already is kept."""

def create_veth(host_name: str, bridge: str, namespace: str, guest_name: str) -> None:
    """Make a veth pair between a bridge and a pinned namespace in one request each."""

def configure_link(namespace: str, name: str, address: str, gateway: str) -> str:
    """Set address and default route ("" for none) inside a pinned namespace; returns the link's MAC."""

def move_link(name: str, namespace: str) -> None:
    """Move a link of the current namespace into a pinned one."""

def delete_link(name: str) -> bool:
    """Remove a link; False if there is none of that name."""

def list_routes() -> list[str]:
    """Return the IPv4 prefixes routed in the main table, without the default route."""

def pidfd_open(pid: int) -> int:
    """Return a pidfd, close-on-exec."""

@final
class Uring:
    """An io_uring for files. Operations are queued, `submit` hands them over, `reap` tells what became of them.

    A buffer given to an operation stays exported (neither freed nor resized) until the operation was reaped. One thread uses it.
    """

    def __new__(cls, n_entries: int) -> Self:
        """Make a ring of a power of two of entries. OSError: ENOSYS, EPERM: the kernel has none for us; EOPNOTSUPP: it is too old."""

    def fileno(self) -> int:
        """Return the descriptor to poll: readable while completions wait."""

    def n_in_flight_max(self) -> int:
        """Return how many operations may be in flight."""

    def n_in_flight(self) -> int:
        """Return how many operations are queued or under way."""

    def read(self, fd: int, offset: int, n_bytes: int, owner: object) -> None:
        """Queue a read of up to `n_bytes`; its result is the bytes."""

    def read_into(self, fd: int, offset: int, buffer: WriteableBuffer, owner: object) -> None:
        """Queue a read into a writable buffer; its result is the number of bytes."""

    def write(self, fd: int, offset: int, buffer: ReadableBuffer, owner: object) -> None:
        """Queue a write of a buffer; its result is the number of bytes."""

    def write_durable(self, fd: int, offset: int, buffer: ReadableBuffer, owner: object) -> None:
        """As `write`, but the data are durable when it completes (RWF_DSYNC)."""

    def sync(self, fd: int, owner: object) -> None:
        """Queue an fdatasync(2); its result is 0."""

    def submit(self) -> int:
        """Hand over what is queued; returns how many the kernel took."""

    def reap(self) -> list[tuple[Any, Any]]:  # whatever the owner was; bytes or int
        """Return (owner, result) of what has completed: bytes, a count, or a negative errno."""

    def close(self) -> None:
        """Wait for what is in flight and give the ring back; twice is fine. Owners that were not told are dropped."""
