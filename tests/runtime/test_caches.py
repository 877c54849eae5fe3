"""The LRU cache and the expiring map, each against a plain model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.caches import ExpiringMap, LruCache
from isopod.world.errors import InvalidArgument


@pytest.mark.row("S29")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.one_of(st.none(), st.integers(0, 12))), max_size=200))
def test_the_least_recently_used_goes_first(steps: list[tuple[int, int | None]]) -> None:
    cache: LruCache[int, bytes] = LruCache(20, len, entries_max=5)
    model: list[tuple[int, bytes]] = []  # least recently used first
    for key, size in steps:
        known = dict(model)
        model = [each for each in model if each[0] != key]
        if size is None:
            assert cache.get(key) == known.get(key)
            if key in known:
                model.append((key, known[key]))
            continue
        assert cache.put(key, bytes(size))
        while sum(len(value) for _, value in model) + size > 20 or len(model) >= 5:
            model.pop(0)
        model.append((key, bytes(size)))
        assert list(cache) == [each for each, _ in model]
        assert cache.statistics().n_bytes == sum(len(value) for _, value in model) <= 20


def test_what_is_over_the_budget_alone_is_not_kept() -> None:
    cache: LruCache[str, bytes] = LruCache(4, len)
    assert cache.put("a", b"1234")
    assert not cache.put("a", b"12345")
    assert (cache.get("a"), cache.remove("a"), len(cache), "a" in cache) == (None, None, 0, False)
    assert cache.put("b", b"1")
    assert cache.remove("b") == b"1"
    assert cache.statistics() == (0, 1, 0, 0, 0)
    for bytes_max, entries_max in ((-1, 1), (1, 0)):
        with pytest.raises(InvalidArgument):
            LruCache[str, bytes](bytes_max, len, entries_max=entries_max)


@pytest.mark.row("S29")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "remove", "wait"]), st.integers(0, 6), st.integers(0, 10)), max_size=300))
def test_an_expiring_map_forgets_in_time(steps: list[tuple[str, int, int]]) -> None:
    now_s = 0.0
    found: ExpiringMap[int, int] = ExpiringMap(4, lambda: now_s)
    model: dict[int, tuple[int, float]] = {}
    for number, (step, key, amount) in enumerate(steps):
        model = {each: kept for each, kept in model.items() if kept[1] > now_s}
        if step == "wait":
            now_s += amount
        elif step == "put":
            model.pop(key, None)
            if amount and len(model) == 4:
                first = min(kept[1] for kept in model.values())
                gone = [each for each, kept in model.items() if kept[1] == first]
                found.put(key, number, amount)
                left = [each for each in gone if found.get(each) is None]
                assert len(left) == 1
                del model[left[0]]
            else:
                found.put(key, number, amount)
            if amount:
                model[key] = (number, now_s + amount)
        elif step == "remove":
            found.remove(key)
            model.pop(key, None)
        else:
            kept = model.get(key)
            assert found.get(key) == (kept[0] if kept and kept[1] > now_s else None)
        assert len(found) == sum(kept[1] > now_s for kept in model.values())


def test_replacing_for_ever_stays_small() -> None:
    found: ExpiringMap[str, int] = ExpiringMap(10, lambda: 0.0)
    for number in range(10_000):
        found.put("a", number, 100)
    assert found.get("a") == 9999
    assert len(found._heap) < 100
    with pytest.raises(InvalidArgument):
        ExpiringMap(0, lambda: 0.0)
