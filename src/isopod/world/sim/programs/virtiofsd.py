"""The simulated /usr/lib/qemu/virtiofsd, which serves a folder to the guest that QEMU connects, and the unshare(1) that comes before it.

isopod starts it as `unshare --mount -- sh -c SCRIPT sh SOURCE PLACE SOCKET FILE`: the script shows the source at PLACE in a mount namespace
of its own, then becomes virtiofsd on PLACE. Of the script only that outcome is known here. The daemon ends when QEMU lets go of it. Not
modelled: the file protocol: a guest's kernel sees the folder as the machine does.
Source: virtiofsd of QEMU 7.2, unshare(1).
"""

import asyncio
from typing import Final

from isopod.world.sim.machine import Machine, SharedFolder
from isopod.world.sim.programs.sockets import serve
from isopod.world.sim.programs.stdio import write_error
from isopod.world.sim.table import SimProcess

PROGRAM: Final = "/usr/lib/qemu/virtiofsd"
_N_WORDS: Final = 11
_START_S: Final = (2e-3, 10e-3)


async def unshare(machine: Machine, process: SimProcess) -> int:
    """Be unshare, then the shell, then virtiofsd."""
    words = process.argv
    if len(words) != _N_WORDS or words[1:3] != ("--mount", "--") or PROGRAM not in words[5]:
        await write_error(process, b"unshare: the simulation does not know this script\n")
        return 1
    source, place, socket, file = words[-4:]
    folder = source.rpartition("/")[0] if file else source
    process.argv = (PROGRAM, f"--socket-path={socket}", "-o", f"source={place}")
    process.program = machine.view.node(PROGRAM).inode
    return await _serve(machine, process, f"{process.cwd}/{socket}", folder or "/")


async def virtiofsd(machine: Machine, process: SimProcess) -> int:
    """Be virtiofsd, started without a script."""
    options = dict(word.removeprefix("--").partition("=")[::2] for word in process.argv[1:])
    return await _serve(machine, process, options.get("socket-path", ""), options.get("source", ""))


async def _serve(machine: Machine, process: SimProcess, path: str, folder: str) -> int:
    await asyncio.sleep(machine.chance.uniform(*_START_S))
    try:
        machine.view.folder(folder)
        await serve(machine, path)
    except OSError as error:
        await write_error(process, f"virtiofsd: {error.filename}: {error.strerror}\n".encode())
        return 1
    machine.shares[path] = SharedFolder(folder, process)
    process.on_exit.append(lambda: _forget(machine, path))
    await asyncio.get_running_loop().create_future()
    return 0


def _forget(machine: Machine, path: str) -> None:
    machine.shares.pop(path, None)
