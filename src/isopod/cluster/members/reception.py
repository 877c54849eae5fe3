"""Reception: what a member answers to other nodes: enrolment, admission, signs of life, new certificates.

Whether a caller may ask is looked at before (`gate`); here the certificate is compared with what the request claims, so that no member
speaks for another.
"""

import asyncio
from typing import Final

import msgspec

from isopod.cluster.members import wire as w
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig, check_node_id, parse_tcp
from isopod.cluster.members.credentials import Bearer, Credentials, bearer_of
from isopod.cluster.members.enrolment import Porter
from isopod.cluster.members.gate import removed_error
from isopod.cluster.members.ports import Raft
from isopod.cluster.members.records import MemberRecord
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.roster import Roster, known_id
from isopod.cluster.members.steward import Steward
from isopod.cluster.members.tokens import TokenUse, check_token_id
from isopod.net.rpc.call import AnyCall, AnyHandler, AnyMethod
from isopod.runtime.logger import Logger
from isopod.world.errors import DeadlineExceeded, ForeignCluster, IdentityConflict, NotLeader, NotStarted, WrongState
from isopod.world.world import World

ADMIT_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.02
ADDRESS_CHARS_MAX: Final = 255
INCARNATION_CHARS_MAX: Final = 64
VERSION_CHARS_MAX: Final = 64


class Reception:
    """The handlers.

    Args:
        world: For the time.
        config: What the node was told.
        raft: Its Raft node.
        registry: The records.
        roster: Changes them.
        book: Where nodes are.
        credentials: The authority's key, on voters.
        steward: Hears signs of life.
        cluster_id: Which cluster.
        logger: Told who comes.
    """

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        raft: Raft,
        registry: Registry,
        *,
        roster: Roster,
        book: Book,
        credentials: Credentials,
        steward: Steward,
        cluster_id: str,
        logger: Logger,
    ) -> None:
        self._world = world
        self._config = config
        self._raft = raft
        self._registry = registry
        self._roster = roster
        self._book = book
        self._credentials = credentials
        self._steward = steward
        self._cluster_id = cluster_id
        self._logger = logger
        self._porter = Porter(world, cluster_id, lambda: credentials.authorities)

    def handlers(self) -> dict[AnyMethod, AnyHandler]:
        """Return a handler for each verb between nodes."""
        return {
            w.ENROL: self.enrol,
            w.ADMIT: self.admit,
            w.BEAT: self.beat,
            w.RENEW: self.renew,
            w.HAND_KEY: self.take_key,
        }

    # --- handlers -----------------------------------------------------------------------------------------------------

    async def enrol(self, _: AnyCall, request: w.EnrolRequest) -> w.EnrolReply:
        """Give a node without a certificate one, if it proves to have a token."""
        _check_claim(request.node_id, request.incarnation, request.address)
        if self._credentials.authority is None:
            return w.EnrolReply(cluster_id=self._cluster_id, ask=self._voter_addresses())
        if self._registry.cluster is None:
            raise WrongState("cluster", self._cluster_id, "being founded", "take nodes in", hint="try again in a moment")
        check_token_id(request.token_id)
        # What this node does not know may be new: a token is made on one node and shown on another.
        record = self._registry.tokens.get(request.token_id) or await self._roster.find_token(request.token_id)
        if not request.session:
            return self._porter.challenge(request, record)
        challenge = self._porter.check(request, record)
        await self._check_id(request.node_id, request.incarnation)
        self._check_rank(request.node_id, request.role)
        record = await self._roster.use_token(request.token_id, TokenUse(request.node_id, request.incarnation), request.role)
        bearer = Bearer(self._cluster_id, request.role, request.node_id, request.incarnation)
        certificate = self._credentials.sign(request.request, bearer, valid_s=self._config.certificate_s)
        self._logger.info("cluster.enrolled", node=request.node_id, address=request.address, token=request.token_id, role=request.role)
        return self._porter.certify(request, challenge, record, certificate)

    async def admit(self, call: AnyCall, request: w.AdmitRequest) -> w.AdmitReply:
        """Make an enrolled node a member; for one that replicates, return when Raft has it as a learner at least."""
        _check_claim(request.node_id, request.incarnation, request.address)
        self._check_bearer(call, request.node_id, request.incarnation, request.role)
        if request.cluster_id not in ("", self._cluster_id):
            raise ForeignCluster(f"node {request.node_id}", request.cluster_id, self._cluster_id)
        await self._check_id(request.node_id, request.incarnation)
        self._check_rank(request.node_id, request.role)
        if not self._raft.is_leader:
            return self._elsewhere()
        if self._raft.status(with_digest=False).node_id not in self._registry.members:
            raise NotStarted(f"node {self._raft.leader}", "the founder's own record is not written yet", "try again")
        wanted = MemberRecord(
            node_id=request.node_id,
            incarnation=request.incarnation,
            address=request.address,
            role=request.role,
            version=request.version[:VERSION_CHARS_MAX],
            joined_at_ns=self._world.clock.now_ns(),
        )
        await self._roster.admit(wanted)
        self._steward.wake()
        if request.role != "agent":
            await self._wait_replica(request.node_id)
        return w.AdmitReply(
            success=True,
            message=f"Node {request.node_id} successfully joined cluster",
            cluster_id=self._cluster_id,
            leader_id=self._raft.leader,
            peers=self._replicas(),
            voters=self._raft.members().voters,
        )

    async def beat(self, call: AnyCall, request: w.BeatRequest) -> w.BeatReply:
        """Hear a sign of life; or say who leads."""
        self._check_bearer(call, request.node_id, request.incarnation, None)
        leader_id, is_leader = self._raft.leader, self._raft.is_leader
        leader = self._book.find(leader_id) if leader_id else None
        record = self._registry.members.get(request.node_id)
        is_member = record is not None and record.incarnation == request.incarnation
        if self._registry.is_removed(request.node_id, request.incarnation):
            raise removed_error(request.node_id)
        if is_leader and record is not None and is_member:
            self._steward.heard(request.node_id, its_now_ns=request.now_ns)
            if (record.address, record.version) != (request.address, request.version[:VERSION_CHARS_MAX]):
                _check_claim(request.node_id, request.incarnation, request.address)
                address, version = request.address, request.version[:VERSION_CHARS_MAX]
                await self._roster.change(request.node_id, lambda old: msgspec.structs.replace(old, address=address, version=version))
        book = self._registry.replica_version
        return w.BeatReply(
            leader_id=leader_id,
            leader_address=leader.address if leader is not None else "",
            lease_s=self._steward.lease_s(),
            beat_s=self._steward.beat_s(),
            book=book,
            peers=self._replicas() if not leader_id or (request.role == "agent" and request.book != book) else None,
            is_member=is_member or not is_leader,
        )

    async def renew(self, call: AnyCall, request: w.RenewRequest) -> w.RenewReply:
        """Sign a member's certificate anew."""
        bearer = bearer_of(call.identity)
        if bearer is None:  # without TLS there is nothing to renew
            raise IdentityConflict(0, "only who shows a certificate can renew it")
        record = self._registry.members.get(bearer.node_id)
        if record is None or record.incarnation != bearer.incarnation:
            raise removed_error(bearer.node_id)
        certificate = self._credentials.sign(request.request, bearer, valid_s=self._config.certificate_s)
        return w.RenewReply(certificate=certificate, authorities=self._credentials.authorities)

    async def take_key(self, call: AnyCall, request: w.HandKey) -> w.Done:
        """Take the authority's key from the leader: this node is about to vote."""
        bearer = bearer_of(call.identity)
        if bearer is not None and bearer.node_id not in self._raft.members().voters:
            raise IdentityConflict(bearer.node_id, "only a voter hands over the authority's key")
        await self._credentials.keep_authority(request.key)
        return w.Done()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_bearer(self, call: AnyCall, node_id: int, incarnation: str, role: str | None) -> None:
        """Compare what a request claims with the certificate it came with."""
        bearer = bearer_of(call.identity)
        if bearer is None:
            return  # without TLS; with it the gate has looked
        if (bearer.node_id, bearer.incarnation) != (node_id, incarnation):
            raise IdentityConflict(node_id, f"its certificate is that of node {bearer.node_id}", "no node speaks for another")
        if role is not None and role != "agent" and bearer.role == "agent":
            raise IdentityConflict(node_id, "it enrolled as an agent", "enrol anew, with a token for voters")

    async def _check_id(self, node_id: int, incarnation: str) -> None:
        record = self._registry.members.get(node_id)
        if self._registry.is_removed(node_id, incarnation):
            raise removed_error(node_id)
        if record is not None and record.incarnation != incarnation:
            # That is final for who asks, and this node may only not have heard that the other one was taken out.
            record = await self._roster.find_member(node_id)
            if record is not None and record.incarnation != incarnation:
                raise known_id(node_id)

    def _check_rank(self, node_id: int, role: str) -> None:
        """Refuse an agent's certificate for a node that holds a replica: with an agent's token alone one would answer in its place."""
        record = self._registry.members.get(node_id)
        if role == "agent" and record is not None and record.role != "agent":
            raise IdentityConflict(
                node_id, f"it is a member as {record.role}, and asks to come back as an agent", "choose a free id: --id N"
            )

    def _elsewhere(self) -> w.AdmitReply:
        """Return the answer of a member that does not lead.

        Raises:
            NotLeader: Nobody is known to lead.
        """
        leader_id = self._raft.leader
        leader = self._book.find(leader_id) if leader_id else None
        if leader is None:
            raise NotLeader(self._config.node_id, leader_id)
        why = f"node {leader_id} leads the cluster"
        return w.AdmitReply(success=False, message=why, cluster_id=self._cluster_id, leader_id=leader_id, ask=(leader.address,))

    async def _wait_replica(self, node_id: int) -> None:
        """Wait until Raft has a node in its configuration."""
        try:
            async with asyncio.timeout(ADMIT_TIMEOUT_S):
                while True:
                    if node_id in self._raft.members().all():
                        return
                    if not self._raft.is_leader:
                        raise NotLeader(self._config.node_id, self._raft.leader)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise DeadlineExceeded(f"adding node {node_id}", ADMIT_TIMEOUT_S) from None

    def _replicas(self) -> tuple[w.NodeAddress, ...]:
        return tuple(peer for peer in self._book.all() if peer.role != "agent")

    def _voter_addresses(self) -> tuple[str, ...]:
        found = (self._book.find(node_id) for node_id in self._raft.members().voters)
        return tuple(peer.address for peer in found if peer is not None)


def _check_claim(node_id: int, incarnation: str, address: str) -> None:
    check_node_id(node_id)
    parse_tcp("Bind address", address)
    if len(address) > ADDRESS_CHARS_MAX or not 0 < len(incarnation) <= INCARNATION_CHARS_MAX or not incarnation.isalnum():
        raise IdentityConflict(node_id, "its incarnation or its address cannot be one")
