"""The CRI by grpcio's asyncio client: the one module of pulse that imports it, loaded when an endpoint's socket is there.

The calls and messages are those of proto/cri/cri.proto, as set-up compiled them into one file beside this module; classes are made from it
here, so that no generated code is kept. v1alpha2 has the same messages under another name in a call's path. Answers are decoded here
and not by grpcio, so that one that is malformed is an error of the tree.

Rules: a channel is used by one connection and shares nothing with others below the surface: after a failure the next one connects at once
and does not inherit grpcio's own pauses. No proxy is ever asked. Bytes that are no UTF-8 become U+FFFD.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Final
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from isopod.pulse.cri_runtime import PACE, Api, RuntimeFacts
from isopod.pulse.model import ContainerStats, Labels
from isopod.pulse.pods import ContainerRow, PodRow, Wanted, allowed
from isopod.world.disk import Disk
from isopod.world.errors import (
    BadRecord,
    DeadlineExceeded,
    Disconnected,
    IsopodError,
    PeerError,
    ProtocolViolation,
    ToolMissing,
    Unsupported,
)

FILE: Final = f"{__file__.rpartition('/')[0]}/cri.binpb"
"""Where set-up writes the descriptors."""
PACKAGE: Final = "runtime.v1"
SERVICE: Final = "RuntimeService"
ANSWER_BYTES_MAX: Final = 64 << 20
"""What is taken of one list: 10,000 pods with 6 KiB each."""
TURN_ROWS: Final = 256
"""So many are read before the loop gets a turn: some 3 ms."""
RUNNING: Final = 1
STATS: Final = "ListContainerStats"
NAME_LABEL: Final = b"io.kubernetes.container.name"
MOUNTPOINT_CHARS_MAX: Final = 256

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.default_authority", "localhost"),  # servers in Go refuse one that is a path
)
_Message = Any
"""A message of a class that is made at run time: it has no type of its own to be named by."""


class Messages:
    """The classes of the protocol.

    Args:
        descriptors: A serialized FileDescriptorSet.

    Raises:
        BadRecord: It is none, or another one.
    """

    def __init__(self, descriptors: bytes) -> None:
        pool = DescriptorPool()
        self._classes: dict[str, tuple[_Message, _Message]] = {}
        try:
            for file in FileDescriptorSet.FromString(descriptors).file:
                pool.Add(file)
            for method in pool.FindServiceByName(f"{PACKAGE}.{SERVICE}").methods:
                self._classes[method.name] = (GetMessageClass(method.input_type), GetMessageClass(method.output_type))
        except (DecodeError, TypeError, KeyError) as error:
            raise BadRecord(FILE, f"it does not describe the CRI: {error}", "make it again: make setup") from error

    def of(self, method: str) -> tuple[_Message, _Message]:
        """Return a call's classes: request and reply."""
        return self._classes[method]


class GrpcRuntime:
    """A runtime behind a Unix socket: a `Runtime` of `isopod.pulse.cri`.

    Args:
        path: The socket.
        messages: What is said.
        call_s: The deadline that the runtime is told.
        stats_call_s: The same of what asks each container.
    """

    def __init__(self, path: str, messages: Messages, *, call_s: float = PACE.call_s, stats_call_s: float = PACE.stats_call_s) -> None:
        self._path = path
        self._messages = messages
        self._call_s = call_s
        self._stats_call_s = stats_call_s
        self._channel = grpc.aio.insecure_channel(f"unix:{quote(path)}", options=_OPTIONS)

    async def version(self, api: Api) -> RuntimeFacts:
        """See `Runtime.version`."""
        reply = await self._call(api, "Version", version="0.1.0")
        return RuntimeFacts(_text(reply.runtime_name), _text(reply.runtime_version))

    async def pods(self, api: Api, want: Wanted) -> Sequence[PodRow]:
        """See `Runtime.pods`."""
        reply = await self._call(api, "ListPodSandbox")
        rows = []
        for number, item in enumerate(reply.items):
            if number % TURN_ROWS == 0:
                await asyncio.sleep(0)
            rows.append(_pod(item, want))
        return rows

    async def containers(self, api: Api) -> Sequence[ContainerRow]:
        """See `Runtime.containers`."""
        reply = await self._call(api, "ListContainers", filter={"state": {"state": RUNNING}})
        return [_container(item) for item in reply.containers]

    async def stats(self, api: Api, sandbox: str = "") -> Sequence[ContainerStats]:
        """See `Runtime.stats`."""
        reply = await self._call(api, STATS, **({"filter": {"pod_sandbox_id": sandbox}} if sandbox else {}))
        rows = []
        for number, item in enumerate(reply.stats):
            if number % TURN_ROWS == 0:
                await asyncio.sleep(0)
            rows.append(_stats(item))
        return rows

    async def close(self) -> None:
        """See `Runtime.close`."""
        await self._channel.close()

    async def _call(self, api: Api, name: str, **fields: object) -> _Message:
        """Call a method; return its reply."""
        request, reply = self._messages.of(name)
        stub: Any = self._channel.unary_unary(f"/runtime.{api}.{SERVICE}/{name}")  # of bytes, where the stubs want messages
        call_s = self._stats_call_s if name == STATS else self._call_s
        call = stub(request(**fields).SerializeToString(), timeout=call_s)
        try:
            return reply.FromString(await call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Disconnected(self._path, f"{name}: the connection was let go of") from None  # grpcio says so by cancelling who waits
        except grpc.aio.AioRpcError as error:
            raise self._error_of(name, error, call_s) from error
        except DecodeError as error:
            raise ProtocolViolation(self._path, f"its answer to {name} cannot be read") from error

    def _error_of(self, name: str, error: grpc.aio.AioRpcError, call_s: float) -> IsopodError:
        code, words = error.code(), error.details() or "it does not say why"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Unsupported(f"{name} of {self._path}", words)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{name} of {self._path}", call_s)
        if code is grpc.StatusCode.UNAVAILABLE:
            return Disconnected(self._path, words, "is the container runtime running, and may this user connect?")
        return PeerError(f"{self._path}: {name}: {code.name}: {words}")


async def open_runtime(disk: Disk, path: str) -> GrpcRuntime:
    """Open the runtime behind a socket.

    Args:
        disk: Where the descriptors are.
        path: The socket.

    Raises:
        ToolMissing: Set-up has not compiled the protocol.
        BadRecord: What it compiled is damaged.
    """
    return GrpcRuntime(path, await load_messages(disk))


async def load_messages(disk: Disk, path: str = FILE) -> Messages:
    """Return the protocol that set-up compiled.

    Raises:
        ToolMissing: It has not.
        BadRecord: The file is damaged.
    """
    try:
        return Messages(await disk.read(path, n_bytes_max=1 << 20))
    except FileNotFoundError as error:
        raise ToolMissing(f"{path} (compiled from proto/cri/ by `make setup`)", "protobuf-compiler") from error


def _pod(item: _Message, want: Wanted) -> PodRow:
    about = item.metadata
    return PodRow(
        id=_text(item.id),
        uid=_text(about.uid),
        name=_text(about.name),
        namespace=_text(about.namespace),
        runtime_handler=_text(item.runtime_handler),
        created_ns=max(0, item.created_at),
        labels=_entries(item.labels, want.labels),
        annotations=_entries(item.annotations, want.annotations),
    )


def _container(item: _Message) -> ContainerRow:
    image = item.image.image or item.image_ref
    name = item.metadata.name or next((entry.value for entry in item.labels if entry.key == NAME_LABEL), b"")
    return ContainerRow(_text(item.id), _text(item.pod_sandbox_id), _text(name), _text(image), max(0, item.created_at))


def _stats(item: _Message) -> ContainerStats:
    memory, layer = item.memory, item.writable_layer
    return ContainerStats(
        id=_text(item.attributes.id),
        cpu_ns=_told(item.cpu, "usage_core_nano_seconds"),
        working_set_bytes=_told(memory, "working_set_bytes"),
        usage_bytes=_told(memory, "usage_bytes"),
        rss_bytes=_told(memory, "rss_bytes"),
        available_bytes=_told(memory, "available_bytes"),
        page_faults=_told(memory, "page_faults"),
        major_page_faults=_told(memory, "major_page_faults"),
        swap_bytes=_told(item.swap, "swap_usage_bytes"),
        written_bytes=_told(layer, "used_bytes"),
        written_inodes=_told(layer, "inodes_used"),
        mountpoint=_text(layer.fs_id.mountpoint)[:MOUNTPOINT_CHARS_MAX],
    )


def _told(message: _Message, name: str) -> int | None:
    """Return a figure, None if it is not told."""
    return int(getattr(message, name).value) if message.HasField(name) else None


def _entries(entries: Iterable[_Message], names: tuple[str, ...]) -> Labels:
    return allowed(((_text(entry.key), _text(entry.value)) for entry in entries), names) if names else ()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
