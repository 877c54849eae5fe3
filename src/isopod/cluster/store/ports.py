"""What a replica needs of others: the Raft node under it, and the way to the other nodes' verbs."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from isopod.cluster.raft.ports import NodeId, RaftEvent, RaftStatus, Waiter
from isopod.wire.service import Method

Q = TypeVar("Q")
R = TypeVar("R")


class Raft(Protocol):
    """The log; `isopod.cluster.raft.RaftNode` is one."""

    def propose_nowait(self, command: bytes, waiter: Waiter, *, timeout_s: float) -> None:
        """Do as `propose`, but tell the waiter; what is known at once is raised at once."""

    def read_barrier_nowait(self, waiter: Waiter, *, timeout_s: float) -> None:
        """Do as `read_barrier`, but tell the waiter, in the moment in which the machine may be read."""

    def propose(self, command: bytes, *, timeout_s: float) -> Awaitable[Any]:
        """Have a command applied; return the machine's result.

        Raises:
            NotLeader: Another node leads; nothing was begun.
            LeadershipLost: It may be applied, or not.
            DeadlineExceeded: The same.
            IsopodError: It was refused.
        """

    def read_barrier(self, *, timeout_s: float) -> Awaitable[int]:
        """Return when everything that was acknowledged before this call is applied here.

        Raises:
            IsopodError: That could not be made sure of in time.
        """

    def status(self, *, with_digest: bool) -> RaftStatus:
        """Return what this node knows; the machine's digest only if it is asked for."""

    def subscribe(self, callback: Callable[[RaftEvent], None]) -> Callable[[], None]:
        """Tell a callback of every event; return what takes it off again."""


class Peers(Protocol):
    """The way to the other nodes' verbs."""

    async def call(self, node_id: NodeId, method: Method[Q, R], request: Q, *, timeout_s: float) -> R:
        """Call a method of a node, once.

        Raises:
            NotStarted: It could not be reached; nothing was begun.
            IsopodError: What the connection or the handler raised.
        """

    def address(self, node_id: NodeId) -> str:
        """Return where clients reach a node, as text; "" if that is not known."""
