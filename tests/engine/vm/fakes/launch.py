"""Start what a driver planned, as the shim would: descriptors 3, 4, ... , the planned folder and environment, the console in a file.

Not the shim: nothing is kept alive, logged or steered. Who starts one ends it (`with`).
"""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Final

from isopod.engine.vm.machine import Plan
from isopod.world.world import World

END_S: Final = 30.0
FIRST_FD: Final = 3


@contextlib.contextmanager
def launched(plan: Plan, console: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the VMM of a plan until the block ends.

    Args:
        plan: Of a driver. Files of the kind "listen" only.
        console: Where its output goes.
    """
    sockets = [_listener(file.target) for file in plan.files if file.kind == "listen"]
    inner = "import os,sys;fds=[int(n) for n in sys.argv[1].split(',') if n];[os.dup2(fd,100+i) for i,fd in enumerate(fds)]"
    inner += ";[os.dup2(100+i,3+i) for i in range(len(fds))];os.closerange(3+len(fds),200);os.execv(sys.argv[2],sys.argv[2:])"
    numbers = ",".join(str(each.fileno()) for each in sockets)
    with open(console, "ab") as output:
        process = subprocess.Popen(
            ["/usr/bin/python3", "-c", inner, numbers, *plan.argv],
            env=plan.env,
            cwd=plan.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[each.fileno() for each in sockets],
            start_new_session=True,
        )
    for each in sockets:
        each.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait(END_S)


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(path)
    listener.listen(16)
    return listener


async def ended(world: World, process: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a VMM that is about to end."""
    identity = world.processes.identify(process.pid)
    if identity is not None:
        async with asyncio.timeout(END_S):
            await world.processes.wait_gone(identity)
    return process.wait(END_S)
