r"""DNS messages as bytes: pure functions that write a query or a simple answer, and read both.

Names are text in the form of zone files: lower case, no final dot, a dot inside a label written as "\.", other bytes than printable ASCII
as "\DDD". Whatever a server sends, reading ends: a compression pointer must point before the name it stands in, each further one before
the one that led to it, names are bounded by 255 bytes, and every record must lie inside the message.
Sources: RFC 1035 sections 3 and 4, RFC 2782 (SRV), RFC 3596 (AAAA), RFC 6891 (EDNS), RFC 2308 (negative answers).
"""

import enum
import ipaddress
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

NAME_BYTES_MAX: Final = 255
LABEL_BYTES_MAX: Final = 63
UDP_BYTES: Final = 1232
"""What we take by UDP: fits every path's MTU (DNS flag day 2020)."""
_HEADER: Final = struct.Struct("!HHHHHH")
_QUESTION: Final = struct.Struct("!HH")
_RECORD: Final = struct.Struct("!HHIH")
_POINTERS_MAX: Final = 127
"""In one name: one before each label is the most that makes sense. Without a bound a chain of them in each record costs seconds."""
_SRV: Final = struct.Struct("!HHH")
_U16: Final = struct.Struct("!H")
_SOA_NUMBERS: Final = struct.Struct("!IIIII")
_IN: Final = 1
_RESPONSE, _AUTHORITATIVE, _TRUNCATED, _WANT_RECURSION, _CAN_RECURSE = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
_OPCODE: Final = 0x7800
_QUESTION_POINTER: Final = b"\xc0\x0c"
"""To the name of the question, which begins behind the header."""
_POINTER: Final = 0xC0
_ESCAPED: Final = frozenset(b'\\."();@$')


class MalformedMessage(ValueError):
    """Bytes that are no DNS message, or text that is no name."""


class RecordType(enum.IntEnum):
    """Of a question or a record (RFC 1035 section 3.2.2)."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41


class ResponseCode(enum.IntEnum):
    """Why there is no answer (RFC 1035 section 4.1.1)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class Mail(NamedTuple):
    """An MX record's data."""

    preference: int
    exchange: str


class Service(NamedTuple):
    """An SRV record's data."""

    priority: int
    weight: int
    port: int
    target: str


class Authority(NamedTuple):
    """Of an SOA record's data: what matters for caching negative answers."""

    server: str
    mailbox: str
    minimum_s: int


Data = str | Mail | Service | Authority | tuple[bytes, ...] | bytes
"""A and AAAA: a numeric address; CNAME, NS, PTR: a name; TXT: its strings; unknown types: the bytes."""


class Question(NamedTuple):
    """What was asked."""

    name: str
    kind: int


class Record(NamedTuple):
    """One resource record."""

    name: str
    kind: int
    ttl_s: int
    data: Data


class Message(NamedTuple):
    """A message that was read. Records of other classes than IN, and OPT, are left out."""

    id: int
    is_response: bool
    is_truncated: bool
    code: int
    questions: tuple[Question, ...]
    answers: tuple[Record, ...]
    authorities: tuple[Record, ...]
    additional: tuple[Record, ...]


class Query(NamedTuple):
    """What a server needs to know of a message that asks it something."""

    id: int
    opcode: int
    wants_recursion: bool
    has_edns: bool
    cls: int
    """Of the question: 1 is IN."""
    question: Question


def encode_query(number: int, question: Question, *, udp_bytes: int = UDP_BYTES) -> bytes:
    """Return a query that asks for recursion.

    Args:
        number: The id, 0 to 65535.
        question: What to ask.
        udp_bytes: The largest answer taken by UDP (EDNS); 0 leaves EDNS out.

    Raises:
        MalformedMessage: The name cannot be one.
    """
    extra = b"\0" + _RECORD.pack(RecordType.OPT, udp_bytes, 0, 0) if udp_bytes else b""
    head = _HEADER.pack(number, _WANT_RECURSION, 1, 0, 0, 1 if udp_bytes else 0)
    return head + encode_name(question.name) + _QUESTION.pack(question.kind, _IN) + extra


def encode_answer(
    query: Query, records: Sequence[Record] = (), *, code: int = ResponseCode.NOERROR, authoritative: bool = False, bytes_max: int = 65535
) -> bytes:
    """Return an answer with A, AAAA, CNAME, NS and PTR records. One that is too large is cut to its question, and says so.

    Args:
        query: What is answered.
        records: Those of other types are left out.
        code: Why there are none, or NOERROR.
        authoritative: Whether we are the ones who know.
        bytes_max: How large it may be.
    """
    flags = _RESPONSE | _CAN_RECURSE | code | (_AUTHORITATIVE if authoritative else 0) | (_WANT_RECURSION if query.wants_recursion else 0)
    question = encode_name(query.question.name) + _QUESTION.pack(query.question.kind, query.cls)
    extra = b"\0" + _RECORD.pack(RecordType.OPT, UDP_BYTES, 0, 0) if query.has_edns else b""
    rows = [row for record in records if (row := _encode_record(record, query.question.name))]
    answer = _HEADER.pack(query.id, flags, 1, len(rows), 0, 1 if extra else 0) + question + b"".join(rows) + extra
    if len(answer) <= bytes_max:
        return answer
    return _HEADER.pack(query.id, flags | _TRUNCATED, 1, 0, 0, 1 if extra else 0) + question + extra


def encode_refusal(data: bytes, code: int) -> bytes:
    """Return an answer without a question to a message that has at least its header, read or not."""
    number, flags = _HEADER.unpack_from(data)[:2]
    return _HEADER.pack(number, _RESPONSE | _CAN_RECURSE | (flags & (_OPCODE | _WANT_RECURSION)) | code, 0, 0, 0, 0)


def is_question(data: bytes) -> bool:
    """Return whether bytes have a message's header, and are no answer: only those may be answered, or two servers would never end."""
    return len(data) >= _HEADER.size and not _HEADER.unpack_from(data)[1] & _RESPONSE


def decode_query(data: bytes) -> Query:
    """Read what somebody asks a server.

    Raises:
        MalformedMessage: It is no message, or does not have exactly one question.
    """
    message = decode(data)
    if len(message.questions) != 1:
        raise MalformedMessage(f"{len(message.questions)} questions")
    flags, n_additional = _HEADER.unpack_from(data)[1], _HEADER.unpack_from(data)[5]
    behind = decode_name(data, _HEADER.size)[1]
    cls = _QUESTION.unpack_from(data, behind)[1]
    # `decode` leaves OPT out; nothing else that it leaves out stands there in a question.
    has_edns = n_additional > len(message.additional)
    return Query(message.id, (flags & _OPCODE) >> 11, bool(flags & _WANT_RECURSION), has_edns, cls, message.questions[0])


def decode(data: bytes) -> Message:
    """Read a message.

    Raises:
        MalformedMessage: It is none.
    """
    if len(data) < _HEADER.size:
        raise MalformedMessage("shorter than a header")
    number, flags, *counts = _HEADER.unpack_from(data)
    offset = _HEADER.size
    questions: list[Question] = []
    for _ in range(counts[0]):
        name, offset = decode_name(data, offset)
        _need(data, offset, _QUESTION.size)
        kind, _class = _QUESTION.unpack_from(data, offset)
        offset += _QUESTION.size
        questions.append(Question(name, kind))
    sections: list[tuple[Record, ...]] = []
    for count in counts[1:]:
        records, offset = _decode_records(data, offset, count)
        sections.append(tuple(records))
    return Message(
        number, bool(flags & _RESPONSE), bool(flags & _TRUNCATED), flags & 0xF, tuple(questions), sections[0], sections[1], sections[2]
    )


def encode_name(name: str) -> bytes:
    """Return a name in wire form, not compressed. Letters outside ASCII are written as IDNA says.

    Raises:
        MalformedMessage: A label is empty or too long, or the whole is.
    """
    labels = _labels(name)
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    if len(wire) > NAME_BYTES_MAX:
        raise MalformedMessage(f"the name {name[:40]!r}... has more than {NAME_BYTES_MAX} bytes")
    return wire


def normal_name(name: str) -> str:
    """Return a name as `decode_name` gives it.

    Raises:
        MalformedMessage: It cannot be a name.
    """
    return decode_name(encode_name(name), 0)[0]


def decode_name(data: bytes, offset: int) -> tuple[str, int]:
    """Read a name.

    Args:
        data: The whole message.
        offset: Where the name begins.

    Returns:
        The name and the offset behind it.

    Raises:
        MalformedMessage: It ends outside the message, is too long, or its pointers do not lead back.
    """
    labels: list[str] = []
    n_bytes = 1
    n_pointers = 0
    limit = offset
    behind = -1
    while True:
        _need(data, offset, 1)
        length = data[offset]
        if length & _POINTER == _POINTER:
            _need(data, offset, 2)
            behind = offset + 2 if behind < 0 else behind
            offset = _U16.unpack_from(data, offset)[0] & 0x3FFF
            n_pointers += 1
            if offset >= limit or n_pointers > _POINTERS_MAX:
                raise MalformedMessage("a compression pointer does not point back, or too many in a row do")
            limit = offset
        elif length & _POINTER:
            raise MalformedMessage("an unknown kind of label")
        elif length == 0:
            return ".".join(labels), offset + 1 if behind < 0 else behind
        else:
            _need(data, offset + 1, length)
            n_bytes += length + 1
            if n_bytes > NAME_BYTES_MAX:
                raise MalformedMessage(f"a name has more than {NAME_BYTES_MAX} bytes")
            labels.append(_label_text(data[offset + 1 : offset + 1 + length]))
            offset += 1 + length


def _encode_record(record: Record, asked: str) -> bytes:
    owner = _QUESTION_POINTER if record.name == asked else encode_name(record.name)
    if record.kind in (RecordType.A, RecordType.AAAA):
        data = ipaddress.ip_address(str(record.data)).packed
    elif record.kind in (RecordType.CNAME, RecordType.NS, RecordType.PTR):
        data = encode_name(str(record.data))
    else:
        return b""
    return owner + _RECORD.pack(record.kind, _IN, record.ttl_s, len(data)) + data


def _decode_records(data: bytes, offset: int, count: int) -> tuple[list[Record], int]:
    records: list[Record] = []
    for _ in range(count):
        name, offset = decode_name(data, offset)
        _need(data, offset, _RECORD.size)
        kind, cls, ttl_s, length = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        _need(data, offset, length)
        if cls == _IN and kind != RecordType.OPT:
            ttl_s = 0 if ttl_s & 0x8000_0000 else ttl_s  # RFC 2181 section 8
            records.append(Record(name, kind, ttl_s, _decode_data(data, offset, length, kind=kind)))
        offset += length
    return records, offset


def _decode_data(data: bytes, offset: int, length: int, *, kind: int) -> Data:
    end = offset + length
    piece = data[offset:end]
    if kind == RecordType.A:
        return str(ipaddress.IPv4Address(_exactly(piece, 4)))
    if kind == RecordType.AAAA:
        return str(ipaddress.IPv6Address(_exactly(piece, 16)))
    if kind == RecordType.TXT:
        return _strings(piece)
    if kind in (RecordType.CNAME, RecordType.NS, RecordType.PTR):
        return _name_at_end(data, offset, end)
    if kind == RecordType.MX:
        _fits(length, _U16.size)
        return Mail(_U16.unpack_from(data, offset)[0], _name_at_end(data, offset + _U16.size, end))
    if kind == RecordType.SRV:
        _fits(length, _SRV.size)
        priority, weight, port = _SRV.unpack_from(data, offset)
        return Service(priority, weight, port, _name_at_end(data, offset + _SRV.size, end))
    if kind == RecordType.SOA:
        server, offset = decode_name(data, offset)
        mailbox, offset = decode_name(data, offset)
        if end - offset != _SOA_NUMBERS.size:
            raise MalformedMessage("an SOA record of a wrong length")
        return Authority(server, mailbox, _SOA_NUMBERS.unpack_from(data, offset)[4])
    return piece


def _name_at_end(data: bytes, offset: int, end: int) -> str:
    name, behind = decode_name(data, offset)
    if behind != end:
        raise MalformedMessage("a record's name does not end with the record")
    return name


def _strings(piece: bytes) -> tuple[bytes, ...]:
    found: list[bytes] = []
    offset = 0
    while offset < len(piece):
        length = piece[offset]
        _need(piece, offset + 1, length)
        found.append(piece[offset + 1 : offset + 1 + length])
        offset += 1 + length
    if not found:
        raise MalformedMessage("a TXT record without a string")
    return tuple(found)


def _exactly(piece: bytes, n_bytes: int) -> bytes:
    if len(piece) != n_bytes:
        raise MalformedMessage(f"an address of {len(piece)} bytes")
    return piece


def _fits(length: int, n_bytes: int) -> None:
    if length <= n_bytes:
        raise MalformedMessage("a record too short for its type")


def _need(data: bytes, offset: int, n_bytes: int) -> None:
    if offset + n_bytes > len(data):
        raise MalformedMessage("it ends too early")


def _labels(name: str) -> list[bytes]:
    if name in ("", "."):
        return []
    labels: list[bytes] = []
    label = bytearray()
    text = name.removesuffix(".") if not name.endswith("\\.") else name
    if not text.isascii():
        text = _idna(text)
    position = 0
    while position < len(text):
        character = text[position]
        if character == ".":
            labels.append(_checked(label, name))
            label = bytearray()
        elif character == "\\":
            digits = text[position + 1 : position + 4]
            escaped = int(digits) if len(digits) == 3 and digits.isdigit() else ord(digits[0]) if digits else -1
            if not 0 <= escaped <= 255:
                raise MalformedMessage(f"a bad escape in the name {name[:40]!r}")
            position += 3 if len(digits) == 3 and digits.isdigit() else 1
            label.append(escaped)
        else:
            label.append(ord(character))
        position += 1
    labels.append(_checked(label, name))
    return labels


def _idna(text: str) -> str:
    try:
        return text.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise MalformedMessage(f"the name {text[:40]!r} has no ASCII form: {error}") from error


def _checked(label: bytearray, name: str) -> bytes:
    if not 1 <= len(label) <= LABEL_BYTES_MAX:
        raise MalformedMessage(f"a label of {len(label)} bytes in the name {name[:40]!r}")
    return bytes(label)


def _label_text(label: bytes) -> str:
    lower = label.lower()
    if lower.replace(b"-", b"").replace(b"_", b"").isalnum():
        return lower.decode("ascii")
    return "".join(chr(byte) if 0x20 < byte < 0x7F and byte not in _ESCAPED else _escape(byte) for byte in lower)


def _escape(byte: int) -> str:
    return "\\" + chr(byte) if byte in _ESCAPED else f"\\{byte:03d}"
