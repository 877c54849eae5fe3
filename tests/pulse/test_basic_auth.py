"""Users and passwords: which files are taken, who is let in, that names do not show, and that guesses hold nobody up."""

import asyncio
import base64
import dataclasses
from collections.abc import Callable
from typing import TypeVar

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.http.messages import HttpError
from isopod.pulse.basic_auth import PEER_MAX, WAITING_MAX, BasicAuth, User, costs_besides, credentials_of, is_right, parse_users, source_of
from isopod.world.errors import InvalidArgument, UnavailableError
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.server_kit import WEB, Rig
from tests.telemetry.kit import Memo

pytestmark = pytest.mark.row("T21")
WAIT_S = 20.0
T = TypeVar("T")
PASSWORD = "open: sesame \u00e9"
"""With what HTTP finds hard: a colon, a blank, another alphabet."""


def hashed(password: str, cost: int = 4) -> bytes:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost))


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


async def put(world: World, folder: str, *lines: bytes) -> str:
    path = f"{folder}/users"
    await world.disk.write_atomic(path, b"\n".join(lines) + b"\n")
    return path


async def until_logged(rig: Rig, event: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while event not in rig.memo.events():
            await asyncio.sleep(0.01)


async def test_users_are_let_in_by_their_passwords_and_the_file_is_followed(world: World, folder: str) -> None:
    path = await put(
        world, folder, b"# who may ask", b"prometheus:" + hashed(PASSWORD), b"", b"anna:" + hashed("2").replace(b"$2b$", b"$2y$")
    )
    async with Rig(world, basic_auth_file=path) as rig:
        rig.fill("a", WEB)
        for wrong in ("", "Basic", "Basic !", basic("prometheus", "wrong"), basic("anna", PASSWORD), basic("nobody", PASSWORD), "Bearer 2"):
            answer = await rig.ask("/metrics", authorization=wrong)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Basic realm="isopod pulse", charset="UTF-8"'), wrong
            assert b"kata_" not in answer.body
        for page in ("/", "/sandboxes", "/config", "/nowhere", "/debug/vars", "/-/reload"):
            assert (await rig.ask(page)).status == 401, page
        assert ((await rig.ask("/healthz")).status, (await rig.ask("/readyz")).status) == (200, 200)
        assert (await rig.ask("/metrics", authorization=basic("prometheus", PASSWORD))).status == 200
        assert (await rig.ask("/metrics", authorization=basic("anna", "2").replace("Basic", "bAsIc"))).status == 200
        await put(world, folder, b"prometheus:" + hashed("another"))
        await until_logged(rig, "pulse.secret_read")
        for name, password, status in (("prometheus", PASSWORD, 401), ("anna", "2", 401), ("prometheus", "another", 200)):
            assert (await rig.ask("/metrics", authorization=basic(name, password))).status == status, (name, password)
        await put(world, folder, b"prometheus:secret-in-the-clear")
        await until_logged(rig, "pulse.secret_not_read")
        assert (await rig.ask("/metrics", authorization=basic("prometheus", "another"))).status == 200, "what held before holds"
        logged = b"".join(rig.memo.lines)
    for secret in (b"sesame", b"another", b"secret-in-the-clear", b"$2b$", b"prometheus"):
        assert secret not in logged


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_token_or_a_password_is_enough(world: World, folder: str, shards: int) -> None:
    path = await put(world, folder, b"anna:" + hashed("2"))
    await world.disk.write(f"{folder}/token", b"the-token\n")
    async with Rig(world, basic_auth_file=path, token_file=f"{folder}/token", shards=shards) as rig:
        refused = await rig.ask("/metrics")
        assert refused.headers["www-authenticate"] == 'Bearer realm="isopod pulse"; Basic realm="isopod pulse", charset="UTF-8"'
        assert refused.status == 401
        for authorization, status in (
            ("Bearer the-token", 200),
            (basic("anna", "2"), 200),
            (basic("anna", "the-token"), 401),
            ("Bearer 2", 401),
        ):
            assert (await rig.ask("/metrics", authorization=authorization)).status == status, authorization


async def test_a_password_that_passed_is_checked_once(world: World, folder: str) -> None:
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2"), b"bert:" + hashed("3")), Memo(world.clock).logger)
    assert users.fits(basic("anna", "2"), "") is False, "before it is open nobody is anybody"
    await users.open()
    try:
        answers = await asyncio.gather(*[fits for _ in range(5) if not isinstance(fits := users.fits(basic("anna", "2"), ""), bool)])
        assert (answers, users.n_checks) == ([True] * 5, 1), "equal ones are one"
        assert users.fits(basic("anna", "2"), "") is True
        assert not await _settled(users, basic("anna", "3"))
        assert await _settled(users, basic("bert", "3"))
        assert (users.fits(basic("anna", "2"), ""), users.fits(basic("bert", "3"), ""), users.n_checks) == (True, True, 3)
    finally:
        await users.close()


async def _settled(users: BasicAuth, authorization: str) -> bool:
    fits = users.fits(authorization, "")
    return fits if isinstance(fits, bool) else await fits


async def test_guesses_are_bounded_and_leave_those_who_are_known_alone(world: World, folder: str) -> None:
    async with Rig(world, basic_auth_file=await put(world, folder, b"anna:" + hashed("2"))) as rig:
        rig.fill("a", WEB)
        assert (await rig.ask("/metrics", authorization=basic("anna", "2"))).status == 200
        guesses = [asyncio.ensure_future(rig.ask("/metrics", authorization=basic("anna", f"guess {n}"))) for n in range(40)]
        while sum(guess.done() for guess in guesses) < 10:
            assert (await rig.ask("/metrics", authorization=basic("anna", "2"))).status == 200
        answers = await asyncio.gather(*guesses)
    assert {answer.status for answer in answers} == {401, 429}
    refused = next(answer for answer in answers if answer.status == 429)
    assert (refused.headers["retry-after"], refused.text.partition("\n")[0]) == ("1", "too many passwords are being checked")


async def test_one_address_cannot_take_all_places(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2")), Memo(world.clock).logger)
    await users.open()
    waiting = [users.fits(basic("anna", f"guess {n}"), "10.0.0.1") for n in range(PEER_MAX)]
    with pytest.raises(HttpError, match="too many"):
        users.fits(basic("anna", "one more"), "10.0.0.1")
    waiting += [users.fits(basic("anna", f"guess {n}"), "10.0.0.1") for n in range(PEER_MAX)]  # the same again are no new ones
    right = users.fits(basic("anna", "2"), "10.0.0.2")
    for n in range(PEER_MAX + 1, WAITING_MAX):
        waiting.append(users.fits(basic("anna", f"guess {n}"), f"10.0.1.{n}"))
    assert not isinstance(right, bool) and await right
    assert not any(await asyncio.gather(*[each for each in waiting if not isinstance(each, bool)]))
    assert not await _settled(users, basic("anna", "the last")), "there is room again"
    await users.close()


async def test_addresses_that_take_all_places_give_one_to_each_that_has_none(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2")), Memo(world.clock).logger)
    await users.open()
    guessers = [f"10.0.0.{n}" for n in range(WAITING_MAX // PEER_MAX)]
    waiting = [(peer, users.fits(basic("anna", f"guess {n} of {peer}"), peer)) for peer in guessers for n in range(PEER_MAX)]
    with pytest.raises(HttpError, match="too many"):
        users.fits(basic("anna", "one more"), guessers[0])
    right = users.fits(basic("anna", "2"), "10.0.1.1")
    waiting += [(peer, users.fits(basic("anna", f"guess of {peer}"), peer)) for peer in ("10.0.1.2", "10.0.1.3")]
    assert not isinstance(right, bool) and await right, "somebody new is let in"
    answers = await asyncio.gather(*[each for _, each in waiting if not isinstance(each, bool)], return_exceptions=True)
    refused = [peer for (peer, _), answer in zip(waiting, answers, strict=True) if isinstance(answer, HttpError) and answer.status == 429]
    assert refused == guessers[1:], "the newest of each that had most, and not the same one thrice"
    assert [answer for answer in answers if not isinstance(answer, HttpError)] == [False] * (len(answers) - 3)
    await users.close()


async def test_where_each_has_one_place_nobody_loses_it(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2")), Memo(world.clock).logger)
    await users.open()
    waiting = [users.fits(basic("anna", f"guess {n}"), f"10.0.1.{n}") for n in range(WAITING_MAX)]
    with pytest.raises(HttpError, match="too many"):
        users.fits(basic("anna", "2"), "10.0.0.3")
    assert await asyncio.gather(*[each for each in waiting if not isinstance(each, bool)]) == [False] * WAITING_MAX
    await users.close()


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::2", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("", ""),
        ("unix", "unix"),
    ],
)
def test_addresses_are_counted_by_whom_they_belong_to(peer: str, source: str) -> None:
    assert source_of(peer) == source


async def test_one_network_of_ipv6_is_one_address(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2")), Memo(world.clock).logger)
    await users.open()
    waiting = [users.fits(basic("anna", f"guess {n}"), f"2001:db8::{n}") for n in range(PEER_MAX)]
    with pytest.raises(HttpError, match="too many"):
        users.fits(basic("anna", "one more"), "2001:db8::99")
    assert not any(await asyncio.gather(*[each for each in waiting if not isinstance(each, bool)]))
    await users.close()


async def test_wrong_guesses_take_half_of_a_processor_at_most(sim_world: SimWorld, folder: str) -> None:
    """After each the next waits as long as it took."""
    slow = SlowCompute()
    world = dataclasses.replace(sim_world.world, compute=slow)
    users = BasicAuth(world, await put(world, folder, b"anna:" + hashed("2")), Memo(world.clock).logger)
    await users.open()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await asyncio.gather(*[fits for n in range(8) if not isinstance(fits := users.fits(basic("anna", str(n + 5)), ""), bool)])
    assert slow.n_s == pytest.approx(0.8)
    assert loop.time() - began_s == pytest.approx(1.6, rel=0.01)
    await users.close()


class SlowCompute:
    """Takes a tenth of a second for each."""

    n_s = 0.0

    async def run(self, function: Callable[..., T], *args: object) -> T:
        await asyncio.sleep(0.1)
        self.n_s += 0.1
        return function(*args)


@given(cost=st.integers(4, 14), more=st.integers(0, 10))
def test_a_check_costs_the_same_for_everybody(cost: int, more: int) -> None:
    besides = costs_besides(User(b"", cost), cost + more)
    assert (1 << cost) + sum(1 << each for each in besides) == 1 << (cost + more)
    assert sum(1 << each for each in costs_besides(None, cost)) == 1 << cost


def test_who_is_right() -> None:
    cheap, dear = (User(hashed("2", cost), cost) for cost in (4, 6))
    assert [is_right(b"2", user, 6) for user in (cheap, dear, None)] == [True, True, False]
    assert [is_right(b"3", user, 6) for user in (cheap, dear, None)] == [False, False, False]


def test_hashes_of_another_library_are_taken() -> None:
    """Made by libxcrypt, as htpasswd and Go's library write them."""
    content = b"alice:$2y$05$abcdefghijklmnopqrstuuMceFj4VbmHOj8C7PetMxzZkwre/z.Ri\r\n"
    content += b"  bob:$2b$05$zyxwvutsrqponmlkjihgfeWF3ersXW0WlxCy5RdMdF8alnsMdxazu \n"
    users = parse_users(content, "f")
    assert (list(users.by_name), users.cost_max) == ([b"alice", b"bob"], 5)
    for name, password in ((b"alice", b"test"), (b"bob", b"open: sesame")):
        assert is_right(password, users.by_name[name], 5)
        assert not is_right(password + b"x", users.by_name[name], 5)


GOOD = b"$2b$04$5GuvT5K8IrLgJCeERWxDQuPW5ktM.EhslAb6021LVx29cKF7JaoV2"  # of "2"; a fresh one would name the tests anew in each run


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "at least one line"),
        (b"# anna:" + GOOD, "at least one line"),
        (b"anna", "line 1: a bcrypt hash"),
        (b"\n\nanna:2", "line 3: a bcrypt hash"),
        (b"anna:$apr1$x$y", "a bcrypt hash"),
        (b"anna:" + GOOD + b"x", "a bcrypt hash"),
        (b"anna:" + GOOD[:28] + b"v" + GOOD[29:], "a bcrypt hash"),
        (b"anna:" + GOOD.replace(b"$04$", b"$31$"), "from 4 to 14"),
        (b"anna:" + GOOD.replace(b"$04$", b"$03$"), "from 4 to 14"),
        (b":" + GOOD, "a name of 1 to 128"),
        (b"a" * 129 + b":" + GOOD, "a name of 1 to 128"),
        (b"a\x1bb:" + GOOD, "printable"),
        (b"a\xff:" + GOOD, "printable"),
        (b"anna:" + GOOD + b"\nanna:" + GOOD, "line 2: this user has a line already"),
        (b"\n".join(b"u%d:" % n + GOOD for n in range(1001)), "more than 1000 users"),
    ],
)
async def test_a_file_that_makes_no_sense_is_refused(sim_world: SimWorld, folder: str, content: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        parse_users(content, "f")
    assert "$" not in caught.value.message.replace("($2y$10$...)", ""), "what stands in it is not told"
    world = sim_world.world
    path = await put(world, folder, content)
    with pytest.raises(InvalidArgument, match="basic auth file"):
        await Rig(world, basic_auth_file=path).__aenter__()


async def test_a_file_that_is_not_there_keeps_the_agent_from_starting(world: World, folder: str) -> None:
    with pytest.raises(UnavailableError):
        await Rig(world, basic_auth_file=f"{folder}/none").__aenter__()


NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S"), exclude_characters=":#"), min_size=1, max_size=20)
HASHES = st.builds(
    lambda kind, cost, salt, last, rest: f"$2{kind}${cost:02}${salt}{last}{rest}".encode(),
    st.sampled_from("aby"),
    st.integers(4, 14),
    st.text("./ABCxyz019", min_size=21, max_size=21),
    st.sampled_from(".Oeu"),
    st.text("./ABCxyz019", min_size=31, max_size=31),
)


@given(st.dictionaries(NAMES, HASHES, min_size=1, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\n\n# x\n"]))
def test_what_is_written_is_read(users: dict[str, bytes], end: bytes) -> None:
    content = end.join(name.encode() + b":" + hash_ for name, hash_ in users.items())
    assert {name.decode(): user.hash for name, user in parse_users(content, "f").by_name.items()} == users


@given(HASHES, st.binary(max_size=72).filter(lambda password: b"\0" not in password))
def test_every_hash_that_is_taken_can_be_checked(hash_: bytes, password: bytes) -> None:
    cheap = hash_[:4] + b"04" + hash_[6:]
    (user,) = parse_users(b"anna:" + cheap, "f").by_name.values()
    assert is_right(password, user, 4) is False


@given(st.binary(max_size=200))
def test_whatever_a_file_holds_is_taken_or_refused(content: bytes) -> None:
    try:
        users = parse_users(content, "f")
    except InvalidArgument:
        return
    assert all(content.count(user.hash) for user in users.by_name.values())


@given(st.text(max_size=60))
def test_whatever_a_field_says_is_somebody_or_nobody(text: str) -> None:
    for field in (text, f"Basic {text}"):
        given_ = credentials_of(field)
        assert given_ is None or field.lower().lstrip().startswith("basic")


@given(st.binary(max_size=90).filter(lambda name: b":" not in name), st.binary(max_size=90))
def test_credentials_are_what_was_packed(name: bytes, password: bytes) -> None:
    found = credentials_of("Basic " + base64.b64encode(name + b":" + password).decode())
    assert found == (None if len(password) > 72 or b"\0" in password else (name, password))
