"""Messages made by hand: what a lying, damaged or delayed peer might send. Protobuf, field numbers from the crate's eraftpb.proto."""

from collections.abc import Iterator
from typing import Final, NamedTuple

KINDS: Final = {
    name: number
    for number, name in enumerate(
        (
            "hup beat propose append append_response vote vote_response snapshot heartbeat heartbeat_response unreachable snap_status "
            "check_quorum transfer_leader timeout_now read_index read_index_response pre_vote pre_vote_response"
        ).split()
    )
}


class WireEntry(NamedTuple):
    """An entry in a message."""

    index: int  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    term: int
    data: bytes = b""
    kind: int = 0


def message(kind: str, sender: int, to: int, *, entries: tuple[WireEntry, ...] = (), context: bytes = b"", **fields: int) -> bytes:
    """Encode a message; `fields`: term, log_term, index, commit, reject, reject_hint, commit_term, request_snapshot."""
    numbers = {"term": 4, "log_term": 5, "index": 6, "commit": 8, "reject": 10}
    numbers |= {"reject_hint": 11, "request_snapshot": 13, "commit_term": 15}
    out = _number(1, KINDS[kind]) + _number(2, to) + _number(3, sender)
    for name, value in fields.items():
        out += _number(numbers[name], value)
    for entry in entries:
        out += _bytes(7, _number(1, entry.kind) + _number(2, entry.term) + _number(3, entry.index) + _bytes(4, entry.data))
    return out + _bytes(12, context)


def snapshot(sender: int, to: int, *, term: int, index: int, voters: bytes, learners: bytes = b"") -> bytes:
    """Encode a snapshot of the same term; ids below 128 as bytes."""
    meta = _bytes(1, _bytes(1, voters) + _bytes(2, learners)) + _number(2, index) + _number(3, term)
    return message("snapshot", sender, to, term=term) + _bytes(9, _bytes(2, meta))


def _number(field: int, value: int) -> bytes:
    return bytes(_varint(field << 3)) + bytes(_varint(value)) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return bytes(_varint(field << 3 | 2)) + bytes(_varint(len(value))) + value if value else b""


def _varint(value: int) -> Iterator[int]:
    while value >= 0x80:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
