"""A receiver of remote writes for tests: it takes requests apart with a message made at run time from the documented field numbers."""

import asyncio
import functools
import math
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self, cast

from cramjam import snappy
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from isopod.net.http.messages import Request, Response
from isopod.net.http.server import HttpServer
from isopod.pulse.write_request import STALE_BITS
from isopod.runtime.metrics import Registry
from isopod.world.network import ServerTls, TcpAddress
from isopod.world.world import World
from tests.telemetry.kit import Memo

_FIELD: Final = descriptor_pb2.FieldDescriptorProto
_TYPES: Final = {"string": _FIELD.TYPE_STRING, "double": _FIELD.TYPE_DOUBLE, "int64": _FIELD.TYPE_INT64}
_MESSAGES: Final = {
    "Sample": ("1 double value", "2 int64 timestamp"),
    "Label": ("1 string name", "2 string value"),
    "TimeSeries": ("1 *Label labels", "2 *Sample samples"),
    "WriteRequest": ("1 *TimeSeries timeseries",),
}
Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """One sample as it came."""

    labels: Labels
    value: float
    at_ms: int

    @property
    def is_stale(self) -> bool:
        """Whether it says that its series ended."""
        bits: int = struct.unpack("<Q", struct.pack("<d", self.value))[0]
        return bits == STALE_BITS

    @property
    def name(self) -> str:
        """The series' name."""
        return dict(self.labels)["__name__"]

    @property
    def sandbox(self) -> str:
        """Whose it is, "" for the agent's own."""
        return dict(self.labels).get("sandbox_id", "")


def decode(body: bytes) -> list[Sample]:
    """Return the samples of a request that was unpacked; what is not in the documented form fails."""
    request = _write_request()()
    request.ParseFromString(body)
    assert request.SerializeToString() == body, "nothing but the documented fields, in their order"
    found = []
    for series in request.timeseries:
        labels = tuple((each.name, each.value) for each in series.labels)
        names = [name for name, _ in labels]
        assert names == sorted({*names}), "in order, each once"
        assert all(value for _, value in labels), "none is empty"
        assert "__name__" in names
        (sample,) = series.samples
        found.append(Sample(labels, sample.value, sample.timestamp))
    return found


Script = Callable[[Request], "Response | None"]


class Receiver:
    """Takes requests until it is told to do otherwise.

    Args:
        world: Where.
        tls: What it shows; None speaks none.
    """

    def __init__(self, world: World, tls: ServerTls | None = None) -> None:
        self._world = world
        self._tls = tls
        self.memo = Memo(world.clock)
        self.requests: list[list[Sample]] = []
        """Those that were taken."""
        self.heads: list[dict[str, str]] = []
        """Of all requests."""
        self.came_s: list[float] = []
        self.answers: list[Response | None] = []
        """What comes next; None never answers. Empty takes what comes."""
        self.n_under_way = self.n_under_way_max = 0
        self.port = 0
        self._server: HttpServer | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hang_up()

    async def listen(self) -> None:
        """Take requests, at the port of before."""
        self._server = HttpServer(self._world, self._take, logger=self.memo.logger, metrics=Registry())
        listener = await self._server.listen(TcpAddress("127.0.0.1", self.port), tls=self._tls)
        self.port = cast("TcpAddress", listener.address).port

    async def hang_up(self) -> None:
        """Cut all connections, and refuse new ones."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    @property
    def url(self) -> str:
        """Where it takes requests."""
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}/api/v1/write"

    @property
    def samples(self) -> list[Sample]:
        """All samples taken, in order."""
        return [sample for request in self.requests for sample in request]

    def times(self, name: str, sandbox: str) -> list[float]:
        """Return the values of all series of a name and a sandbox, NaN for the end of one, in the order they came."""
        return [math.nan if s.is_stale else s.value for s in self.samples if (s.name, s.sandbox) == (name, sandbox)]

    async def _take(self, request: Request) -> Response:
        self.n_under_way += 1
        self.n_under_way_max = max(self.n_under_way_max, self.n_under_way)
        try:
            self.heads.append({name.lower(): value for name, value in request.headers})
            self.came_s.append(asyncio.get_running_loop().time())
            body = await request.read(16 << 20)
            samples = decode(bytes(snappy.decompress_raw(body)))
            if self.answers:
                answer = self.answers.pop(0)
                if answer is None:
                    await asyncio.Event().wait()
                assert answer is not None
                if answer.status >= 300:
                    return answer
            self.requests.append(samples)
            return Response(204)
        finally:
            self.n_under_way -= 1


class Cutter(asyncio.Protocol):
    """Resets each connection as soon as something comes."""

    n_cut = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        Cutter.n_cut += 1
        self._transport.abort()


@functools.cache
def _write_request() -> type[Any]:
    file = descriptor_pb2.FileDescriptorProto(name="isopod_remote_test.proto", package="isopod.remote.test", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            number, kind, field_name = field.split()
            made = message.field.add(name=field_name, number=int(number), label=_FIELD.LABEL_OPTIONAL)
            if kind.startswith("*"):
                made.label = _FIELD.LABEL_REPEATED
                made.type_name = f".isopod.remote.test.{kind[1:]}"
                made.type = _FIELD.TYPE_MESSAGE
            else:
                made.type = _TYPES[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found: type[Any] = message_factory.GetMessageClass(pool.FindMessageTypeByName("isopod.remote.test.WriteRequest"))
    return found
