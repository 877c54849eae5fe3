"""SortedKeys: always what a sorted list would say."""

from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.cluster.store.sorted_keys import BLOCK, SortedKeys

TEXT = st.text(alphabet="ab/ü", min_size=1, max_size=4)


@given(
    st.lists(TEXT, unique=True),
    st.lists(
        st.tuples(st.booleans(), TEXT, st.text(alphabet="ab/ü", max_size=3), st.text(alphabet="ab/ü", max_size=3), st.booleans()),
        max_size=40,
    ),
)
@settings(max_examples=300, deadline=None)
def test_is_a_sorted_list(first: list[str], steps: list[tuple[bool, str, str, str, bool]]) -> None:
    keys, model = SortedKeys(first), dict.fromkeys(first)
    for adds, key, prefix, after, looks in steps:
        if adds and key not in model:
            keys.add(key)
            model[key] = None
        elif not adds and key in model:
            keys.remove(key)
            del model[key]
        if looks:
            assert list(keys.starting_with(prefix, after)) == [
                key for key in sorted(model) if key.startswith(prefix) and (not after or key > after)
            ]
    assert list(keys.starting_with("")) == sorted(model)


def test_many_keys_one_by_one_in_any_order() -> None:
    names = [f"k{(number * 7919) % 5003:05d}" for number in range(5003)]
    keys = SortedKeys()
    for place, name in enumerate(names):
        keys.add(name)
        if place % 50 == 0:
            list(keys.starting_with("k9"))
    assert list(keys.starting_with("")) == sorted(names)
    for place, name in enumerate(names):
        keys.remove(name)
        if place % 50 == 0:
            assert list(keys.starting_with("k00000")) == (["k00000"] if "k00000" in names[place + 1 :] else [])
    assert list(keys.starting_with("")) == []
    assert len(names) > 2 * BLOCK
