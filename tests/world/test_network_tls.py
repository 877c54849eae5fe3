"""TLS of the Network port, on both Worlds and both host loops: the handshake really happens."""

import asyncio
import gc
from typing import Any

import pytest

from isopod.world.errors import DeadlineExceeded, HandshakeFailed, InvalidArgument
from isopod.world.network import (
    ClientTls,
    Listener,
    ServerTls,
    TcpAddress,
    TlsMaterial,
    UnixAddress,
    alpn_protocol,
    peer_identity,
)
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.net.certificates import EPOCH_S, LONG_S, Subject, client_leaf, client_material, issue, server_leaf, server_material
from tests.world.recorder import Recorder

LOOPBACK = TcpAddress("127.0.0.1", 0)
pytestmark = pytest.mark.row("S15")


class Served(Recorder):
    """Echoes, and is remembered."""

    def __init__(self, made: list["Served"], *, echo: bool = True) -> None:
        super().__init__(echo=echo)
        made.append(self)


class Deaf(Recorder):
    """Never answers, and closes when the peer does."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def serve(world: World, tls: ServerTls, made: list[Served] | None = None, *, echo: bool = True) -> Listener:
    kept: list[Served] = [] if made is None else made
    return await world.network.listen(LOOPBACK, lambda: Served(kept, echo=echo), tls=tls)


async def dial(world: World, address: Any, tls: ClientTls | None) -> tuple[asyncio.Transport, Recorder]:
    transport, client = await world.network.connect(address, Recorder, tls=tls)
    assert isinstance(client, Recorder)
    return transport, client


async def end(transport: asyncio.Transport, client: Recorder, listener: Listener) -> None:
    transport.close()
    await client.wait_lost()
    await listener.close()


async def test_bytes_go_both_ways(world: World) -> None:
    listener = await serve(world, ServerTls(server_material()))
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    transport.write(b"hello")
    assert await client.wait_received(5) == b"hello"
    assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert transport.get_extra_info("cipher")[2] >= 128
    assert transport.get_extra_info("peername")[1] == listener.address[1]  # type: ignore[misc]
    await end(transport, client, listener)
    assert client.error is None


async def test_megabytes_arrive_whole_whatever_the_reader_does(world: World) -> None:
    listener = await serve(world, ServerTls(server_material()))
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    sent = b"".join(index.to_bytes(4, "big") for index in range(1 << 19))
    transport.pause_reading()
    transport.write(sent[:100])
    transport.writelines([sent[100:1000], sent[1000:]])
    await asyncio.sleep(0.02)
    assert client.received == b""
    transport.resume_reading()
    await client.wait_received(1 << 19)
    transport.pause_reading()
    await asyncio.sleep(0.01)
    transport.resume_reading()
    assert await client.wait_received(len(sent)) == sent
    await end(transport, client, listener)


async def test_over_a_unix_socket_the_name_must_be_given(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: Recorder(echo=True), tls=ServerTls(server_material()))
    with pytest.raises(InvalidArgument):
        await dial(world, address, ClientTls(client_material()))
    transport, client = await dial(world, address, ClientTls(client_material(), server_name="localhost"))
    transport.write(b"x")
    assert await client.wait_received(1) == b"x"
    await end(transport, client, listener)


async def test_half_close_reaches_the_peer_which_can_still_answer(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material()), made, echo=False)
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    assert transport.can_write_eof()
    transport.write(b"question")
    transport.write_eof()
    with pytest.raises(RuntimeError):
        transport.write(b"more")
    served = await made[0].wait_made()
    await made[0].wait_end()
    assert bytes(made[0].received) == b"question"
    served.write(b"answer")
    assert await client.wait_received(6) == b"answer"
    served.close()
    await client.wait_end()
    await end(transport, client, listener)
    await made[0].wait_lost()
    assert (client.error, made[0].error) == (None, None)


async def test_ending_while_the_peers_last_words_and_end_wait_unread(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material()), made, echo=False)
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    served = await made_first(made)

    def pause_first(data: bytes) -> None:
        transport.pause_reading()
        client.received += data
        client.changed.set()

    client.data_received = pause_first  # type: ignore[method-assign]
    served.writelines([b"x" * 20_000, b"last words"])
    served.write_eof()
    await client.wait_received(1)
    await asyncio.sleep(0.02)
    transport.write(b"goodbye")
    transport.write_eof()
    await made[0].wait_end()
    assert made[0].received == b"goodbye"
    assert len(client.received) < 20_010
    async with asyncio.timeout(40):
        while len(client.received) < 20_010:
            transport.resume_reading()
            await asyncio.sleep(0.001)
    transport.resume_reading()
    await client.wait_end()
    assert client.received == b"x" * 20_000 + b"last words"
    served.close()
    await end(transport, client, listener)
    await made[0].wait_lost()
    assert (client.error, made[0].error) == (None, None)


async def test_what_was_written_before_close_arrives_also_while_the_peer_writes(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material()), made, echo=False)
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    (await made_first(made)).write(b"never read")
    transport.write(bytes(300_000))
    transport.close()
    await made[0].wait_end()
    (await made_first(made)).close()
    await client.wait_lost()
    await made[0].wait_lost()
    assert len(made[0].received) == 300_000
    await listener.close()


async def test_an_end_without_goodbye_is_not_taken_for_the_end(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material()), made)
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    transport.write(b"part of")
    await client.wait_received(7)
    transport.abort()
    await made[0].wait_lost()
    assert isinstance(made[0].error, ConnectionError)
    assert not made[0].at_end
    await client.wait_lost()
    await listener.close()


async def test_protocols_are_agreed_on(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material(alpn=("h2", "http/1.1"))), made)
    transport, client = await dial(world, listener.address, ClientTls(client_material(alpn=("http/1.1", "other"))))
    assert alpn_protocol(transport) == "http/1.1"
    assert alpn_protocol(await made_first(made)) == "http/1.1"
    await end(transport, client, listener)


async def test_the_certificate_follows_the_name_asked_for(world: World) -> None:
    tls = ServerTls(server_material(), names={"b.example": server_material("b.example"), "*.c.example": server_material("*.c.example")})
    listener = await serve(world, tls)
    for name, shown in (("b.example", "b.example"), ("x.c.example", "*.c.example"), ("localhost", "localhost")):
        transport, client = await dial(world, listener.address, ClientTls(client_material(), server_name=name))
        identity = peer_identity(transport)
        assert identity is not None
        assert identity.common_name == shown
        transport.close()
        await client.wait_lost()
    with pytest.raises(HandshakeFailed, match="not trusted"):
        await dial(world, listener.address, ClientTls(client_material(), server_name="y.x.c.example"))
    await listener.close()


async def test_a_server_sees_who_its_client_is(world: World) -> None:
    made: list[Served] = []
    listener = await serve(world, ServerTls(server_material(client_auth="required")), made)
    transport, client = await dial(world, listener.address, ClientTls(client_material(client_leaf())))
    transport.write(b"x")
    assert await client.wait_received(1) == b"x"
    identity = peer_identity(await made_first(made))
    assert identity is not None
    assert (identity.common_name, identity.organisation) == ("a client", "tests")
    assert identity.dns_names == ("client.example",)
    assert identity.uris == ("spiffe://isopod/client",)
    assert identity.not_before_s < identity.not_after_s
    await end(transport, client, listener)


@pytest.mark.parametrize("shown", ["nothing", "wrong authority", "expired", "a server's"])
async def test_a_client_without_a_good_certificate_is_refused(world: World, shown: str) -> None:
    leaf = {
        "nothing": None,
        "wrong authority": client_leaf(by="somebody else"),
        "expired": issue(Subject("late", purpose="client"), not_after_s=EPOCH_S - 86_400),
        "a server's": server_leaf(),
    }[shown]
    made: list[Served] = []
    tls = ServerTls(server_material(client_auth="required"))
    listener = await serve(world, tls, made)
    try:  # TLS 1.3 tells the client after its own handshake is over
        transport, client = await dial(world, listener.address, ClientTls(client_material(leaf)))
        transport.write(b"let me in")
        await client.wait_lost()
        assert isinstance(client.error, HandshakeFailed | ConnectionError)
        assert client.received == b""
    except (HandshakeFailed, ConnectionError):
        pass
    while not tls.statistics().n_failed:
        await asyncio.sleep(0.001)
    assert made[0].transport is None
    assert "certificate" in tls.statistics().last_failure
    await listener.close()


@pytest.mark.parametrize("shown", ["wrong authority", "wrong name", "expired", "not yet"])
async def test_a_server_without_a_good_certificate_is_refused(world: World, shown: str) -> None:
    subject = Subject("localhost", dns_names=("localhost",), addresses=("127.0.0.1",))
    leaf = {
        "wrong authority": server_leaf(by="somebody else"),
        "wrong name": issue(Subject("x", dns_names=("other.example",))),
        "expired": issue(subject, not_after_s=EPOCH_S - 86_400),
        "not yet": issue(subject, not_before_s=EPOCH_S + 4 * LONG_S),
    }[shown]
    listener = await serve(world, ServerTls(TlsMaterial(leaf.certificate, leaf.key)))
    with pytest.raises(HandshakeFailed, match="not trusted") as caught:
        await dial(world, listener.address, ClientTls(client_material()))
    assert "hint" not in str(caught.value)
    # Verification can be switched off, by name only.
    trusting = ClientTls(TlsMaterial(verify_peer=False))
    if shown in ("wrong authority", "wrong name") or world.name == "host":
        transport, client = await dial(world, listener.address, trusting)
        transport.write(b"x")
        assert await client.wait_received(1) == b"x"
        transport.close()
        await client.wait_lost()
    await listener.close()


async def test_new_connections_get_the_new_certificate_old_ones_keep_theirs(world: World) -> None:
    tls = ServerTls(server_material())
    listener = await serve(world, tls)
    trust = ClientTls(client_material())
    old, old_client = await dial(world, listener.address, trust)
    renewed = issue(Subject("renewed", dns_names=("localhost",), addresses=("127.0.0.1",)))
    with pytest.raises(InvalidArgument, match="does not belong"):
        tls.use(TlsMaterial(renewed.certificate, server_leaf().key))
    tls.use(TlsMaterial(renewed.certificate, renewed.key))
    new, new_client = await dial(world, listener.address, trust)
    found = [peer_identity(transport) for transport in (old, new)]
    assert [each.common_name for each in found if each is not None] == ["localhost", "renewed"]
    old.write(b"still")
    assert await old_client.wait_received(5) == b"still"
    old.close()
    await old_client.wait_lost()
    await end(new, new_client, listener)
    assert tls.statistics()[:2] == (2, 0)
    assert tls.statistics().n_reloads == 1


async def test_garbage_instead_of_tls_ends_that_connection_only(world: World) -> None:
    tls = ServerTls(server_material())
    listener = await serve(world, tls)
    plain, recorder = await dial(world, listener.address, None)
    plain.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await recorder.wait_end()
    plain.close()
    await recorder.wait_lost()
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    transport.write(b"x")
    assert await client.wait_received(1) == b"x"
    await end(transport, client, listener)
    assert (tls.statistics().n_handshakes, tls.statistics().n_failed) == (2, 1)


async def test_a_client_of_a_plain_server_is_told(world: World) -> None:
    listener = await world.network.listen(LOOPBACK, lambda: Recorder(echo=True))
    with pytest.raises(HandshakeFailed):
        await dial(world, listener.address, ClientTls(client_material()))
    await listener.close()


async def test_a_handshake_that_stalls_has_its_time(world: World) -> None:
    tls = ServerTls(server_material(), handshake_s=0.05)
    listener = await serve(world, tls)
    silent, recorder = await dial(world, listener.address, None)
    await recorder.wait_end()
    silent.close()
    await recorder.wait_lost()
    assert "took longer than 0.05 s" in tls.statistics().last_failure
    await listener.close()
    deaf = await world.network.listen(LOOPBACK, Deaf)
    with pytest.raises(DeadlineExceeded):
        await dial(world, deaf.address, ClientTls(client_material(), handshake_s=0.05))
    await deaf.close()


async def test_a_cancelled_connect_leaves_nothing(world: World) -> None:
    made: list[Deaf] = []

    def accept() -> Deaf:
        made.append(Deaf())
        return made[-1]

    deaf = await world.network.listen(LOOPBACK, accept)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await dial(world, deaf.address, ClientTls(client_material()))
    await made[0].wait_lost()
    await deaf.close()


async def test_a_connect_cancelled_in_any_turn_leaves_no_failure_that_nobody_saw(world: World) -> None:
    made: list[Deaf] = []

    def accept() -> Deaf:
        made.append(Deaf())
        return made[-1]

    async def cancel_after(n_turns: int) -> None:
        connecting = asyncio.ensure_future(dial(world, deaf.address, ClientTls(client_material())))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)

    deaf = await world.network.listen(LOOPBACK, accept)
    for n_turns in range(12):
        await cancel_after(n_turns)
    for each in made:
        await each.wait_lost()
    await deaf.close()
    gc.collect()  # an exception that was not looked at is told when its future goes


async def test_the_protocol_can_be_replaced_and_bring_its_own_buffer(world: World) -> None:
    class Filling(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.space = bytearray(10)
            self.got = bytearray()

        def get_buffer(self, sizehint: int) -> memoryview:
            return memoryview(self.space)

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.space[:nbytes]

    listener = await serve(world, ServerTls(server_material()))
    transport, client = await dial(world, listener.address, ClientTls(client_material()))
    filling = Filling()
    transport.set_protocol(filling)
    assert transport.get_protocol() is filling
    transport.write(bytes(range(100)))
    async with asyncio.timeout(40):
        while len(filling.got) < 100:
            await asyncio.sleep(0.001)
    assert filling.got == bytes(range(100))
    transport.set_protocol(client)
    await end(transport, client, listener)


def test_material_that_makes_no_context_is_refused() -> None:
    leaf = server_leaf()
    for material, why in (
        (TlsMaterial(), "a server needs one"),
        (TlsMaterial(b"no pem", leaf.key), "not PEM, or is missing"),
        (TlsMaterial(leaf.certificate, b""), "not PEM, or is missing"),
        (TlsMaterial(leaf.certificate, leaf.key, client_auth="required"), "somebody who signs them"),
        (TlsMaterial(leaf.certificate, leaf.key, b"no pem"), "not PEM, or is missing"),
    ):
        with pytest.raises(InvalidArgument, match=why) as caught:
            ServerTls(material)
        assert "PRIVATE" not in str(caught.value)
    assert "PRIVATE" not in repr(server_material())


def test_old_versions_and_weak_suites_are_off() -> None:
    context = ServerTls(server_material()).context
    suites = [suite["name"] for suite in context.get_ciphers()]
    assert context.minimum_version.name == "TLSv1_2"
    assert suites
    assert all(name.startswith("TLS_") or ("ECDHE" in name and ("GCM" in name or "CHACHA20" in name)) for name in suites)


def test_a_simulation_with_tls_is_a_function_of_its_seed() -> None:
    digests = []
    for _ in range(2):
        sim = make_sim_world(7)

        async def body(world: World = sim.world) -> None:
            listener = await serve(world, ServerTls(server_material(client_auth="required")))
            transport, client = await dial(world, listener.address, ClientTls(client_material(client_leaf())))
            transport.write(bytes(100_000))
            await client.wait_received(100_000)
            await end(transport, client, listener)

        sim.loop.start_trace()
        sim.run(body())
        digests.append(sim.loop.trace_digest())
        sim.close()
    assert digests[0] == digests[1]


def test_the_simulation_judges_certificates_by_its_own_clock() -> None:
    sim = make_sim_world()

    async def body() -> None:
        leaf = issue(
            Subject("localhost", addresses=("127.0.0.1",)), not_before_s=EPOCH_S - 86_400, not_after_s=EPOCH_S + 3600
        )  # by the machine's clock it has expired long ago
        listener = await serve(sim.world, ServerTls(TlsMaterial(leaf.certificate, leaf.key)))
        transport, client = await dial(sim.world, listener.address, ClientTls(client_material()))
        transport.close()
        await client.wait_lost()
        sim.clock.step_ns(2 * 3600 * 10**9)
        with pytest.raises(HandshakeFailed, match="expired"):
            await dial(sim.world, listener.address, ClientTls(client_material()))
        await listener.close()

    sim.run(body())
    sim.close()


async def made_first(made: list[Served]) -> asyncio.Transport:
    async with asyncio.timeout(40):
        while not made:
            await asyncio.sleep(0.001)
    return await made[0].wait_made()
