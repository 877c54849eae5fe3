"""The simulated /usr/bin/cp, of one file to another name: holes stay holes.

Errors have the words and the status of GNU coreutils 9.1. A copy that fails leaves what it had written.
"""

import asyncio
import os
from typing import Final

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.stdio import write_error
from isopod.world.sim.table import SimProcess

_WORK_S: Final = (1e-3, 5e-3)
_BYTES_PER_S: Final = 1 << 30


async def cp(machine: Machine, process: SimProcess) -> int:
    """Be cp."""
    words = [word for word in process.argv[1:] if not word.startswith("-")]
    if len(words) != 2:
        await write_error(process, b"cp: missing file operand\n")
        return 1
    source, target = words
    try:
        inode = machine.view.open_file(source)
        machine.disk.faults.check_read(inode, source, 0, inode.content.size)
        data, size = inode.content.head(), inode.content.size
        await asyncio.sleep(machine.chance.uniform(*_WORK_S) + len(data) / _BYTES_PER_S)
        made = machine.view.open_file(target, create_mode=0o644)
        made.resize(0)
        machine.disk.faults.check("write", target)
        made.write_at(0, data)
        made.resize(size)
    except OSError as error:
        await write_error(process, f"cp: cannot copy '{source}' to '{target}': {os.strerror(error.errno or 0)}\n".encode())
        return 1
    return 0
