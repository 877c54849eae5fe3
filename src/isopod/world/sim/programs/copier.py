"""The simulated helper that packs and unpacks trees beside the node: the twin of `isopod.world.host.copier`, whose header says what it is
asked and what it answers.

Archives are made and unpacked at once, in the moment when all of them is there, and never compressed; a bind whose place is missing is
left out, as there.
"""

import asyncio
import errno
import os
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from isopod.world.sim.machine import Machine
from isopod.world.sim.pipes import ReadEnd, WriteEnd
from isopod.world.sim.programs import guest_files
from isopod.world.sim.programs.container import container_of
from isopod.world.sim.table import SimProcess
from isopod.world.sim.view import View, fail

_WORK_S: Final = (5e-3, 40e-3)
_PIECE_BYTES: Final = 64 << 10


async def copier(machine: Machine, process: SimProcess) -> int:
    """Be the helper."""
    request = msgspec.json.decode(process.argv[-1])
    await asyncio.sleep(machine.chance.uniform(*_WORK_S))
    try:
        answer = await _carry_out(machine, process, request)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        code = "invalid" if error.errno in (errno.EINVAL, errno.ELOOP) else "not_found" if missing else "failed"
        await _say(process, {"error": {"code": code, "message": f"{error.filename}: {os.strerror(error.errno or 0)}"}})
        return 1
    if answer is not None:
        await _say(process, {"ok": answer})
    return 0


async def _carry_out(machine: Machine, process: SimProcess, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    path = str(request["path"])
    if request["op"] == "look":
        return guest_files.look(_view(machine, request["root"]), path, follow=bool(request["follow"]))
    if request["op"] == "archive":
        _, data = guest_files.pack(_view(machine, request["root"]), path)
        await _say(process, {"ok": {}})
        out = process.pipes["_COPY_OUT"]
        assert isinstance(out, WriteEnd)
        for start in range(0, len(data), _PIECE_BYTES):
            await out.write(data[start : start + _PIECE_BYTES])
        return None
    _view(machine, request["root"]).folder(path)
    source, data = process.pipes["_COPY_IN"], b""
    assert isinstance(source, ReadEnd)
    while piece := await source.read():
        data += piece
    guest_files.extract(_view(machine, request["root"]), path, data)
    return {}


def _view(machine: Machine, root: Mapping[str, Any]) -> View:
    """Return what a process sees, or a folder as a root."""
    if "pid" in root:
        process = machine.table.lately(int(root["pid"]))
        if process is None or not process.is_alive or process.identity.started_ticks != root["ticks"]:
            fail(errno.ESRCH, f"/proc/{root['pid']}/root")
        return container_of(process).view
    view = View(machine.view.folder(str(root["folder"])))
    for source, target, read_only in root["binds"]:
        if view.find(target) is not None:
            view.mount(target, machine.view.node(source))
            if read_only:
                view.make_read_only(target)
    return view


async def _say(process: SimProcess, answer: Mapping[str, Any]) -> None:
    says = process.pipes["_COPY_SAYS"]
    assert isinstance(says, WriteEnd)
    await says.write(msgspec.json.encode(answer) + b"\n")
