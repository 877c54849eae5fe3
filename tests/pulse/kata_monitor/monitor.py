"""Monitor: a kata-monitor that was built elsewhere, run over a stage's sandboxes, in mounts of its own.

kata-monitor knows two roots and no other: /run/vc/sbs and /run/kata. The stage's are mounted there, for it alone.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from isopod.testing import wait_for_condition_with_backoff
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.pulse.fake_cri import GrpcCri
from tests.pulse.kata_monitor.scenes import Scene
from tests.pulse.kata_monitor.stage import Asker, Stage

START_S: Final = 60.0
LABELS: Final = "kata_shim_threads"
"""A family of every sandbox that has a pod."""
_MOUNT: Final = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/vc/sbs /run/kata
mount --bind "$1" /run/vc/sbs
mount --bind "$2" /run/kata
exec "$3" -listen-address "$4" -runtime-endpoint "$5" -log-level debug
"""


def missing() -> str:
    """Return why it cannot be run here, "" if it can."""
    if os.geteuid() != 0:
        return "kata-monitor's roots can be mounted by root alone"
    return "" if shutil.which("unshare") else "no unshare here"


def version(binary: str) -> dict[str, str]:
    """Return what it says of itself."""
    said = subprocess.run([binary, "--version"], capture_output=True, check=True, timeout=START_S, text=True).stdout
    return {name.strip().lower(): value for name, value in re.findall(r"^ (.*):\t(.*)$", said, re.MULTILINE)}


class Monitor:
    """A kata-monitor over a stage, with a runtime's socket. Use it in an `async with`.

    Args:
        world: The host's.
        binary: The program.
        scene: What is on the stage.
        stage: It stands.
        folder: For its log and the runtime's socket.
    """

    def __init__(self, world: World, binary: str, scene: Scene, *, stage: Stage, folder: str) -> None:
        self._world = world
        self._binary = binary
        self._scene = scene
        self._stage = stage
        self._cri = GrpcCri(f"{folder}/cri.sock")
        self._cri.behaviour.pods = list(scene.pods)
        self._log = Path(f"{folder}/kata-monitor.log")
        self._process: subprocess.Popen[bytes] | None = None
        self.asker: Asker

    async def __aenter__(self) -> Self:
        address = TcpAddress("127.0.0.1", _free_port())
        self.asker = Asker(self._world, address)
        try:
            await self._cri.start()
            self._start(address)
            await wait_for_condition_with_backoff(self._is_ready, what="kata-monitor knows all sandboxes and pods", timeout_s=START_S)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._end()

    def _start(self, address: TcpAddress) -> None:
        roots = self._stage.roots
        program = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT, "sh"]
        told = [roots["go"], roots["rust"], self._binary, f"{address.host}:{address.port}", self._cri.path]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*program, *told], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        if not _listens(self.asker.port):
            return False
        there = {each.id for each in self._scene.sandboxes}
        if {*(await self.asker.text("/sandboxes")).split()} != there:
            return False
        wanted = [pod.id for pod in self._scene.pods if pod.id in there]
        if not wanted:
            return True
        shown = await self.asker.text(f"/metrics?filter_family={LABELS}")
        return all(re.search(rf'sandbox_id="{identifier}",cri_uid="[^"]', shown) for identifier in wanted)

    async def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        await self.asker.close()
        await self._cri.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
