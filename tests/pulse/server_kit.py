"""What the tests of the server share: a store with sandboxes in it, served on either World, and shims that answer as they are told."""

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from isopod.net.http.client import HttpClient
from isopod.net.http.limits import HttpLimits
from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.labels import block, kata_labels
from isopod.pulse.model import Container, Families, Fragment, Kind, Pod, Runtime, Target
from isopod.pulse.own import Facts
from isopod.pulse.policy import PolicyFile
from isopod.pulse.resource import resource
from isopod.pulse.security import LIMITS
from isopod.pulse.server import PulseServer
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimAnswer, ShimClient
from isopod.pulse.store import Store
from isopod.world.errors import IsopodError
from isopod.world.network import Address, ClientTls, TcpAddress, UnixAddress, parse_address
from isopod.world.world import World
from tests.telemetry.kit import Memo

ROOTS = {"/run/vc/sbs": True, "/run/kata": False}
WEB = Pod("0d3b", "web-0", "prod", containers=(Container("c1", "nginx", "docker.io/library/nginx:1"),))
DB = Pod("77aa", "db-0", "prod")
HOSTILE = Pod("u<i>", '"><script>alert(1)</script>\x1b[2J\nID: forged', "a&b")


class Answer(NamedTuple):
    """One whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


class Shims:
    """Stands for the client of shims: answers by socket and path, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, float]] = []
        self.answers: dict[tuple[str, str], ShimAnswer | IsopodError] = {}
        self.gate: asyncio.Event | None = None

    async def get(self, socket: str, path: str, *, timeout_s: float, n_bytes_max: int) -> ShimAnswer:
        """See `ShimClient.get`."""
        self.asked.append((socket, path, timeout_s))
        if self.gate is not None:
            await self.gate.wait()
        answer = self.answers[socket, path]
        if isinstance(answer, IsopodError):
            raise answer
        assert len(answer.body) <= n_bytes_max
        return answer


class Rig:
    """A server over a store.

    Args:
        world: The ports.
        facts: What the other parts say.
        client: Asks shims; None for `shims`.
        limits: Of the server.
        policy: Its file; who uses it opens it.
        origins: Who gave settings.
        **settings: Of the agent.
    """

    def __init__(
        self,
        world: World,
        *,
        facts: Facts | None = None,
        client: ShimClient | None = None,
        limits: HttpLimits = LIMITS,
        policy: PolicyFile | None = None,
        origins: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.world = world
        self.memo = Memo(world.clock)
        self.shims = Shims()
        self.facts = facts or Facts(roots=ROOTS)
        self.settings = PulseSettings(**({"listen": "127.0.0.1:0"} | settings))
        self.store = Store(asyncio.get_running_loop().time, container_labels=cadvisor_labels, resource=resource, epoch="test")
        self.server = PulseServer(
            world,
            self.settings,
            self.store,
            client or self.shims,
            facts=lambda: self.facts,
            policy=policy,
            origins=origins,
            logger=self.memo.logger,
            limits=limits,
        )
        self.client = HttpClient(world, decompresses=False)
        self.address: Address = TcpAddress("", 0)
        self.scheme = "http"

    async def __aenter__(self) -> Self:
        try:
            self.address = parse_address(await self.server.start())
        except BaseException:
            await self.server.stop()
            await self.client.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.stop()

    async def trust(self, tls: ClientTls) -> None:
        """Speak TLS from now on."""
        await self.client.close()
        self.client = HttpClient(self.world, tls=tls, decompresses=False)
        self.scheme = "https"

    async def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Send one request; underscores in names of headers stand for dashes."""
        host = "any.example" if isinstance(self.address, UnixAddress) else "localhost"
        port = "" if isinstance(self.address, UnixAddress) else f":{self.address.port}"
        fields = tuple((name.replace("_", "-"), value) for name, value in headers.items())
        answer = await self.client.request(method, f"{self.scheme}://{host}{port}{path}", headers=fields, address=self.address)
        told: dict[str, str] = {}
        for name, value in answer.headers:
            key = name.lower()
            told[key] = f"{told[key]}; {value}" if key in told else value
        return Answer(answer.status, told, await answer.read())

    def add(self, identifier: str, runtime: Runtime = "go", pod: Pod | None = None) -> str:
        """Add a sandbox without figures; return its socket."""
        socket = "" if runtime == "isopod" else f"/run/vc/sbs/{identifier}/shim-monitor.sock"
        self.store.add(Target(identifier, runtime, socket))
        self.store.describe(identifier, pod)
        return socket

    def fill(self, identifier: str, pod: Pod | None = None, *, load: float = 0.5, n_lines: int = 1, runtime: Runtime = "go") -> str:
        """Add a sandbox with a family of each kind, or a container with a figure; return its socket."""
        socket = self.add(identifier, runtime, pod)
        kata = {} if runtime == "isopod" else kata_families(identifier, pod, load=load, n_lines=n_lines)
        labels = block(cadvisor_labels(identifier, pod))
        names = ("container_memory_usage_bytes", "container_memory_working_set_bytes")
        containers = {name: Fragment("gauge", b"Memory.", b"%b{%b} 4096\n" % (name.encode(), labels), 1) for name in names}
        self.store.replace(identifier, kata, containers=containers, n_bytes=99, took_s=0.002, raw=b"guest_load{} 0.5\n")
        return socket


def kata_families(identifier: str, pod: Pod | None = None, *, load: float = 0.5, n_lines: int = 1) -> Families:
    """Return a gauge, a counter and a histogram of a sandbox."""
    labels = block(kata_labels(identifier, pod))

    def family(name: str, kind: Kind, *samples: tuple[str, str, float]) -> Fragment:
        lines = [b"%b%b{%b%b} %b\n" % (name.encode(), end.encode(), labels, more.encode(), b"%g" % value) for end, more, value in samples]
        return Fragment(kind, b"A %b." % kind.encode(), b"".join(lines), len(lines))

    took = "kata_shim_rpc_durations_histogram_milliseconds"
    return {
        "kata_agent_scrape_count": family("kata_agent_scrape_count", "counter", ("", "", 3)),
        "kata_guest_load": family("kata_guest_load", "gauge", *(("", f',item="load{n}"', load) for n in range(n_lines))),
        took: family(took, "histogram", ("_bucket", ',le="1"', 1), ("_bucket", ',le="+Inf"', 2), ("_sum", "", 3), ("_count", "", 2)),
    }


def values(text: str) -> dict[str, float]:
    """Return the figures of an exposition by series."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line and not line.startswith("#")}
