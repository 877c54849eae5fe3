"""A container runtime for tests: what it lists and how it misbehaves is told to it, and it is reached in two ways.

`MemoryCri` is asked by calls, in both Worlds. `GrpcCri` is a real server of grpcio's on a Unix socket, on the host, whose answers are made
from the fields of proto/cri/cri.proto. The bodies of tests do not know which it is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio

from isopod.pulse.cri import Api, Runtime, RuntimeFacts
from isopod.pulse.cri_client import FILE, Messages
from isopod.pulse.model import ContainerStats
from isopod.pulse.pods import ContainerRow, PodRow, Wanted
from isopod.world.errors import Disconnected, PeerError, Unsupported
from isopod.world.world import World

METHODS = ("Version", "ListPodSandbox", "ListContainers", "ListContainerStats")


class Refused(Exception):
    """What a runtime answers instead."""

    def __init__(self, status: str, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.words = words


class Behaviour:
    """What a runtime lists and does."""

    def __init__(self) -> None:
        self.facts = RuntimeFacts("fake", "1.0")
        self.apis: tuple[str, ...] = ("v1", "v1alpha2")
        self.pods: list[PodRow] = []
        self.containers: list[ContainerRow] = []
        self.stats: list[ContainerStats] = []
        self.unknown: tuple[str, ...] = ()
        """Methods that it does not know."""
        self.refusals: dict[str, Refused] = {}
        """What single methods answer instead."""
        self.delays_s: dict[str, float] = {}
        """How slow single methods are."""
        self.hung_pods: tuple[str, ...] = ()
        """Sandboxes of whose containers it does not come to know what they use: nor, before it asked them, the others'."""
        self.failed_pods: tuple[str, ...] = ()
        """Sandboxes that it cannot count: it refuses to tell of all if they are among those asked for."""
        self.hung: tuple[str, ...] = ()
        """Methods that never answer."""
        self.delay_s = 0.0
        self.refusal: Refused | None = None
        self.calls: list[str] = []
        """The version and the method of each call, in their order."""
        self.at_s: list[float] = []
        """When they came, in the loop's time."""

    def stats_of(self, sandbox: str) -> list[ContainerStats]:
        """Return the stats of a sandbox's containers, of all if it is ""."""
        mine = [row.id for row in self.containers if row.pod_id == sandbox]
        return [row for row in self.stats if not sandbox or row.id in mine]

    async def count(self, sandbox: str) -> None:
        """Hang or fail, if a shim does that is to be asked."""
        if self.failed_pods and (not sandbox or sandbox in self.failed_pods):
            raise Refused("UNKNOWN", "failed to decode container metrics")
        if self.hung_pods and (not sandbox or sandbox in self.hung_pods):
            await asyncio.Event().wait()

    def n(self, call: str) -> int:
        return self.calls.count(call)

    async def behave(self, api: str, method: str) -> None:
        """Be as slow, hung or unwilling as told."""
        self.calls.append(f"{api} {method}")
        self.at_s.append(asyncio.get_running_loop().time())
        if api not in self.apis:
            raise Refused("UNIMPLEMENTED", f"unknown service runtime.{api}.RuntimeService")
        if method in self.unknown:
            raise Refused("UNIMPLEMENTED", f"unknown method {method}")
        if method in self.hung:
            await asyncio.Event().wait()
        delay_s = self.delays_s.get(method, self.delay_s)
        if delay_s:
            await asyncio.sleep(delay_s)  # the slowness itself
        refusal = self.refusals.get(method, self.refusal)
        if refusal is not None:
            raise refusal


class Cri(Protocol):
    """A runtime that a test starts and stops."""

    path: str
    behaviour: Behaviour

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def open(self, world: World, path: str) -> Runtime: ...


class MemoryCri:
    """A runtime without a socket; the file at its path says that it is there."""

    def __init__(self, world: World, path: str) -> None:
        self.path = path
        self.behaviour = Behaviour()
        self.is_up = False
        self._world = world

    async def start(self) -> None:
        await self._world.disk.write(self.path, b"")
        self.is_up = True

    async def stop(self) -> None:
        await self._world.disk.remove(self.path)
        self.is_up = False

    async def open(self, world: World, path: str) -> Runtime:
        return _MemoryRuntime(self)


class _MemoryRuntime:
    def __init__(self, cri: MemoryCri) -> None:
        self._cri = cri

    async def version(self, api: Api) -> RuntimeFacts:
        await self._ask(api, "Version")
        return self._cri.behaviour.facts

    async def pods(self, api: Api, want: Wanted) -> Sequence[PodRow]:
        await self._ask(api, "ListPodSandbox")
        return list(self._cri.behaviour.pods)

    async def containers(self, api: Api) -> Sequence[ContainerRow]:
        await self._ask(api, "ListContainers")
        return list(self._cri.behaviour.containers)

    async def stats(self, api: Api, sandbox: str = "") -> Sequence[ContainerStats]:
        await self._ask(api, "ListContainerStats")
        try:
            await self._cri.behaviour.count(sandbox)
        except Refused as refused:
            raise _as_error(refused) from None
        return self._cri.behaviour.stats_of(sandbox)

    async def close(self) -> None:
        pass

    async def _ask(self, api: Api, method: str) -> None:
        if not self._cri.is_up:
            raise Disconnected(self._cri.path)
        try:
            await self._cri.behaviour.behave(api, method)
        except Refused as refused:
            raise _as_error(refused) from None


def _as_error(refused: Refused) -> Exception:
    if refused.status == "UNIMPLEMENTED":
        return Unsupported("it", refused.words)
    return Disconnected("it", refused.words) if refused.status == "UNAVAILABLE" else PeerError(refused.words)


class GrpcCri:
    """A runtime behind a Unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.behaviour = Behaviour()
        self.requests: dict[str, bytes] = {}
        """The last request of each method."""
        self.raw: dict[str, bytes] = {}
        """Answers that are sent as they are, by method."""
        self.metadata: dict[str, str] = {}
        self.left_s: float | None = None
        """What the last call's deadline was."""
        self._messages = Messages(Path(FILE).read_bytes())
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        for api in ("v1", "v1alpha2"):
            table = {method: self._serve(api, method) for method in METHODS}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"runtime.{api}.RuntimeService", table),))
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def stop(self) -> None:
        """End as a killed process does: its calls break, and its socket's file is gone."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        Path(self.path).unlink(missing_ok=True)

    async def open(self, world: World, path: str) -> Runtime:
        from isopod.pulse.cri import open_by_grpc

        return await open_by_grpc(world, path)

    def _serve(self, api: str, method: str) -> Any:
        async def answer(data: bytes, context: Any) -> bytes:
            self.requests[method] = data
            self.metadata = dict(context.invocation_metadata() or ())
            self.left_s = context.time_remaining()
            try:
                await self.behaviour.behave(api, method)
            except Refused as refused:
                await _abort(context, refused)
            if method in self.raw:
                return self.raw[method]
            if method != "ListContainerStats":
                return self.encoded(method)
            sandbox = str(self._messages.of(method)[0].FromString(data).filter.pod_sandbox_id)
            try:
                await self.behaviour.count(sandbox)
            except Refused as refused:
                await _abort(context, refused)
            return self.encoded(method, sandbox)

        return grpc.unary_unary_rpc_method_handler(answer)

    def encoded(self, method: str, sandbox: str = "") -> bytes:
        """Return what a method answers; about one sandbox, if it is named."""
        answers: Mapping[str, dict[str, object]] = {
            "Version": {"runtime_name": self.behaviour.facts.name.encode(), "runtime_version": self.behaviour.facts.version.encode()},
            "ListPodSandbox": {"items": [_pod(row) for row in self.behaviour.pods]},
            "ListContainers": {"containers": [_container(row) for row in self.behaviour.containers]},
            "ListContainerStats": {"stats": [_stats(row) for row in self.behaviour.stats_of(sandbox)]},
        }
        _, reply = self._messages.of(method)
        data: bytes = reply(**answers[method]).SerializeToString()
        return data


async def _abort(context: Any, refused: Refused) -> NoReturn:
    await context.abort(getattr(grpc.StatusCode, refused.status), refused.words)
    raise AssertionError


def _pod(row: PodRow) -> dict[str, object]:
    return {
        "id": row.id.encode(),
        "metadata": {"name": row.name.encode(), "uid": row.uid.encode(), "namespace": row.namespace.encode(), "attempt": 1},
        "created_at": row.created_ns,
        "labels": [{"key": key.encode(), "value": value.encode()} for key, value in row.labels],
        "annotations": [{"key": key.encode(), "value": value.encode()} for key, value in row.annotations],
        "runtime_handler": row.runtime_handler.encode(),
    }


def _container(row: ContainerRow) -> dict[str, object]:
    return {
        "id": row.id.encode(),
        "pod_sandbox_id": row.pod_id.encode(),
        "metadata": {"name": row.name.encode()},
        "image": {"image": row.image.encode()},
        "image_ref": b"sha256:0",
        "created_at": row.created_ns,
    }


def _stats(row: ContainerStats) -> dict[str, object]:
    """Return a message in which what is None is absent, and so is a part of which all is."""
    memory = {
        "working_set_bytes": row.working_set_bytes,
        "available_bytes": row.available_bytes,
        "usage_bytes": row.usage_bytes,
        "rss_bytes": row.rss_bytes,
        "page_faults": row.page_faults,
        "major_page_faults": row.major_page_faults,
    }
    parts: dict[str, Mapping[str, int | None]] = {
        "cpu": {"usage_core_nano_seconds": row.cpu_ns},
        "memory": memory,
        "swap": {"swap_usage_bytes": row.swap_bytes},
        "writable_layer": {"used_bytes": row.written_bytes, "inodes_used": row.written_inodes},
    }
    made: dict[str, Any] = {"attributes": {"id": row.id.encode()}}
    for name, figures in parts.items():
        told = {field: {"value": value} for field, value in figures.items() if value is not None}
        if told:
            made[name] = told
    if row.mountpoint:
        made.setdefault("writable_layer", {})["fs_id"] = {"mountpoint": row.mountpoint.encode()}
    return made
