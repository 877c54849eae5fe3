"""Basic auth: users and the bcrypt hashes of their passwords, from a file with one `USER:HASH` a line, as `htpasswd -B` writes it.

    prometheus:$2y$10$3b5k...        # the hashes of Prometheus' own web.yml are the same
    # a comment

- A hash takes tens to hundreds of milliseconds, which is its purpose: it is made beside the loop (`Compute`), one at a time. What passed is
  remembered by a keyed digest, one for each user, so that a scraper pays once; the key is this process's and stands nowhere.
- Who guesses holds nobody up: at most WAITING_MAX checks wait, at most PEER_MAX of one address (of IPv6: of one /64), equal ones are one,
  and after a wrong one the next rests as long as it took, so that guesses cost half a processor at most. More are answered with 429. When
  all places are taken, an address that has none gets that of the newest check that waits of the address with most.
- How long an answer takes says nothing of users: one that there is not, and one whose hash is cheaper than others', cost what the dearest
  costs.
- Names and passwords are never logged. bcrypt looks at 72 bytes: a longer password is refused, not cut.

Source: RFC 7617; bcrypt as its package implements it ($2a$, $2b$, $2y$).
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from isopod.net.http.messages import HttpError
from isopod.pulse.followed import Followed
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument
from isopod.world.world import World

FILE_BYTES_MAX: Final = 256 << 10
USERS_MAX: Final = 1000
NAME_BYTES_MAX: Final = 128
PASSWORD_BYTES_MAX: Final = 72
COST_MAX: Final = 14
"""A hash of this cost takes about a second; each more doubles it."""
WAITING_MAX: Final = 16
PEER_MAX: Final = 4
RETRY_S: Final = 1
HINT: Final = "`htpasswd -nB USER` prints a line"
_HASH: Final = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
"""A salt has 128 bits, of which its last character tells two."""
_SALT: Final = b"." * 22


class Credentials(NamedTuple):
    """What somebody says who they are."""

    name: bytes
    password: bytes


class User(NamedTuple):
    """One line of the file. Each more of `cost` doubles the time of a check."""

    hash: bytes
    cost: int


class Users(NamedTuple):
    """The file's contents."""

    by_name: Mapping[bytes, User]
    cost_max: int


class Passed(NamedTuple):
    """That a password was right: for which hash, and its keyed digest."""

    user: User
    digest: bytes


def parse_users(content: bytes, path: str) -> Users:
    """Return the users of a file. Raised errors name the line and never what it holds.

    Args:
        content: Its bytes.
        path: For messages.

    Raises:
        InvalidArgument: A line makes no sense, a user stands there twice, or there is none.
    """
    found: dict[bytes, User] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        name, _, hashed = text.partition(b":")
        match = _HASH.fullmatch(hashed)
        why = ""
        if not name or len(name) > NAME_BYTES_MAX or not _is_printable(name):
            why = f"a name of 1 to {NAME_BYTES_MAX} printable bytes is wanted before the colon"
        elif match is None:
            why = "a bcrypt hash is wanted behind the colon ($2y$10$...)"
        elif not 4 <= int(match[1]) <= COST_MAX:
            why = f"the cost of the hash must be from 4 to {COST_MAX}"
        elif name in found:
            why = "this user has a line already"
        elif len(found) >= USERS_MAX:
            why = f"there are more than {USERS_MAX} users"
        if why or match is None:
            raise InvalidArgument("basic auth file", path, f"line {number}: {why}", HINT)
        found[name] = User(hashed, int(match[1]))
    if not found:
        raise InvalidArgument("basic auth file", path, "wants at least one line USER:HASH", HINT)
    return Users(found, max(user.cost for user in found.values()))


def credentials_of(authorization: str) -> Credentials | None:
    """Return what an Authorization field of the scheme Basic carries, None if it carries nothing that could be right."""
    scheme, _, given = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(given.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):  # no base64, or not even ASCII
        return None
    if not colon or len(name) > NAME_BYTES_MAX or len(password) > PASSWORD_BYTES_MAX or b"\0" in password:
        return None
    return Credentials(name, password)


def is_right(password: bytes, user: User | None, cost_max: int) -> bool:
    """Return whether a password is a user's, in a time that depends on `cost_max` alone.

    Args:
        password: What was given, at most PASSWORD_BYTES_MAX long.
        user: Whose it may be, None for one that there is not.
        cost_max: Of all users' hashes.
    """
    import bcrypt  # noqa: PLC0415  only an agent with users pays for it

    fits = user is not None and bcrypt.checkpw(password, user.hash)
    for cost in costs_besides(user, cost_max):
        bcrypt.hashpw(password, b"$2b$%02d$%b" % (cost, _SALT))
    return fits


def costs_besides(user: User | None, cost_max: int) -> Sequence[int]:
    """Return the costs of the hashes that are made besides a user's own, so that all together are as dear as one of `cost_max`.

    A hash of cost c takes 2^c rounds, and 2^c + 2^c + 2^(c+1) + ... + 2^(m-1) is 2^m.
    """
    return (cost_max,) if user is None else range(user.cost, cost_max)


class BasicAuth:
    """The users of a file, kept up to date between `open` and `close`.

    Args:
        world: Its disk, chance and processors.
        path: The file's.
        logger: Told when it changed, or makes no sense; what held before then holds on.
    """

    def __init__(self, world: World, path: str, logger: Logger) -> None:
        self.file: Final = Followed(world.disk, path, partial(parse_users, path=path), logger=logger, n_bytes_max=FILE_BYTES_MAX)
        self._compute = world.compute
        self._key = bytes.fromhex(world.random.token_hex(32))
        self._passed: dict[bytes, Passed] = {}
        self._checks: dict[bytes, _Check] = {}
        """Under way or waiting, by digest, the oldest first."""
        self._place = asyncio.Lock()
        self._at_work = b""
        """The digest of the check that has the place."""
        self.n_checks = 0
        """How many hashes were made."""

    async def open(self) -> None:
        """Read the file, and follow it. Raises as `Followed.open`."""
        await self.file.open()

    async def close(self) -> None:
        """Follow it no more, and let go of what is being checked."""
        await self.file.close()
        tasks = [check.task for check in self._checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def fits(self, authorization: str, peer: str) -> bool | Awaitable[bool]:
        """Return whether an Authorization field names a user with their password: at once if that is known, else later.

        Args:
            authorization: The field.
            peer: Whose checks are counted together; "" for somebody on this machine, whose are not.

        Raises:
            HttpError: 429: too many wait already.
        """
        given, users = credentials_of(authorization), self.file.value
        if given is None or users is None:
            return False
        digest = hmac.digest(self._key, b"%b:%b" % given, hashlib.sha256)  # a name has no colon
        user, passed = users.by_name.get(given.name), self._passed.get(given.name)
        if passed is not None and passed.user == user and hmac.compare_digest(passed.digest, digest):
            return True
        check = self._checks.get(digest)
        if check is None:
            check = self._begin(given, digest, source_of(peer))
        return asyncio.shield(check.answer)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, given: Credentials, digest: bytes, source: str) -> "_Check":
        n_of_source = sum(check.source == source for check in self._checks.values())
        is_full = len(self._checks) >= WAITING_MAX
        if (source and n_of_source >= PEER_MAX) or (is_full and (n_of_source or not self._displace())):
            raise _too_many()
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._check(given, digest), name="pulse password")
        check = self._checks[digest] = _Check(source, task, loop.create_future())
        task.add_done_callback(lambda _: self._ended(digest, check))
        return check

    def _displace(self) -> bool:
        """Have the newest check that waits of the address with most, if that has several, give up its place; return whether one did."""
        n_by_source = Counter(check.source for check in self._checks.values())
        for digest, check in reversed(self._checks.items()):
            if digest != self._at_work and 1 < n_by_source[check.source] == max(n_by_source.values()):
                del self._checks[digest]
                check.task.cancel()
                _settle(check.answer, _too_many())
                return True
        return False

    def _ended(self, digest: bytes, check: "_Check") -> None:
        if self._checks.get(digest) is check:
            del self._checks[digest]
        if check.task.cancelled():
            check.answer.cancel()
        else:
            _settle(check.answer, check.task.exception() or check.task.result())

    async def _check(self, given: Credentials, digest: bytes) -> bool:
        async with self._place:
            self._at_work = digest
            users = self.file.value
            if users is None:
                return False
            loop = asyncio.get_running_loop()
            user, began_s = users.by_name.get(given.name), loop.time()
            self.n_checks += 1
            fits = await self._compute.run(is_right, given.password, user, users.cost_max)
            if user is None or not fits:
                await asyncio.sleep(loop.time() - began_s)
                return False
            self._passed = {name: passed for name, passed in self._passed.items() if name in users.by_name}
            self._passed[given.name] = Passed(user, digest)
            return True


class _Check(NamedTuple):
    """One check of a password: whose it is, as they are counted, and what those who wait for it are told."""

    source: str
    task: asyncio.Task[bool]
    answer: asyncio.Future[bool]


def source_of(peer: str) -> str:
    """Return as what an address is counted: of IPv6 its /64, since whoever has one address there has them all."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:  # a name, or nobody
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return peer
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.IPv6Network((address.packed, 64), strict=False))


def _settle(answer: asyncio.Future[bool], outcome: bool | BaseException) -> None:
    if answer.done():
        return
    if isinstance(outcome, BaseException):
        answer.set_exception(outcome)
        answer.exception()  # nobody may be left who wants to know
    else:
        answer.set_result(outcome)


def _too_many() -> HttpError:
    return HttpError(429, "too many passwords are being checked", "try again in a moment", headers=(("retry-after", str(RETRY_S)),))


def _is_printable(name: bytes) -> bool:
    try:
        return name.decode().isprintable()
    except UnicodeDecodeError:
        return False
