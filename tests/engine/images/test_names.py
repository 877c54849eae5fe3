"""Names of images: what is one, and what it becomes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.engine.images.names import parse_full_id, parse_id_prefix, parse_name
from isopod.world.errors import InvalidArgument

HEX = "0123456789abcdef" * 4


@pytest.mark.row("R38")
@pytest.mark.parametrize(
    "text, full",
    [
        ("busybox", "busybox:latest"),
        ("busybox:1.36", "busybox:1.36"),
        ("isopod/busybox", "isopod/busybox:latest"),
        ("a/b/c/d:v1", "a/b/c/d:v1"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("localhost:5000/x:Tag_1.2-3", "localhost:5000/x:Tag_1.2-3"),
        ("Registry.Example.COM/x", "Registry.Example.COM/x:latest"),
        ("a--b__c.d_e", "a--b__c.d_e:latest"),
        ("host:5000", "host:5000"),
        ("a" * 255, "a" * 255 + ":latest"),
        ("x:" + "t" * 128, "x:" + "t" * 128),
        ("abc", "abc:latest"),
    ],
)
def test_names(text: str, full: str) -> None:
    assert parse_name(text) == full
    assert parse_name(full) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "a\n",
        "a\0",
        "../x",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        "-a",
        "a-",
        "a..b",
        "a___b",
        "Busybox",
        "x/Busybox",
        ":tag",
        "a:",
        "a:-x",
        "a:b:c",
        "a:b/c",
        "é",
        "a" * 256,
        "x:" + "t" * 129,
        "busybox@sha256:" + HEX,
        HEX,
        "sha256:" + HEX,
        "sha256:abc",
        "a" * 100_000,
        "a-" * 5_000,
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_name(text)


def test_the_refusal_says_what_is_wrong() -> None:
    with pytest.raises(InvalidArgument, match="capital letters"):
        parse_name("Busybox")
    with pytest.raises(InvalidArgument, match="by digest"):
        parse_name("busybox@sha256:" + HEX)
    with pytest.raises(InvalidArgument, match="an id, not a name"):
        parse_name(HEX)


@given(st.text(alphabet="aB1._-/:@ \n\0", max_size=12))
def test_a_name_is_safe_whatever_is_written(text: str) -> None:
    try:
        name, _, tag = parse_name(text).rpartition(":")
    except InvalidArgument:
        return
    assert all(part not in ("", ".", "..") for part in name.split("/"))
    assert tag.replace("_", "").replace(".", "").replace("-", "").isalnum() or set(tag) <= set("_.-")
    assert text in (name, f"{name}:{tag}")


def test_ids() -> None:
    assert parse_full_id(HEX) == parse_full_id("sha256:" + HEX) == "sha256:" + HEX
    assert parse_full_id(HEX[:-1]) is None
    assert parse_full_id(HEX.upper()) is None
    assert parse_id_prefix("abc") == parse_id_prefix("sha256:abc") == "sha256:abc"
    assert parse_id_prefix("xyz") is None
    assert parse_id_prefix("") is None
