"""The bytes of the driver: what an entry holds, what a frame between nodes holds, and the three numbers of a HardState.

An entry is a MessagePack array `[stamp_ns, [command, ...]]`: when it was proposed, and the commands of one turn of the leader's loop. An
empty entry is a new leader's first.

A frame is `session (u64) | length (u32) message | length message ...`, all little-endian. A message is the core's own (the protocol buffers
of raft-rs), of which only what stands in front is looked at here: the kind, the addressee and the sender.

Source: protocol buffers' encoding (a field is the varint `number << 3 | wire type`, then its value; fields come in rising order).
"""

from collections.abc import Sequence
from struct import Struct as Layout
from typing import Final, NamedTuple

import msgspec

from isopod.world.errors import BadRecord

FRAME_HEAD: Final = Layout("<Q")
_LENGTH: Final = Layout("<I")
READ_CONTEXT: Final = Layout(">QQQ")
"""Node, boot, counter: never used twice."""
SNAPSHOT_START: Final = b"\x08\x07"
"""How a message of kind MsgSnapshot begins: field 1 is the kind, 7."""

FORWARDED: Final = (b"\x08\x0d", b"\x08\x0f")
"""How messages begin that a core passes on in the name of their first sender: MsgTransferLeader and MsgReadIndex."""
APPEND_START: Final = b"\x08\x03"
"""How a message of kind MsgAppend begins."""
HEARTBEAT_ANSWER_START: Final = b"\x08\x09"
"""The same of MsgHeartbeatResponse."""
ELECTION_STARTS: Final = (b"\x08\x05", b"\x08\x11", b"\x08\x0e")
"""The same of what asks for a vote (MsgRequestVote, MsgRequestPreVote) or for standing at once (MsgTimeoutNow)."""
_COMMIT_BYTES_MAX: Final = 64

Envelope = tuple[int, list[bytes]]
_DECODER: Final = msgspec.msgpack.Decoder(Envelope)
_encode: Final = msgspec.msgpack.Encoder().encode
decode_envelope: Final = _DECODER.decode
pack_length: Final = _LENGTH.pack


def encode_envelope(stamp_ns: int, commands: Sequence[bytes]) -> bytes:
    """Return the payload of an entry.

    Args:
        stamp_ns: The leader's time.
        commands: In the order in which they are to be applied.
    """
    return _encode((stamp_ns, commands))


class HardState(NamedTuple):
    """What a node promised: its term, its vote in it, and how far it knows the log to be committed."""

    term: int = 0
    vote: int = 0
    commit: int = 0


def decode_hard_state(data: bytes) -> HardState:
    """Return the fields of the core's HardState; absent ones are 0.

    Raises:
        BadRecord: It is none.
    """
    fields = [0, 0, 0]
    offset = 0
    try:
        while offset < len(data):
            tag, offset = _varint(data, offset)
            value, offset = _varint(data, offset)
            if tag not in {8, 16, 24}:
                raise BadRecord("hard state", f"tag {tag}")
            fields[(tag >> 3) - 1] = value
    except IndexError:
        raise BadRecord("hard state", "it is cut short") from None
    return HardState(*fields)


def encode_hard_state(state: HardState) -> bytes:
    """Return the core's form."""
    return b"".join(_tagged(number, value) for number, value in enumerate(state, start=1) if value)


def address_of(sender: int, to: int) -> bytes:
    """Return what stands behind the two bytes of a message's kind: fields 2 (to) and 3 (from)."""
    return _tagged(2, to) + _tagged(3, sender)


def only_commits(append: bytes) -> bool:
    """Return whether a MsgAppend has no entries: it says how far the log is committed, as the next one with entries would.

    Args:
        append: A message that begins with `APPEND_START`.
    """
    return _has_only_numbers(append)


def is_sign_of_life(message: bytes) -> bool:
    """Return whether a message answers a heartbeat that asked for nothing: it says that its sender is there, and no more."""
    return message.startswith(HEARTBEAT_ANSWER_START) and _has_only_numbers(message)


def _has_only_numbers(message: bytes) -> bool:
    """Return whether a message has no entries, no context and no snapshot."""
    if len(message) > _COMMIT_BYTES_MAX:
        return False
    offset = 0
    end = len(message)
    while offset < end:
        if message[offset] & 7:
            return False  # not a number
        offset += 1
        while message[offset] > 0x7F:
            offset += 1
        offset += 1
    return True


def split_frame(frame: bytes) -> list[bytes]:
    """Return the messages of a frame.

    Raises:
        ValueError: The lengths do not add up.
    """
    messages: list[bytes] = []
    offset = FRAME_HEAD.size
    end = len(frame)
    unpack = _LENGTH.unpack_from
    while offset < end:
        if offset + 4 > end:
            raise ValueError("a length is cut short")
        begin = offset + 4
        offset = begin + unpack(frame, offset)[0]
        if offset == begin or offset > end:
            raise ValueError(f"a message of {offset - begin} bytes with {end - begin} left")
        messages.append(frame[begin:offset])
    return messages


def _tagged(field: int, value: int) -> bytes:
    """Return a field of kind varint."""
    out = bytearray((field << 3,))
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the number at an offset, and the offset behind it."""
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
        if shift > 63:
            raise BadRecord("hard state", "a number of more than 64 bits")
