"""Enrolment: both sides prove to have the token; whoever sits in between learns nothing and changes nothing."""

from typing import Any

import msgspec
import pytest

from isopod.cluster.members.enrolment import CLOCK_SKEW_S, SESSIONS_MAX, Applicant, Porter
from isopod.cluster.members.tokens import (
    TokenRecord,
    TokenUse,
    check_token,
    check_use,
    is_forgettable,
    new_token,
    proof,
    token_id,
    token_key,
    token_record,
)
from isopod.cluster.members.wire import EnrolReply, EnrolRequest
from isopod.net.ca import Authority, certificate_request
from isopod.world.errors import ForeignCluster, HandshakeFailed, InvalidArgument, ProtocolViolation, TokenRefused, WrongState
from isopod.world.sim import SimWorld

TOKEN = "isopod-join-0123456789abcdef0123456789abcdef01234567"
CLUSTER = "00112233aabbccdd"
_NS = 1_000_000_000


class Case:
    """An authority with its porter, and a node that knocks."""

    def __init__(self, sim: SimWorld, *, token: str = TOKEN, cluster_id: str = "") -> None:
        world = sim.world
        self.authority = Authority.create(world, "isopod cluster")
        self.porter = Porter(world, CLUSTER, lambda: self.authority.certificate)
        self.record = token_record(TOKEN, now_ns=world.clock.now_ns(), valid_s=3600, uses=1, role="voter")
        self.request = certificate_request("isopod node 7")
        wanted = EnrolRequest(
            token_id="",
            nonce="",
            node_id=7,
            incarnation="0a1b",
            address="10.0.0.7:7000",
            role="voter",
            request=self.request.certificate,
        )
        self.applicant = Applicant(world, token, wanted, peer="10.0.0.1:7000", cluster_id=cluster_id)

    def certify(self, answer: EnrolRequest) -> EnrolReply:
        """Go on as a member does once it has seen the proof."""
        from isopod.net.ca import Subject

        challenge = self.porter.check(answer, self.record)
        certificate = self.authority.sign_request(answer.request, Subject("isopod node 7"))
        return self.porter.certify(answer, challenge, self.record, certificate)


def test_a_node_with_the_token_gets_a_certificate(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    enrolled = case.applicant.finish(case.certify(case.applicant.answer(challenge)))
    assert enrolled.cluster_id == CLUSTER
    assert enrolled.authorities == case.authority.certificate
    assert b"BEGIN CERTIFICATE" in enrolled.certificate


def test_neither_side_ever_sends_the_token_or_its_key(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    answer = case.applicant.answer(challenge)
    reply = case.certify(answer)
    said = b"".join(msgspec.msgpack.encode(each) for each in (case.applicant.first, challenge, answer, reply))
    assert TOKEN.encode() not in said
    assert token_key(TOKEN) not in said
    assert case.record.key.hex().encode() not in said


def test_a_member_without_the_token_is_not_believed(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    impostor = msgspec.structs.replace(case.record, key=token_key("another-secret-0123456789"))
    challenge = case.porter.challenge(case.applicant.first, impostor)
    with pytest.raises(HandshakeFailed, match="does not have our join token"):
        case.applicant.answer(challenge)


def test_a_node_without_the_token_is_not_let_in(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    forged = msgspec.structs.replace(case.applicant.first, session=challenge.session, proof=b"x" * 32)
    with pytest.raises(TokenRefused, match="the proof is wrong"):
        case.porter.check(forged, case.record)
    with pytest.raises(TokenRefused, match="no such token"):
        case.porter.challenge(case.applicant.first, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"cluster_id": "ffeeddccbbaa9988"},
        {"authorities": b"-----BEGIN CERTIFICATE-----"},
        {"now_ns": 1},
        {"session": "0" * 32},
        {"proof": b""},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_challenge_that_was_changed_on_the_way_is_refused(sim_world: SimWorld, changed: dict[str, Any]) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    with pytest.raises(HandshakeFailed):
        case.applicant.answer(msgspec.structs.replace(challenge, **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"node_id": 1},
        {"incarnation": "ffff"},
        {"address": "10.6.6.6:7000"},
        {"role": "agent"},
        {"request": b"-----BEGIN CERTIFICATE REQUEST-----"},
        {"nonce": "0" * 32},
        {"token_id": "0" * 12},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_request_that_was_changed_on_the_way_is_refused(sim_world: SimWorld, changed: dict[str, Any]) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    answer = case.applicant.answer(challenge)
    with pytest.raises(TokenRefused, match="the proof is wrong"):
        case.porter.check(msgspec.structs.replace(answer, **changed), case.record)
    # And changed already in the first request: the member's proof is then about another request.
    other = Case(sim_world)
    challenge = other.porter.challenge(msgspec.structs.replace(other.applicant.first, **changed), other.record)
    with pytest.raises(HandshakeFailed):
        other.applicant.answer(challenge)


def test_a_certificate_that_was_changed_on_the_way_is_refused(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    reply = case.certify(case.applicant.answer(case.porter.challenge(case.applicant.first, case.record)))
    with pytest.raises(HandshakeFailed, match="changed on the way"):
        case.applicant.finish(msgspec.structs.replace(reply, certificate=reply.certificate + b"\n"))
    fresh = Case(sim_world)
    with pytest.raises(ProtocolViolation, match="without a challenge"):
        fresh.applicant.finish(reply)


def test_a_member_that_signs_with_another_authority_is_refused(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    answer = case.applicant.answer(case.porter.challenge(case.applicant.first, case.record))
    case.authority = Authority.create(sim_world.world, "another")
    with pytest.raises(ProtocolViolation, match="not of its own authority"):
        case.applicant.finish(case.certify(answer))


def test_what_was_recorded_cannot_be_replayed(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    answer = case.applicant.answer(case.porter.challenge(case.applicant.first, case.record))
    case.porter.check(answer, case.record)
    with pytest.raises(TokenRefused, match="answered already"):
        case.porter.check(answer, case.record)
    later = case.porter.challenge(case.applicant.first, case.record)
    with pytest.raises(TokenRefused, match="the proof is wrong"):
        case.porter.check(msgspec.structs.replace(answer, session=later.session), case.record)
    # A recorded proof of the member does not pass for one of the node, nor the other way round.
    assert proof(case.record.key, "member", b"x") != proof(case.record.key, "node", b"x")


def test_challenges_are_bounded_in_number_and_time(sim_world: SimWorld) -> None:
    case = Case(sim_world)
    answer = case.applicant.answer(case.porter.challenge(case.applicant.first, case.record))
    for _ in range(SESSIONS_MAX):
        case.porter.challenge(case.applicant.first, case.record)
    with pytest.raises(TokenRefused, match="too late"):
        case.porter.check(answer, case.record)
    answer = case.applicant.answer(case.porter.challenge(case.applicant.first, case.record))
    sim_world.clock.step_ns(31 * _NS)
    with pytest.raises(TokenRefused, match="too late"):
        case.porter.check(answer, case.record)


@pytest.mark.parametrize("off_s", [3600, -3600])
def test_a_clock_an_hour_off_is_told(sim_world: SimWorld, off_s: int) -> None:
    case = Case(sim_world)
    challenge = case.porter.challenge(case.applicant.first, case.record)
    sim_world.clock.step_ns(off_s * _NS)
    side = "ahead of" if off_s > 0 else "behind"
    with pytest.raises(WrongState, match=f"3600 s {side} the cluster's") as caught:
        case.applicant.answer(challenge)
    assert "chronyc" in caught.value.hint
    sim_world.clock.step_ns(int((-off_s + CLOCK_SKEW_S / 2) * _NS))
    case.applicant.answer(challenge)


def test_another_cluster_than_the_one_it_belongs_to_is_refused(sim_world: SimWorld) -> None:
    case = Case(sim_world, cluster_id="0123012301230123")
    with pytest.raises(ForeignCluster, match=CLUSTER):
        case.applicant.answer(case.porter.challenge(case.applicant.first, case.record))


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_new_tokens_are_long_and_differ(sim_world: SimWorld) -> None:
    tokens = [new_token(sim_world.world) for _ in range(50)]
    assert len(dict.fromkeys(tokens)) == 50
    assert all(len(token) == 52 and check_token(token) == token for token in tokens)
    assert len(dict.fromkeys(map(token_id, tokens))) == 50


@pytest.mark.parametrize(
    "text", ["", "short", "a" * 40, "abcabcabcabcabcabcabcabcabc", "x" * 513, "é" * 30, "0123456789 0123456789\n01234"]
)
def test_what_is_too_simple_is_no_token(text: str) -> None:
    with pytest.raises(TokenRefused):
        check_token(text)


def test_a_token_lets_in_as_often_and_as_long_as_it_may() -> None:
    record = token_record(TOKEN, now_ns=0, valid_s=10, uses=2, role="voter")
    first, second, third = (TokenUse(number, "i") for number in (1, 2, 3))
    record = check_use(record, first, "voter", now_ns=1)
    record = check_use(record, second, "voter", now_ns=1)
    assert check_use(record, first, "voter", now_ns=11 * _NS) == record, "who came in comes again: its answer was lost"
    with pytest.raises(TokenRefused, match="was used 2 times"):
        check_use(record, third, "voter", now_ns=1)
    with pytest.raises(TokenRefused, match="was used 2 times"):
        check_use(record, TokenUse(1, "another disk"), "voter", now_ns=1)
    fresh = token_record(TOKEN, now_ns=0, valid_s=10, uses=2, role="agent")
    with pytest.raises(TokenRefused, match="has expired"):
        check_use(fresh, first, "agent", now_ns=10 * _NS)
    with pytest.raises(TokenRefused, match="for agents only"):
        check_use(fresh, first, "learner", now_ns=1)
    revoked = msgspec.structs.replace(fresh, is_revoked=True)
    with pytest.raises(TokenRefused, match="was revoked"):
        check_use(revoked, first, "agent", now_ns=1)
    with pytest.raises(TokenRefused, match="no such token"):
        check_use(None, first, "agent", now_ns=1)


def test_bounds_of_tokens() -> None:
    for fields in ({"valid_s": 0}, {"valid_s": 1e9}, {"uses": 0}, {"uses": 10_001}):
        with pytest.raises(InvalidArgument):
            token_record(TOKEN, **{"now_ns": 0, "valid_s": 1.0, "uses": 1, "role": "voter", **fields})  # type: ignore[arg-type]
    record = token_record(TOKEN, now_ns=0, valid_s=1, uses=1, role="voter")
    assert not is_forgettable(record, 7 * 86_400 * _NS)
    assert is_forgettable(record, 8 * 86_400 * _NS)
    assert isinstance(record, TokenRecord)
