"""Names of kernel objects: short enough, and never another instance's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.engine.network import names
from isopod.world.errors import InvalidArgument

PREFIXES = st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True)
HEX = st.text("0123456789abcdef", min_size=names.DIGITS, max_size=names.DIGITS)


@pytest.mark.parametrize("prefix", ["", "9a", "isopod-1", "Isopod", "isopodisopod", "iso pod", "iso*", "isö"])
def test_bad_prefixes_are_refused(prefix: str) -> None:
    with pytest.raises(InvalidArgument):
        names.check_prefix(prefix)


@given(PREFIXES, HEX)
def test_names_fit_a_link_and_are_known_again(prefix: str, digits: str) -> None:
    names.check_prefix(prefix)
    bridges = [names.default_bridge(prefix), names.bridge(prefix, "backend", [])]
    assert all(names.owns_bridge(prefix, link) and not names.owns_veth(prefix, link) for link in bridges)
    veth = names.veth(prefix, digits)
    assert names.owns_veth(prefix, veth) and not names.owns_bridge(prefix, veth)
    assert max(len(link) for link in [*bridges, veth]) <= 15


@given(PREFIXES, st.one_of(PREFIXES, st.text("0123456789abvc-", max_size=6)), HEX)
def test_two_instances_never_meet(one: str, more: str, digits: str) -> None:
    for other in (more, (one + more)[: names.PREFIX_CHARS_MAX]):
        if other == one or not other or "-" in other or not other[0].isalpha():
            continue
        for link in (names.default_bridge(one), names.bridge(one, "x", []), names.veth(one, digits)):
            assert not names.owns_bridge(other, link)
            assert not names.owns_veth(other, link)


def test_a_bridge_name_is_stable_unless_taken() -> None:
    first = names.bridge("iso", "backend", [])
    assert first == names.bridge("iso", "backend", ["iso0"]) == "iso-b" + first[5:]
    assert names.bridge("iso", "backend", [first]) not in (first, names.bridge("iso", "frontend", []))
