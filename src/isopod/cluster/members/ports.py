"""What the members need of a Raft node: `RaftNode` has it. Narrow, so that the leader's work can be tested alone."""

from collections.abc import Callable
from typing import Protocol

from isopod.cluster.raft.ports import MemberChange, RaftEvent, RaftStatus
from isopod.cluster.raft.ports import Members as Replicas


class Raft(Protocol):
    """A Raft node, as far as membership is concerned."""

    @property
    def is_leader(self) -> bool:
        """Whether it believes to lead."""

    @property
    def leader(self) -> int:
        """Who leads, 0 for nobody."""

    @property
    def applied_index(self) -> int:
        """How far its machine is."""

    def status(self, *, with_digest: bool = True) -> RaftStatus:
        """Return what it knows now."""

    def members(self) -> Replicas:
        """Return who votes and who only replicates."""

    def subscribe(self, callback: Callable[[RaftEvent], None]) -> Callable[[], None]:
        """Tell a callback of every event; returns what takes it off again."""

    async def change_member(self, change: MemberChange, *, timeout_s: float) -> object:
        """Change the configuration by one step, as the leader."""

    async def transfer_leadership(self, to: int | None, *, timeout_s: float) -> object:
        """Hand leadership over."""
