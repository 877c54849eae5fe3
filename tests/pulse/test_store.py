"""What is kept of each sandbox: rounds taken in whole, failures, labels that are exchanged, and nothing of those that went."""

import gc
import sys
import tracemalloc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse import core
from isopod.pulse.labels import block, kata_labels
from isopod.pulse.merge import Shape
from isopod.pulse.model import Families, Fragment, Pod, Query, Target
from isopod.pulse.store import Entry, Store
from isopod.pulse.view import View
from isopod.world.errors import InvalidArgument, NotFound
from tests.pulse.families import fragment, labelled, sandbox

POD = Pod("uid-1", "web-0", "shop")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def store_of(*identifiers: str, keep_rounds: int = 2) -> tuple[Store, Clock]:
    clock = Clock()
    store = Store(clock, keep_rounds=keep_rounds)
    for identifier in identifiers:
        store.add(Target(identifier, "go", f"/run/{identifier}"))
    return store, clock


def shown(view: View) -> str:
    return b"".join([each.text for group in view.groups() if group is not None for each in group.fragments]).decode()


def entry_of(store: Store, identifier: str) -> Entry:
    entry = store.get(identifier)
    assert entry is not None
    return entry


@pytest.mark.row("K16")
def test_a_sandbox_that_is_known_is_never_overwritten() -> None:
    store, _ = store_of("a")
    store.describe("a", POD)
    store.replace("a", sandbox("a", POD))
    before = shown(store.view(Query()))
    again = store.add(Target("a", "rust", "/elsewhere"))
    assert again is store.get("a")
    assert (again.pod, again.runtime, again.socket, again.up) == (POD, "go", "/run/a", True)
    assert shown(store.view(Query())) == before


def test_entries_come_in_the_order_of_their_ids_whatever_order_they_came_in() -> None:
    store, _ = store_of("c", "a", "d", "b")
    store.remove("d")
    assert [entry.id for entry in store.entries()] == ["a", "b", "c"]
    for name in ("c", "b", "a"):
        store.replace(name, {"x": labelled(name, None, "x", {"": 1})})
    assert [line[14] for line in shown(store.view(Query())).splitlines()] == ["a", "b", "c"]


@pytest.mark.row("K5")
def test_a_view_of_one_sandbox_namespace_or_pod_holds_that_alone() -> None:
    store, _ = store_of("a", "b", "c", "d")
    for name, pod in (("a", POD), ("b", Pod("2", "web-1", "shop")), ("c", Pod("3", "web-0", "test"))):
        store.describe(name, pod)
    for name in "abcd":
        store.replace(name, {"x": labelled(name, entry_of(store, name).pod, "x", {"": 1})})

    def ids(**fields: str) -> str:
        return "".join([line[14] for line in shown(store.view(Query(**fields))).splitlines()])  # type: ignore[arg-type]

    assert ids() == "abcd"
    assert ids(sandbox="b") == "b"
    assert ids(sandbox="d") == "d"
    assert ids(namespace="shop") == "ab"
    assert ids(pod="web-0") == "ac"
    assert ids(namespace="shop", pod="web-0") == "a"
    assert ids(namespace="none") == ""
    assert ids(sandbox="c", namespace="shop") == ""
    with pytest.raises(NotFound, match="no such sandbox: nobody"):
        store.view(Query(sandbox="nobody"))


def test_families_are_chosen_by_prefix_and_the_agents_own_too() -> None:
    store, _ = store_of("a")
    store.replace("a", sandbox("a"))
    own = {"kata_monitor_scrape_count": fragment("kata_monitor_scrape_count 1\n", "counter")}
    names = list(store.view(Query(prefixes=("kata_guest", "kata_monitor_", "kata_guest_load")), own).chosen.kinds)
    assert names == ["kata_guest_load", "kata_monitor_scrape_count"]


def test_a_malformed_selector_is_refused_before_anything_is_sent() -> None:
    store, _ = store_of("a")
    with pytest.raises(InvalidArgument, match="selector"):
        store.view(Query(matches=("{",)))


def test_which_families_a_view_shows() -> None:
    store = Store(lambda: 0.0, resource=lambda entry: {"r": fragment(f'r{{id="{entry.id}"}} 1\n')})
    store.add(Target("a", "go", ""))
    store.describe("a", Pod("u", "p", "n"))
    store.replace("a", {"kata_x": fragment("kata_x 1\n")}, containers={"container_x": fragment("container_x 1\n")})
    assert list(store.view(Query("all")).chosen.kinds) == ["container_x", "kata_x"]
    assert shown(store.view(Query("kata"))) == "kata_x 1\n"
    assert shown(store.view(Query("cadvisor"))) == "container_x 1\n"
    assert shown(store.view(Query("resource"))) == 'r{id="a"} 1\n'
    assert shown(store.view(Query("resource", sandbox="a"))) == 'r{id="a"} 1\n'


@pytest.mark.row("K18")
def test_a_view_stays_as_it_was_while_the_store_goes_on() -> None:
    store, _ = store_of("a", "b")
    for name in "ab":
        store.replace(name, sandbox(name), containers={"container_x": fragment(f'container_x{{id="{name}"}} 1\n')})
    view = store.view(Query())
    before = shown(view)
    groups = view.groups()
    begun = [next(groups), next(groups)]
    store.replace("a", {"new": fragment("new 1\n")})
    store.describe("b", POD)
    store.remove("b")
    store.add(Target("c", "go", ""))
    store.replace("c", sandbox("c"))
    assert shown(view) == before
    rest = [*begun, *groups]
    assert b"".join([each.text for group in rest if group is not None for each in group.fragments]).decode() == before


ROUNDS = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "add", "fail", "describe", "look"]), st.sampled_from("abc"), st.integers(0, 3)),
    max_size=30,
)


@pytest.mark.row("K18")
@given(ROUNDS, st.integers(0, 6))
def test_readers_see_a_whole_round_of_each_sandbox_however_their_steps_fall(steps: list[tuple[str, str, int]], pace: int) -> None:
    """Readers are open while rounds come; each family of a sandbox carries its round's number."""
    store, _ = store_of("a", "b", "c", keep_rounds=1)
    reading: list[tuple[dict[str, set[str]], object]] = []
    number = 0

    def go_on(n_groups: int) -> None:
        for found, groups in reading:
            for _ in range(n_groups):
                group = next(groups, None)  # type: ignore[call-overload]  # an iterator
                for each in group.fragments if group is not None else ():
                    for line in each.text.decode().splitlines():
                        found.setdefault(line.partition('sandbox_id="')[2][0], set()).add(line.rpartition(" ")[2])

    for word, name, family in steps:
        entry = store.get(name)
        if word == "replace":
            number += 1
            families = sandbox(name, entry.pod if entry else None, number)
            families.pop(list(families)[family])
            store.replace(name, families)
        elif word == "remove":
            store.remove(name)
        elif word == "add":
            store.add(Target(name, "go", ""))
        elif word == "fail":
            store.fail(name, "timeout", 3.0)
        elif word == "describe":
            store.describe(name, Pod(str(number), "p", "n"))
        else:
            reading.append(({}, store.view(Query()).groups()))
        go_on(pace)
    go_on(10)
    assert [found for found, _ in reading if any(len(rounds) != 1 for rounds in found.values())] == []


def test_the_labels_of_what_is_kept_are_exchanged_when_it_is_known_whose_a_sandbox_is() -> None:
    store, _ = store_of("a")
    store.replace("a", sandbox("a"))
    assert store.describe("a", POD)
    assert shown(store.view(Query())) == b"".join([each.text for each in sandbox("a", POD).values()]).decode()
    assert not store.describe("a", POD)
    other = Pod('u"1', "web\\0", "shop", labels=(("app.kubernetes.io/name", "x"),))
    assert store.describe("a", other)
    assert shown(store.view(Query())) == b"".join([each.text for each in sandbox("a", other).values()]).decode()
    assert store.describe("a", None)
    assert shown(store.view(Query())) == b"".join([each.text for each in sandbox("a").values()]).decode()
    assert not store.describe("nobody", POD)


def test_the_labels_under_cadvisors_names_are_exchanged_too() -> None:
    def labels(identifier: str, pod: Pod | None) -> tuple[tuple[str, str], ...]:
        return (("id", identifier), ("pod", pod.name if pod else ""))

    store = Store(lambda: 0.0, container_labels=labels)
    store.add(Target("a", "go", ""))
    store.replace("a", {}, containers={"container_x": fragment('container_x{id="a",pod="",cpu="total"} 1\n')})
    store.describe("a", POD)
    assert shown(store.view(Query())) == 'container_x{id="a",pod="web-0",cpu="total"} 1\n'


def test_a_line_that_has_a_pods_new_label_itself_keeps_it_under_another_name() -> None:
    store, _ = store_of("a")
    begun = block(kata_labels("a", None)).decode()
    tricky = r'other=",label_app=",exported="\",label_app=\"x"'
    text = f'x{{{begun},label_app="own",{tricky}}} 1\n'
    store.replace("a", {"x": fragment(text, open_text=text)})
    store.describe("a", Pod("1", "p", "n", labels=(("app", "web"),)))
    begun = block(kata_labels("a", Pod("1", "p", "n", labels=(("app", "web"),)))).decode()
    assert shown(store.view(Query())) == f'x{{{begun},exported_label_app="own",{tricky}}} 1\n'
    assert entry_of(store, "a").families["x"].open_text == shown(store.view(Query())).encode()


def test_figures_outlive_some_failed_rounds_and_then_go() -> None:
    store, clock = store_of("a", keep_rounds=2)
    store.replace("a", {"x": fragment("x 1\n")}, took_s=0.5)
    entry = entry_of(store, "a")
    assert (entry.up, entry.error, entry.age_s(107.0), entry.took_s) == (True, "", 7.0, 0.5)
    seen = []
    for n in range(1, 5):
        clock.now_s += 60
        store.fail("a", "timeout", 3.0)
        seen.append((entry.up, entry.error, entry.n_failures, shown(store.view(Query()))))
        assert entry.n_failures == n
    assert seen == [(False, "timeout", 1, "x 1\n"), (False, "timeout", 2, "x 1\n"), (False, "timeout", 3, ""), (False, "timeout", 4, "")]
    assert entry.age_s(clock.now_s) == 240.0
    assert store.statistics().n_expired == 1
    assert store.view(Query()).chosen.kinds == {}
    store.replace("a", {"x": fragment("x 1\n")})
    assert (entry.up, entry.error, entry.n_failures, shown(store.view(Query()))) == (True, "", 0, "x 1\n")


def test_a_sandbox_that_is_not_to_be_kept_goes_with_its_first_failure() -> None:
    store, _ = store_of("a", keep_rounds=0)
    store.replace("a", {"x": fragment("x 1\n")})
    store.fail("a", "refused", 0.0)
    assert shown(store.view(Query())) == ""


def test_what_comes_for_a_sandbox_that_is_gone_makes_no_ghost() -> None:
    store, _ = store_of("a")
    store.replace("a", sandbox("a"))
    assert store.remove("a")
    assert not store.remove("a")
    assert not store.replace("a", sandbox("a"))
    assert not store.touch("a", 0.1)
    assert not store.fail("a", "timeout", 3.0)
    assert store.get("a") is None
    assert shown(store.view(Query())) == ""
    assert store.statistics().n_late == 3
    assert store.statistics().n_families == 0


def test_the_same_again_confirms_a_round_and_changes_nothing_that_is_shown() -> None:
    store, clock = store_of("a")
    store.replace("a", sandbox("a"), dropped={"value": 2}, n_bytes=10)
    generation, tag = store.generation, store.view(Query()).tag
    clock.now_s += 60
    assert store.touch("a", 0.25)
    entry = entry_of(store, "a")
    assert (entry.age_s(clock.now_s), entry.took_s, entry.n_rounds, entry.dropped) == (0.0, 0.25, 2, {"value": 4})
    assert (store.generation, store.view(Query()).tag) == (generation, tag)
    assert store.statistics().n_unchanged == 1


def test_fragments_that_say_the_same_are_kept_with_what_was_made_of_them() -> None:
    store, _ = store_of("a")
    store.replace("a", sandbox("a"))
    before = dict(entry_of(store, "a").families)
    generation = store.generation
    store.replace("a", sandbox("a"))
    assert all(entry_of(store, "a").families[name] is each for name, each in before.items())
    assert store.generation == generation
    changed = sandbox("a")
    changed["kata_agent_threads"] = labelled("a", None, "kata_agent_threads", {"": 2})
    store.replace("a", changed)
    assert [name for name, each in entry_of(store, "a").families.items() if each is not before[name]] == ["kata_agent_threads"]
    assert store.generation > generation


def test_the_tag_of_a_view_tells_what_is_in_it_and_nothing_else() -> None:
    store, _ = store_of("a", "b")
    for name in "ab":
        store.replace(name, sandbox(name))
    tags = {name: store.view(Query(sandbox=name)).tag for name in "ab"}
    whole = store.view(Query()).tag
    store.replace("b", sandbox("b", value=2))
    assert store.view(Query(sandbox="a")).tag == tags["a"]
    assert store.view(Query(sandbox="b")).tag != tags["b"]
    assert store.view(Query()).tag != whole
    assert store.view(Query(prefixes=("x",))).tag != store.view(Query()).tag


def test_lines_left_out_are_added_up_by_reason() -> None:
    store, _ = store_of("a")
    store.replace("a", {}, dropped={"value": 2, "name": 1})
    store.replace("a", {}, dropped={"value": 3})
    assert entry_of(store, "a").dropped == {"value": 5, "name": 1}


def test_conflicts_between_sandboxes_are_counted_and_end_with_their_cause() -> None:
    """T8 of the targets."""
    store, _ = store_of("a", "b", "c")
    for name, kind in (("a", "gauge"), ("b", "gauge"), ("c", "counter")):
        store.replace(name, {"x": Fragment(kind, b"", f'x{{id="{name}"}} 1\n'.encode(), 1)})  # type: ignore[arg-type]
    assert store.statistics().conflicts == {"x": 1}
    assert shown(store.view(Query())) == 'x{id="a"} 1\nx{id="b"} 1\n'
    assert shown(store.view(Query(sandbox="c"))) == 'x{id="c"} 1\n'
    store.replace("c", {"x": Fragment("gauge", b"", b'x{id="c"} 1\n', 1)})
    assert store.statistics().conflicts == {}
    assert shown(store.view(Query())) == 'x{id="a"} 1\nx{id="b"} 1\nx{id="c"} 1\n'


def test_statistics_say_what_is_held() -> None:
    store, _ = store_of("a", "b")
    store.replace("a", sandbox("a"), containers={"container_x": fragment("container_x 1\n")})
    store.fail("b", "timeout", 3.0)
    held = store.statistics()
    assert (held.n_sandboxes, held.n_up, held.n_families, held.n_rounds, held.n_failed) == (2, 1, 8, 1, 1)
    assert held.n_series == sum(each.n_series for each in sandbox("a").values()) + 1


def coming(n: int) -> Families:
    pod = Pod(f"uid-{n}", f"pod-{n}", f"team-{n % 20}")
    return sandbox(f"{n:064d}", pod, n)


def test_sandboxes_that_come_and_go_leave_nothing_behind() -> None:
    """T3 of the targets. The real one, with a process' memory, is in the benchmark; this one finds what is kept by mistake."""
    store, _ = store_of()

    def churn(begin: int, end: int) -> None:
        for n in range(begin, end):
            identifier = f"{n:064d}"
            store.add(Target(identifier, "go", ""))
            store.describe(identifier, Pod(f"uid-{n}", f"pod-{n}", f"team-{n % 20}"))
            store.replace(identifier, coming(n), dropped={"value": 1}, raw=b"x" * 100)
            if not n % 7:
                store.fail(identifier, "timeout", 1.0)
            if not n % 50:
                shown(store.view(Query()))
            store.remove(f"{n - 100:064d}")

    churn(0, 1000)
    gc.collect()
    n_objects = len(gc.get_objects())
    tracemalloc.start()
    try:
        n_bytes = tracemalloc.get_traced_memory()[0]
        churn(1000, 3000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - n_bytes
    finally:
        tracemalloc.stop()
    assert len(store.entries()) == 100
    held = sum(sys.getsizeof(each.text) for entry in store.entries() for each in entry.families.values())
    assert len(gc.get_objects()) - n_objects < 200
    # What was there before tracing began does not count: all that is held now came since.
    assert grown < 4 * held


@pytest.mark.row("T3")
def test_lists_of_families_that_nobody_has_any_more_are_let_go_of() -> None:
    store = Store(lambda: 0.0)
    store.add(Target("a", "go", "/a"))
    made: list[weakref.ref[Shape]] = []
    for number in range(20):
        body = b"".join(b"# TYPE r%d_%d gauge\nr%d_%d 1\n" % (number, each, number, each) for each in range(5))
        store.replace("a", core.read(body, (), core.Rules(), {}).families)
        made += [weakref.ref(entry.shapes[0]) for entry in store.entries()]
    gc.collect()
    assert [shape() is not None for shape in made] == [False] * 19 + [True]
