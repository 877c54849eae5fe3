"""The node's private mount namespace: made once, pinned at a file, entered by every later node process.

Why: the OCI runtime refuses v1 controllers beside a unified hierarchy, so the latter is hidden from the node and its children; and the
containers' root file systems stay out of the host's mount table. The namespace is a slave: what is mounted later on the host, below a
mount that the host shares, is seen (a host whose mounts are private, as some images without systemd have them, shares nothing).

How it is made, each step leaving something that the next `enter` completes or enters:

1. The pin's folder is bound on itself and made private. A namespace cannot be pinned inside itself, so the pin must not spread to it.
2. A forked child unshares, makes everything a slave, covers the unified hierarchy by an empty tmpfs where v1 controllers are, says so.
3. We, still in the host's namespace, bind the child's /proc/PID/ns/mnt on the pin. From here on it is complete.
4. We enter it by setns(2). The child ends.

Rules: the kernel lets a process change its mount namespace only while no thread shares its file system state, so `enter` comes before
any thread starts (EINVAL otherwise). `leave_pin` may come with threads running: it works in a thread that unshares that state first.
Sources: mount_namespaces(7), setns(2), unshare(2), Documentation/filesystems/sharedsubtree.rst.
"""

import errno
import os
import threading
from collections.abc import Callable
from typing import Final

from isopod import _core
from isopod.world.host import cgroups, libc
from isopod.world.host.mountinfo import at_and_below, read_own, self_bind_at, topmost_at

OWN_NAMESPACE: Final = "/proc/self/ns/mnt"
_READY: Final = b"ready"
_COVER_BYTES: Final = 16 << 20
_REPORT_BYTES: Final = 4096


def enter(pin: str) -> int:
    """Enter the namespace pinned at `pin`, making it if there is none.

    Args:
        pin: An absolute path, in a folder that holds nothing to be shared with other namespaces.

    Returns:
        A descriptor of the namespace left behind, for `leave_pin`; the caller closes it.

    Raises:
        OSError: EINVAL if the process has threads; else what a mount call said.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError(errno.EINVAL, "a process with threads cannot change its mount namespace", pin)
    host_fd = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not is_pinned(pin):
            _isolate_folder(os.path.dirname(pin))
            os.close(os.open(pin, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            _make_pinned(pin)
        fd = os.open(pin, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _core.enter_mount_namespace(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.close(host_fd)
        raise
    return host_fd


def is_pinned(pin: str) -> bool:
    """Return whether a namespace is pinned at `pin`, seen from the current one."""
    found = topmost_at(read_own(), pin)
    return found is not None and found.kind == "nsfs"


def leave_pin(pin: str, host_fd: int | None) -> None:
    """Undo in the host's namespace what `enter` did there: pin, folder's bind, file. Blocking; whoever is inside stays inside.

    Args:
        pin: What was given to `enter`.
        host_fd: What `enter` returned; None if this process never entered and is in the host's namespace itself.
    """
    if host_fd is None:
        _unpin(pin)
    else:
        _call_in_namespace(host_fd, lambda: _unpin(pin))


def unmount_tree(target: str) -> None:
    """Unmount all at and under `target`, deepest first; what is busy is detached."""
    for mount in at_and_below(read_own(), target):
        _unmount(mount.target)


def _unmount(target: str) -> None:
    try:
        _core.unmount(target, False)
    except OSError as error:
        if error.errno == errno.EBUSY:
            _core.unmount(target, True)
        elif error.errno not in (errno.EINVAL, errno.ENOENT):  # it went with another one meanwhile
            raise


def _isolate_folder(folder: str) -> None:
    if self_bind_at(read_own(), folder) is None:
        _core.bind_mount(folder, folder)
    _core.make_private(folder)


def _make_pinned(pin: str) -> None:
    """Make a namespace and pin it.

    The kernel refuses (EINVAL) to bind a namespace that is not younger than the one it is bound in, judged by their numbers. Since
    Linux 6.18 each CPU hands out numbers from a block of its own, so a namespace made on another CPU than ours was can count as older.
    One made on the same CPU never does: hence one attempt on each. Below a machine's first namespace the first attempt suffices.
    """
    for cpu in (None, *sorted(os.sched_getaffinity(0))):
        if _pin_new(pin, cpu):
            return
    raise OSError(errno.EINVAL, "the kernel refuses to pin a mount namespace", pin)


def _pin_new(pin: str, cpu: int | None) -> bool:
    """Fork the child that makes a namespace on a CPU (None: any), and pin it; False if it counts as older than ours."""
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    hold_read, hold_write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(hold_write)
        _be_first_inside(report_write, hold_read, cpu)
    os.close(report_write)
    os.close(hold_read)
    try:
        report = os.read(report_read, _REPORT_BYTES)
        if report != _READY:
            number, _, why = report.decode(errors="replace").partition(" ")
            raise OSError(int(number or errno.ECHILD), why or "the child that makes the mount namespace died", pin)
        return _bind_younger(f"/proc/{child}/ns/mnt", pin)
    finally:
        os.close(report_read)
        os.close(hold_write)
        os.waitpid(child, 0)


def _bind_younger(namespace: str, pin: str) -> bool:
    try:
        _core.bind_mount(namespace, pin)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _be_first_inside(report_fd: int, hold_fd: int, cpu: int | None) -> None:
    """Be the child: make the namespace, report, and live until the parent closes its end (or dies). Never returns."""
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        _core.unshare_mounts()
        _core.make_slave_recursive("/")
        layout = cgroups.read_layout()
        if layout.mode == "hybrid" and layout.unified is not None:
            unmount_tree(layout.unified)
            # A cover of our own: crun makes folders there, which would else stay on the host's file system, out of everybody's sight.
            _core.mount_tmpfs(layout.unified, _COVER_BYTES)
        os.write(report_fd, _READY)
        os.read(hold_fd, 1)
    except OSError as error:
        os.write(report_fd, f"{error.errno or errno.EIO} {error.strerror}".encode()[:_REPORT_BYTES])
    finally:
        os._exit(0)


def _unpin(pin: str) -> None:
    folder = os.path.dirname(pin)
    while is_pinned(pin):
        _core.unmount(pin, True)
    while self_bind_at(read_own(), folder) is not None:
        _core.unmount(folder, True)
    try:
        os.unlink(pin)
    except FileNotFoundError:
        return


def _call_in_namespace(namespace_fd: int, call: Callable[[], None]) -> None:
    """Run `call` in a mount namespace, in a thread of its own that ends with it."""
    failures: list[OSError] = []

    def work() -> None:
        try:
            libc.unshare_file_system_state()
            _core.enter_mount_namespace(namespace_fd)
            call()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="isopod-unpin")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
