"""What a scrape shows: an unchanging choice of families, and its entity tag."""

from isopod.pulse.model import Query, Target
from isopod.pulse.store import Store
from isopod.pulse.view import KEPT_S, Demand
from tests.pulse.families import fragment


def test_a_coding_is_wanted_for_a_while_after_somebody_asked() -> None:
    now_s = 50.0
    demand = Demand(lambda: now_s)
    assert not demand.is_wanted("gzip")
    demand.note("gzip")
    now_s += KEPT_S - 1
    assert demand.is_wanted("gzip")
    assert not demand.is_wanted("zstd")
    now_s += 1
    assert not demand.is_wanted("gzip")
    demand.note("gzip")
    assert demand.is_wanted("gzip")


def test_conflicts_are_told_of_the_families_that_are_wanted() -> None:
    store = Store(lambda: 0.0)
    for name, kind in (("a", "gauge"), ("b", "counter"), ("c", "gauge")):
        store.add(Target(name, "go", ""))
        store.replace(name, {"x": fragment("x 1\n", kind), "y": fragment("y 1\n", kind)})  # type: ignore[arg-type]
    assert store.view(Query()).conflicts == {"x": 1, "y": 1}
    assert store.view(Query(prefixes=("y",))).conflicts == {"y": 1}


def test_sandboxes_of_different_shapes_stand_together_in_a_family() -> None:
    store = Store(lambda: 0.0)
    for number, name in enumerate("abcdef"):
        store.add(Target(name, "go", ""))
        families = {"x": fragment(f'x{{id="{name}"}} 1\n')}
        if number % 2:
            families["y"] = fragment(f'y{{id="{name}"}} 1\n')
        store.replace(name, families)
    view = store.view(Query())
    found = {group.name: sorted([each.text[6:7] for each in group.fragments]) for group in view.groups() if group is not None}
    assert found == {"x": [b"a", b"b", b"c", b"d", b"e", b"f"], "y": [b"b", b"d", b"f"]}
    assert len(view.blocks) == 2
    assert view.n_sandboxes == 6
