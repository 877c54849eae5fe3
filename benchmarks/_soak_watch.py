"""What the soak measures of processes from outside, and the arithmetic of its verdict."""

import http.client
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from benchmarks._soak_shared import Look

ADMIN_S: Final = 30.0
CLOSING_S: Final = 0.1
"""Between asking and counting descriptors: the server may still have to close the connection it was asked on."""
MIB: Final = 1 << 20
_KIB: Final = 1024
_PARENT, _STARTED = 1, 19
"""Fields of /proc/PID/stat behind the name."""


class Member(NamedTuple):
    """A process, told from a later one of the same number by its start."""

    pid: int
    started: int


class Process(msgspec.Struct, frozen=True):
    """One look at a process from outside. Sizes are bytes."""

    pid: int
    rss: int
    pss: int
    n_descriptors: int
    descriptors: Mapping[str, int]
    """By what they are: "socket", "anon_inode:[eventpoll]", a path."""
    n_threads: int


class Sample(msgspec.Struct, frozen=True):
    """One look at the whole program, while it is under load or idle."""

    at_s: float
    processes: tuple[Process, ...]
    looks: tuple[Look, ...]
    members: tuple[Member, ...]
    """All processes of the program, the first one first."""

    def process(self, pid: int) -> Process | None:
        """Return one of them."""
        return next((process for process in self.processes if process.pid == pid), None)


def family(pid: int) -> list[Member]:
    """Return a process and all below it, zombies too: nobody waited for them. Sessions and groups do not tell: shards have their own."""
    parents: dict[int, list[Member]] = {}
    found: list[Member] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            member = Member(int(entry.name), int(fields[_STARTED]))
            parents.setdefault(int(fields[_PARENT]), []).append(member)
            if member.pid == pid:
                found.append(member)
    for member in found:  # grows while it is gone through
        found += parents.get(member.pid, [])
    return found


def lives(member: Member) -> bool:
    """Return whether that very process is still there, be it as a zombie."""
    fields = _fields(member.pid)
    return bool(fields) and int(fields[_STARTED]) == member.started


def process(pid: int) -> Process | None:
    """Look at a process; None if it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        sizes = _sizes(folder / "smaps_rollup")
        n_threads = len(os.listdir(folder / "task"))
        kinds: dict[str, int] = {}
        for name in os.listdir(folder / "fd"):
            try:
                kind = os.readlink(folder / "fd" / name)
            except OSError:
                continue
            kind = kind.partition(":[")[0] if kind.startswith(("socket:", "pipe:")) else kind
            kinds[kind] = kinds.get(kind, 0) + 1
    except OSError:
        return None
    return Process(pid, sizes.get("Rss", 0), sizes.get("Pss", 0), sum(kinds.values()), kinds, n_threads)


def looks(folder: Path, *, deep: bool) -> tuple[Look, ...]:
    """Ask the server what it holds."""
    connection = _Unix(f"{folder}/admin.sock")
    try:
        connection.request("GET", "/looks?deep" if deep else "/looks", headers={"connection": "close"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise OSError(f"admin answered {answer.status}: {body[:200]!r}")
        return tuple(msgspec.json.decode(body, type=list[Look]))
    finally:
        connection.close()


def sample(folder: Path, pid: int, at_s: float, *, deep: bool) -> Sample:
    """Look at the program from inside and outside."""
    seen = looks(folder, deep=deep)
    time.sleep(CLOSING_S)
    found = [process(each) for each in sorted({look.pid for look in seen})]
    return Sample(at_s, tuple(each for each in found if each is not None), seen, tuple(family(pid)))


def slope_per_min(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of (seconds, value) points per minute, as the median of the slopes between all pairs (Theil and Sen): a few samples
    that caught large answers in buffers do not move it, as they would move a least-squares line."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for number, a in enumerate(points) for b in points[number + 1 :] if b[0] > a[0]]
    return statistics.median(slopes) * 60 if slopes else 0.0


def counts(look: Look, found: Process | None) -> dict[str, int]:
    """Return what must be exactly as it was before, of one process."""
    return {
        "descriptors": 0 if found is None else found.n_descriptors,
        "tasks": len(look.tasks),
        "connections": look.connections,
        "websockets": look.websockets,
        "rpc connections": look.rpc_connections,
        "calls open": look.calls_open,
        "adopted": look.adopted,
        "shard calls": look.shard_calls,
    }


def changed(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return by how much counts have changed, what grew most first."""
    names = dict.fromkeys((*after, *before))
    differences = {name: after.get(name, 0) - before.get(name, 0) for name in names}
    return {name: difference for name, difference in sorted(differences.items(), key=lambda item: -item[1]) if difference}


def grown(before: Mapping[str, int], after: Mapping[str, int], *, least: int) -> dict[str, int]:
    """Return by how much counts have grown, those by `least` and more, the most first."""
    return {name: difference for name, difference in changed(before, after).items() if difference >= least}


class _Unix(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("soak", timeout=ADMIN_S)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ADMIN_S)
        self.sock.connect(self._path)


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _sizes(path: Path) -> dict[str, int]:
    sizes = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines()[1:]:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) > 1 and words[1] == "kB":
            sizes[name] = int(words[0]) * _KIB
    return sizes
