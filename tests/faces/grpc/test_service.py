"""The face on a real node: reflection, grpcurl, hostile clients, mutual TLS, where it may listen, how it ends, and what it costs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from isopod.net.ca import Issued
from tests.faces.grpc import kit
from tests.faces.grpc.kit import BLIXARD, CLUSTER, RAFT, Client, NodeProcess
from tests.faces.grpc.test_members import free_ports
from tests.net import certificates

pytestmark = [pytest.mark.slow, pytest.mark.row("B6")]
LOOPBACK = "127.0.0.1:0"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node with the face before it; it may not have logged a fault of its own at the end."""
    with kit.running(tmp_path_factory.mktemp("node"), port=free_ports(1)[0]) as node:
        yield node
        assert b"Traceback" not in node.log()


@pytest.fixture
def client(node: NodeProcess) -> Iterator[Client]:
    """A client of it."""
    with node.client() as client:
        yield client


# --- reflection -------------------------------------------------------------------------------------------------------


def test_reflection_lists_the_services_and_their_files(client: Client) -> None:
    stub = reflecting(client)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="blixard.VmInfo"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="blixard.Nothing"),
    ]
    services, file, nothing = stub.ServerReflectionInfo(iter(requests), timeout=kit.CALL_S)
    assert [each.name for each in services.list_services_response.service] == [
        BLIXARD,
        CLUSTER,
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    assert b"VM_STATE_RUNNING" in file.file_descriptor_response.file_descriptor_proto[0]
    assert nothing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_grpcurl_finds_its_way_without_the_sources(node: NodeProcess) -> None:
    if not kit.GRPCURL.exists():
        pytest.skip(f"{kit.GRPCURL} is not there: GOBIN={kit.GRPCURL.parent} go install github.com/fullstorydev/grpcurl/cmd/grpcurl@latest")

    def grpcurl(*words: str, data: str = "{}") -> tuple[int, str]:
        verb = [address, *words] if words[0] in ("list", "describe") else ["-d", data, address, *words]
        done = subprocess.run([kit.GRPCURL, "-plaintext", *verb], capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    address = node.wait_face()
    assert CLUSTER in grpcurl("list")[1].split()
    assert "rpc ListVms" in grpcurl("describe", CLUSTER)[1]
    kit.wait(lambda: '"healthy": true' in grpcurl(f"{CLUSTER}/HealthCheck")[1], "its health")
    code, said = grpcurl(f"{CLUSTER}/GetClusterStatus")
    assert (code, "NODE_STATE_LEADER" in said) == (0, True)
    code, said = grpcurl(f"{CLUSTER}/StartVm", data='{"name": "none"}')
    assert code != 0
    assert "Code: NotFound" in said
    code, said = grpcurl(f"{CLUSTER}/SendRaftMessage")
    assert "Code: Unimplemented" in said


# --- hostile clients --------------------------------------------------------------------------------------------------


@pytest.mark.row("B7")
@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x02\xff\xfe", b"\x0a\x01", b"\x08" + b"\xff" * 11],
    ids=["no tag", "a length beyond the end", "bad UTF-8", "cut off", "an endless number"],
)
def test_what_is_no_message_is_refused(client: Client, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.raw(f"/{CLUSTER}/StartVm", data)
    assert kit.status_of(caught.value) == ("INVALID_ARGUMENT", "the request is no blixard.StartVmRequest")


def test_fields_that_nobody_knows_are_passed_over(client: Client) -> None:
    assert client.raw(f"/{CLUSTER}/GetVmStatus", b"\xfa\x7f\x03abc") == b""


@pytest.mark.row("B7")
def test_unknown_calls_and_services(client: Client) -> None:
    for path in (f"/{CLUSTER}/DeleteVm", "/blixard.None/Call", f"/{RAFT}/Propose", "/"):
        with pytest.raises(grpc.RpcError) as caught:
            client.raw(path, b"")
        assert kit.status_of(caught.value)[0] == "UNIMPLEMENTED"


def test_a_message_of_64_mib_is_refused_and_not_kept(node: NodeProcess) -> None:
    [(address, pid)] = node.faces()
    before = resident_mib(pid)
    with Client(address, options=[("grpc.max_send_message_length", -1)]) as client:
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                client.raw(f"/{CLUSTER}/StartVm", b"\x0a" + b"\x80\x80\x80\x20" + b"a" * (64 << 20))
            assert kit.status_of(caught.value)[0] == "RESOURCE_EXHAUSTED"
        assert resident_mib(pid) < before + 24
        assert client.call("GetVmStatus", name="after").found is False


def test_absurd_values_end_with_an_answer(client: Client) -> None:
    long = "\N{SNOWMAN}" * (1 << 18)
    assert client.refused("StartVm", name=long)[0] == "NOT_FOUND"
    assert client.call("GetVmStatus", name=long).found is False
    assert client.refused("CreateVm", name="a/../../b")[0] == "INVALID_ARGUMENT"
    assert client.refused("CreateVm", name=long, vcpus=2**32 - 1, memory_mb=2**32 - 1)[0] == "INVALID_ARGUMENT"
    assert client.call("GetTaskStatus", task_id=long).found is False
    reply = client.call("SubmitTask", task_id="\0", command="true")
    assert (reply.accepted, reply.message.startswith("Failed to submit task: task id")) == (False, True)
    reply = client.call("SubmitTask", task_id="t", command="true", timeout_secs=2**64 - 1)
    assert (reply.accepted, "timeout_secs" in reply.message) == (False, True)
    assert client.call("LeaveCluster", node_id=2**64 - 1).success is False


def test_metadata_over_the_limit_is_refused(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("HealthCheck", metadata=[("x-large", "y" * (64 << 10))])
    assert kit.status_of(caught.value)[0] in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
    assert client.call("HealthCheck").message != ""


def test_who_speaks_no_http_is_shown_out(node: NodeProcess) -> None:
    host, _, port = node.wait_face().rpartition(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096):
        with socket.create_connection((host, int(port)), timeout=kit.CALL_S) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(said)
            connection.settimeout(kit.CALL_S)
            while connection.recv(65536):
                pass
    with node.client() as client:
        assert client.call("GetVmStatus", name="after").found is False


def test_only_so_many_connections_are_served(node: NodeProcess) -> None:
    host, _, port = node.wait_face().rpartition(":")
    n_open = 0
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=kit.CALL_S))
            try:
                n_open += bool(connection.recv(9))  # its settings come first
            except ConnectionError:
                break
        assert n_open <= 256
    with node.client() as client:
        assert client.call("GetVmStatus", name="after").found is False


# --- where it may listen ----------------------------------------------------------------------------------------------


def refused(folder: Path, listen: str, *words: str) -> str:
    """Start a node that must not start; return what it said."""
    node = NodeProcess(folder, *words, port=free_ports(1)[0], listen=listen)
    try:
        assert node.process.wait(kit.START_S) in (2, 4)
    finally:
        node.process.kill()
        node.process.wait(30)
    said = node.log().decode()
    assert "Traceback" not in said
    return said[said.index("error: ") :]


def test_an_address_that_is_taken_is_named(tmp_path: Path, node: NodeProcess) -> None:
    address = node.wait_face()
    assert refused(tmp_path, address).startswith(f"error: Address {address} already in use")


@pytest.mark.parametrize(
    ("listen", "words", "why"),
    [
        ("0.0.0.0:7001", (), "other machines reach it, which needs mutual TLS"),
        ("example.org:7001", (), "other machines reach it"),
        ("nonsense", (), "want HOST:PORT or unix:/PATH"),
        (LOOPBACK, ("--grpc-cert-file", "/none.pem"), "TLS is mutual"),
        (LOOPBACK, ("--grpc-cert-file", "/none", "--grpc-key-file", "/none", "--grpc-ca-file", "/none"), "cannot read /none"),
        ("unix:/none/such/folder/grpc.sock", (), "/none/such/folder/grpc.sock"),
    ],
)
def test_where_it_may_not_listen(tmp_path: Path, listen: str, words: tuple[str, ...], why: str) -> None:
    said = refused(tmp_path, listen, *words)
    assert why in said


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    leaf, other = certificates.server_leaf(), certificates.client_leaf()
    for wrong in (Issued(b"nonsense", leaf.key), Issued(leaf.certificate, other.key)):
        words = tls_words(tmp_path, wrong, certificates.authority().certificate)
        assert refused(tmp_path, LOOPBACK, *words).startswith("error: TLS material")


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    with kit.running(tmp_path, port=free_ports(1)[0], listen=f"unix:{path}") as node, node.client() as client:
        assert client.call("GetVmStatus", name="x").found is False
        assert path.stat().st_mode & 0o022 == 0
    assert not path.exists()


def test_mutual_tls_lets_in_whom_the_authority_certified(tmp_path: Path) -> None:
    server, ours, strangers = certificates.server_leaf(), certificates.client_leaf(), certificates.client_leaf(by="another authority")
    trusted = certificates.authority().certificate
    words = tls_words(tmp_path, server, trusted)
    with kit.running(tmp_path, *words, port=free_ports(1)[0], listen="0.0.0.0:0") as node:
        port = node.wait_face().rpartition(":")[2]
        address = f"localhost:{port}"
        with Client(address, credentials=grpc.ssl_channel_credentials(trusted, ours.key, ours.certificate)) as client:
            assert client.call("GetVmStatus", name="x").found is False
        for credentials in (
            grpc.ssl_channel_credentials(trusted, strangers.key, strangers.certificate),
            grpc.ssl_channel_credentials(trusted),
            None,
        ):
            with Client(address, credentials=credentials) as client:
                assert client.refused("GetVmStatus", name="x", timeout_s=5.0)[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    ours = certificates.client_leaf()
    trusted, new = certificates.authority().certificate, certificates.authority("another authority").certificate
    words = tls_words(tmp_path, certificates.server_leaf(), trusted)
    with kit.running(tmp_path, *words, port=free_ports(1)[0], listen="127.0.0.1:0") as node:
        address = f"localhost:{node.wait_face().rpartition(':')[2]}"

        def answers(root: bytes) -> bool:
            with Client(address, credentials=grpc.ssl_channel_credentials(root, ours.key, ours.certificate)) as client:
                try:
                    return not client.call("GetVmStatus", name="x", timeout_s=5.0).found
                except grpc.RpcError:
                    return False

        assert answers(trusted)
        assert not answers(new)
        (tmp_path / "key").write_bytes(b"not yet whole")
        kit.wait(lambda: kit.lines_of(node, "grpc.certificates_not_read"), "a look at the half renewed files")
        assert answers(trusted), "what is no key leaves what was shown"
        tls_words(tmp_path, certificates.server_leaf(by="another authority"), trusted)
        kit.wait(lambda: answers(new), "the new certificate")
        assert len(node.faces()) == 1


def tls_words(folder: Path, leaf: Issued, authority: bytes) -> list[str]:
    """Write the three files; return the flags that name them."""
    for name, data in (("cert", leaf.certificate), ("key", leaf.key), ("ca", authority)):
        (folder / name).write_bytes(data)
    return [word for name in ("cert", "key", "ca") for word in (f"--grpc-{name}-file", str(folder / name))]


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.row("B14")
def test_it_stops_cleanly_with_open_streams_and_calls(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, port=free_ports(1)[0])
    try:
        with node.client() as client, client as other:
            stub = reflecting(client)
            held = threading.Event()

            def requests() -> Iterator[reflection_pb2.ServerReflectionRequest]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")
                held.wait(kit.CALL_S)

            stream = stub.ServerReflectionInfo(requests())
            next(iter(stream))
            assert other.call("GetVmStatus", name="x").found is False
            began = os.times().elapsed
            assert node.stop() == 0, node.log().decode()
            assert os.times().elapsed - began < 20
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(stream))
            assert caught.value.code().name in ("UNAVAILABLE", "CANCELLED")
            held.set()
    finally:
        node.stop(signal.SIGKILL)
    [finished] = kit.lines_of(node, "shutdown.finished")
    assert finished["clean"] is True
    assert not os.path.exists(f"/proc/{node.faces()[0][1]}")


def test_it_ends_with_a_node_that_is_killed(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, port=free_ports(1)[0])
    node.wait_face()
    node.stop(signal.SIGKILL)
    [(_, pid)] = node.faces()
    kit.wait(lambda: not os.path.exists(f"/proc/{pid}"), "its end")


def test_one_that_is_killed_is_started_again(tmp_path: Path) -> None:
    [port] = free_ports(1)
    with kit.running(tmp_path, port=free_ports(1)[0], listen=f"127.0.0.1:{port}") as node:
        [(address, pid)] = node.faces()
        os.kill(pid, signal.SIGKILL)
        assert node.wait_face(2) == address
        with node.client() as client:
            assert client.call("GetVmStatus", name="x").found is False
    assert [line["code"] for line in kit.lines_of(node, "grpc.died")] == [-9]


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_node_without_it_never_loads_grpcio(tmp_path: Path) -> None:
    with kit.running(tmp_path, port=free_ports(1)[0]) as node:
        maps = Path(f"/proc/{node.process.pid}/maps").read_text()
        assert "cygrpc" not in maps
        assert "cygrpc" in Path(f"/proc/{node.faces()[0][1]}/maps").read_text()
    probe = (
        "import sys, isopod.node.main, isopod.cli.main; print([name for name in sys.modules if name.split('.')[0] in ('grpc', 'google')])"
    )
    said = subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.strip() == "[]"


def test_what_a_call_costs(node: NodeProcess, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    [(_, pid)] = node.faces()
    n_calls = 300
    client.call("HealthCheck")
    figures: list[str] = []
    for name, service in (("GetRaftStatus", BLIXARD), ("ListVms", CLUSTER)):
        face_s, own_s, began_s = cpu_s(pid), cpu_s(node.process.pid), os.times().elapsed
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(client.call, name, service) for _ in range(n_calls)]:
                done.result()
        face_ms, own_ms = 1000 * (cpu_s(pid) - face_s) / n_calls, 1000 * (cpu_s(node.process.pid) - own_s) / n_calls
        a_second = n_calls / (os.times().elapsed - began_s)
        figures.append(f"{name}: {face_ms:.2f} ms of CPU in the face, {own_ms:.2f} ms in the node, {a_second:.0f} a second")
        assert face_ms < 20
    with capsys.disabled():
        print(f"\n  the face: {resident_mib(pid)} MiB resident; " + "; ".join(figures))  # noqa: T201 - the figures
    assert resident_mib(pid) < 120


def reflecting(client: Client) -> Any:
    """Return grpcio's own stub of reflection, which has no types."""
    return reflection_pb2_grpc.ServerReflectionStub(client.channel)


def resident_mib(pid: int) -> int:
    """Return how much of a process lies in memory."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) >> 10


def cpu_s(pid: int) -> float:
    """Return what a process has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
