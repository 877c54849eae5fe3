"""Users: who "NAME|UID[:GROUP|GID]" is inside an image.

Pure functions on the texts of the image's own /etc/passwd and /etc/group, which may be missing (pass "") and are not trusted: lines
that make no sense are skipped, names never leave this module, and the host's users are never asked. Reading the two files from a
rootfs without following its links out of it is the caller's duty.

Rules: a name is looked up before a number is read as one, so an account called "1000" wins over the uid 1000; the first line that
matches counts; a number needs no account (group 0, home "/"). Without a group the account's own group and its memberships apply; with
one, only that group. The primary group always stands among the additional ones too: a file mode that denies a group then also denies
those who have it as primary group only.

Source: passwd(5), group(5), credentials(7), OCI runtime specification 1.0.2 (config.md, "POSIX-platform User").
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from isopod.world.errors import InvalidArgument

ID_MAX: Final = (1 << 31) - 1
N_GROUPS_MAX: Final = 65_536
"""NGROUPS_MAX of Linux."""
_TEXT_CHARS_MAX: Final = 256


class ResolvedUser(NamedTuple):
    """A process's identity."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...]
    """`gid` first, then the groups the account is a member of, in the file's order."""
    home: str


class _Account(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def resolve_user(user: str, passwd: str, group: str) -> ResolvedUser:
    """Return the identity that `user` names.

    Args:
        user: NAME, UID, NAME:GROUP, UID:GID or a mix; "" is uid 0.
        passwd: The text of the image's /etc/passwd.
        group: The text of the image's /etc/group.

    Raises:
        InvalidArgument: No such name, or a number out of range.
    """
    if len(user) > _TEXT_CHARS_MAX or "\0" in user or "\n" in user:
        raise InvalidArgument("user", user[:_TEXT_CHARS_MAX], "malformed")
    who, _, which = user.partition(":")
    account = _find_account(user, who or "0", passwd)
    if which:
        gid = _find_group(user, which, group)
        return ResolvedUser(account.uid, gid, (gid,), account.home)
    gids = [account.gid]
    gids += [entry.gid for entry in _groups(group) if account.name and account.name in entry.members]
    unique = tuple(dict.fromkeys(gids))
    if len(unique) > N_GROUPS_MAX:
        raise InvalidArgument("user", user, f"is in more than {N_GROUPS_MAX} groups of the image's /etc/group")
    return ResolvedUser(account.uid, account.gid, unique, account.home)


def _find_account(user: str, who: str, passwd: str) -> _Account:
    by_name = next((entry for entry in _accounts(passwd) if entry.name == who), None)
    if by_name is not None:
        return by_name
    uid = _parse_id(who)
    if uid is None:
        raise InvalidArgument("user", user, f"the image has no user {who!r}", "give a UID, or a name from the image's /etc/passwd")
    by_uid = next((entry for entry in _accounts(passwd) if entry.uid == uid), None)
    return by_uid or _Account("", _in_range(user, uid), 0, "/")


def _find_group(user: str, which: str, group: str) -> int:
    by_name = next((entry.gid for entry in _groups(group) if entry.name == which), None)
    if by_name is not None:
        return by_name
    gid = _parse_id(which)
    if gid is None:
        raise InvalidArgument("user", user, f"the image has no group {which!r}", "give a GID, or a name from the image's /etc/group")
    return _in_range(user, gid)


def _accounts(passwd: str) -> Iterator[_Account]:
    for line in passwd.split("\n"):
        fields = line.split(":")
        if len(fields) < 6 or not fields[0]:
            continue
        uid, gid = _parse_id(fields[2]), _parse_id(fields[3])
        if uid is not None and gid is not None and uid <= ID_MAX and gid <= ID_MAX:
            home = fields[5] if fields[5].startswith("/") else "/"
            yield _Account(fields[0], uid, gid, home)


def _groups(group: str) -> Iterator[_Group]:
    for line in group.split("\n"):
        fields = line.split(":")
        if len(fields) < 3 or not fields[0]:
            continue
        gid = _parse_id(fields[2])
        if gid is not None and gid <= ID_MAX:
            members = fields[3].strip().split(",") if len(fields) > 3 else ()
            yield _Group(fields[0], gid, tuple(members))


def _parse_id(text: str) -> int | None:
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 20 else None


def _in_range(user: str, number: int) -> int:
    if number > ID_MAX:
        raise InvalidArgument("user", user, f"ids go from 0 to {ID_MAX}")
    return number
