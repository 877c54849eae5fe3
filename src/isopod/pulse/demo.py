"""Demo: sandboxes that are made up, each served on a socket as its shim would, for a first look at the agent.

Their figures follow the clock: sandbox n uses n tenths of a processor (at most one), and moves bytes in proportion; counters only grow.
The folder belongs to the demo and goes with it. This is not a test double: tests have their own, which also misbehave.
"""

import asyncio
from functools import partial
from types import TracebackType
from typing import Final, Self

from isopod.net.http import HttpServer, Request, Response
from isopod.net.http.messages import HttpError
from isopod.pulse.model import SOCKET_NAME, Pod
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.network import UnixAddress
from isopod.world.world import World

MEMORY_BYTES: Final = 512 << 20
_TEXT: Final = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)


class Demo:
    """Use as `async with Demo(world, 3) as demo`.

    Args:
        world: Where the sockets are.
        n_sandboxes: How many.
        folder: Where its folder is made.
    """

    def __init__(self, world: World, n_sandboxes: int, *, folder: str = "/tmp") -> None:  # noqa: S108 - made with a name nobody guesses, for its owner alone
        self.root = f"{folder}/isopod-demo-{world.random.token_hex(6)}"
        """The folder with one folder for each sandbox."""
        self.pods = {identifier_of(number): pod_of(number) for number in range(1, n_sandboxes + 1)}
        """Whose they are."""
        self._world = world
        self._n_sandboxes = n_sandboxes
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._servers: list[HttpServer] = []

    async def __aenter__(self) -> Self:
        try:
            await self._world.disk.make_directory(self.root)
            for number in range(1, self._n_sandboxes + 1):
                await self._world.disk.make_directory(f"{self.root}/{identifier_of(number)}")
                await self._serve(number)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()

    async def _close(self) -> None:
        for server in self._servers:
            await server.close()
        await self._world.disk.remove_tree(self.root)

    async def _serve(self, number: int) -> None:
        logger = Logger(lambda _: None, self._world.clock)
        server = HttpServer(self._world, partial(self._answer, number), logger=logger, metrics=Registry())
        self._servers.append(server)
        await server.listen(UnixAddress(f"{self.root}/{identifier_of(number)}/{SOCKET_NAME}"))

    def _answer(self, number: int, request: Request) -> Response:
        if request.path == "/agent-url":
            return Response(200, _TEXT, f"unix://{self.root}/{identifier_of(number)}/agent.sock".encode())
        if request.path != "/metrics":
            raise HttpError(404)
        return Response(200, _TEXT, body(number, self._loop.time() - self._began_s + 60.0))


def identifier_of(number: int) -> str:
    """Return the id of a sandbox, which are counted from 1."""
    return f"demo-{number:04}"


def pod_of(number: int) -> Pod:
    """Return whose a sandbox is: five to a namespace."""
    return Pod(f"00000000-0000-4000-8000-{number:012}", f"app-{number}", f"team-{(number + 4) // 5}")


def body(number: int, up_s: float) -> bytes:
    """Return what the shim of a sandbox says.

    Args:
        number: Which, from 1.
        up_s: How long it has been up, in seconds.
    """
    busy = min(number, 10) / 10
    user_ms, system_ms = int(up_s * busy * 800), int(up_s * busy * 200)
    n_bytes = int(up_s * busy * 1e6)
    free = MEMORY_BYTES - min(MEMORY_BYTES // 2, number << 24)
    cpu = {"user": user_ms, "nice": 0, "system": system_ms, "idle": int(up_s * 1000) - user_ms - system_ms, "iowait": 0}
    memory = {"mem_total": MEMORY_BYTES, "mem_free": free, "mem_available": free, "buffers": 1 << 20, "cached": 16 << 20}
    memory |= {"anon_pages": 8 << 20, "inactive_file": 4 << 20, "active_file": 8 << 20, "swap_total": 0, "swap_free": 0, "mapped": 2 << 20}
    network = {"recv_bytes": n_bytes, "recv_packets": n_bytes // 1400, "sent_bytes": n_bytes // 4, "sent_packets": n_bytes // 2800}
    disk = {"reads": n_bytes >> 14, "sectors_read": n_bytes >> 9, "writes": n_bytes >> 15, "sectors_written": n_bytes >> 10}
    families = (
        _family(
            "kata_guest_cpu_time",
            "Time of the guest's processors in milliseconds.",
            {'cpu="total",item="%s"': cpu, 'cpu="0",item="%s"': cpu},
        ),
        _family("kata_guest_meminfo", "Memory of the guest in bytes.", {'item="%s"': memory}),
        _family("kata_guest_netdev_stat", "What the guest's interfaces carried.", {'interface="eth0",item="%s"': network}),
        _family("kata_guest_diskstat", "What the guest's disks did.", {'disk="vda",item="%s"': disk}),
        _family("kata_guest_load", "Load of the guest.", {'item="%s"': {"load1": busy, "load5": busy, "load15": busy}}),
        _family("kata_guest_tasks", "Tasks of the guest.", {'item="%s"': {"cur": 1, "max": 20 + number}}),
    )
    shim = f"# HELP kata_shim_threads Threads of the shim.\n# TYPE kata_shim_threads gauge\nkata_shim_threads {number % 5 + 8}\n"
    return "".join((*families, shim)).encode()


def _family(name: str, help_text: str, samples: dict[str, dict[str, int]] | dict[str, dict[str, float]]) -> str:
    lines = [f"{name}{{{labels % item}}} {value}\n" for labels, values in samples.items() for item, value in values.items()]
    return f"# HELP {name} {help_text}\n# TYPE {name} gauge\n{''.join(lines)}"
