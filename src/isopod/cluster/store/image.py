"""Image: the store's state as the bytes of a snapshot, with a version and a digest.

The bytes are a mark with the format's version, the BLAKE2b hash of what follows, and that, packed. Equal states make equal bytes. Beside
the hash, which says that the bytes are those that were written, the state's own digest is in it: it says that what was built from them
is what was there.
"""

from hashlib import blake2b
from typing import Final

import msgspec

from isopod.api.store.messages import LEVEL, Entry
from isopod.cluster.store.leases import SavedLease
from isopod.cluster.store.sessions import SavedSession
from isopod.world.errors import BadRecord

MARK: Final = b"isopod-store\x01"
HASH_BYTES: Final = 32
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


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Image).decode


def pack_image(image: Image, digest: str) -> bytes:
    """Return the bytes of a snapshot."""
    body = _encode(msgspec.structs.replace(image, digest=digest))
    return b"".join((MARK, blake2b(body, digest_size=HASH_BYTES).digest(), body))


def unpack_image(data: bytes) -> tuple[Image, str]:
    """Return an image and the digest it names.

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
    if blake2b(body, digest_size=HASH_BYTES).digest() != data[len(MARK) : start]:
        raise BadRecord("snapshot", "it is damaged: its hash is another", "use an older snapshot, or have another node send one")
    try:
        image = _decode(body)
    except _DECODE_ERRORS as error:
        raise BadRecord("snapshot", str(error)) from None
    if image.level > LEVEL:
        raise BadRecord("snapshot", f"it uses level {image.level} of the store's words, we know {LEVEL}", "use a later isopod")
    return image, image.digest
