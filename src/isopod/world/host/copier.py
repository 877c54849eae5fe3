"""copier: the program that packs and unpacks trees beside the node, one process for each copy: `main REQUEST`, a JSON object.

It is what `Processes.own_program("copier")` names. A copy may wait on a dead file system, or meet a container that harms: the node then
ends the process, and all that was mounted for it goes with it.

    {"op": "look", "path": P, "follow": B}       says {"ok": {"kind", "path", "mode", "n_bytes"}}
    {"op": "archive", "path": P}                 says {"ok": {}}, writes the archive, ends with 0; a failure midway is said after that
    {"op": "extract", "path": P}                 reads an archive, says {"ok": {}}

each with "root": {"pid": N, "ticks": T}, what that very process has as its root, or {"folder": P, "binds": [[SOURCE, TARGET, READ_ONLY]]},
a folder, in which each source is shown at its target, for this process alone. What is said is a line each, {"error": {"code", "message"}}
for what went wrong ("not_found", "invalid" or "failed"). The descriptors: $_COPY_SAYS, $_COPY_OUT, $_COPY_IN.

Sources: proc(5), mount(2), mount_namespaces(7).
"""

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from isopod.world.host import libc, trees

_ROOT: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_TICKS_FIELD: Final = 19
"""Field 22 of /proc/PID/stat, counted behind the name."""


def main(arguments: Sequence[str]) -> int:
    """Do what the request says; return the exit status."""
    request = json.loads(arguments[0])
    try:
        answer = _carry_out(request)
    except trees.TreeError as error:
        return _refuse(error.code, str(error))
    except OSError as error:
        # While an archive is unpacked, something missing is no answer to what was asked.
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and request["op"] != "extract"
        what = f"{_shown(error.filename)}: " if error.filename else ""
        return _refuse("not_found" if missing else "failed", f"{what}{error.strerror}")
    if answer is not None:
        _say({"ok": answer})
    return 0


def _carry_out(request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    root = _open_root(request["root"])
    path = str(request["path"])
    match request["op"]:
        case "look":
            return trees.look(root, path, follow=bool(request["follow"]))._asdict()
        case "archive":
            if trees.look(root, path, follow=False).kind == "nothing":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            _say({"ok": {}})
            with open(int(os.environ["_COPY_OUT"]), "wb", buffering=trees.CHUNK_BYTES) as out:
                trees.pack(root, path, out)
            return None
        case "extract":
            try:
                kind = trees.look(root, path, follow=True).kind
            except (FileNotFoundError, NotADirectoryError):
                kind = "nothing"
            if kind != "folder":
                raise trees.TreeError("not_found" if kind == "nothing" else "invalid", f"{path}: no such folder")
            with open(int(os.environ["_COPY_IN"]), "rb", buffering=0) as source:
                trees.unpack(root, path, source)
                while source.read(trees.CHUNK_BYTES):  # what follows the archive's end is nothing
                    pass
            return {}
        case op:
            raise trees.TreeError("invalid", f"no operation {op!r}")


def _open_root(root: Mapping[str, Any]) -> int:
    if "pid" in root:
        fd = os.open(f"/proc/{root['pid']}/root", _ROOT)
        # Looked at after the root was opened: a number that is another process's by now is found out.
        with open(f"/proc/{root['pid']}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[_TICKS_FIELD])
        if ticks != root["ticks"]:
            raise ProcessLookupError(errno.ESRCH, "it has ended", None)
        return fd
    if root["binds"]:
        _bind(str(root["folder"]), root["binds"])
    return os.open(str(root["folder"]), _ROOT)


def _bind(folder: str, binds: Sequence[tuple[str, str, bool]]) -> None:
    """Show sources below a folder, in mounts of our own."""
    libc.unshare_mounts()
    root = os.open(folder, _ROOT)
    for source, target, read_only in binds:
        with suppress(FileNotFoundError, NotADirectoryError):  # nobody has ever started it: its place is not made yet
            libc.bind_mount(source, f"/proc/self/fd/{libc.open_in_root(root, target, os.O_PATH)}")
            if read_only:  # opened anew, it is what was just mounted
                libc.make_read_only(f"/proc/self/fd/{libc.open_in_root(root, target, os.O_PATH)}")
    os.close(root)


def _refuse(code: str, message: str) -> int:
    _say({"error": {"code": code, "message": message}})
    return 1


def _say(answer: Mapping[str, Any]) -> None:
    os.write(int(os.environ["_COPY_SAYS"]), json.dumps(answer).encode() + b"\n")


def _shown(path: str | bytes | int) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
