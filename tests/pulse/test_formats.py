"""Which form and coding an answer has, by what a client accepts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.formats import OPENMETRICS, PROTOBUF, TEXT, Format, choose_coding, choose_format, negotiate

PROTO = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
OPEN = "application/openmetrics-text"

# What Prometheus 2.x and 3.x send.
PROMETHEUS_2 = f"{OPEN};version=1.0.0,{OPEN};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_2_PROTO = f"{PROTO};q=0.8,{OPEN};version=1.0.0;q=0.7,{OPEN};version=0.0.1;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = (
    f"{OPEN};version=1.0.0;escaping=allow-utf-8;q=0.6,{OPEN};version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3_TEXT = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3"
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        (CHROME, TEXT),
        ("text/plain", TEXT),
        ("text/*", TEXT),
        ("application/json", TEXT),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_2_PROTO, PROTOBUF),
        (PROMETHEUS_3_TEXT, TEXT),
        (OPEN, OPENMETRICS),
        (f"{OPEN}; version=0.0.1", TEXT),
        (f"{OPEN};version=2.0.0, text/plain;q=0.1", TEXT),
        ("application/*", OPENMETRICS),
        (f"text/plain;q=0.3, {OPEN};q=0.4", OPENMETRICS),
        (f"text/plain;q=0.4, {OPEN};q=0.3", TEXT),
        (f"text/plain, {OPEN}", TEXT),
        (f"*/*, {OPEN}", OPENMETRICS),
        (f"{OPEN};q=0, text/plain;q=0.001", TEXT),
        (f"{OPEN};q=0", TEXT),
        (f"{OPEN};q=1.5, text/plain;q=0.1", TEXT),
        ("APPLICATION/OPENMETRICS-TEXT;VERSION=1.0.0", OPENMETRICS),
        (f'{OPEN};version="1.0.0"', OPENMETRICS),
        ('text/x;a="b,c;d", application/openmetrics-text', OPENMETRICS),
        (PROTO.replace(";", " ; "), PROTOBUF),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text", TEXT),
        ("application/vnd.google.protobuf", TEXT),
        (";;,,=,q=;", TEXT),
    ],
)
def test_the_format_that_a_client_likes_best(accept: str, expected: Format) -> None:
    """T13 of the targets."""
    assert choose_format(accept) == expected


def test_a_scheme_of_escaping_that_is_known_is_named_back() -> None:
    chosen = choose_format(PROMETHEUS_3)
    assert chosen.name == "openmetrics"
    assert chosen.content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
    assert choose_format(f"{OPEN};escaping=other") == OPENMETRICS


@pytest.mark.parametrize(
    ("accept_encoding", "expected"),
    [
        ("", "identity"),
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("GZIP", "gzip"),
        ("zstd", "zstd"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("gzip;q=0.5, zstd", "zstd"),
        ("gzip;q=0.5, zstd;q=0.5", "gzip"),
        ("br", "identity"),
        ("*", "gzip"),
        ("gzip;q=0, *", "zstd"),
        ("gzip;q=0, *;q=0.5", "zstd"),
        ("identity", "identity"),
        ("identity, gzip;q=0.5", "identity"),
        ("identity;q=0.5, gzip;q=0.5", "gzip"),
        ("gzip;q=0", "identity"),
        ("identity;q=0", "identity"),
        ("gzip;q=0.0001", "identity"),
        ("gzip;q=nan", "identity"),
    ],
)
def test_the_coding_that_a_client_likes_best(accept_encoding: str, expected: str) -> None:
    assert choose_coding(accept_encoding) == expected


@given(st.text(alphabet='text/plain,;q=01.*"\\ ', max_size=200), st.text(alphabet='gzip,;q=01.*"\\ ', max_size=200))
def test_whatever_is_accepted_there_is_an_answer(accept: str, accept_encoding: str) -> None:
    chosen, coding = negotiate(accept, accept_encoding)
    assert chosen.content_type.startswith(("text/", "application/"))
    assert coding in {"identity", "gzip", "zstd"}


def test_a_field_without_end_is_read_up_to_a_bound() -> None:
    assert choose_format("text/x," * 1_000_000 + OPEN) == TEXT
