"""The simulated /usr/sbin/mke2fs: makes an ext4 file system in a file, empty or with the tree of a folder (`-d`).

Legal behaviours: a seeded delay; a file that is smaller than the size asked for is made longer, sparse. Errors have mke2fs' status 1.
Source: mke2fs(8), e2fsprogs 1.47.
"""

import asyncio
import errno
import os
from collections.abc import Sequence
from typing import Final

from isopod.world.disk import UnpackLimits
from isopod.world.sim import layers
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.guest_disks import make_ext4
from isopod.world.sim.programs.stdio import write_error
from isopod.world.sim.table import SimProcess

_VALUES: Final = tuple("-" + letter for letter in "tEOmLbINUTiJdgGeoMCrl")
_WORK_S: Final = (5e-3, 30e-3)
_BLOCK_BYTES: Final = 1024
_UNITS: Final = {"": _BLOCK_BYTES, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


async def mke2fs(machine: Machine, process: SimProcess) -> int:
    """Be mke2fs."""
    await asyncio.sleep(machine.chance.uniform(*_WORK_S))
    options, words = _parse(process.argv[1:])
    if not words:
        await write_error(process, b"Usage: mke2fs [-q] [-t fs-type] device [blocks-count]\n")
        return 1
    try:
        inode = machine.view.open_file(words[0], create_mode=0o644 if len(words) > 1 else None)
        n_bytes = _size(words[1]) if len(words) > 1 else inode.content.size
        tree = b""
        if "-d" in options:
            tree = layers.pack(machine.view.folder(options["-d"]).inode, options["-d"], UnpackLimits())[1]
        machine.disk.faults.check("write", words[0])
        make_ext4(inode, max(n_bytes, inode.content.size), tree)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        await write_error(process, f"mke2fs: {os.strerror(number)} while setting up superblock of {words[0]}\n".encode())
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in _VALUES:
            options[word] = rest.pop(0) if rest else ""
        elif not word.startswith("-"):
            words.append(word)
    return options, words


def _size(text: str) -> int:
    digits = text.lower().rstrip("skmgt")
    return int(digits) * _UNITS[text.lower()[len(digits) :]]
