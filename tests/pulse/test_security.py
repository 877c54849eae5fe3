"""Who may ask, and how much: TLS from files, client certificates, tokens, Unix sockets, names of this machine, bounds, the way down."""

import asyncio
import os
import ssl
import stat
from collections.abc import Callable
from typing import Any

import pytest

from isopod.net.http.limits import HttpLimits
from isopod.net.tls import TlsFiles
from isopod.pulse.followed import READ_HINT
from isopod.pulse.policy import read_policy
from isopod.pulse.security import Token
from isopod.pulse.settings import PulseSettings
from isopod.world.errors import InvalidArgument, IsopodError, UnavailableError
from isopod.world.network import ClientTls, TcpAddress, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import Subject, authority, client_leaf, client_material, issue, server_leaf
from tests.net.http.kit import Peer
from tests.pulse.server_kit import WEB, Rig

WAIT_S = 20.0
RENEWED = Subject("renewed", dns_names=("localhost",), addresses=("127.0.0.1",))


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; the test's own limit ends what never comes."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def put(world: World, folder: str, files: TlsFiles, *, name: str = "server") -> None:
    """Write a server's files."""
    leaf = server_leaf() if name == "server" else issue(RENEWED)
    await world.disk.write_atomic(files.key, leaf.key)
    await world.disk.write_atomic(files.certificate, leaf.certificate)
    await world.disk.write_atomic(f"{folder}/ca.crt", authority().certificate)


def files_in(folder: str) -> TlsFiles:
    return TlsFiles(f"{folder}/tls.crt", f"{folder}/tls.key", f"{folder}/ca.crt")


@pytest.mark.row("T21")
async def test_tls_follows_its_files(world: World, folder: str) -> None:
    files = files_in(folder)
    await put(world, folder, files)
    async with Rig(world, tls_cert_file=files.certificate, tls_key_file=files.key) as rig:
        trust = ClientTls(client_material())
        await rig.trust(trust)
        assert (await rig.ask("/healthz")).status == 200
        await put(world, folder, files, name="renewed")
        await until(lambda: "pulse.tls_read" in rig.memo.events())
        await world.disk.write_atomic(files.certificate, b"no certificate")
        await until(lambda: "pulse.tls_not_read" in rig.memo.events())
        await rig.trust(trust)
        assert (await rig.ask("/healthz")).status == 200, "what was shown before is shown on"
        rig.scheme = "http"
        with pytest.raises(IsopodError):
            await rig.ask("/healthz")


@pytest.mark.row("T21")
async def test_clients_must_show_a_certificate_of_the_authority(world: World, folder: str) -> None:
    files = files_in(folder)
    await put(world, folder, files)
    async with Rig(world, tls_cert_file=files.certificate, tls_key_file=files.key, tls_client_ca_file=files.authorities) as rig:
        await rig.trust(ClientTls(client_material(client_leaf())))
        assert (await rig.ask("/metrics")).status == 200
        for leaf in (None, client_leaf("somebody", "another authority")):
            await rig.trust(ClientTls(client_material(leaf)))
            with pytest.raises(IsopodError):
                await rig.ask("/healthz")


@pytest.mark.row("T21")
async def test_files_that_make_no_tls_keep_the_agent_from_starting(world: World, folder: str) -> None:
    rig = Rig(world, tls_cert_file=f"{folder}/none", tls_key_file=f"{folder}/none")
    with pytest.raises(UnavailableError, match="cannot read"):
        await rig.__aenter__()
    await world.disk.write(f"{folder}/bad", b"bad")
    rig = Rig(world, tls_cert_file=f"{folder}/bad", tls_key_file=f"{folder}/bad")
    with pytest.raises(InvalidArgument, match="not PEM"):
        await rig.__aenter__()


@pytest.mark.row("T21")
@pytest.mark.parametrize("version", ["VersionTLS12", "VersionTLS13"])
async def test_the_least_version_is_a_setting(sim_world: SimWorld, folder: str, version: str) -> None:
    files = files_in(folder)
    world = sim_world.world
    await put(world, folder, files)
    async with Rig(world, tls_cert_file=files.certificate, tls_key_file=files.key, tls_min_version=version) as rig:
        trust = ClientTls(client_material())
        trust.context.maximum_version = ssl.TLSVersion.TLSv1_2
        await rig.trust(trust)
        if version == "VersionTLS12":
            assert (await rig.ask("/healthz")).status == 200
        else:
            with pytest.raises(IsopodError):
                await rig.ask("/healthz")


@pytest.mark.row("T21")
@pytest.mark.parametrize("ours", ["CHACHA20_POLY1305_SHA256", "AES_256_GCM_SHA384"])
async def test_the_suites_are_a_setting(sim_world: SimWorld, folder: str, ours: str) -> None:
    files = files_in(folder)
    world = sim_world.world
    await put(world, folder, files)
    suites = tuple(f"TLS_ECDHE_{kind}_WITH_{ours}" for kind in ("RSA", "ECDSA"))
    async with Rig(world, tls_cert_file=files.certificate, tls_key_file=files.key, tls_cipher_suites=suites) as rig:
        trust = ClientTls(client_material())
        trust.context.maximum_version = ssl.TLSVersion.TLSv1_2
        trust.context.set_ciphers("ECDHE+CHACHA20")
        await rig.trust(trust)
        if "CHACHA20" in ours:
            assert (await rig.ask("/healthz")).status == 200
        else:
            with pytest.raises(IsopodError):
                await rig.ask("/healthz")


@pytest.mark.row("T21")
@pytest.mark.parametrize("suite", ["TLS_RSA_WITH_RC4_128_SHA", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "ECDHE+AESGCM", ""])
def test_a_suite_that_is_unknown_or_not_sound_is_refused(suite: str) -> None:
    with pytest.raises(InvalidArgument, match="cipher suite"):
        PulseSettings(tls_cert_file="/c", tls_key_file="/k", tls_cipher_suites=(suite,))


@pytest.mark.row("T21")
async def test_a_token_is_wanted_and_followed(world: World, folder: str) -> None:
    path = f"{folder}/token"
    await world.disk.write(path, b"first-token\nwith a second line\n")
    async with Rig(world, token_file=path) as rig:
        rig.fill("a", WEB)
        for wrong in ("", "Bearer", "Bearer first-toke", "Bearer first-token2", "Basic first-token", "first-token", "Bearer \xff"):
            answer = await rig.ask("/metrics", authorization=wrong)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="isopod pulse"'), wrong
            assert b"kata_" not in answer.body
        for path_ in ("/", "/sandboxes", "/nowhere", "/debug/vars", "/agent-url?sandbox=a", "/healthz/", "//healthz"):
            assert (await rig.ask(path_)).status == 401, path_
        assert ((await rig.ask("/healthz")).status, (await rig.ask("/readyz")).status) == (200, 200)
        assert (await rig.ask("/metrics", authorization="bearer  first-token ")).status == 200
        await world.disk.write_atomic(path, b"second-token\n")
        await until(lambda: "pulse.secret_read" in rig.memo.events())
        assert (await rig.ask("/metrics", authorization="Bearer first-token")).status == 401
        assert (await rig.ask("/metrics", authorization="Bearer second-token")).status == 200
        await world.disk.write_atomic(path, b"\n")
        await until(lambda: "pulse.secret_not_read" in rig.memo.events())
        assert (await rig.ask("/metrics", authorization="Bearer second-token")).status == 200, "the one before stays"
        assert (await rig.ask("/metrics", authorization="Bearer ")).status == 401
        logged = b"".join(rig.memo.lines)
    assert b"first-token" not in logged and b"second-token" not in logged


@pytest.mark.parametrize("content", [b"", b"\n\n", b"two words\n", b"caf\xc3\xa9\n"])
async def test_a_file_without_a_token_is_refused(world: World, folder: str, content: bytes) -> None:
    rig = Rig(world, token_file=f"{folder}/token")
    with pytest.raises(UnavailableError):
        await rig.__aenter__()
    await world.disk.write(f"{folder}/token", content)
    rig = Rig(world, token_file=f"{folder}/token")
    with pytest.raises(InvalidArgument, match="wants a token"):
        await rig.__aenter__()


async def test_a_token_is_compared_whole(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/token", b"abc\r\n")
    token = Token(world, f"{folder}/token", Rig(world).memo.logger)
    await token.open()
    fits = {word: token.fits(word) for word in ("Bearer abc", "BEARER abc", "Bearer ab", "Bearer abcd", "Bearer", "", "abc")}
    await token.close()
    assert [word for word, is_right in fits.items() if is_right] == ["Bearer abc", "BEARER abc"]


@pytest.mark.row("T21")
async def test_a_unix_socket_is_its_groups_alone(world: World, folder: str) -> None:
    async with Rig(world, listen=f"unix:{folder}/pulse.sock") as rig:
        assert rig.address == UnixAddress(f"{folder}/pulse.sock")
        assert (await rig.ask("/healthz")).status == 200, "by any name: no browser gets here"
        found = await world.disk.stat(f"{folder}/pulse.sock")
        assert found is not None
        assert stat.S_IMODE(found.mode) == 0o660
    assert await world.disk.stat(f"{folder}/pulse.sock") is None


@pytest.mark.row("T21")
@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8090", 200), ("[::1]", 200), ("evil.example", 421), ("localhost.evil.example:8090", 421)],
)
async def test_pages_of_other_sites_cannot_read_a_loopback_port(world: World, host: str, status: int) -> None:
    async with Rig(world) as rig:
        for path in ("/", "/metrics", "/sandboxes", "/healthz", "/agent-url?sandbox=a"):
            answer = await rig.ask(path, host=host)
            assert (answer.status == 421) is (status == 421), path
        assert not rig.shims.asked


async def test_an_address_in_use_is_told(world: World) -> None:
    async with Rig(world) as rig:
        assert isinstance(rig.address, TcpAddress)
        other = Rig(world, listen=f"127.0.0.1:{rig.address.port}")
        with pytest.raises(UnavailableError, match="cannot listen on 127") as caught:
            await other.__aenter__()
        assert "another program listens there" in caught.value.hint
        with pytest.raises(UnavailableError, match="cannot listen on unix") as caught:
            await Rig(world, listen="unix:/nowhere/at/all/p.sock").__aenter__()
        assert "make the folder of the socket first" in caught.value.hint


@pytest.mark.row("T21")
async def test_files_that_are_missing_are_told_with_a_hint(world: World, folder: str) -> None:
    told: tuple[dict[str, Any], ...] = (
        {"token_file": "/none"},
        {"basic_auth_file": "/none"},
        {"tls_cert_file": "/none", "tls_key_file": "/none"},
    )
    for settings in told:
        with pytest.raises(UnavailableError, match="cannot read .*none") as caught:
            await Rig(world, **settings).__aenter__()
        assert caught.value.hint == READ_HINT
    with pytest.raises(UnavailableError) as caught:
        await read_policy(world.disk, f"{folder}/none")
    assert caught.value.hint == READ_HINT


@pytest.mark.row("T21")
async def test_connections_heads_and_time_are_bounded(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with Rig(world) as rig:
        large = await rig.ask("/metrics", x="y" * (17 << 10))
        assert (large.status, b"a head of more than" in large.body) == (431, True)
        assert (await rig.ask("/" + "a" * (9 << 10))).status == 414
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.transport.write(b"GET / HTTP/1.1\r\n")
        await asyncio.sleep(11)
        assert b" 408 " in peer.data
        peer.transport.close()
    async with Rig(world, limits=HttpLimits(connections_max=2)) as rig:
        peers = [Peer() for _ in range(3)]
        for each in peers:
            await world.network.connect(rig.address, lambda each=each: each)  # type: ignore[misc]  # mypy cannot infer it
        await asyncio.sleep(0.1)
        assert [b" 503 " in each.data for each in peers] == [False, False, True]
        for each in peers:
            assert each.transport is not None
            each.transport.close()


@pytest.mark.row("T21")
@pytest.mark.virtual_time
async def test_the_way_down_takes_at_most_two_seconds(world: World) -> None:
    """Whatever goes on: an idle connection, a shim that never answers, a scrape that nobody reads."""
    rig = Rig(world)
    rig.shims.gate = asyncio.Event()
    await rig.__aenter__()
    for number in range(100):
        rig.fill(f"s{number:03}", WEB, n_lines=400)
    rig.shims.answers["/run/vc/sbs/s000/shim-monitor.sock", "/agent-url"] = InvalidArgument("a", "b", "c")
    peers = [Peer() for _ in range(3)]
    for peer, request in zip(
        peers,
        ("", "GET /agent-url?sandbox=s000 HTTP/1.1\r\nHost: x\r\n\r\n", "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        strict=True,
    ):
        await world.network.connect(rig.address, lambda peer=peer: peer)  # type: ignore[misc]  # mypy cannot infer it
        assert peer.transport is not None
        if request.startswith("GET /metrics"):
            peer.transport.pause_reading()
        peer.transport.write(request.replace("Host: x", "Host: localhost").encode())
    await asyncio.sleep(0.5)
    assert rig.shims.asked
    began_s = asyncio.get_running_loop().time()
    await rig.server.stop()
    assert asyncio.get_running_loop().time() - began_s <= 2.0
    await rig.client.close()
    for peer in peers:
        assert peer.transport is not None
        peer.transport.abort()


@pytest.mark.host
async def test_the_hosts_socket_has_its_mode(host_world: World, folder: str) -> None:
    async with Rig(host_world, listen=f"unix:{folder}/pulse.sock"):
        assert stat.S_IMODE(os.stat(f"{folder}/pulse.sock").st_mode) == 0o660
