"""Image: the store's state as the bytes of a snapshot, with a version and a digest.

The bytes are a mark with the format's version, the BLAKE2b hash of what follows, and that, packed. Equal states make equal bytes. Beside
the hash, which says that the bytes are those that were written, the state's own digest is in it: it says that what was built from them
is what was there.

Packing is done in pieces, each a few milliseconds of work: a million keys take seconds, in which a node must go on to answer its peers.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from hashlib import blake2b
from struct import pack
from typing import Final, TypeVar

import msgspec

from isopod.api.store.messages import LEVEL, Entry
from isopod.cluster.store.leases import SavedLease
from isopod.cluster.store.sessions import SavedSession
from isopod.world.errors import BadRecord

T = TypeVar("T")
MARK: Final = b"isopod-store\x01"
HASH_BYTES: Final = 32
PIECE_BYTES: Final = 128 << 10
PIECE_ITEMS: Final = 1024
HASHED_AT_ONCE: Final = 1 << 20
_DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class Image(msgspec.Struct, frozen=True, array_like=True):
    """All of the state."""

    level: int
    revision: int
    compacted: int
    stamp_ns: int
    index: int
    entries: list[Entry]
    history: list[Entry]
    marks: list[tuple[int, int]]
    n_granted: int
    leases: list[SavedLease]
    n_opened: int
    sessions: list[SavedSession]
    digest: str = ""

    def misfit(self, wanted: str, found: str) -> BadRecord:
        """Return the error of an image whose state has not the digest it names."""
        why = f"its state has digest {found}, not {wanted}"
        return BadRecord(f"snapshot at revision {self.revision}", why, "do all nodes have the same limits?")


_encoder: Final = msgspec.msgpack.Encoder()
_decode: Final = msgspec.msgpack.Decoder(Image).decode


def pack_in_pieces(image: Image, entries: Iterable[Entry], n_entries: int, digest: Iterable[str]) -> Iterator[bytes]:
    """Return the bytes of a snapshot, in pieces. The first ones are empty: work was done, and the hash that comes first is not known yet.

    Args:
        image: Everything but entries and digest; nobody changes its lists meanwhile.
        entries: In the order of their keys.
        n_entries: How many.
        digest: Asked for before the entries: "" as long as it is being worked out, then itself.
    """
    for text in digest:
        if text:
            image = msgspec.structs.replace(image, digest=text)
        else:
            yield b""
    hashed = blake2b(digest_size=HASH_BYTES)
    packed: deque[bytes] = deque()
    buffer = bytearray(array_head(len(Image.__struct_fields__)))
    for name in Image.__struct_fields__:
        value = getattr(image, name)
        if isinstance(value, int | str):
            _encoder.encode_into(value, buffer, -1)
            continue
        items, n_items = (entries, n_entries) if name == "entries" else (value, len(value))
        buffer += array_head(n_items)
        for number, item in enumerate(items, 1):
            _encoder.encode_into(item, buffer, -1)
            if len(buffer) >= PIECE_BYTES or not number % PIECE_ITEMS:
                packed.append(bytes(buffer))
                hashed.update(packed[-1])
                buffer.clear()
                yield b""
    hashed.update(buffer)
    yield b"".join((MARK, hashed.digest()))
    packed.append(bytes(buffer))
    while packed:  # one by one, so that each is let go of when it was taken
        yield packed.popleft()


def array_head(n: int) -> bytes:
    """Return how MessagePack begins an array of so many items."""
    if n < 16:
        return bytes((0x90 | n,))
    return pack(">BH", 0xDC, n) if n < 1 << 16 else pack(">BI", 0xDD, n)


def unpack_in_pieces(data: bytes) -> Generator[None, None, Image]:
    """Return an image, at the end of a few milliseconds' work for each piece.

    Raises:
        BadRecord: It is no snapshot of a store, is damaged, or of a later version.
    """
    if not data.startswith(MARK[:-1]):
        raise BadRecord("snapshot", "it is none of a store")
    version = data[len(MARK) - 1 : len(MARK)]
    if version != MARK[-1:]:
        raise BadRecord("snapshot", f"version {version.hex() or 'missing'} of the format", "use the isopod that made it, or a later one")
    start = len(MARK) + HASH_BYTES
    body = memoryview(data)[start:]
    hashed = blake2b(digest_size=HASH_BYTES)
    for begin in range(0, len(body), HASHED_AT_ONCE):
        hashed.update(body[begin : begin + HASHED_AT_ONCE])
        yield
    if hashed.digest() != data[len(MARK) : start]:
        raise BadRecord("snapshot", "it is damaged: its hash is another", "use an older snapshot, or have another node send one")
    try:
        image = _decode(body)
    except _DECODE_ERRORS as error:
        raise BadRecord("snapshot", str(error)) from None
    if image.level > LEVEL:
        raise BadRecord("snapshot", f"it uses level {image.level} of the store's words, we know {LEVEL}", "use a later isopod")
    return image


def finish(work: Generator[None, None, T]) -> T:
    """Do all of some work at once; return what it comes to."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            result: T = ended.value
            return result
