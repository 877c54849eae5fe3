"""What a simulated guest's memory holds, and the file that a snapshot of it is.

The file is what QEMU's migration stream is to others: a head that QEMU itself reads, then memory that it does not look at; or that memory
lies in a file of its own, which whoever goes on from it maps. A damaged head is refused; damaged memory is a guest that does nothing.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

_MAGIC: Final = b"QEVM"
_VERSION: Final = 3
_PAGE_BYTES: Final = 4096


class Remembered(msgspec.Struct):
    """A command that runs."""

    stream: int
    arguments: dict[str, Any]
    pid: int


class GuestState(msgspec.Struct):
    """The agent and the kernel, as far as a snapshot keeps them."""

    boot_id: str
    entropy: str
    layers: list[tuple[str, str | None]] = []
    configuration: dict[str, Any] | None = None
    commands: list[Remembered] = []
    main_exit: dict[str, Any] | None = None
    """How the main command ended."""

    def remember(self, stream: int, arguments: Mapping[str, Any], pid: int) -> None:
        """Note a command that was started."""
        self.commands.append(Remembered(stream, dict(arguments), pid))

    def forget(self, stream: int) -> None:
        """Note its end."""
        self.commands = [each for each in self.commands if each.stream != stream]


class Saved(msgspec.Struct):
    """A guest's memory."""

    state: GuestState
    upper: bytes | None
    """The tree of its own files as its kernel knew it."""
    now_ns: int
    is_damaged: bool = False


class _Head(msgspec.Struct):
    version: int
    shape: list[Any]
    was_running: bool
    n_memory_bytes: int
    """0: the memory lies in a file of its own."""
    checksum: int


class Snapshot(NamedTuple):
    """A guest's memory, and whether it ran while it was saved: it goes on by itself then."""

    saved: Saved
    was_running: bool


class BadSnapshot(Exception):
    """A monitor refuses to go on from it."""


def encode_memory(saved: Saved) -> bytes:
    """Return what a guest's memory is to others: pages."""
    memory = msgspec.json.encode(saved)
    data = len(memory).to_bytes(4, "little") + zlib.crc32(memory).to_bytes(4, "little") + memory
    return data.ljust(-(-len(data) // _PAGE_BYTES) * _PAGE_BYTES, b"\0")


def decode_memory(data: bytes) -> Saved:
    """Return what a guest finds in its memory; nothing it can make use of, if somebody else wrote there."""
    n_bytes, checksum = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
    memory = data[8 : 8 + n_bytes]
    if len(memory) < n_bytes or zlib.crc32(memory) != checksum or not n_bytes:
        return Saved(GuestState("", ""), None, 0, is_damaged=True)
    return msgspec.json.decode(memory, type=Saved)


def encode(saved: Saved, shape: list[object], *, was_running: bool, apart: bool) -> bytes:
    """Return the stream of a machine of that shape.

    Args:
        saved: The guest.
        shape: The machine.
        was_running: Whether its processors ran.
        apart: Whether its memory lies in a file that both sides map, and is no part of the stream.
    """
    memory = b"" if apart else encode_memory(saved)
    head = msgspec.json.encode(_Head(_VERSION, list(shape), was_running, len(memory), zlib.crc32(memory)))
    return _MAGIC + len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head + memory


def decode(data: bytes, shape: list[object], memory: bytes | None) -> Snapshot:
    """Return what a stream, and the file of the memory if there is one, hold.

    Raises:
        BadSnapshot: It is none, is cut off, or is one of another machine.
    """
    n_bytes, checksum = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
    head_bytes = data[12 : 12 + n_bytes]
    if data[:4] != _MAGIC or len(head_bytes) < n_bytes or zlib.crc32(head_bytes) != checksum:
        raise BadSnapshot("Not a migration stream")
    head = msgspec.json.decode(head_bytes, type=_Head)
    if head.version != _VERSION:
        raise BadSnapshot("Unsupported migration stream version")
    if head.shape != list(shape):
        raise BadSnapshot("Size mismatch: the devices differ from those of the snapshot")
    inline = data[12 + n_bytes : 12 + n_bytes + head.n_memory_bytes]
    if len(inline) < head.n_memory_bytes or (not head.n_memory_bytes and memory is None):
        raise BadSnapshot("load of migration failed: Input/output error")
    return Snapshot(decode_memory(inline or memory or b""), head.was_running)
