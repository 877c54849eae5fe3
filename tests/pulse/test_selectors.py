"""Selectors on views: T16 of the targets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse import core
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Pod, Query, Target
from isopod.pulse.selectors import Selection
from isopod.pulse.store import Store
from isopod.world.errors import InvalidArgument
from tests.pulse.families import fragment, sandbox

PODS = {name: Pod(f"uid-{name}", f"pod-{name}", f"team-{name[0]}") for name in ("a1", "a2", "b1")}


def filled() -> Store:
    store = Store(lambda: 0.0)
    for name, pod in PODS.items():
        store.add(Target(name, "go", ""))
        store.describe(name, pod)
        store.replace(name, sandbox(name, pod), containers={"container_x": fragment('container_x{pod="p",image="i"} 1\n')})
    return store


def lines(store: Store, *matches: str) -> list[str]:
    """Return the series that selectors take, without what is the same in all of a sandbox's."""
    found = []
    for group in store.view(Query(matches=matches)).groups():
        for each in group.fragments if group is not None else ():
            assert each.n_series == each.text.count(b"\n")
            for line in each.text.decode().splitlines():
                for name, pod in PODS.items():
                    labels = ",".join([f'{key}="{value}"' for key, value in kata_labels(name, pod)])
                    line = line.replace(labels, name)  # noqa: PLW2901
                found.append(line.rpartition(" ")[0])
    return found


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("kata_agent_threads", ["kata_agent_threads{a1}", "kata_agent_threads{a2}", "kata_agent_threads{b1}"]),
        ("kata_agent_threads{}", ["kata_agent_threads{a1}", "kata_agent_threads{a2}", "kata_agent_threads{b1}"]),
        ('{__name__="kata_agent_threads",sandbox_id="a1"}', ["kata_agent_threads{a1}"]),
        ('{"kata_agent_threads", sandbox_id="a1"}', ["kata_agent_threads{a1}"]),
        ('{__name__=~"kata_agent_.*",sandbox_id=~"a.",}', ["kata_agent_threads{a1}", "kata_agent_threads{a2}"]),
        ('kata_agent_threads{sandbox_id!~"a."}', ["kata_agent_threads{b1}"]),
        ('kata_guest_load{item="load1",cri_namespace="team-b"}', ['kata_guest_load{b1,item="load1"}']),
        ('{item="load1",sandbox_id!="a1",cri_namespace!="team-b"}', ['kata_guest_load{a2,item="load1"}']),
        ('kata_guest_load{item!="load1",sandbox_id="a1"}', ['kata_guest_load{a1,item="load5"}']),
        ('kata_rpc_bucket{le="2",sandbox_id="a1"}', ['kata_rpc_bucket{a1,action="a",le="2"}']),
        ('kata_rpc_count{sandbox_id="a1"}', ['kata_rpc_count{a1,action="a"}']),
        ('kata_pause_seconds{quantile="0.5",sandbox_id="a1"}', ['kata_pause_seconds{a1,quantile="0.5"}']),
        ('{quantile="",__name__=~"kata_pause.*",sandbox_id="a1"}', ["kata_pause_seconds_sum{a1}", "kata_pause_seconds_count{a1}"]),
        (r'kata_odd{path="a,b=\"c\"}\\",sandbox_id="a1"}', [r'kata_odd{a1,path="a,b=\"c\"}\\"}']),
        (r"""kata_odd{path='a,b="c"}\\',sandbox_id="a1"}""", [r'kata_odd{a1,path="a,b=\"c\"}\\"}']),
        ('kata_odd{path=~`a,b="c"}\\\\`,sandbox_id="a1"}', [r'kata_odd{a1,path="a,b=\"c\"}\\"}']),
        ('container_x{pod="p",sandbox_id="",image!=""}', ['container_x{pod="p",image="i"}'] * 3),
        ('kata_guest_load{nothing="there"}', []),
        ("nothing", []),
        ('{sandbox_id="\\x61\\u0031",__name__="kata_agent_threads"}', ["kata_agent_threads{a1}"]),
        (' kata_agent_threads { sandbox_id = "a1" , } ', ["kata_agent_threads{a1}"]),
    ],
)
def test_the_series_that_a_selector_takes(selector: str, expected: list[str]) -> None:
    assert lines(filled(), selector) == expected


def test_of_several_selectors_one_is_enough_and_no_series_comes_twice() -> None:
    taken = lines(
        filled(), 'kata_agent_threads{sandbox_id="a1"}', '{sandbox_id="a1",__name__=~"kata_a.*"}', 'kata_guest_load{item="load5"}'
    )
    assert taken == ["kata_agent_threads{a1}", *(f'kata_guest_load{{{name},item="load5"}}' for name in PODS)]


def test_the_form_for_openmetrics_is_narrowed_too() -> None:
    store = Store(lambda: 0.0)
    store.add(Target("a", "go", ""))
    text = 'x_total{sandbox_id="a",cri_uid="",cri_name="",cri_namespace="",k="1"} 1\n'
    open_text = text.replace(" 1\n", ' 1 # {k="2"} 1\n')
    both = fragment(text + text.replace('k="1"', 'k="2"'), "counter", open_text=open_text + open_text.replace('k="1"', 'k="2"', 1))
    store.replace("a", {"x_total": both})
    (group,) = [each for each in store.view(Query(matches=('{k="1"}',))).groups() if each is not None]
    assert [(each.text, each.open_text) for each in group.fragments] == [(text.encode(), open_text.encode())]


def test_fragments_that_are_wanted_whole_are_those_of_the_store() -> None:
    store = filled()
    entry = store.get("a1")
    assert entry is not None
    (group,) = [each for each in store.view(Query(sandbox="a1", matches=("kata_guest_load",))).groups() if each is not None]
    assert group.fragments[0] is entry.families["kata_guest_load"]


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("", "neither"),
        ("{", "name of a label is missing"),
        ("{}", "takes everything"),
        ('{a=""}', "takes everything"),
        ('{a=~".*"}', "takes everything"),
        ('{a!="x"}', "takes everything"),
        ("{a}", "one of ="),
        ("{a=b}", "text in quotes"),
        ('{a="b}', "text in quotes"),
        ('{a="b" c="d"}', "at character 8: a comma"),
        ('{a="b"} x', "behind its end"),
        ('x{__name__="y"}', "before the braces"),
        ('{a="\\q"}', "no escape"),
        ('{a="\\ud800"}', "not a character"),
        ('{a=~"("}', "regular expression"),
        ('{a=~"(a+"}', "missing"),
        ('a b="c"', "behind its end"),
        ('{1a="b"}', "name of a label"),
        ("x" * 5000, "longer"),
        ("{" + 'a="b",' * 70 + "}", "more than 64 matchers"),
    ],
)
def test_a_malformed_selector_is_refused_with_its_place(selector: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Selection.parse([selector])


def test_too_many_selectors_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="more than 64"):
        Selection.parse(["x"] * 65)


@given(st.text(alphabet="x{}=\"~!,\\'`ab(*", max_size=24))
def test_whatever_is_asked_is_taken_or_refused(text: str) -> None:
    try:
        Selection.parse([text])
    except InvalidArgument:
        return
    assert "x" in text or "a" in text or "b" in text or '"' in text or "'" in text or "`" in text


VALUES = st.text(alphabet='a"\\}{,= \n', max_size=6)


@given(st.lists(VALUES, min_size=1, max_size=4, unique=True))
def test_values_with_the_formats_own_signs_in_them_are_told_apart(values: list[str]) -> None:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    store = Store(lambda: 0.0)
    store.add(Target("a", "go", ""))
    begun = ",".join([f'{key}="{value}"' for key, value in kata_labels("a", None)])
    text = "".join([f'x{{{begun},k="{quoted(value)}"}} {number}\n' for number, value in enumerate(values)])
    store.replace("a", {"x": fragment(text)})
    for number, value in enumerate(values):
        view = store.view(Query(matches=(f'x{{k="{quoted(value)}"}}',)))
        (group,) = [each for each in view.groups() if each is not None]
        assert [each.text.decode().rpartition(" ")[2] for each in group.fragments] == [f"{number}\n"]


@pytest.mark.row("T16")
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_label_of_one_pod_alone_decides_in_either_order(order: tuple[str, str]) -> None:
    store = Store(lambda: 0.0)
    pods = {"a": Pod("u1", "p1", "ns", labels=(("app", "web"),)), "b": Pod("u2", "p2", "ns")}
    body = b'# TYPE m gauge\nm{item="x"} 1\nm{item="y"} 2\n'
    for identifier, whose in zip(order, ("a", "b"), strict=True):
        store.add(Target(identifier, "go", "/x"))
        store.describe(identifier, pods[whose])
        store.replace(identifier, core.read(body, kata_labels(identifier, pods[whose]), core.Rules(), {}).families)
    (line,) = lines(store, '{label_app="web",item="x"}')
    assert f'sandbox_id="{order[0]}"' in line
