"""Who reaches what on the cluster's port, and what becomes of certificates."""

import asyncio
from typing import Any

import pytest

from isopod.api import cluster as c
from isopod.api.messages import Empty
from isopod.api.store import methods as kv
from isopod.api.store.messages import Get, KvRead
from isopod.cluster.members import wire as w
from isopod.cluster.members.credentials import Bearer, bearer_of, subject_of
from isopod.cluster.members.enrolment import Applicant
from isopod.cluster.members.links import explain_handshake
from isopod.cluster.messaging import SEND, Batch
from isopod.cluster.raft.wire import HELLO, RaftHello
from isopod.net.ca import Authority, certificate_request
from isopod.net.rpc import connect
from isopod.world.errors import (
    ForeignCluster,
    HandshakeFailed,
    IdentityConflict,
    InvalidArgument,
    IsopodError,
    PeerError,
    RefusedError,
    TokenRefused,
    WrongState,
)
from isopod.world.network import ClientTls, PeerIdentity, TlsMaterial
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.members.rig import TOKEN, rig_of, until

BLIND = TlsMaterial(verify_peer=False, minimum_version="1.3")
BEAT = w.BeatRequest(node_id=1, incarnation="aa", address="127.0.0.1:1", role="voter", version="", applied=0, now_ns=0, book=0)


async def test_a_stranger_reaches_enrolment_and_nothing_else(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        node = await rig.found()
        client = await connect(world, node.address, tls=ClientTls(BLIND))
        asked: list[tuple[Any, Any]] = [
            (c.STATUS, c.StatusRequest()),
            (c.LEAVE, c.NodeRequest(node_id=1)),
            (kv.KV_READ, KvRead(reads=[Get("tokens/")])),
            (kv.KV_STATUS, Empty()),
            (w.BEAT, BEAT),
            (w.HAND_KEY, w.HandKey(key=b"")),
            (HELLO, RaftHello(node.cluster_id, 2, "aa", 1)),
            (SEND, Batch(1, "e", [])),
        ]
        for method, request in asked:
            with pytest.raises(RefusedError, match="only members of the cluster may ask that"):
                await client.call(method, request)
        request = w.EnrolRequest(token_id="x", nonce="y", node_id=2, incarnation="aa", address="127.0.0.1:1", role="voter", request=b"z")
        with pytest.raises(TokenRefused, match="knows no such token"):
            await client.call(w.ENROL, request)
        await client.close()


@pytest.mark.parametrize(
    "fields",
    [{"node_id": 0}, {"node_id": -1}, {"address": ""}, {"address": "x" * 300 + ":1"}, {"incarnation": "../.."}, {"incarnation": ""}],
)
async def test_nonsense_at_the_door_is_refused(sim_world: SimWorld, folder: str, fields: dict[str, object]) -> None:
    async with rig_of(sim_world.world, folder, "tls") as rig:
        node = await rig.found()
        said = {
            "token_id": "x",
            "nonce": "y",
            "node_id": 2,
            "incarnation": "aa",
            "address": "127.0.0.1:1",
            "role": "voter",
            "request": b"z",
        }
        client = await connect(sim_world.world, node.address, tls=ClientTls(BLIND))
        with pytest.raises((InvalidArgument, IdentityConflict)):
            await client.call(w.ENROL, w.EnrolRequest(**{**said, **fields}))  # type: ignore[arg-type]
        await client.close()


async def test_a_foreign_authoritys_certificate_opens_nothing(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        node = await rig.found()
        foreign = Authority.create(world, "isopod cluster")
        issued = foreign.issue(subject_of(Bearer(node.cluster_id, "voter", 1, node.identity.incarnation)))
        ours = node._credentials.authorities
        shown = TlsMaterial(certificate=issued.certificate, key=issued.key, authorities=ours, minimum_version="1.3")
        with pytest.raises(PeerError):
            client = await connect(world, node.address, tls=ClientTls(shown, server_name=f"{node.cluster_id}.isopod"))
            try:
                await client.call(c.STATUS, c.StatusRequest())
            finally:
                await client.close()
        # And nobody of ours takes a foreign member for one of ours.
        trusting = TlsMaterial(authorities=foreign.certificate, minimum_version="1.3")
        with pytest.raises(HandshakeFailed, match="not trusted"):
            await connect(world, node.address, tls=ClientTls(trusting, server_name=f"{node.cluster_id}.isopod"))


async def test_two_clusters_do_not_mix(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as one, rig_of(world, f"{folder}/other", "tls") as two:
        first, second = await one.found(), await two.found()
        stray = await one.join(2, first)
        await stray.stop()
        with pytest.raises(IsopodError) as caught:
            moved = one.make(2, bind=stray.advertised, join=(second.advertised,), token=TOKEN)
            await moved.start()
            await moved.wait_ready(3.0)
            assert moved.cluster_id == first.cluster_id, "it goes back to its own"
            raise ForeignCluster("it", second.cluster_id, first.cluster_id)
        assert isinstance(caught.value, ForeignCluster)
        assert [entry.id for entry in second.status().nodes] == [1]


async def test_no_member_speaks_for_another(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first, second, _ = await rig.form(3)
        links = second.links
        lie = w.BeatRequest(node_id=3, incarnation="aa", address="127.0.0.1:1", role="voter", version="", applied=0, now_ns=0, book=0)
        with pytest.raises(IdentityConflict, match="its certificate is that of node 2"):
            await links.call(1, w.BEAT, lie)
        with pytest.raises(IdentityConflict, match="its certificate is that of node 2"):
            await links.call(1, SEND, Batch(3, "e", []))
        with pytest.raises(IdentityConflict, match="does not speak for it"):
            await links.call(1, HELLO, RaftHello(first.cluster_id, 3, "aa", 1))
        # And who answers at an address must be who was meant.
        client = await connect(world, first.address, tls=first._credentials.client(1))
        await client.close()
        with pytest.raises(HandshakeFailed):
            await connect(world, first.address, tls=first._credentials.client(2))


async def test_an_agent_reaches_what_agents_need(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        agent = await rig.join(9, first, role="agent")
        assert (await agent.links.call(1, c.STATUS, c.StatusRequest())).leader_id == 1
        asked: list[tuple[Any, Any]] = [
            (kv.KV_READ, KvRead(reads=[Get("tokens/")])),
            (c.LEAVE, c.NodeRequest(node_id=1)),
            (w.HAND_KEY, w.HandKey(key=b"")),
            (HELLO, RaftHello(first.cluster_id, 9, agent.identity.incarnation, 1)),
        ]
        for method, request in asked:
            with pytest.raises(RefusedError, match="an agent may not call"):
                await agent.links.call(1, method, request)
        promoted = w.AdmitRequest(
            node_id=9,
            incarnation=agent.identity.incarnation,
            address=agent.advertised,
            role="voter",
            version="",
            cluster_id=first.cluster_id,
        )
        with pytest.raises(IdentityConflict, match="it enrolled as an agent"):
            await agent.links.call(1, w.ADMIT, promoted)
        with pytest.raises(WrongState, match="an agent"):
            await first.members.promote(9)


async def test_an_agents_token_makes_nobody_a_voters_double(world: World, folder: str) -> None:
    """A voter's id and incarnation are no secret: they stand in the certificate that it shows to everybody."""
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        second = await rig.join(2, first)
        token = (await first.members.create_token(c.CreateToken(role="agent"))).token
        wanted = w.EnrolRequest(
            token_id="",
            nonce="",
            node_id=2,
            incarnation=second.identity.incarnation,
            address="127.0.0.1:1",
            role="agent",
            request=certificate_request("isopod node 2").certificate,
        )
        applicant = Applicant(world, token, wanted, peer="the door")
        client = await connect(world, first.address, tls=ClientTls(BLIND))
        answer = applicant.answer(await client.call(w.ENROL, applicant.first))
        with pytest.raises(IdentityConflict, match="asks to come back as an agent"):
            await client.call(w.ENROL, answer)
        await client.close()

        # And nobody takes an agent's certificate for that of a replica.
        def shown(role: str) -> PeerIdentity:
            uri = Bearer(first.cluster_id, role, 2, second.identity.incarnation).uri
            return PeerIdentity("", "", (), (), (uri,), "", 0, 0)

        assert first.book.admits(2, shown("voter"))
        assert not first.book.admits(2, shown("agent"))


async def test_voters_hold_the_authoritys_key_and_nobody_else(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        learner = await rig.join(2, first, role="learner")
        agent = await rig.join(3, first, role="agent")

        async def has_key(node: object) -> bool:
            return await world.disk.stat(f"{node.config.data_dir}/tls/ca.key") is not None  # type: ignore[attr-defined]

        assert [await has_key(node) for node in (first, learner, agent)] == [True, False, False]
        await first.members.promote(2)
        assert await has_key(learner)
        found = await world.disk.stat(f"{learner.config.data_dir}/tls/ca.key")
        assert found is not None
        assert found.mode & 0o777 == 0o600
        # The founder may die for good: the other voter lets nodes in.
        await first.members.transfer(2)
        await learner.members.demote(1)
        await until(lambda: learner.status().voters == (2,), "it votes alone")
        token = (await learner.members.create_token(c.CreateToken())).token
        await rig.join(4, learner, token=token)
        await until(lambda: first._credentials.authority is None, "who votes no more forgets the key")
        assert not await has_key(first)


async def test_a_key_that_was_left_behind_is_removed_at_the_next_start(world: World, folder: str) -> None:
    """The node was stopped between its last vote and the removal of the key."""
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        learner = await rig.join(2, first, role="learner")
        await learner.stop()
        path = f"{learner.config.data_dir}/tls/ca.key"
        await world.disk.write(path, await world.disk.read(f"{first.config.data_dir}/tls/ca.key"))
        again = await rig.again(2, role="learner")
        await until(lambda: again._credentials.authority is None, "it is removed")
        await again.stop()
        assert await world.disk.stat(path) is None
        assert first._credentials.authority is not None


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"", b"\x16\x03\x01\xff\xff" + b"\0" * 100])
async def test_garbage_on_the_port_harms_nobody(world: World, folder: str, garbage: bytes) -> None:
    async with rig_of(world, folder, "tls") as rig:
        node = await rig.found()
        lost = asyncio.Event()
        transport, _ = await world.network.connect(node.address, lambda: _Lost(lost))
        transport.write(garbage)
        if not garbage:
            transport.close()
        async with asyncio.timeout(15):
            await lost.wait()
        await node.store.put("color", b"red")


async def test_a_frame_of_four_gigabytes_ends_its_connection(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        node = await rig.found()
        client = await connect(world, node.address, plaintext=True)
        assert client.connection._transport is not None
        client.connection._transport.write(b"\xff\xff\xff\xff" + b"x" * 1000)
        with pytest.raises(PeerError):
            await client.call(c.STATUS, c.StatusRequest())
        await client.close()
        await node.store.put("color", b"red")


async def test_certificates_are_renewed_while_all_goes_on(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found(certificate_s=60.0)
        learner = await rig.join(2, first, role="learner", certificate_s=60.0)
        before = [node._credentials.remaining_s() for node in (first, learner)]
        assert all(0 < left <= 60 for left in before)
        await asyncio.sleep(150)
        assert all(node._credentials.remaining_s() > 15 for node in (first, learner))
        # New connections are made with the new ones, in both directions.
        first.links.drop(2)
        learner.links.drop(1)
        await learner.pulse.beat(1)
        await learner.store.put("color", b"red")
        assert (await learner.store.get("color")).value == b"red"


async def test_an_expired_certificate_needs_a_token_and_a_voter_needs_none(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found(certificate_s=60.0)
        learner = await rig.join(2, first, role="learner", certificate_s=60.0)
        await learner.stop()
        await asyncio.sleep(100)
        with pytest.raises(WrongState, match="the certificate of node 2 is expired") as caught:
            await rig.make(2, role="learner", bind=learner.advertised).start()
        assert "ISOPOD_CLUSTER_TOKEN" in caught.value.hint
        token = (await first.members.create_token(c.CreateToken())).token
        again = await rig.again(2, role="learner", token=token, certificate_s=60.0)
        assert again._credentials.remaining_s() > 50
        await first.stop()
        await again.stop()
        await asyncio.sleep(100)
        alone = await rig.again(1, certificate_s=60.0)
        assert alone._credentials.remaining_s() > 50


async def test_a_running_node_whose_clock_is_off_is_told_so(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        learner = await rig.join(2, first, role="learner")
        sim_world.clock.step_ns(40 * 86_400 * 1_000_000_000)
        learner.links.drop(1)
        with pytest.raises(HandshakeFailed, match="expired") as caught:
            await learner.links.call(1, c.STATUS, c.StatusRequest())
        assert "clocks" in caught.value.hint


def test_hints_of_handshakes_fit() -> None:
    error = explain_handshake(HandshakeFailed("x", "its certificate is not trusted: certificate is not yet valid"))
    assert "timedatectl" in error.hint
    error = explain_handshake(HandshakeFailed("x", "its certificate is not trusted: self-signed"))
    assert "timedatectl" not in error.hint
    assert bearer_of(None) is None


class _Lost(asyncio.Protocol):
    def __init__(self, lost: asyncio.Event) -> None:
        self._lost = lost

    def connection_lost(self, _: Exception | None) -> None:
        self._lost.set()
