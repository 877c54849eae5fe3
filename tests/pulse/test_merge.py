"""Families of many sandboxes as one: order, types that disagree, and what is left out and counted."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.merge import PARTS, Block, Census, Group, Pairs, Shape, Told, block_of, count, groups, pairs_of, plan
from isopod.pulse.model import Families, Kind, Row
from tests.pulse.families import fragment

pytestmark = pytest.mark.row("T8")

KINDS: tuple[Kind, ...] = ("counter", "gauge", "histogram", "summary", "untyped")


def of(**kinds: Kind) -> Families:
    return {name: fragment(f"{name} 1\n", kind) for name, kind in kinds.items()}


def merged(parts: list[Families], own: Families | None = None) -> tuple[list[Group], Mapping[str, int]]:
    blocks = [block_of(part) for part in parts]
    chosen = plan([count(blocks)], Told(own or {}).kinds)
    found = [group for group in groups(chosen, [block_of(own), *blocks] if own else blocks) if group is not None]
    return found, chosen.conflicts


def test_a_family_of_many_sandboxes_is_one_group_in_the_order_of_names() -> None:
    parts = [of(b="gauge", a="counter"), of(c="gauge", a="counter")]
    found, conflicts = merged(parts)
    assert [(group.name, group.kind, len(group.fragments)) for group in found] == [
        ("a", "counter", 2),
        ("b", "gauge", 1),
        ("c", "gauge", 1),
    ]
    assert found[0].fragments == [parts[0]["a"], parts[1]["a"]]
    assert not conflicts


def test_the_kind_of_most_sandboxes_wins_and_the_others_are_counted() -> None:
    """T8 of the targets."""
    found, conflicts = merged([of(a="counter"), of(a="gauge"), of(a="counter"), of(b="gauge")])
    assert [(group.name, group.kind, len(group.fragments)) for group in found] == [("a", "counter", 2), ("b", "gauge", 1)]
    assert conflicts == {"a": 1}


def test_of_kinds_that_are_equally_many_the_first_by_name_wins() -> None:
    found, conflicts = merged([of(a="untyped"), of(a="gauge")])
    assert [group.kind for group in found] == ["gauge"]
    assert conflicts == {"a": 1}


def test_a_known_family_keeps_its_kind_against_the_majority() -> None:
    liars = [of(kata_guest_load="histogram") for _ in range(3)]
    found, conflicts = merged([*liars, of(kata_guest_load="gauge")])
    assert [(group.kind, len(group.fragments)) for group in found] == [("gauge", 1)]
    assert conflicts == {"kata_guest_load": 3}


def test_a_known_family_that_nobody_has_of_its_kind_is_shown_as_it_is() -> None:
    assert [group.kind for group in merged([of(kata_guest_load="untyped")])[0]] == ["untyped"]


def test_the_agents_own_families_have_the_agents_kind_and_come_first() -> None:
    own = of(a="counter")
    found, conflicts = merged([of(a="gauge"), of(a="counter"), of(a="gauge")], own)
    assert found[0].fragments[0] is own["a"]
    assert (found[0].kind, len(found[0].fragments)) == ("counter", 2)
    assert conflicts == {"a": 2}


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([of(x="histogram"), of(x="histogram"), of(x_count="gauge")], ["x"]),
        ([of(x="histogram"), of(x_count="gauge"), of(x_count="gauge")], ["x_count"]),
        ([of(x="summary"), of(x_sum="counter")], ["x"]),
        ([of(x="summary"), of(x_bucket="counter")], ["x", "x_bucket"]),
        ([of(x="gauge"), of(x_count="counter")], ["x", "x_count"]),
        ([of(x="histogram"), of(x_bucket="gauge", x_count="gauge", x_sum="gauge")], ["x"]),
    ],
)
def test_families_whose_lines_would_have_the_same_names_do_not_stand_together(parts: list[Families], kept: list[str]) -> None:
    found, conflicts = merged(parts)
    assert [group.name for group in found] == kept
    lost = {name for part in parts for name in part} - set(kept)
    assert set(conflicts) == lost


def test_an_own_family_does_not_go_for_a_sandboxs() -> None:
    found, _ = merged([of(x="histogram") for _ in range(5)], of(x_count="counter"))
    assert [group.name for group in found] == ["x_count"]
    found, _ = merged([of(x_count="gauge") for _ in range(5)], of(x="histogram"))
    assert [group.name for group in found] == ["x"]


def test_the_help_is_the_first_that_says_something() -> None:
    parts = [{"a": fragment("a 1\n", help_text="")}, {"a": fragment("a 2\n", help_text="Second.")}]
    assert merged(list(parts))[0][0].help == b"Second."


NAMES = st.sampled_from(["a", "b", "a_count", "a_sum", "a_bucket", "a_count_sum", "kata_guest_load"])
SANDBOXES = st.lists(st.dictionaries(NAMES, st.sampled_from(KINDS), max_size=5).map(lambda kinds: of(**kinds)), max_size=6)


@given(SANDBOXES, st.dictionaries(NAMES, st.sampled_from(KINDS), max_size=2).map(lambda kinds: of(**kinds)))
def test_whatever_sandboxes_say_groups_are_of_one_kind_and_nothing_is_lost_uncounted(parts: list[Families], own: Families) -> None:
    found, conflicts = merged(parts, own)
    names = [group.name for group in found]
    assert names == sorted(set(names))
    assert all(each.kind == group.kind for group in found for each in group.fragments)
    taken = [name + suffix for group in found for name in [group.name] for suffix in PARTS.get(group.kind, ())]
    if not own:
        assert not set(taken) & set(names)
        n_given = sum(len(part) for part in parts)
        assert n_given == sum(len(group.fragments) for group in found) + sum(conflicts.values())


@given(st.lists(st.dictionaries(NAMES, st.sampled_from(KINDS), max_size=5).map(lambda kinds: pairs_of(of(**kinds))), max_size=8))
def test_a_census_that_all_left_is_empty(shapes: list[Pairs]) -> None:
    census = Census()
    for shape in shapes:
        census.add(shape)
    assert census.counts == count([Block(Shape(shape), (Row(()),)) for shape in shapes])
    for shape in shapes:
        census.remove(shape)
    assert census.counts == {}
