"""TLS from files: read, watched, taken over, and kept when what comes is bad. On both Worlds."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from isopod.net.ca import Issued, Subject, write_issued
from isopod.net.tcp import Connection, TcpServer, connect_tcp
from isopod.net.tls import ReloadingTls, TlsFiles, TlsRules, open_client_tls, open_server_tls, read_material
from isopod.world.errors import HandshakeFailed, InvalidArgument, IsopodError, KernelError, UnavailableError
from isopod.world.network import ClientTls, ServerTls, TcpAddress, TlsMaterial
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import authority, client_leaf, client_material, issue, server_leaf, server_material

pytestmark = pytest.mark.row("S15")
LOOPBACK = TcpAddress("127.0.0.1", 0)
SUBJECT = Subject("renewed", dns_names=("localhost",), addresses=("127.0.0.1",))


async def put(world: World, folder: str, issued: Issued) -> TlsFiles:
    await world.disk.write(f"{folder}/ca.crt", authority().certificate)
    await write_issued(world, issued, certificate=f"{folder}/tls.crt", key=f"{folder}/tls.key")
    return TlsFiles(f"{folder}/tls.crt", f"{folder}/tls.key", f"{folder}/ca.crt")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(40):
        while not condition():
            await asyncio.sleep(0.005)


async def shown(world: World, address: object, tls: ClientTls) -> str:
    """Connect and return whom the server claims to be."""
    assert isinstance(address, TcpAddress)
    connection = await connect_tcp(world, address, tls=tls)
    identity = connection.identity
    await connection.wait_closed()
    assert identity is not None
    return identity.common_name


async def serve(world: World, tls: ServerTls) -> tuple[TcpServer, TcpAddress]:
    async def echo(connection: Connection) -> None:
        while data := await connection.read():
            connection.write(data)

    server = TcpServer(world, echo)
    listener = await server.listen(LOOPBACK, tls=tls)
    assert isinstance(listener.address, TcpAddress)
    return server, listener.address


async def test_changed_files_are_taken_over_and_old_connections_go_on(world: World, folder: str) -> None:
    reports: list[IsopodError | None] = []
    reloading: ReloadingTls[ServerTls] = await open_server_tls(world, await put(world, folder, server_leaf()), report=reports.append)
    server, address = await serve(world, reloading.tls)
    trust = ClientTls(client_material())
    old = await connect_tcp(world, address, tls=trust)
    await put(world, folder, issue(SUBJECT))
    await until(lambda: reloading.tls.statistics().n_reloads)
    assert await shown(world, address, trust) == "renewed"
    assert old.identity is not None
    assert old.identity.common_name == "localhost"
    old.write(b"still here")
    assert await old.readexactly(10) == b"still here"
    assert reports == [None]
    await old.wait_closed()
    await reloading.close()
    await server.close()


async def test_what_makes_no_context_is_reported_and_the_old_one_stays(world: World, folder: str) -> None:
    reports: list[IsopodError | None] = []
    files = await put(world, folder, server_leaf())
    reloading = await open_server_tls(world, files, report=reports.append)
    server, address = await serve(world, reloading.tls)
    trust = ClientTls(client_material())
    renewed = issue(SUBJECT)
    await world.disk.write_atomic(files.certificate, renewed.certificate)  # the key is still the old one
    await until(lambda: reports)
    assert isinstance(reports[0], InvalidArgument)
    assert "does not belong" in str(reports[0])
    assert await shown(world, address, trust) == "localhost"
    await world.disk.remove(files.key)
    await until(lambda: any(isinstance(report, UnavailableError) for report in reports))
    assert await shown(world, address, trust) == "localhost"
    await world.disk.write_atomic(files.key, renewed.key)
    await until(lambda: reports[-1] is None)
    assert await shown(world, address, trust) == "renewed"
    await reloading.close()
    assert reloading.tls.statistics().n_reloads == 1
    await server.close()


async def test_files_behind_links_are_followed_and_a_failure_is_reported_once(sim_world: SimWorld, folder: str) -> None:
    """What is written is in another folder than the links, whose own folder sees nothing of it."""
    world, reports = sim_world.world, list[IsopodError | None]()
    await world.disk.make_directory(f"{folder}/real")
    await world.disk.make_directory(f"{folder}/shown")
    await put(world, f"{folder}/real", server_leaf())
    for name in ("tls.crt", "tls.key"):
        sim_world.machine.view.symlink(f"{folder}/real/{name}", f"{folder}/shown/{name}")
    reloading = await open_server_tls(world, TlsFiles(f"{folder}/shown/tls.crt", f"{folder}/shown/tls.key"), report=reports.append)
    await put(world, f"{folder}/real", issue(SUBJECT))
    await until(lambda: reloading.tls.statistics().n_reloads)
    assert reports[-1] is None
    await world.disk.write_atomic(f"{folder}/real/tls.key", b"no key")
    await asyncio.sleep(60)
    failures = [str(report) for report in reports if report is not None]
    assert [failure for failure in failures if "not PEM" in failure] == failures[-1:]
    assert failures[-1].startswith(f"TLS material '{folder}/shown/tls.crt, {folder}/shown/tls.key': "), "the files by their names"
    await reloading.close()


async def test_writing_the_same_again_is_no_reload(world: World, folder: str) -> None:
    reports: list[IsopodError | None] = []
    reloading = await open_server_tls(world, await put(world, folder, server_leaf()), report=reports.append)
    assert not await reloading.reload()
    await put(world, folder, server_leaf())
    await put(world, folder, issue(SUBJECT))
    assert await reloading.reload()
    assert reports == [None]
    await reloading.close()
    await reloading.close()


async def test_certificates_by_name_and_client_certificates_from_files(world: World, folder: str) -> None:
    for name in ("a", "b", "me"):
        await world.disk.make_directory(f"{folder}/{name}")
    files = await put(world, f"{folder}/a", server_leaf())
    named = await put(world, f"{folder}/b", server_leaf("b.example"))
    mine = await put(world, f"{folder}/me", client_leaf())
    reloading = await open_server_tls(world, files, rules=TlsRules(client_auth="required"), names={"b.example": named})
    client = await open_client_tls(world, mine, server_name="b.example")
    server, address = await serve(world, reloading.tls)
    assert await shown(world, address, client.tls) == "b.example"
    await put(world, f"{folder}/b", issue(Subject("renewed b", dns_names=("b.example",))))
    await until(lambda: reloading.tls.statistics().n_reloads)
    assert await shown(world, address, client.tls) == "renewed b"
    await world.disk.write_atomic(f"{folder}/me/ca.crt", authority("somebody else").certificate)
    await until(lambda: client.tls.statistics().n_reloads)
    with pytest.raises(HandshakeFailed):
        await shown(world, address, client.tls)
    await client.close()
    await reloading.close()
    await server.close()


async def test_files_that_are_missing_or_bad_at_the_start(world: World, folder: str) -> None:
    with pytest.raises(UnavailableError, match=r"cannot read .*none"):
        await open_server_tls(world, TlsFiles(f"{folder}/none", f"{folder}/none"))
    await world.disk.write(f"{folder}/bad", b"no pem")
    with pytest.raises(InvalidArgument):
        await open_server_tls(world, TlsFiles(f"{folder}/bad", f"{folder}/bad"))
    with pytest.raises(InvalidArgument):
        await open_client_tls(world, TlsFiles(authorities=f"{folder}/bad"))
    assert await read_material(world, TlsFiles()) == TlsMaterial()


async def test_a_folder_that_goes_and_comes_back(host_world: World, folder: str) -> None:
    inner = f"{folder}/certificates"
    await host_world.disk.make_directory(inner)
    files = await put(host_world, inner, server_leaf())
    reports: list[IsopodError | None] = []
    reloading = await open_server_tls(host_world, files, report=reports.append)
    await host_world.disk.remove_tree(inner)
    await until(lambda: reports)
    assert reports[0] is not None
    await host_world.disk.make_directory(inner)
    await put(host_world, inner, issue(SUBJECT))
    await until(lambda: reloading.tls.statistics().n_reloads)
    await reloading.close()


@pytest.mark.parametrize("stricter", [{"client_auth": "required"}, {"minimum_version": "1.3"}])
def test_a_name_cannot_have_rules_of_its_own_that_would_not_be_kept(stricter: dict[str, Any]) -> None:
    """OpenSSL takes them from the first context, whatever the name asked for: nobody would be asked for a certificate."""
    plain = server_material()
    strict = msgspec.structs.replace(server_material("b.example"), **stricter)
    with pytest.raises(InvalidArgument, match=r"b\.example.*must be those of the first"):
        ServerTls(plain, names={"b.example": strict})
    tls = ServerTls(strict, names={"b.example": strict})
    with pytest.raises(InvalidArgument):
        tls.use(strict, names={"b.example": plain})


async def test_a_final_dot_is_no_part_of_the_name_to_prove(world: World) -> None:
    server, address = await serve(world, ServerTls(server_material()))
    assert await shown(world, address, ClientTls(client_material(), server_name="localhost.")) == "localhost"
    with pytest.raises(HandshakeFailed):
        await shown(world, address, ClientTls(client_material(), server_name="localhost.."))
    await server.close()


async def test_handshakes_under_way_are_bounded(world: World) -> None:
    """A connection counts for who listens only once it is secured: until then this is the only bound."""
    material = server_material()
    tls = ServerTls(material, handshakes_max=1)
    server, address = await serve(world, tls)
    client = ClientTls(client_material(), server_name="localhost")
    silent, _ = await world.network.connect(address, asyncio.Protocol)
    with pytest.raises((HandshakeFailed, KernelError)):
        await shown(world, address, client)
    assert "more than 1 handshakes" in tls.statistics().last_failure
    silent.abort()
    await until(lambda: tls.statistics().n_handshakes)
    for _ in range(3):
        assert await shown(world, address, client) == "localhost"
    await server.close()


async def test_a_reload_that_the_machine_fails_is_reported_and_tried_again(sim_world: SimWorld, folder: str) -> None:
    reports: list[IsopodError | None] = []
    files = await put(sim_world.world, folder, server_leaf())
    failures = [OSError(errno.EMFILE, "Too many open files")]

    async def read() -> dict[str, TlsMaterial]:
        return {"": await read_material(sim_world.world, files)}

    def use(_: object) -> None:
        if failures:
            raise failures.pop()

    reloading = ReloadingTls(sim_world.world, ServerTls(server_material()), read=read, use=use, folders=(), report=reports.append)
    assert not await reloading.reload()
    assert await reloading.reload()
    assert reports[1] is None
    assert "oo many open files" in str(reports[0])
