"""The DNS codec against dnspython's, and against whatever a hostile server may send."""

import contextlib

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.dns.message import (
    Authority,
    Mail,
    MalformedMessage,
    Message,
    Question,
    Record,
    RecordType,
    Service,
    decode,
    decode_name,
    encode_name,
    encode_query,
    normal_name,
)

pytestmark = pytest.mark.row("S16")

LABELS = st.binary(min_size=1, max_size=20)
NAMES = st.lists(LABELS, min_size=1, max_size=6).map(lambda labels: dns.name.Name([*labels, b""]))
HOSTS = st.lists(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True), min_size=1, max_size=4).map(".".join)
SETS = st.one_of(
    st.tuples(st.just("A"), st.ip_addresses(v=4).map(str)),
    st.tuples(st.just("AAAA"), st.ip_addresses(v=6).map(str)),
    st.tuples(st.just("CNAME"), HOSTS.map(lambda host: host + ".")),
    st.tuples(st.just("NS"), HOSTS.map(lambda host: host + ".")),
    st.tuples(st.just("MX"), st.builds("{} {}.".format, st.integers(0, 65535), HOSTS)),
    st.tuples(st.just("SRV"), st.builds("{} {} {} {}.".format, st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 65535), HOSTS)),
    st.tuples(
        st.just("TXT"),
        st.lists(st.from_regex(r"[ -!#-\[\]-~]{0,40}", fullmatch=True).map('"{}"'.format), min_size=1, max_size=4).map(" ".join),
    ),
    st.tuples(st.just("SOA"), st.builds("{}. {}. 1 2 3 4 {}".format, HOSTS, HOSTS, st.integers(0, 2**31 - 1))),
    st.tuples(st.just("CAA"), st.just('0 issue "ca.example"')),
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, dns.message.Message]:
    query = dns.message.make_query(draw(HOSTS), draw(st.sampled_from(["A", "AAAA", "TXT"])), id=draw(st.integers(0, 65535)))
    response = dns.message.make_response(query)
    response.flags |= draw(st.sampled_from([dns.flags.Flag(0), dns.flags.TC]))
    response.set_rcode(dns.rcode.Rcode(draw(st.integers(0, 5))))
    for section in (response.answer, response.authority, response.additional):
        for owner in draw(st.lists(HOSTS, max_size=3, unique=True)):
            kind, text = draw(SETS)
            section.append(dns.rrset.from_text(owner + ".", draw(st.integers(0, 2**31 - 1)), "IN", kind, text))
    return response.to_wire(), response


@given(answers())
@settings(max_examples=60, deadline=None)
def test_what_dnspython_writes_is_read(written: tuple[bytes, dns.message.Message]) -> None:
    wire, theirs = written
    ours = decode(wire)
    assert (ours.id, ours.is_response, ours.code) == (theirs.id, True, theirs.rcode() & 0xF)
    assert ours.is_truncated == bool(theirs.flags & dns.flags.TC)
    assert ours.questions == (Question(str(theirs.question[0].name)[:-1], theirs.question[0].rdtype),)
    for found, expected in zip(
        (ours.answers, ours.authorities, ours.additional), (theirs.answer, theirs.authority, theirs.additional), strict=True
    ):
        assert found == tuple(record for rrset in expected for record in records(rrset))


def records(rrset: dns.rrset.RRset) -> list[Record]:
    """Say in our terms what dnspython has."""

    def name(value: dns.name.Name) -> str:
        return value.to_text(omit_final_dot=True).lower()

    found: list[Record] = []
    for data in rrset:
        kind = data.rdtype
        if kind in (RecordType.A, RecordType.AAAA):
            value: object = data.address
        elif kind == RecordType.MX:
            value = Mail(data.preference, name(data.exchange))
        elif kind == RecordType.SRV:
            value = Service(data.priority, data.weight, data.port, name(data.target))
        elif kind == RecordType.TXT:
            value = data.strings
        elif kind == RecordType.SOA:
            value = Authority(name(data.mname), name(data.rname), data.minimum)
        elif kind in (RecordType.CNAME, RecordType.NS):
            value = name(data.target)
        else:
            value = data.to_wire()
        found.append(Record(name(rrset.name), kind, rrset.ttl, value))  # type: ignore[arg-type]
    return [each if each.kind != RecordType.AAAA else each._replace(data=compressed(str(each.data))) for each in found]


def compressed(address: str) -> str:
    import ipaddress

    return str(ipaddress.ip_address(address))


@given(HOSTS, st.sampled_from(list(RecordType)), st.integers(0, 65535), st.sampled_from([0, 512, 1232]))
def test_a_query_is_byte_for_byte_dnspythons(host: str, kind: RecordType, number: int, udp_bytes: int) -> None:
    theirs = dns.message.make_query(host, dns.rdatatype.RdataType(kind), id=number, use_edns=0 if udp_bytes else -1, payload=udp_bytes)
    assert encode_query(number, Question(host, kind), udp_bytes=udp_bytes) == theirs.to_wire()


@given(NAMES)
def test_names_are_written_and_read_like_dnspythons(name: dns.name.Name) -> None:
    wire = name.to_wire()
    assert wire is not None
    text, behind = decode_name(wire, 0)
    assert behind == len(wire)
    assert encode_name(text) == wire.lower()
    assert dns.name.from_text(text + ".") == name


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode(data)


@given(answers(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_message_is_read_or_refused(written: tuple[bytes, dns.message.Message], data: st.DataObject) -> None:
    wire = bytearray(written[0])
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedMessage):
        assert isinstance(decode(bytes(wire[: data.draw(st.integers(0, len(wire)))])), Message)


HEAD = bytes(5) + b"\1" + bytes(6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (b"\xc0\x0c", "does not point back"),
        (b"\xc0\x0e\xc0\x0c", "does not point back"),
        (b"\x01a\xc0\x0c", "does not point back"),
        (b"\xc0\xff", "does not point back"),
        (b"\x3fabc", "too early"),
        (b"\xc0", "too early"),
        (b"\x80a", "unknown kind of label"),
        (b"\x40a", "unknown kind of label"),
        (b"\x3f" + b"a" * 63, "too early"),
        ((b"\x3f" + b"a" * 63) * 4 + b"\0", "more than 255 bytes"),
    ],
)
def test_names_that_would_never_end(name: bytes, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why):
        decode(HEAD + name + b"\0\1\0\1")


def test_a_ladder_of_pointers_is_bounded_too() -> None:
    ladder = b"\x01a\0" + b"".join(b"\x01a" + bytes([0xC0, 4 * step if step else 0]) for step in range(15))
    with contextlib.suppress(MalformedMessage):
        decode_name(ladder, len(ladder) - 4)


def test_a_chain_of_pointers_is_short() -> None:
    """Eight thousand fit below the highest offset; if each record's name walked them all, one message would cost many seconds."""
    chain = HEAD + b"\0" + b"".join((0xC000 | at).to_bytes(2, "big") for at in [12, *range(13, 600, 2)])
    with pytest.raises(MalformedMessage, match="too many in a row"):
        decode_name(chain, len(chain) - 2)
    assert decode_name(chain, len(HEAD) + 1 + 2 * 126) == ("", len(HEAD) + 1 + 2 * 127)


@pytest.mark.parametrize("text", ["a..b", ".a", "a" * 64, "a\\", "a\\999", ".".join(["abcdefgh"] * 40), "ü" * 80])
def test_text_that_is_no_name(text: str) -> None:
    with pytest.raises(MalformedMessage):
        encode_name(text)


def test_text_in_many_forms() -> None:
    assert normal_name("WWW.Example.ORG.") == "www.example.org"
    assert normal_name("a\\.b.c") == "a\\.b.c"
    assert normal_name("a\\032b") == "a\\032b"
    assert normal_name("bücher.example") == "xn--bcher-kva.example"
    assert normal_name(".") == ""
    assert normal_name("_http._tcp.example") == "_http._tcp.example"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (1, b"123"),
        (28, b"1" * 15),
        (15, b"\0"),
        (33, b"\0" * 6),
        (16, b""),
        (16, b"\x05ab"),
        (5, b"\x01a\0extra"),
        (6, b"\0\0short"),
        (1, None),
    ],
)
def test_records_of_a_wrong_length(kind: int, data: bytes | None) -> None:
    length = 200 if data is None else len(data)
    record = b"\0" + kind.to_bytes(2, "big") + b"\0\1" + bytes(4) + length.to_bytes(2, "big") + (data or b"")
    with pytest.raises(MalformedMessage):
        decode(bytes(6) + b"\0\1" + bytes(4) + record)
