"""What holds, and reading it again: /config and /-/reload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import bcrypt
import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from isopod import __version__
from isopod.pulse.config_page import config_of, config_page
from isopod.pulse.policy import Policy, PolicyConfig, PolicyFile, PolicyState
from isopod.pulse.settings import PulseSettings
from isopod.world.network import ClientTls, peer_identity
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import client_material
from tests.net.http.kit import Peer
from tests.pulse.server_kit import WEB, Rig
from tests.pulse.test_security import files_in, put

GOOD = b"namespaces: {deny: [kube-system]}\n"
BETTER = b"namespaces: {allow: [prod]}\nfamily_intervals_s: {kata_guest_vm_stat: 300}\n"
BAD = b"namespaces: {forbid: [x]}\n"


class Governed:
    """A rig with a policy's file, and what was adopted."""

    def __init__(self, world: World, folder: str, **settings: Any) -> None:
        self.path = f"{folder}/policy.yaml"
        self.adopted: list[Policy] = []
        self._world = world
        self._logger_of = Rig(world).memo.logger
        self.file = PolicyFile(world.disk, self.path, on_change=self.adopted.append, clock=world.clock, logger=self._logger_of)
        self.rig = Rig(world, policy=self.file, policy_file=self.path, **settings)

    async def say(self, text: bytes) -> None:
        """Write the policy."""
        await self._world.disk.write_atomic(self.path, text)

    @property
    def config(self) -> PolicyConfig:
        """The policy that was adopted last."""
        return self.adopted[-1].config


@asynccontextmanager
async def governed(world: World, folder: str, **settings: Any) -> AsyncIterator[Governed]:
    made = Governed(world, folder, **settings)
    await made.say(GOOD)
    await made.file.open()
    async with made.rig:
        yield made


# --- reading again ----------------------------------------------------------------------------------------------------


@pytest.mark.row("T19")
@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_policy_is_read_again_at_once_and_nonsense_leaves_what_holds(world: World, folder: str, method: str) -> None:
    async with governed(world, folder, enable_lifecycle=True) as made:
        rig = made.rig
        answer = await rig.ask("/-/reload", method)
        assert (answer.status, answer.text) == (200, f"policy {made.path}: read\n")
        assert len(made.adopted) == 1, "the same again is no change"
        await made.say(BETTER)
        assert (await rig.ask("/-/reload", method)).status == 200
        assert made.config.namespaces.allow == ("prod",)
        await made.say(BAD)
        refused = await rig.ask("/-/reload", method)
        assert refused.status == 400
        assert refused.text.startswith(f"policy {made.path}: refused, what held before holds: ") and "forbid" in refused.text
        assert (made.config.namespaces.allow, made.file.is_good) == (("prod",), False)
        await world.disk.remove(made.path)
        gone = await rig.ask("/-/reload", method, accept="application/json")
        (row,) = gone_rows = msgspec.json.decode(gone.body)["read"]
        assert (gone.status, len(gone_rows), row["what"], row["file"]) == (500, 1, "policy", made.path)
        assert "cannot read the policy" in row["error"]
        await made.say(BETTER)
        assert (await rig.ask("/-/reload", method)).status == 200
        assert (made.file.is_good, len(made.adopted)) == (True, 2)


@pytest.mark.row("T19")
async def test_a_value_that_is_not_of_its_type_leaves_what_holds(world: World, folder: str) -> None:
    """YAML makes a day of it, and there is none."""
    async with governed(world, folder, enable_lifecycle=True) as made:
        await made.say(b"namespaces: {deny: [2020-02-30]}\n")
        refused = await made.rig.ask("/-/reload", "PUT")
        assert (refused.status, len(made.adopted)) == (400, 1)
        assert "not of its type" in refused.text
        assert "not of its type" in (await made.rig.ask("/config?format=text")).text
        await made.say(BETTER)
        assert (await made.rig.ask("/-/reload", "PUT")).status == 200


@pytest.mark.row("T19")
async def test_it_is_off_unless_it_was_asked_for(world: World, folder: str) -> None:
    async with governed(world, folder) as made:
        await made.say(BETTER)
        for method in ("PUT", "POST"):
            answer = await made.rig.ask("/-/reload", method)
            assert (answer.status, len(made.adopted)) == (403, 1)
            assert "--enable-lifecycle" in answer.text
        assert (await made.rig.ask("/-/reload")).status == 405
        for method in ("GET", "HEAD", "DELETE"):
            answer = await made.rig.ask("/-/reload", method)
            assert (answer.status, answer.headers["allow"]) == (405, "PUT, POST")


@pytest.mark.row("T19", "T21")
async def test_it_is_guarded_as_everything_else_and_against_other_sites_pages(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/token", b"the-token\n")
    async with governed(world, folder, enable_lifecycle=True, token_file=f"{folder}/token") as made:
        await made.say(BETTER)
        who = {"authorization": "Bearer the-token"}
        assert (await made.rig.ask("/-/reload", "PUT")).status == 401
        assert (await made.rig.ask("/-/reload", "PUT", host="evil.example", **who)).status == 421
        for origin in ("http://evil.example", "null", "http://localhost:1"):
            assert (await made.rig.ask("/-/reload", "POST", origin=origin, **who)).status == 403, origin
        assert len(made.adopted) == 1
        own = {"host": "localhost:8090", "origin": "http://localhost:8090"}
        assert (await made.rig.ask("/-/reload", "POST", **own, **who)).status == 200
        assert len(made.adopted) == 2


@pytest.mark.row("T19", "T21")
@pytest.mark.parametrize("shards", [1, 2])
async def test_everything_that_lies_in_files_is_read_again(world: World, folder: str, shards: int) -> None:
    """Each for itself: what makes no sense leaves what held, the others hold."""
    files = files_in(folder)
    await put(world, folder, files)
    token, users = f"{folder}/token", f"{folder}/users"
    await world.disk.write(token, b"one\n")
    await world.disk.write(users, b"anna:" + bcrypt.hashpw(b"2", bcrypt.gensalt(4)) + b"\n")
    tls: dict[str, Any] = {"tls_cert_file": files.certificate, "tls_key_file": files.key}
    async with governed(world, folder, enable_lifecycle=True, token_file=token, basic_auth_file=users, shards=shards, **tls) as made:
        rig = made.rig
        await rig.trust(ClientTls(client_material()))
        answer = await rig.ask("/-/reload", "PUT", authorization="Bearer one")
        read = f"policy {made.path}: read\nTLS certificate {files.certificate}: read\ntoken {token}: read\nbasic auth {users}: read\n"
        assert (answer.status, answer.text) == (200, read)
        await world.disk.write_atomic(token, b"two\n")
        await world.disk.write_atomic(users, b"anna:in-the-clear\n")
        await world.disk.write_atomic(files.key, b"no key")
        answer = await rig.ask("/-/reload", "PUT", authorization="Bearer one")
        if answer.status == 401:  # the file is followed too, and that may have been quicker
            answer = await rig.ask("/-/reload", "PUT", authorization="Bearer two")
        assert answer.status == 400
        assert [line.partition(": ")[2][:7] for line in answer.text.splitlines()] == ["read", "refused", "read", "refused"]
        assert "in-the-clear" not in answer.text
        assert (await rig.ask("/", authorization="Bearer one")).status == 401
        await rig.trust(ClientTls(client_material()))
        assert (await rig.ask("/", authorization="Bearer two")).status == 200, "the certificate of before is shown on"


@pytest.mark.row("T19", "T21")
@pytest.mark.parametrize("shards", [1, 2])
async def test_a_renewed_certificate_is_shown_after_a_reload(world: World, folder: str, shards: int) -> None:
    files = files_in(folder)
    await put(world, folder, files)
    tls: dict[str, Any] = {"tls_cert_file": files.certificate, "tls_key_file": files.key}
    async with Rig(world, enable_lifecycle=True, shards=shards, **tls) as rig:
        await rig.trust(ClientTls(client_material()))
        assert (await rig.ask("/healthz")).status == 200
        await put(world, folder, files, name="renewed")
        assert (await rig.ask("/-/reload", "PUT")).text == f"TLS certificate {files.certificate}: read\n"
        assert await common_name(world, rig) == "renewed", "at once: whoever connects after the answer sees it"


async def common_name(world: World, rig: Rig) -> str:
    """Return whose certificate is shown."""
    peer = Peer()
    transport, _ = await world.network.connect(rig.address, lambda: peer, tls=ClientTls(client_material()))
    identity = peer_identity(transport)
    transport.close()
    assert identity is not None
    return identity.common_name


async def test_without_files_there_is_nothing_to_read(world: World) -> None:
    async with Rig(world, enable_lifecycle=True) as rig:
        answer = await rig.ask("/-/reload", "POST")
        assert (answer.status, answer.text.partition(":")[0]) == (200, "nothing to read")


@pytest.mark.row("T19")
async def test_in_strict_mode_it_is_there_only_if_asked_for_and_guarded_all_the_same(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with governed(world, folder, strict_compat=True, enable_lifecycle=True) as made:
        await made.say(BETTER)
        assert (await made.rig.ask("/-/reload", "PUT", host="evil.example")).status == 421
        assert (await made.rig.ask("/-/reload", "PUT")).text == f"policy {made.path}: read\n"
    async with Rig(world, strict_compat=True) as rig:
        assert (await rig.ask("/-/reload", "PUT")).text.startswith("Available HTTP endpoints:")


@pytest.mark.row("T19")
async def test_reloads_at_one_time_come_one_after_another(sim_world: SimWorld, folder: str) -> None:
    async with governed(sim_world.world, folder, enable_lifecycle=True) as made:
        await made.say(BETTER)
        answers = await asyncio.gather(*(made.rig.ask("/-/reload", "PUT") for _ in range(8)))
        assert [answer.status for answer in answers] == [200] * 8
        assert len(made.adopted) == 2


# --- what holds -------------------------------------------------------------------------------------------------------


@pytest.mark.row("T16", "T19")
async def test_config_says_what_holds_and_why_the_file_does_not(world: World, folder: str) -> None:
    origins = {"policy_file": "flag --policy-file", "interval_s": "variable KATA_PULSE_METRICS_INTERVAL"}
    async with governed(world, folder, interval_s=7.5, pod_labels=("app", "tier"), origins=origins) as made:
        rig = made.rig
        rig.fill("a", WEB)
        answer = await rig.ask("/config")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert "  interval_s: 7.5  # variable KATA_PULSE_METRICS_INTERVAL\n" in answer.text
        assert '  view: "all"  # default\n' in answer.text
        told = yaml.safe_load(answer.text)
        assert told["settings"]["pod_labels"] == ["app", "tier"]
        assert (told["policy"]["file"], told["policy"]["error"]) == (made.path, "")
        assert msgspec.convert(told["policy"]["config"], PolicyConfig) == made.config
        await made.say(BAD)
        with pytest.raises(Exception, match="forbid"):
            await made.file.reload()
        shown = msgspec.json.decode((await rig.ask("/config", accept="application/json")).body)
        assert "forbid" in shown["policy"]["error"]
        assert msgspec.convert(shown["policy"]["config"], PolicyConfig) == made.config, "what held before holds"
        assert {row["name"]: row["origin"] for row in shown["settings"]}["policy_file"] == "flag --policy-file"
        assert shown["version"] == __version__
        browser = await rig.ask("/config", accept="text/html")
        assert "<td>variable KATA_PULSE_METRICS_INTERVAL</td>" in browser.text and "kube-system" in browser.text
        assert (await rig.ask("/config", "PUT")).status == 405


@pytest.mark.row("T16", "T21")
@pytest.mark.parametrize("form", ["text", "html", "json"])
async def test_config_holds_no_secret(sim_world: SimWorld, folder: str, form: str) -> None:
    world = sim_world.world
    files = files_in(folder)
    await put(world, folder, files)
    hashed = bcrypt.hashpw(b"sesame", bcrypt.gensalt(4))
    contents = {"token": b"secret-token\n", "users": b"anna:" + hashed + b"\n", "push-token": b"secret-push\n"}
    for name, content in contents.items():
        await world.disk.write(f"{folder}/{name}", content)
    settings: dict[str, Any] = {
        "token_file": f"{folder}/token", "basic_auth_file": f"{folder}/users", "push_token_file": f"{folder}/push-token",
        "tls_cert_file": files.certificate, "tls_key_file": files.key, "push_url": "https://receiver/write?key=secret-key",
    }  # fmt: skip
    async with Rig(world, **settings) as rig:
        await rig.trust(ClientTls(client_material()))
        text = (await rig.ask(f"/config?format={form}", authorization="Bearer secret-token")).text
    for path in (f"{folder}/token", f"{folder}/users", f"{folder}/push-token", files.key, "https://receiver/write?..."):
        assert path in text
    for secret in ("secret-token", "secret-push", "secret-key", "sesame", hashed.decode(), "PRIVATE KEY"):
        assert secret not in text


@given(
    words=st.lists(st.text(max_size=30), max_size=3),
    path=st.text(max_size=30),
    origin=st.text(max_size=30),
    error=st.text(max_size=30),
    namespace=st.text(max_size=30),
)
def test_whatever_stands_in_it_the_text_is_yaml_and_says_the_same(
    words: list[str], path: str, origin: str, error: str, namespace: str
) -> None:
    settings = PulseSettings(pod_labels=tuple(words), policy_file=path)
    config = msgspec.convert({"namespaces": {"deny": [namespace]}}, PolicyConfig)
    shown = config_of("1", settings, {"pod_labels": origin}, PolicyState(path, config, 1_700_000_000_000_000_000, error))
    body = config_page("text", shown).body
    assert isinstance(body, bytes)
    told = yaml.safe_load(body.decode())
    assert told["settings"] == {row.name: list(row.value) if isinstance(row.value, tuple) else row.value for row in shown.settings}
    assert (told["policy"]["error"], told["policy"]["read_at"]) == (error, "2023-11-14T22:13:20Z")
    assert msgspec.convert(told["policy"]["config"], PolicyConfig) == config
    for kind in ("html", "json"):
        assert config_page(kind, shown).status == 200
