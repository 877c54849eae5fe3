"""The authority: what openssl and curl say to its certificates, what is written, when it expires."""

import asyncio
import math
import os
import shutil
import stat
import subprocess

import pytest

from isopod.net.ca import Authority, Issued, Subject, certificate_info, is_signed_by, self_signed, write_issued
from isopod.net.ca_records import Purpose
from isopod.net.tcp import Connection, TcpServer, connect_tcp
from isopod.world.errors import HandshakeFailed, InvalidArgument, UnavailableError
from isopod.world.network import ClientTls, ServerTls, TcpAddress, TlsMaterial
from isopod.world.sim import SimWorld
from isopod.world.world import World

pytestmark = pytest.mark.row("S15")
DAY_S = 86_400.0


async def test_what_a_certificate_says(world: World) -> None:
    authority = Authority.create(world, "a test authority")
    subject = Subject(
        "web", dns_names=("web.example", "*.web.example"), addresses=("127.0.0.1", "::1"), uris=("spiffe://x/web",), organisation="tests"
    )
    issued = authority.issue(subject, valid_s=DAY_S)
    info = certificate_info(issued.certificate)
    assert (info.subject, info.issuer) == ("O=tests,CN=web", "CN=a test authority")
    assert (info.dns_names, info.addresses, info.uris) == (("web.example", "*.web.example"), ("127.0.0.1", "::1"), ("spiffe://x/web",))
    assert not info.is_authority
    assert info.fingerprint.startswith("sha256:")
    assert DAY_S - 5 < info.remaining_s(world.clock.now_ns()) <= DAY_S
    assert info.not_before_s < world.clock.now_ns() / 1e9
    assert certificate_info(authority.certificate).is_authority
    assert is_signed_by(issued.certificate, authority.certificate)
    assert not is_signed_by(issued.certificate, Authority.create(world, "a test authority").certificate)
    again = authority.issue(subject)
    assert (certificate_info(again.certificate).serial, again.key) != (info.serial, issued.key)
    assert "PRIVATE" not in repr(issued)


async def test_files_are_written_whole_and_the_key_is_the_owners(world: World, folder: str) -> None:
    issued = Authority.create(world, "a").issue(Subject("web"))
    await write_issued(world, issued, certificate=f"{folder}/tls.crt", key=f"{folder}/tls.key")
    assert await world.disk.read(f"{folder}/tls.key") == issued.key
    for name, mode in (("tls.crt", 0o644), ("tls.key", 0o600)):
        found = await world.disk.stat(f"{folder}/{name}")
        assert found is not None
        assert stat.S_IMODE(found.mode) == mode
    assert await world.disk.list(folder) == ["tls.crt", "tls.key"]
    with pytest.raises(UnavailableError):
        await write_issued(world, issued, certificate=f"{folder}/none/tls.crt", key=f"{folder}/none/tls.key")


async def test_a_leaf_never_outlives_its_authority(world: World) -> None:
    authority = Authority.create(world, "short", valid_s=DAY_S)
    issued = authority.issue(Subject("long"), valid_s=100 * DAY_S)
    assert certificate_info(issued.certificate).not_after_s == certificate_info(authority.certificate).not_after_s


async def test_what_cannot_be_issued(world: World) -> None:
    authority = Authority.create(world, "a")
    other = Authority.create(world, "b")
    leaf = authority.issue(Subject("leaf"))
    for issued in (
        Issued(authority.certificate, other.issued.key),
        Issued(b"no pem", authority.issued.key),
        Issued(authority.certificate, b"no pem"),
        leaf,
    ):
        with pytest.raises(InvalidArgument):
            Authority(world, issued)
    for subject in (Subject(""), Subject("x" * 100), Subject("x", addresses=("1.2.3",)), Subject("x", dns_names=("ä.example",))):
        with pytest.raises(InvalidArgument):
            authority.issue(subject)
    with pytest.raises(InvalidArgument):
        authority.issue(Subject("x"), valid_s=0)
    with pytest.raises(InvalidArgument):
        Authority.create(world, "")
    with pytest.raises(InvalidArgument):
        certificate_info(b"")
    assert Authority(world, authority.issued).certificate == authority.certificate


@pytest.mark.host
async def test_openssl_accepts_the_chain_for_its_purpose_only(host_world: World, folder: str) -> None:
    authority = Authority.create(host_world, "a")
    open_write(f"{folder}/ca.crt", authority.certificate)
    cases: list[tuple[Purpose, set[str]]] = [("server", {"sslserver"}), ("client", {"sslclient"}), ("both", {"sslserver", "sslclient"})]
    for purpose, accepted in cases:
        issued = authority.issue(Subject("x", dns_names=("x.example",), purpose=purpose))
        open_write(f"{folder}/x.crt", issued.certificate)
        for asked in ("sslserver", "sslclient"):
            argv = ["openssl", "verify", "-x509_strict", "-purpose", asked, "-CAfile", f"{folder}/ca.crt", f"{folder}/x.crt"]
            done = subprocess.run(argv, check=False, capture_output=True, timeout=30)
            assert (done.returncode == 0) == (asked in accepted), done.stderr


@pytest.mark.host
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_speaks_to_us_with_and_without_a_good_certificate(host_world: World, folder: str) -> None:
    authority = Authority.create(host_world, "a")
    served = authority.issue(Subject("localhost", dns_names=("localhost",), addresses=("127.0.0.1",)))
    open_write(f"{folder}/ca.crt", authority.certificate)
    await write_issued(host_world, authority.issue(Subject("me", purpose="client")), certificate=f"{folder}/me.crt", key=f"{folder}/me.key")

    async def hello(connection: Connection) -> None:
        await connection.readuntil(b"\r\n\r\n")
        who = connection.identity.common_name if connection.identity else "nobody"
        connection.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(who), who.encode()))

    server = TcpServer(host_world, hello)
    tls = ServerTls(TlsMaterial(served.certificate, served.key, authority.certificate, client_auth="required", alpn=("http/1.1",)))
    listener = await server.listen(TcpAddress("127.0.0.1", 0), tls=tls)
    port = listener.address[1]  # type: ignore[misc]
    trust = ["--cacert", f"{folder}/ca.crt"]
    mine = ["--cert", f"{folder}/me.crt", "--key", f"{folder}/me.key"]
    for host in ("localhost", "127.0.0.1"):
        assert await curl(f"https://{host}:{port}/", *trust, *mine) == (0, b"me")
    assert (await curl(f"https://localhost:{port}/", *trust))[0] != 0
    assert (await curl(f"https://localhost:{port}/", *mine))[0] == 60  # the server is not trusted
    assert (await curl(f"https://localhost:{port}/", "--tls-max", "1.1", *trust, *mine))[0] != 0
    assert await curl(f"https://localhost:{port}/", "--tls-max", "1.2", *trust, *mine) == (0, b"me")
    await server.close()


async def test_a_certificate_that_vouches_for_itself(host_world: World, folder: str) -> None:
    issued = self_signed(host_world, Subject("localhost", dns_names=("localhost",), addresses=("127.0.0.1",)))
    other = self_signed(host_world, Subject("localhost", dns_names=("localhost",), addresses=("127.0.0.1",)))
    assert is_signed_by(issued.certificate, issued.certificate)
    open_write(f"{folder}/own.crt", issued.certificate)
    argv = ["openssl", "verify", "-purpose", "sslserver", "-CAfile", f"{folder}/own.crt", f"{folder}/own.crt"]
    assert subprocess.run(argv, check=False, capture_output=True, timeout=30).returncode == 0
    server = TcpServer(host_world, hello)
    listener = await server.listen(TcpAddress("127.0.0.1", 0), tls=ServerTls(TlsMaterial(issued.certificate, issued.key)))
    connection = await connect_tcp(host_world, listener.address, tls=ClientTls(TlsMaterial(authorities=issued.certificate)))
    assert await connection.readexactly(2) == b"hi"
    await connection.wait_closed()
    with pytest.raises(HandshakeFailed):
        await connect_tcp(host_world, listener.address, tls=ClientTls(TlsMaterial(authorities=other.certificate)))
    await server.close()
    with pytest.raises(InvalidArgument):
        self_signed(host_world, Subject(""))


async def hello(connection: Connection) -> None:
    connection.write(b"hi")
    await connection.read()


async def curl(url: str, *options: str) -> tuple[int, bytes]:
    argv = ["curl", "-sS", "--noproxy", "*", "--max-time", "20", *options, url]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output, _ = await process.communicate()
    return process.returncode or 0, output


def open_write(path: str, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


@pytest.mark.parametrize("valid_s", [math.inf, math.nan, 1e300, 0, -1])
def test_a_validity_that_makes_no_sense(sim_world: SimWorld, valid_s: float) -> None:
    with pytest.raises(InvalidArgument, match="validity"):
        Authority.create(sim_world.world, "a", valid_s=valid_s)
    with pytest.raises(InvalidArgument, match="validity"):
        self_signed(sim_world.world, Subject("a"), valid_s=valid_s)
