"""Types of the Rust core (`rust/core`), checked against the built module by stubtest. Long calls release the GIL."""

from collections.abc import Callable, Sequence

class ArchiveError(Exception):
    """An archive entry is unsafe, damaged, or over a limit. args = (entry, why)."""

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
