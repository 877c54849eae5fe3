"""Reading /proc/PID/mountinfo: pure functions over its text. Source: proc(5)."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

OWN_MOUNTINFO: Final = "/proc/thread-self/mountinfo"
"""Of the calling thread: one thread may stand in another namespace than the rest."""
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    """The folder of the file system that is mounted; "mnt:[...]" or "net:[...]" for a pinned namespace."""
    target: str
    is_shared: bool
    kind: str
    source: str
    super_options: tuple[str, ...]


def parse(text: str) -> list[Mount]:
    """Return the mounts of a mountinfo text, in its order."""
    return [_parse_line(line) for line in text.splitlines() if line]


def read_own() -> list[Mount]:
    """Return the mounts of this process's namespace."""
    with open(OWN_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        return parse(file.read())


def is_below(path: str, folder: str) -> bool:
    """Return whether `path` is `folder` or lies under it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def at_and_below(mounts: Sequence[Mount], target: str) -> list[Mount]:
    """Return the mounts at and under `target` in the order in which they can be unmounted: deepest first, last mounted first."""
    found = [(mount.target.count("/"), index, mount) for index, mount in enumerate(mounts) if is_below(mount.target, target)]
    return [mount for _, _, mount in sorted(found, key=lambda row: row[:2], reverse=True)]


def topmost_at(mounts: Iterable[Mount], target: str) -> Mount | None:
    """Return the mount that is seen at `target`, None if nothing is mounted there."""
    found = [mount for mount in mounts if mount.target == target]
    covered = [mount.parent_id for mount in found]
    return next((mount for mount in reversed(found) if mount.mount_id not in covered), None)


def self_bind_at(mounts: Sequence[Mount], folder: str) -> Mount | None:
    """Return the mount that binds `folder` on itself, None if there is none (another file system mounted there is none)."""
    by_id = {mount.mount_id: mount for mount in mounts}
    for mount in mounts:
        parent = by_id.get(mount.parent_id)
        if mount.target == folder and parent is not None and parent.device == mount.device and mount.root == _path_in(parent, folder):
            return mount
    return None


def _path_in(parent: Mount, folder: str) -> str:
    """Return the path that `folder` has inside the file system of the mount it lies on."""
    return os.path.normpath(os.path.join(parent.root, os.path.relpath(folder, parent.target)))


def _parse_line(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    kind, source, super_options = after.split(" ")[:3]
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=fields[2],
        root=_unescape(fields[3]),
        target=_unescape(fields[4]),
        is_shared=any(field.startswith("shared:") for field in fields[6:]),
        kind=kind,
        source=_unescape(source),
        super_options=tuple(super_options.split(",")),
    )


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
