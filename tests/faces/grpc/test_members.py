"""The calls about the cluster, on real nodes by a standard client: three nodes, one that waits to join, and one alone."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.faces.grpc import kit
from tests.faces.grpc.kit import BLIXARD, RAFT, NodeProcess

pytestmark = pytest.mark.row("B6")
SECRET = {"ISOPOD_CLUSTER_TOKEN": "a-secret-of-these-tests-0123456789"}
LEADER, FOLLOWER = kit.value_of("NodeState", "NODE_STATE_LEADER"), kit.value_of("NodeState", "NODE_STATE_FOLLOWER")


def free_ports(n: int) -> list[int]:
    """Return ports that nobody listens on just now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in found]


class Trio:
    """Three nodes of a cluster, and a fourth that waits to be told whom to join."""

    def __init__(self, folder: Path) -> None:
        self.ports = free_ports(4)
        peers = ",".join(f"{number}:127.0.0.1:{port}" for number, port in enumerate(self.ports[:3], 1))
        self.nodes = [
            NodeProcess(
                folder, "--peers", peers, "--grpc-test-services", "true", number=number, port=self.ports[number - 1], environment=SECRET
            )
            for number in (1, 2, 3)
        ]
        self.nodes.append(NodeProcess(folder, "--join-cluster", number=4, port=self.ports[3]))
        self.clients = [node.client() for node in self.nodes]

    def address(self, number: int) -> str:
        return f"127.0.0.1:{self.ports[number - 1]}"

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for node in self.nodes:
            node.stop()

    def wait_formed(self) -> int:
        """Return the leader's id once all agree on it and all three vote."""

        def is_formed() -> bool:
            found = [client.call("GetClusterStatus") for client in self.clients[:3]]
            return (
                len({reply.leader_id for reply in found}) == 1
                and all(reply.leader_id and sorted(node.state for node in reply.nodes) == [FOLLOWER, FOLLOWER, LEADER] for reply in found)
                and all(client.call("GetRaftStatus", BLIXARD).state in ("leader", "follower") for client in self.clients[:3])
            )

        def is_formed_or_not_yet() -> bool:
            try:
                return is_formed()
            except grpc.RpcError:
                return False

        kit.wait(is_formed_or_not_yet, "the cluster")
        leader: int = self.clients[0].call("GetClusterStatus").leader_id
        return leader


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """The nodes, formed."""
    trio = Trio(tmp_path_factory.mktemp("trio"))
    try:
        trio.wait_formed()
        yield trio
    finally:
        trio.close()


@pytest.mark.slow
@pytest.mark.row("B1")
@pytest.mark.row("B3")
def test_all_nodes_say_the_same_leader_term_and_members(trio: Trio) -> None:
    leader = trio.wait_formed()
    replies = [client.call("GetClusterStatus") for client in trio.clients[:3]]
    for reply in replies:
        assert [(node.id, node.address) for node in reply.nodes] == [(number, trio.address(number)) for number in (1, 2, 3)]
        assert [node.id for node in reply.nodes if node.state == LEADER] == [leader]
    assert len({reply.term for reply in replies}) == 1
    for number, client in enumerate(trio.clients[:3], 1):
        status = client.call("GetRaftStatus", BLIXARD)
        assert (status.node_id, status.leader_id, status.term) == (number, leader, replies[0].term)
        assert (status.is_leader, status.state) == (number == leader, "leader" if number == leader else "follower")
        assert client.call("HealthCheck") == kit.message("HealthCheckResponse", healthy=True, message=f"Node {number} is healthy")


@pytest.mark.slow
@pytest.mark.row("B4")
def test_who_may_not_join(trio: Trio) -> None:
    client = trio.clients[0]
    for node_id, address, wanted in (
        (0, "127.0.0.1:1", "Invalid node ID: must be non-zero"),
        (9, "", "Bind address cannot be empty"),
        (2, "127.0.0.1:1", "Node 2 already exists in cluster"),
    ):
        reply = client.call("JoinCluster", node_id=node_id, bind_address=address)
        assert (reply.success, reply.message) == (False, wanted)
    reply = client.call("JoinCluster", node_id=2**64 - 1, bind_address="127.0.0.1:1")
    assert reply.success is False
    assert reply.message.startswith("Failed to join cluster: a node joins from its own end")
    assert "--token TOKEN" in reply.message


@pytest.mark.slow
@pytest.mark.row("B4")
@pytest.mark.row("B5")
def test_a_node_joins_and_leaves(trio: Trio) -> None:
    joiner = trio.clients[3]
    health = joiner.call("HealthCheck")
    assert health.healthy is False
    assert health.message.startswith("Node 4 is unhealthy: it waits to be told whom to join")
    refused = joiner.call("JoinCluster", node_id=4, bind_address=trio.address(2))
    assert refused.success is False
    assert refused.message.startswith("Failed to join cluster: the join token was refused")
    stranger = joiner.call("JoinCluster", node_id=5, bind_address=trio.address(2))
    assert stranger.message.startswith("Failed to join cluster: this is node 4, which is in no cluster itself")

    secret = [("isopod-token", SECRET["ISOPOD_CLUSTER_TOKEN"])]
    reply = joiner.call("JoinCluster", node_id=4, bind_address=trio.address(2), metadata=secret)
    assert (reply.success, reply.message) == (True, "Node 4 successfully joined cluster")
    assert {1, 2, 3} <= {peer.id for peer in reply.peers}
    assert {1, 2, 3} <= set(reply.voters)
    assert joiner.call("JoinCluster", node_id=4, bind_address=trio.address(2)).message == "Node 4 already exists in cluster"

    for node_id, wanted in (
        (0, "Invalid node ID: must be non-zero"),
        (1, "Cannot remove self from cluster. Use shutdown instead."),
        (77, "Node 77 not found in cluster configuration"),
    ):
        reply = trio.clients[0].call("LeaveCluster", node_id=node_id)
        assert (reply.success, reply.message) == (False, wanted)
    reply = trio.clients[0].call("LeaveCluster", node_id=4)
    assert (reply.success, reply.message) == (True, "Node 4 successfully removed from cluster")
    kit.wait(
        lambda: all([node.id for node in client.call("GetClusterStatus").nodes] == [1, 2, 3] for client in trio.clients[:3]),
        "the removal on every node",
    )


@pytest.mark.slow
def test_what_is_proposed_is_in_the_log_of_all(trio: Trio) -> None:
    for client in trio.clients[:3]:
        assert client.call("Propose", RAFT, data=b"\x00\xff").success is True
        state = client.call("GetClusterState", RAFT)
        assert (state.leader_id, len(state.nodes)) == (trio.wait_formed(), 3)
    assert trio.clients[3].refused("Propose", RAFT, data=b"")[0] == "UNIMPLEMENTED", "it was not asked to serve tests"


@pytest.mark.slow
@pytest.mark.row("B7")
def test_raft_messages_are_refused_with_a_reason(trio: Trio) -> None:
    status, words = trio.clients[0].refused("SendRaftMessage", raft_data=b"\x08\x01")
    assert status == "UNIMPLEMENTED"
    assert "nodes exchange Raft messages only on their own connections" in words
    assert trio.clients[0].refused("SendRaftMessage", RAFT, from_node=1, message_type="heartbeat")[0] == "UNIMPLEMENTED"


@pytest.mark.slow
@pytest.mark.row("B7")
def test_a_node_that_runs_nothing_says_so_to_every_call(tmp_path: Path) -> None:
    [port] = free_ports(1)
    with kit.running(tmp_path, number=3, port=port, environment=SECRET) as node, node.client() as client:
        kit.wait(lambda: client.call("HealthCheck").healthy, "its leadership")
        assert client.call("LeaveCluster", node_id=3).message == "Cannot remove self from cluster. Use shutdown instead."
        assert list(client.call("ListVms").vms) == []
        reply = client.call("CreateVm", name="web")
        assert reply.success is False
        assert "without an engine (--role control)" in reply.message
        assert client.call("GetVmStatus", name="web").found is False
        assert client.refused("StartVm", name="web")[0] == "NOT_FOUND"
        assert client.refused("StopVm", name="web")[0] == "NOT_FOUND"
        reply = client.call("SubmitTask", task_id="t", command="true")
        assert reply.accepted is False
        assert reply.message.startswith("Failed to submit task: node at this socket is without an engine")
        assert client.call("GetTaskStatus", task_id="t").found is False
        assert client.refused("ProposeTask", BLIXARD) == ("INVALID_ARGUMENT", "Task is required")
        assert client.call("ProposeTask", BLIXARD, task=kit.message("Task", command="true")).message == "Task ID cannot be empty"
