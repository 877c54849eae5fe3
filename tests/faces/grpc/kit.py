"""A standard gRPC client, its stubs made from proto/ as anybody would make them, and real nodes with the face in front."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from tests.cluster.real.rig import COMMAND

PROTO: Final = Path(__file__).parents[3] / "proto"
GRPCURL: Final = PROTO.parent / "build" / "peers" / "grpcurl"
START_S: Final = 60.0
CALL_S: Final = 30.0
CLUSTER: Final = "blixard.ClusterService"
BLIXARD: Final = "blixard.BlixardService"
RAFT: Final = "blixard.raft.RaftConsensusService"
LOG: Final = re.compile(rb'"event":"node.grpc","address":"([^"]+)","pid":(\d+)')


@cache
def compiled() -> bytes:
    """Return what protoc makes of the sources now."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/set"
        files = sorted(path.name for path in PROTO.glob("*.proto"))
        command = ["protoc", f"--proto_path={PROTO}", "--include_imports", f"--descriptor_set_out={target}", *files]
        subprocess.run(command, check=True, timeout=60)
        return Path(target).read_bytes()


@cache
def pool() -> DescriptorPool:
    """Return the sources' descriptors."""
    found = DescriptorPool()
    for file in FileDescriptorSet.FromString(compiled()).file:
        found.Add(file)
    return found


def message(name: str, /, **fields: Any) -> Any:
    """Return a message of the protocol."""
    return GetMessageClass(pool().FindMessageTypeByName(f"blixard.{name}"))(**fields)


def value_of(enum: str, name: str) -> int:
    """Return an enum's number."""
    found: int = pool().FindEnumTypeByName(f"blixard.{enum}").values_by_name[name].number
    return found


class Client:
    """A client of one address. Close it.

    Args:
        address: "HOST:PORT" or "unix:PATH".
        credentials: For TLS.
        options: Of the channel.
    """

    def __init__(
        self, address: str, *, credentials: grpc.ChannelCredentials | None = None, options: Sequence[tuple[str, Any]] = ()
    ) -> None:
        # A channel of its own for each client, and not one that grpcio shares below the surface.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), *options)
        if credentials is not None:
            self.channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self.channel = grpc.insecure_channel(address, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        name: str,
        service: str = CLUSTER,
        /,
        *,
        timeout_s: float | None = CALL_S,
        metadata: Sequence[tuple[str, str]] = (),
        **fields: Any,
    ) -> Any:
        """Call a method; return its reply, or raise grpc.RpcError."""
        method = pool().FindServiceByName(service).methods_by_name[name]
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        stub = self.channel.unary_unary(
            f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString
        )
        return stub(request(**fields), timeout=timeout_s, metadata=tuple(metadata))

    def raw(self, path: str, data: bytes, *, timeout_s: float = CALL_S) -> bytes:
        """Send bytes to a method."""
        stub: Any = self.channel.unary_unary(path)  # of bytes, where the stubs want messages
        reply: bytes = stub(data, timeout=timeout_s)
        return reply

    def refused(self, name: str, service: str = CLUSTER, /, **fields: Any) -> tuple[str, str]:
        """Call a method that has to fail; return the status and its words."""
        try:
            reply = self.call(name, service, **fields)
        except grpc.RpcError as error:
            return status_of(error)
        raise AssertionError(f"it answered: {reply}")

    def close(self) -> None:
        self.channel.close()


def status_of(error: Any) -> tuple[str, str]:
    """Return a failed call's status and its words."""
    return error.code().name, error.details()


class NodeProcess:
    """A node that runs no containers, as the README starts it, with the face before it. Stop it.

    Args:
        folder: Where everything of it lies.
        number: Its id.
        port: Of its cluster.
        words: More of its command line.
        listen: Where the face listens.
        environment: More variables.
        prefix: What stands before its command line.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        number: int = 1,
        port: int = 0,
        listen: str = "127.0.0.1:0",
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder / f"n{number}"
        self.folder.mkdir(exist_ok=True)
        self.log_path = folder / f"n{number}.log"
        self.socket = f"{self.folder}/isopod.sock"
        self._n_seen = len(LOG.findall(self.log()))
        bind = ("--bind", f"127.0.0.1:{port}") if port else ()
        argv = [*prefix, *COMMAND, "node", "--role", "control", "--id", str(number), *bind, "--data-dir", str(self.folder)]
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **(environment or {})}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*argv, "--grpc-listen", listen, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=env
            )

    def log(self) -> bytes:
        return self.log_path.read_bytes() if self.log_path.exists() else b""

    def faces(self) -> list[tuple[str, int]]:
        """Return address and pid of every face it started."""
        return [(address.decode(), int(pid)) for address, pid in LOG.findall(self.log())[self._n_seen :]]

    def wait_face(self, n: int = 1) -> str:
        """Return where its n-th face serves, once it does."""
        wait(lambda: len(self.faces()) >= n or self.process.poll() is not None, f"face {n} of {self.folder}")
        assert len(self.faces()) >= n, self.log().decode()
        return self.faces()[n - 1][0]

    def client(self) -> Client:
        self.wait_face()
        return Client(self.faces()[-1][0])

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End it; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
            raise AssertionError(self.log().decode()) from None


def wait(condition: Any, what: str, timeout_s: float = START_S) -> None:
    """Ask until it holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.02)  # between two questions; the limit above bounds them


@contextmanager
def running(folder: Path, *words: str, **told: Any) -> Iterator[NodeProcess]:
    """A node for the length of the block; it has to stop in good order."""
    node = NodeProcess(folder, *words, **told)
    try:
        node.wait_face()
        yield node
        assert node.stop() == 0, node.log().decode()
    except BaseException:
        print(node.log().decode())  # noqa: T201 - pytest shows it with the failure
        raise
    finally:
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait(30)
    for _, pid in node.faces():
        assert not os.path.exists(f"/proc/{pid}"), "its face lives on"


def lines_of(node: NodeProcess, event: str) -> list[dict[str, Any]]:
    """Return what a node logged of one kind."""
    found = [json.loads(line) for line in node.log().splitlines() if line.startswith(b"{")]
    return [line for line in found if line["event"] == event]
