"""Join tokens: what lets a new node in. Pure: texts, keys and the replicated record; no I/O.

A token is a text of high entropy, known to the joining node and to nobody else: "isopod-join-" and 40 hexadecimal digits, or a secret of at
least 24 characters that all nodes of a cluster are given before it exists. The cluster keeps a key derived from it, never the text: what is
replicated cannot be typed in, though who can read it is a member anyway.

    usable while    not revoked, now < expires_at, uses left (a node that comes again with the same incarnation uses none)
    kept            for a week after it expired, so that its refusal can say why
"""

import hashlib
import hmac
from typing import Final

import msgspec

from isopod.cluster.members.config import TOKEN_CHARS_MAX, TOKEN_CHARS_MIN, Role
from isopod.world.errors import InvalidArgument, TokenRefused
from isopod.world.world import World

PREFIX: Final = "isopod-join-"
SECRET_BYTES: Final = 20
ID_CHARS: Final = 12
HEX: Final = "0123456789abcdef"
USES_MAX: Final = 10_000
VALID_S_MAX: Final = 366 * 86_400.0
SHARED_VALID_S: Final = 24 * 3600.0
"""How long after its founding a cluster takes the secret it was founded with."""
SHARED_USES: Final = 64
DISTINCT_CHARS_MIN: Final = 8
KEPT_NS: Final = 7 * 86_400 * 1_000_000_000
_ID_DOMAIN: Final = b"isopod token id\0"
_KEY_DOMAIN: Final = b"isopod token key\0"
_NS: Final = 1_000_000_000


class TokenUse(msgspec.Struct, frozen=True, array_like=True):
    """Who came in by a token."""

    node_id: int
    incarnation: str


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A token as it is replicated."""

    id: str
    key: bytes
    created_at_ns: int
    expires_at_ns: int
    uses: int
    role: Role
    used_by: tuple[TokenUse, ...] = ()
    is_revoked: bool = False

    @property
    def uses_left(self) -> int:
        """How many more nodes may come."""
        return max(0, self.uses - len(self.used_by))

    def is_usable(self, now_ns: int) -> bool:
        """Return whether a new node may come in by it now."""
        return not self.is_revoked and now_ns < self.expires_at_ns and self.uses_left > 0


def new_token(world: World) -> str:
    """Return the text of a new token: 160 bits of chance."""
    return PREFIX + world.random.token_hex(SECRET_BYTES)


def check_token(text: str) -> str:
    """Return a token that could be one.

    Raises:
        TokenRefused: It is too short or too simple to keep anybody out, or too long.
    """
    hint = "make one: isopod cluster token create, or before there is a cluster: openssl rand -hex 20"
    if not text:
        raise TokenRefused("there is none", "pass it with --token or in ISOPOD_CLUSTER_TOKEN")
    if not TOKEN_CHARS_MIN <= len(text) <= TOKEN_CHARS_MAX or not text.isascii() or not text.isprintable():
        raise TokenRefused(f"it is not {TOKEN_CHARS_MIN} to {TOKEN_CHARS_MAX} printable characters long", hint)
    if len(dict.fromkeys(text)) < DISTINCT_CHARS_MIN:
        raise TokenRefused("it is too simple", hint)
    return text


def token_id(text: str) -> str:
    """Return the name by which a token is spoken of; it tells nothing of a text of high entropy."""
    return hashlib.sha256(_ID_DOMAIN + text.encode()).hexdigest()[:ID_CHARS]


def check_token_id(text: str) -> str:
    """Return a token's id as a stranger says it, if it may be one: nothing is looked up for others.

    Raises:
        TokenRefused: It may not.
    """
    if len(text) != ID_CHARS or not all(char in HEX for char in text):
        raise TokenRefused("this cluster knows no such token")
    return text


def token_key(text: str) -> bytes:
    """Return the key that both sides prove to have."""
    return hashlib.sha256(_KEY_DOMAIN + text.encode()).digest()


def token_record(text: str, *, now_ns: int, valid_s: float, uses: int, role: Role) -> TokenRecord:
    """Return the record of a token.

    Args:
        text: The token.
        now_ns: The wall time.
        valid_s: For how long, in seconds; at most a year.
        uses: How many nodes may come in by it.
        role: The most that they may become.

    Raises:
        InvalidArgument: A bound makes no sense.
        TokenRefused: The text cannot be a token.
    """
    if not 0 < valid_s <= VALID_S_MAX:
        raise InvalidArgument("token's validity", f"{valid_s:g} s", f"want more than 0, at most {VALID_S_MAX:.0f} s")
    if not 1 <= uses <= USES_MAX:
        raise InvalidArgument("token's uses", uses, f"want 1 to {USES_MAX}")
    check_token(text)
    return TokenRecord(
        id=token_id(text), key=token_key(text), created_at_ns=now_ns, expires_at_ns=now_ns + int(valid_s * _NS), uses=uses, role=role
    )


def check_use(record: TokenRecord | None, use: TokenUse, role: Role, *, now_ns: int) -> TokenRecord:
    """Return the record as it is after a node came in by it.

    Args:
        record: The token, None if there is none of that id.
        use: Who comes.
        role: What it wants to be.
        now_ns: The wall time.

    Raises:
        TokenRefused: It may not; the message says why.
    """
    if record is None:
        raise TokenRefused("this cluster knows no such token")
    if record.is_revoked:
        raise TokenRefused(f"token {record.id} was revoked")
    if role != "agent" and record.role == "agent":
        raise TokenRefused(f"token {record.id} is for agents only", "make one for voters: isopod cluster token create --role voter")
    if use in record.used_by:
        return record  # the answer to its first try was lost
    if now_ns >= record.expires_at_ns:
        raise TokenRefused(f"token {record.id} has expired")
    if not record.uses_left:
        raise TokenRefused(f"token {record.id} was used {record.uses} times, as often as it may be")
    return msgspec.structs.replace(record, used_by=(*record.used_by, use))


def is_forgettable(record: TokenRecord, now_ns: int) -> bool:
    """Return whether nobody will ask for a token any more."""
    return now_ns > record.expires_at_ns + KEPT_NS


def proof(key: bytes, what: str, transcript: bytes) -> bytes:
    """Return what shows that one has a token's key and means this transcript.

    Args:
        key: The key.
        what: Which of the proofs of an enrolment it is: one cannot be shown for another.
        transcript: Everything that was said.
    """
    return hmac.digest(key, what.encode() + b"\0" + transcript, "sha256")


def is_proof(shown: bytes, key: bytes, what: str, transcript: bytes) -> bool:
    """Return whether a proof is the right one, in a time that does not depend on how wrong it is."""
    return hmac.compare_digest(shown, proof(key, what, transcript))
