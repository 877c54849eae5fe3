"""Enrolment: how a node without a certificate gets one, by a token that both sides prove to have and neither sends.

    node                                              member
    token id, nonce, who it is, request for a  --->   looks the token up
    certificate
                                               <---   cluster id, session (its nonce), the authority's certificate, its time,
    checks the member's proof: it has the token,      HMAC(key, "member", all of the above)
    and this is the authority it means
    the same again, with the session and       --->   checks the node's proof; uses the token up, by a transaction;
    HMAC(key, "node", all of the above)               signs the request
                                               <---   certificate, HMAC(key, "certificate", all of the above and it)

Each proof covers everything said before, in both directions, with a fresh nonce of each side: a proof that was recorded fits no other
session, and whoever sits in between without the token can only cut the line. What he reads (a request, certificates) is public. The
connection is TLS without a look at the member's certificate, for the authority is not known yet: the proof is that look.

The two classes are pure state machines; who carries the messages is `joining` and `service`.
"""

import hashlib
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from isopod.cluster.members.identity import check_cluster_id
from isopod.cluster.members.tokens import TokenRecord, is_proof, proof, token_id, token_key
from isopod.cluster.members.wire import EnrolReply, EnrolRequest
from isopod.net.ca import is_signed_by
from isopod.world.errors import ForeignCluster, HandshakeFailed, InvalidArgument, ProtocolViolation, TokenRefused, WrongState
from isopod.world.world import World

NONCE_BYTES: Final = 16
SESSIONS_MAX: Final = 256
SESSION_NS: Final = 30_000_000_000
CLOCK_SKEW_S: Final = 240.0
"""How far clocks may differ: certificates begin five minutes before they were made."""
_NS: Final = 1_000_000_000


class Enrolled(NamedTuple):
    """What a node has in the end."""

    cluster_id: str
    certificate: bytes
    authorities: bytes


class Applicant:
    """The node's side of one enrolment.

    Args:
        world: For a nonce and the time.
        token: The token's text.
        wanted: Who it is and what it wants; nonce, session and proof are filled in here.
        peer: The member's address, for errors.
        cluster_id: The cluster it must be, "" for any.
    """

    def __init__(self, world: World, token: str, wanted: EnrolRequest, *, peer: str, cluster_id: str = "") -> None:
        self._world = world
        self._key = token_key(token)
        self._peer = peer
        self._cluster_id = cluster_id
        nonce = world.random.token_hex(NONCE_BYTES)
        self.first = msgspec.structs.replace(wanted, token_id=token_id(token), nonce=nonce, session="", proof=b"")
        self._challenge: EnrolReply | None = None

    def answer(self, challenge: EnrolReply) -> EnrolRequest:
        """Check the member's proof and return the second request.

        Raises:
            HandshakeFailed: It does not have the token.
            WrongState: The clocks differ too much.
            ForeignCluster: It is of another cluster than ours.
            ProtocolViolation: It said nonsense.
        """
        try:
            check_cluster_id(challenge.cluster_id)
        except InvalidArgument as error:
            raise ProtocolViolation(self._peer, error.message) from error
        if not is_proof(challenge.proof, self._key, "member", transcript(self.first, challenge)):
            raise HandshakeFailed(self._peer, "it does not have our join token: it is another cluster, or somebody in between")
        if self._cluster_id and challenge.cluster_id != self._cluster_id:
            raise ForeignCluster(f"the member at {self._peer}", challenge.cluster_id, self._cluster_id)
        off_s = (self._world.clock.now_ns() - challenge.now_ns) / _NS
        if abs(off_s) > CLOCK_SKEW_S:
            side = "ahead of" if off_s > 0 else "behind"
            raise WrongState(
                "this machine's clock", "", f"{abs(off_s):.0f} s {side} the cluster's", "join", hint="set it: chronyc makestep"
            )
        self._challenge = challenge
        own = proof(self._key, "node", transcript(self.first, challenge))
        return msgspec.structs.replace(self.first, session=challenge.session, proof=own)

    def finish(self, reply: EnrolReply) -> Enrolled:
        """Check the certificate that came and return it.

        Raises:
            HandshakeFailed: It is not from who proved to have the token.
            ProtocolViolation: It was not signed by the authority.
        """
        challenge = self._challenge
        if challenge is None:
            raise ProtocolViolation(self._peer, "a certificate without a challenge")
        if not is_proof(reply.proof, self._key, "certificate", transcript(self.first, challenge, reply.certificate)):
            raise HandshakeFailed(self._peer, "its certificate for us was changed on the way")
        if not is_signed_by(reply.certificate, challenge.authorities):
            raise ProtocolViolation(self._peer, "the certificate is not of its own authority")
        return Enrolled(challenge.cluster_id, reply.certificate, challenge.authorities)


class Porter:
    """The member's side: open challenges, bounded in number and time.

    Args:
        world: For nonces and the time.
        cluster_id: Which cluster.
        authorities: Returns the authority's certificate.
    """

    def __init__(self, world: World, cluster_id: str, authorities: Callable[[], bytes]) -> None:
        self._world = world
        self._cluster_id = cluster_id
        self._authorities = authorities
        self._sessions: dict[str, tuple[EnrolRequest, EnrolReply]] = {}

    def challenge(self, request: EnrolRequest, record: TokenRecord | None) -> EnrolReply:
        """Return the challenge to a first request.

        Args:
            request: The request.
            record: The token it names.

        Raises:
            TokenRefused: There is none.
        """
        if record is None:
            raise TokenRefused("this cluster knows no such token")
        now_ns = self._world.clock.now_ns()
        self._drop_old(now_ns)
        reply = EnrolReply(
            cluster_id=self._cluster_id,
            session=self._world.random.token_hex(NONCE_BYTES),
            authorities=self._authorities(),
            now_ns=now_ns,
        )
        first = msgspec.structs.replace(request, session="", proof=b"")
        reply = msgspec.structs.replace(reply, proof=proof(record.key, "member", transcript(first, reply)))
        self._sessions[reply.session] = (first, reply)
        return reply

    def check(self, request: EnrolRequest, record: TokenRecord | None) -> EnrolReply:
        """Check a node's proof; its session is over either way.

        Args:
            request: The second request.
            record: The token it names.

        Returns:
            The challenge it answered.

        Raises:
            TokenRefused: The proof is wrong, replayed, or too late.
        """
        self._drop_old(self._world.clock.now_ns())
        first, challenge = self._sessions.pop(request.session, (None, None))
        if first is None or challenge is None or record is None:
            raise TokenRefused("this challenge was answered already, or too late", "try again")
        said = msgspec.structs.replace(request, session="", proof=b"")
        if said != first or not is_proof(request.proof, record.key, "node", transcript(first, challenge)):
            raise TokenRefused("the proof is wrong")
        return challenge

    def certify(self, request: EnrolRequest, challenge: EnrolReply, record: TokenRecord, certificate: bytes) -> EnrolReply:
        """Return the last reply."""
        first = msgspec.structs.replace(request, session="", proof=b"")
        own = proof(record.key, "certificate", transcript(first, challenge, certificate))
        return EnrolReply(cluster_id=self._cluster_id, certificate=certificate, proof=own)

    def _drop_old(self, now_ns: int) -> None:
        while self._sessions:
            session, (_, challenge) = next(iter(self._sessions.items()))
            if len(self._sessions) < SESSIONS_MAX and now_ns - challenge.now_ns < SESSION_NS:
                return
            del self._sessions[session]


def transcript(first: EnrolRequest, challenge: EnrolReply, certificate: bytes = b"") -> bytes:
    """Return everything that was said, unambiguously: what proofs are about."""
    said = (
        "isopod enrolment 1",
        (first.token_id, first.nonce, first.node_id, first.incarnation, first.address, first.role, _hash(first.request)),
        (challenge.cluster_id, challenge.session, challenge.now_ns, _hash(challenge.authorities)),
        _hash(certificate),
    )
    return msgspec.msgpack.encode(said)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
