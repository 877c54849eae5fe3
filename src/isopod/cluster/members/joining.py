"""Joining: how a node without a cluster finds one and becomes a member.

It asks the addresses it was given, one after the other, and again after a pause, until one of them takes it in. Names are resolved with
every try: several addresses are tried in turn, and one that moved is found. What cannot pass by waiting (a wrong token, a taken id,
another cluster) is raised, unless another address of the same round did better.

    enrol     with the token, for a certificate            skipped without TLS, and by who has one
    admit     with the certificate, at the leader          members hand out its address
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, TypeVar

import isopod
from isopod.cluster.members import wire as w
from isopod.cluster.members.config import ClusterConfig, parse_tcp
from isopod.cluster.members.credentials import Credentials
from isopod.cluster.members.enrolment import Applicant, Enrolled
from isopod.cluster.members.identity import Identity
from isopod.cluster.members.links import connect_any, explain_handshake
from isopod.cluster.members.tokens import check_token
from isopod.net.ca import certificate_request
from isopod.net.rpc import Client
from isopod.runtime.logger import Logger
from isopod.world.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ForeignCluster,
    HandshakeFailed,
    IdentityConflict,
    IsopodError,
    NotStarted,
    TokenRefused,
    UnavailableError,
    UsageError,
    WrongState,
)
from isopod.world.network import ClientTls, TlsMaterial
from isopod.world.world import World

T = TypeVar("T")
CONNECT_S: Final = 3.0
CALL_S: Final = 15.0
PAUSE_FIRST_S: Final = 0.1
PAUSE_MAX_S: Final = 2.0
LEADER_HOPS_MAX: Final = 4
FATAL: Final = (TokenRefused, IdentityConflict, ForeignCluster, AlreadyExists, UsageError)
"""What no waiting mends."""


class Admission(NamedTuple):
    """A node is a member now."""

    cluster_id: str
    reply: w.AdmitReply


class Unreachable(NamedTuple):
    """Nobody answered at all: there may be no cluster yet."""

    why: str


class Joiner:
    """Joins.

    Args:
        world: The ports.
        config: What the node was told.
        identity: Who it is.
        credentials: Where its certificate goes.
        address: Where it will listen, as the others are told.
        logger: Told of tries.
    """

    def __init__(
        self, world: World, config: ClusterConfig, identity: Identity, credentials: Credentials, *, address: str, logger: Logger
    ) -> None:
        self.why = ""
        """What the last try failed for."""
        self._world = world
        self._config = config
        self._identity = identity
        self._credentials = credentials
        self._address = address
        self._logger = logger
        self._random = world.random.stream("cluster.join")

    async def enrol(self, addresses: Sequence[str], *, tries: int | None = None, is_patient: bool = False) -> Enrolled | Unreachable:
        """Get a certificate from any of these members.

        Args:
            addresses: "HOST:PORT" of each.
            tries: How many rounds; None for no end.
            is_patient: Whether to go on without end if anybody answered at all.

        Returns:
            What was got; `Unreachable` if nobody answered in all rounds.

        Raises:
            TokenRefused: The token is wrong, or lets nobody in any more.
            IdentityConflict: The id is taken.
            IsopodError: What else no waiting mends.
        """
        token = check_token(self._config.token)
        own = certificate_request(f"isopod node {self._config.node_id}")

        async def knock(address: str) -> Enrolled:
            enrolled = await self._enrol_at(address, token, own.certificate)
            await self._credentials.install(enrolled.certificate, own.key, enrolled.authorities)
            return enrolled

        return await self._rounds(addresses, knock, tries, is_patient=is_patient)

    async def admit(
        self, addresses: Sequence[str], cluster_id: str, *, tries: int | None = None, is_patient: bool = False
    ) -> Admission | Unreachable:
        """Become a member, at any of these members or where they say the leader is. Returns and raises as `enrol`.

        Args:
            addresses: "HOST:PORT" of each.
            cluster_id: The cluster, "" if any will do (without TLS).
            tries: How many rounds; None for no end.
            is_patient: Whether to go on without end if anybody answered at all.
        """

        async def ask(address: str) -> Admission:
            return await self._admit_at(address, cluster_id)

        return await self._rounds(addresses, ask, tries, is_patient=is_patient)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _rounds(
        self, addresses: Sequence[str], attempt: Callable[[str], Awaitable[T]], tries: int | None, *, is_patient: bool
    ) -> T | Unreachable:
        """Try each address in turn, round after round."""
        n_rounds = 0
        while True:
            fatal: IsopodError | None = None
            nobody = True
            for address in addresses:
                try:
                    return await attempt(address)
                except IsopodError as error:
                    self.why = error.message if error.message.startswith(address) else f"{address}: {error.message}"
                    nobody = nobody and isinstance(error, NotStarted | DeadlineExceeded)
                    if isinstance(error, FATAL):
                        fatal = fatal or error
            if fatal is not None:
                raise fatal
            n_rounds += 1
            if tries is not None and n_rounds >= tries:
                if nobody:
                    return Unreachable(self.why)
                if is_patient:
                    tries = None  # somebody is there: it is only a matter of time
                    continue
                raise UnavailableError(f"node {self._config.node_id} could not join: {self.why}", "see the log of that member")
            if n_rounds in (1, 10) or n_rounds % 100 == 0:
                self._logger.warning("cluster.join_waits", why=self.why, rounds=n_rounds)
            pause_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(n_rounds - 1, 10))
            await asyncio.sleep(pause_s * (1 - 0.5 * self._random.random()))

    async def _enrol_at(self, address: str, token: str, request: bytes) -> Enrolled:
        wanted = w.EnrolRequest(
            token_id="",
            nonce="",
            node_id=self._config.node_id,
            incarnation=self._identity.incarnation,
            address=self._address,
            role=self._config.role,
            request=request,
        )
        # The authority is not known yet: who answers proves itself by the token.
        tls = ClientTls(TlsMaterial(verify_peer=False, minimum_version="1.3"))
        asked = address
        for _ in range(LEADER_HOPS_MAX):
            client = await self._connect(asked, tls)
            try:
                applicant = Applicant(self._world, token, wanted, peer=asked, cluster_id=self._identity.cluster_id)
                challenge = await client.call(w.ENROL, applicant.first, timeout_s=CALL_S)
                if not challenge.ask:
                    answer = applicant.answer(challenge)
                    return applicant.finish(await client.call(w.ENROL, answer, timeout_s=CALL_S))
            finally:
                await client.close()
            asked = challenge.ask[self._random.randrange(len(challenge.ask))]
        raise NotStarted(address, "it knows no member that can sign", "try again")

    async def _admit_at(self, address: str, cluster_id: str) -> Admission:
        request = w.AdmitRequest(
            node_id=self._config.node_id,
            incarnation=self._identity.incarnation,
            address=self._address,
            role=self._config.role,
            version=isopod.__version__,
            cluster_id=cluster_id,
        )
        asked = address
        for _ in range(LEADER_HOPS_MAX):
            client = await self._connect(asked, self._credentials.client())
            try:
                reply = await client.call(w.ADMIT, request, timeout_s=CALL_S)
            except HandshakeFailed as error:
                raise explain_handshake(error) from error
            finally:
                await client.close()
            if reply.success:
                return Admission(reply.cluster_id, reply)
            if not reply.ask:
                raise WrongState("the member at", asked, "not able to take nodes in", "join", hint=reply.message)
            asked = reply.ask[0]
        raise NotStarted(address, "its members do not agree who leads", "try again")

    async def _connect(self, address: str, tls: ClientTls | None) -> Client:
        where = parse_tcp("address to join", address)
        return await connect_any(self._world, where, name=f"isopod-node-{self._config.node_id}", timeout_s=CONNECT_S, tls=tls)
