"""Errors as gRPC says them: every class of the tree has its status, and a client sees it with the words, the hint and the code."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import grpc
import pytest

from isopod.faces.grpc.settings import CALLS_MAX
from isopod.faces.grpc.statuses import DETAILS_BYTES_MAX, is_answer, status_of
from isopod.world.errors import DiskFull, KernelError, NotFound, from_code, tree
from tests.faces.grpc import kit
from tests.faces.grpc.faulty import HINT, MESSAGE

pytestmark = pytest.mark.row("B7")
ROOT = Path(__file__).parents[3]

TABLE = {
    "invalid_argument": "INVALID_ARGUMENT",
    "usage": "INVALID_ARGUMENT",
    "too_large": "INVALID_ARGUMENT",
    "unsupported": "UNIMPLEMENTED",
    "method_not_found": "UNIMPLEMENTED",
    "not_found": "NOT_FOUND",
    "already_exists": "ALREADY_EXISTS",
    "exhausted": "RESOURCE_EXHAUSTED",
    "disk_full": "RESOURCE_EXHAUSTED",
    "token_refused": "PERMISSION_DENIED",
    "not_leader": "UNAVAILABLE",
    "disconnected": "UNAVAILABLE",
    "not_started": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "already_serving": "UNAVAILABLE",
    "deadline_exceeded": "DEADLINE_EXCEEDED",
    "leadership_lost": "ABORTED",
    "cancelled": "CANCELLED",
    **dict.fromkeys(("refused", "wrong_state", "in_use", "foreign_cluster", "identity_conflict"), "FAILED_PRECONDITION"),
    **dict.fromkeys(("revision_compacted", "session_expired", "command_not_runnable"), "FAILED_PRECONDITION"),
}
"""All others are INTERNAL, as in the reference."""


class Faulty(NamedTuple):
    """A server that fails as it is told, its client, and what it logs."""

    address: str
    client: kit.Client
    log: Path


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """The server, on either loop."""
    argv = [sys.executable, "-m", "tests.faces.grpc.faulty", request.param]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    log = tmp_path_factory.mktemp("faulty") / "log"
    with (
        open(log, "wb") as stderr,
        subprocess.Popen(argv, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            address = server.stdout.readline().decode().strip()
            with kit.Client(address) as client:
                yield Faulty(address, client, log)
            server.stdin.close()
            assert server.wait(20) == 0
        finally:
            server.kill()


@pytest.fixture
def client(faulty: Faulty) -> kit.Client:
    """Its client."""
    return faulty.client


@pytest.mark.parametrize("code", tree())
def test_every_error_has_its_status_words_and_code(client: kit.Client, code: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("GetVmStatus", name=code)
    assert kit.status_of(caught.value) == (TABLE.get(code, "INTERNAL"), f"{MESSAGE} ({HINT})")
    error: Any = caught.value
    assert dict(error.trailing_metadata())["isopod-code"] == code


def test_a_busy_kernel_may_be_asked_again_and_a_refusing_one_not() -> None:
    assert status_of(KernelError("open", "/dev/kvm", 16)).name == "UNAVAILABLE"
    assert status_of(KernelError("open", "/dev/kvm", 13)).name == "INTERNAL"
    assert status_of(DiskFull("/srv")).name == "RESOURCE_EXHAUSTED"


def test_what_is_our_own_fault_is_logged_and_said_without_its_inside(faulty: Faulty) -> None:
    status, words = faulty.client.refused("GetVmStatus", name="break")
    assert status == "INTERNAL"
    assert "GetVmStatus failed" in words
    assert "secret" not in words
    kit.wait(lambda: "a secret of the inside" in faulty.log.read_text(), "the line in the log")
    lines = [line for line in faulty.log.read_text().splitlines() if "Traceback" in line]
    assert [json.loads(line)["event"] for line in lines] == ["grpc.bug"]


def test_words_of_any_kind_travel(client: kit.Client) -> None:
    status, words = client.refused("GetVmStatus", name="words")
    assert status == "NOT_FOUND"
    assert words.startswith("Grüße")
    assert len(words.encode()) <= DETAILS_BYTES_MAX


def test_the_clients_deadline_ends_a_call_with_a_reason(client: kit.Client) -> None:
    assert client.refused("GetVmStatus", name="hang", timeout_s=0.5)[0] == "DEADLINE_EXCEEDED"


def test_a_call_without_a_deadline_has_ours(client: kit.Client) -> None:
    assert client.call("GetVmStatus", name="left", timeout_s=None).vm_info.node_id == 20_000
    assert 0 < client.call("GetVmStatus", name="left", timeout_s=7.0).vm_info.node_id <= 7000


def test_a_reply_over_the_limit_is_an_error_and_no_hang(client: kit.Client) -> None:
    assert client.refused("GetVmStatus", name="huge")[0] in ("RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN")


def test_only_so_many_calls_are_served_at_once(faulty: Faulty) -> None:
    path, data = f"/{kit.CLUSTER}/GetVmStatus", kit.message("GetVmStatusRequest", name="hang").SerializeToString()
    clients = [kit.Client(faulty.address) for _ in range(3)]
    try:
        stubs: list[Any] = [client.channel.unary_unary(path) for client in clients]
        calls = [stub.future(data, timeout=4.0) for stub in stubs for _ in range(100)]
        found = [call.exception().code().name for call in calls]
    finally:
        for client in clients:
            client.close()
    assert found.count("RESOURCE_EXHAUSTED") >= 300 - CALLS_MAX
    assert found.count("RESOURCE_EXHAUSTED") + found.count("DEADLINE_EXCEEDED") == 300
    assert faulty.client.call("GetVmStatus", name="left").found is True


def test_what_is_told_in_a_reply_is_what_could_not_be_done() -> None:
    told = [code for code in tree() if is_answer(from_code(code, ""))]
    assert {"wrong_state", "in_use", "exhausted", "runtime_failed", "disk_full"} <= set(told)
    assert not {"not_found", "already_exists", "invalid_argument", "unsupported", "disconnected", "bug"} & set(told)


@pytest.mark.parametrize("name", ["\N{SNOWMAN}" * 5000, "x" * 999 + "\N{SNOWMAN}", "\udcff" * 5000])
def test_details_stay_far_below_what_grpc_begins_to_refuse(name: str) -> None:
    details = status_of(NotFound("virtual machine", name)).details
    assert 0 < len(details.encode()) <= DETAILS_BYTES_MAX
    assert len(quote(details)) < 4096
