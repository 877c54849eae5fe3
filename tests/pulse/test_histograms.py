"""Histograms of all sandboxes as one: real counters, exact, coherent, and bounded."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import core
from isopod.pulse.histograms import COUNT_MAX, NAME_BYTES_MAX, Histograms, MergeFacts, Room
from isopod.pulse.labels import block, kata_labels
from isopod.pulse.model import Families, Pod, Query, Reading, Target
from isopod.pulse.policy import Policy, PolicyConfig
from isopod.pulse.push import rows
from isopod.pulse.relabel import RuleConfig
from isopod.pulse.store import Store
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse import metric_family
from tests.pulse.reparsed import PROMTOOL, as_open, as_text, check_reading, promtool_complaint
from tests.pulse.shims import FakeShims
from tests.pulse.test_agent import asking
from tests.pulse.test_intake import Kept

pytestmark = pytest.mark.row("T15")

A, B, C = "a" * 64, "b" * 64, "c" * 64
RPC: Final = "kata_rpc_seconds"
LIMITS: Final = ("0.1", "0.2", "+Inf")
SAMPLES: Final = Path(__file__).parent / "data"


def histogram(
    counts: Sequence[int], total: str = "1", *, labels: str = 'action="x"', limits: Sequence[str] = LIMITS, name: str = RPC
) -> str:
    """Return the lines of a histogram: `counts` are those of each bucket by itself."""
    own = f"{labels}," if labels else ""
    text = "".join(f'{name}_bucket{{{own}le="{le}"}} {sum(counts[: n + 1])}\n' for n, le in enumerate(limits))
    return f"{text}{name}_sum{{{labels}}} {total}\n{name}_count{{{labels}}} {sum(counts)}\n"


def typed(*texts: str, name: str = RPC) -> str:
    return f"# HELP {name} Calls.\n# TYPE {name} histogram\n{''.join(texts)}"


def take(histograms: Histograms, identifier: str, body: str) -> Families:
    """Take an answer in; return what is left with the sandbox."""
    labels = kata_labels(identifier, Pod("u", identifier[:3], "prod"))
    return histograms.take(identifier, core.read(body.encode(), labels, core.Rules(), {}).families, block(labels))


def shown(histograms: Histograms, name: str = RPC) -> list[str]:
    families = histograms.families()
    check_families(families)
    return families[name].text.decode().split("\n")[:-1] if name in families else []


def check_families(families: Families) -> None:
    """Assert that both parsers take families, and that no histogram is left out of OpenMetrics as incoherent."""
    check_reading(Reading(families, {}, sum(each.n_series for each in families.values()), {}))
    again = core.read(as_text(families).encode(), (), core.Rules(renames=()), {})
    assert again.dropped == {}
    assert as_open(again.families) == as_open(families)


def test_two_sandboxes_are_one_histogram_without_their_labels() -> None:
    histograms = Histograms()
    left = take(histograms, A, typed(histogram((1, 2, 3), "0.5")) + "kata_load 1\n")
    assert list(left) == ["kata_load"]
    assert left["kata_load"].text.startswith(b'kata_load{sandbox_id="aaa')
    take(histograms, B, typed(histogram((10, 0, 0), "0.25"), histogram((0, 0, 1), "7", labels='action="y"')))
    assert shown(histograms) == [
        'kata_rpc_seconds_bucket{action="x",le="0.1"} 11',
        'kata_rpc_seconds_bucket{action="x",le="0.2"} 13',
        'kata_rpc_seconds_bucket{action="x",le="+Inf"} 16',
        'kata_rpc_seconds_sum{action="x"} 0.75',
        'kata_rpc_seconds_count{action="x"} 16',
        'kata_rpc_seconds_bucket{action="y",le="0.1"} 0',
        'kata_rpc_seconds_bucket{action="y",le="0.2"} 0',
        'kata_rpc_seconds_bucket{action="y",le="+Inf"} 1',
        'kata_rpc_seconds_sum{action="y"} 7',
        'kata_rpc_seconds_count{action="y"} 1',
    ]
    assert histograms.families()[RPC].help == b"Calls."
    assert histograms.statistics() == MergeFacts(2, {})


def test_protobuf_says_the_same() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((1, 2, 3), "0.5"), histogram((4, 0, 0), "0.25", labels="")))
    each = histograms.families()[RPC]
    (family,) = metric_family.read(core.protobuf(RPC, each.kind, each.help, [each.text]))
    counts = [(metric.histogram.sample_count, metric.histogram.sample_sum) for metric in family.metric]
    assert counts == [(4, 0.25), (6, 0.5)]
    assert [bucket.cumulative_count for bucket in family.metric[1].histogram.bucket][:2] == [1, 3]


def test_only_what_is_new_is_added_and_a_count_that_fell_began_anew() -> None:
    histograms = Histograms()
    for counts, total, expected in (
        ((1, 1, 0), "1", ["1", "2", "2", "1", "2"]),
        ((1, 1, 0), "1", ["1", "2", "2", "1", "2"]),
        ((2, 1, 1), "9", ["2", "3", "4", "9", "4"]),
        ((1, 0, 0), "0.5", ["3", "4", "5", "9.5", "5"]),
        ((1, 5, 0), "3", ["3", "9", "10", "12", "10"]),
        ((2, 4, 9), "4", ["5", "15", "25", "16", "25"]),  # one bucket fell though their sum rose
        ((2, 4, 9), "1", ["7", "21", "40", "17", "40"]),  # so did the sum
    ):
        take(histograms, A, typed(histogram(counts, total)))
        assert [line.rpartition(" ")[2] for line in shown(histograms)] == expected


def test_what_a_sandbox_counted_stays_when_it_is_gone_and_is_not_counted_twice_when_it_is_back() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((5, 0, 0))))
    take(histograms, B, typed(histogram((1, 0, 0))))
    histograms.forget(A)
    histograms.forget("nobody")
    assert shown(histograms)[-1].endswith(" 6")
    take(histograms, A, typed(histogram((7, 0, 0))))
    assert shown(histograms)[-1].endswith(" 8")
    histograms.forget(A)
    take(histograms, A, typed(histogram((1, 0, 0))))
    assert shown(histograms)[-1].endswith(" 9"), "its shim was begun anew meanwhile"


def test_a_family_that_is_missing_for_a_round_is_not_counted_twice() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((5, 0, 0))))
    take(histograms, A, "kata_load 1\n")
    take(histograms, A, typed(histogram((6, 0, 0))))
    assert shown(histograms)[-1].endswith(" 6")


def test_sums_are_added_as_decimals() -> None:
    histograms = Histograms()
    for number in range(10):
        take(histograms, f"s{number}", typed(histogram((1, 0, 0), "0.1")))
    assert shown(histograms)[3] == 'kata_rpc_seconds_sum{action="x"} 1'
    take(histograms, "s11", typed(histogram((1, 0, 0), "0." + "3" * 400)))
    assert float(shown(histograms)[3].split()[1]) == pytest.approx(4 / 3)
    take(histograms, "s12", typed(histogram((1, 0, 0), "1e-9")))
    assert shown(histograms)[3].startswith('kata_rpc_seconds_sum{action="x"} 1.33')


def test_labels_are_the_same_in_any_order_and_empty_ones_are_none() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((1, 0, 0), labels='b="2",a="1"')))
    take(histograms, B, typed(histogram((1, 0, 0), labels='a="1",c="",b="2"')))
    take(histograms, C, typed(histogram((1, 0, 0), labels="")))
    assert shown(histograms)[-1] == 'kata_rpc_seconds_count{a="1",b="2"} 2'
    assert shown(histograms)[4] == "kata_rpc_seconds_count 1"
    take(histograms, C, typed(histogram((2, 0, 0), limits=("0.10", "2e-1", "inf"), labels="")))
    assert shown(histograms)[0] == 'kata_rpc_seconds_bucket{le="0.1"} 2'
    assert histograms.statistics() == MergeFacts(2, {})


def test_other_limits_stay_with_their_sandbox() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((1, 2, 3))))
    other = histogram((4, 4), limits=("0.1", "+Inf"))
    left = take(histograms, B, typed(other, histogram((1, 0, 0), labels='action="y"')))
    assert left[RPC].text.count(b"\n") == left[RPC].n_series == 4
    assert left[RPC].text.count(b'sandbox_id="bbb') == 4
    assert b'action="y"' not in left[RPC].text
    assert histograms.statistics() == MergeFacts(2, {"bounds": 1})
    assert shown(histograms)[4].endswith('{action="x"} 6')
    check_families(left)
    assert take(histograms, B, typed(histogram((1, 0, 0)))) == {}
    assert histograms.statistics() == MergeFacts(2, {})
    take(histograms, B, typed(other))
    histograms.forget(B)
    assert histograms.statistics() == MergeFacts(2, {})


@pytest.mark.parametrize(
    "text",
    [
        histogram((1, 2), limits=("0.1", "0.2")),
        histogram((1, 2, 3)).replace(f"{RPC}_sum", "other_sum"),
        histogram((1, 2, 3)).replace(f"{RPC}_count", "other_count"),
        histogram((3, -1, 3)),
        histogram((1, 2, 3)).replace('count{action="x"} 6', 'count{action="x"} 7'),
        histogram((1, 2, 3), "-1"),
        histogram((1, 2, 3), "NaN"),
        histogram((1, 2, 3), "+Inf"),
        histogram((1, 2, 3), limits=("-1", "2", "+Inf")),
        histogram((1, 2, 3), limits=("1", "1.0", "+Inf")),
        histogram((1, 2, 3), limits=("0." + "1" * 40, "2", "+Inf")),
    ],
    ids=["no last", "no sum", "no count", "falls", "count", "negative", "not a number", "infinite", "below zero", "twice", "long"],
)
def test_one_that_cannot_be_added_stays_with_its_sandbox_as_it_came(text: str) -> None:
    histograms = Histograms()
    body = typed(text, histogram((1, 0, 0), labels='action="y"'))
    labels = kata_labels(A, None)
    before = core.read(body.encode(), labels, core.Rules(), {}).families[RPC]
    left = histograms.take(A, {RPC: before}, block(labels))[RPC]
    assert left.text == b"".join(line + b"\n" for line in before.text.split(b"\n") if b'action="x"' in line)
    assert (left.kind, left.help, left.n_series) == ("histogram", b"Calls.", left.text.count(b"\n"))
    if before.open_text is None:
        assert left.open_text is None
    else:
        assert left.open_text == b"", "it is left out of OpenMetrics, as before"
    assert histograms.statistics() == MergeFacts(1, {"form": 1})
    assert shown(histograms)[-1] == 'kata_rpc_seconds_count{action="y"} 1'


def test_exemplars_and_times_go_from_what_is_added_and_stay_in_what_is_not() -> None:
    histograms = Histograms()
    with_more = histogram((1, 0, 0)).replace('le="0.1"} 1', 'le="0.1"} 1 # {id="} 7"} 0.05 17')
    body = typed(with_more, with_more.replace('"x"', '"y # {"').replace("+Inf", "5")) + "# EOF\n"
    left = take(histograms, A, body)[RPC]
    assert left.open_text == b""
    take(histograms, B, typed(histogram((1, 0), labels='action="z"', limits=("0.1", "+Inf"))))
    left = take(histograms, A, typed(with_more.replace('"x"', '"z"')) + "# EOF\n")[RPC]
    assert left.open_text is not None
    assert b'# {id="} 7"} 0.05 17' in left.open_text
    assert left.open_text.count(b"\n") == left.n_series == 5
    assert shown(histograms)[0] == 'kata_rpc_seconds_bucket{action="x",le="0.1"} 1'


def test_what_is_called_as_the_agents_own_is_left_alone() -> None:
    histograms = Histograms()
    name = "kata_pulse_shim_request_duration_seconds"
    left = take(histograms, A, typed(histogram((1, 0, 0), name=name), name=name))
    assert list(left) == [name]
    assert histograms.families() == {}


def test_there_is_so_much_room_and_no_more() -> None:
    histograms = Histograms(Room(shown=9, sandbox=6, gone=6))

    def some(*actions: str) -> str:
        return typed(*(histogram((1, 0, 0), labels=f'action="{action}"') for action in actions))

    left = take(histograms, A, some("1", "2", "3"))
    assert left[RPC].n_series == 5, "a sandbox has room for two"
    assert histograms.statistics() == MergeFacts(2, {"room": 1})
    take(histograms, B, some("3"))
    left = take(histograms, C, some("4", "1"))
    assert b'action="4"' in left[RPC].text, "there is no room for a fourth"
    assert b'action="1"' not in left[RPC].text, "what is shown already goes on"
    for identifier in (A, B, C):
        histograms.forget(identifier)
    assert len(shown(histograms)) == 15
    take(histograms, A, some("1"))
    assert shown(histograms)[4].endswith(" 3"), "it was too long ago: it is taken for another one"
    take(histograms, C, some("1"))
    assert shown(histograms)[4].endswith(" 3"), "it is remembered"


def some(*actions: str, limits: Sequence[str] = LIMITS, n: int = 1) -> str:
    """Return the text of a histogram for each action, of which each observed so much."""
    counts = (n, *[0] * (len(limits) - 1))
    return typed(*(histogram(counts, labels=f'action="{action}"', limits=limits) for action in actions))


def counts_of(histograms: Histograms) -> dict[str, int]:
    lines = [line for line in shown(histograms) if "_count{" in line]
    return {line.split('"')[1]: int(line.rpartition(" ")[2]) for line in lines}


# --- other policies -------------------------------------------------------------------------------------------------------


def test_under_another_policy_what_nobody_tells_is_not_shown_and_goes_on_when_it_is_told_again() -> None:
    histograms = Histograms()
    take(histograms, A, some("x", "y", "z"))
    take(histograms, B, some("x", "y"))
    take(histograms, C, some("w"))
    histograms.forget(C)
    histograms.begin_anew()
    assert counts_of(histograms) == {"x": 2, "y": 2, "z": 1}, "A and B are yet to be read; nobody else tells of w"
    n_changes = histograms.n_changes
    take(histograms, A, some("x"))
    assert counts_of(histograms) == {"x": 2, "y": 2}
    assert histograms.n_changes > n_changes
    take(histograms, B, "kata_load 1\n")
    assert counts_of(histograms) == {"x": 2}
    assert histograms.statistics() == MergeFacts(1, {})
    take(histograms, A, some("x", "y", n=2))
    assert counts_of(histograms) == {"x": 3, "y": 3}, "it goes on where it was"
    take(histograms, C, some("w"))
    assert counts_of(histograms) == {"w": 1, "x": 3, "y": 3}, "it was not counted twice"


def test_what_only_unread_sandboxes_told_goes_with_them() -> None:
    histograms = Histograms()
    take(histograms, A, some("x"))
    histograms.begin_anew()
    histograms.begin_anew()
    assert counts_of(histograms) == {"x": 1}
    histograms.forget(A)
    assert histograms.families() == {}
    assert histograms.block()[1] == {}
    histograms.begin_anew()
    take(histograms, A, some("x", n=3))
    take(histograms, A, some("x", n=3))
    assert counts_of(histograms) == {"x": 3}


def test_a_policy_that_drops_limits_begins_histograms_anew() -> None:
    histograms = Histograms()
    for identifier in (A, B):
        take(histograms, identifier, some("x", n=5))
    histograms.begin_anew()
    fewer = ("0.1", "+Inf")
    assert list(take(histograms, A, some("x", limits=fewer))) == [RPC], "B may tell the old ones yet"
    take(histograms, B, some("x", limits=fewer))
    for identifier in (A, B):
        assert take(histograms, identifier, some("x", limits=fewer, n=2)) == {}
    assert counts_of(histograms) == {"x": 4}
    histograms.begin_anew()
    histograms.forget(B)
    assert take(histograms, A, some("x", n=7)) == {}, "nobody else has a part in it"
    assert counts_of(histograms) == {"x": 7}


def test_other_policies_fill_no_room() -> None:
    histograms = Histograms(Room(shown=12, sandbox=6, gone=6))
    for number in range(20):
        histograms.begin_anew()
        for identifier in (A, B):
            take(histograms, identifier, some(f"x{number}", "y", n=number + 1))
        for identifier in (A, B):
            assert take(histograms, identifier, some(f"x{number}", "y", n=number + 1)) == {}, number
        assert counts_of(histograms) == {f"x{number}": 2 * (number + 1), "y": 2 * (number + 1)}


def test_a_policy_that_drops_a_histogram_holds_from_the_next_round_on(sim_world: SimWorld) -> None:
    made = kept(sim_world, A)
    body = some("x", "y").encode()
    made.intake.accept(Target(A, "go", ""), body, 0.01)
    before, tag = text_of(made.store), made.store.view(Query()).tag
    drop = RuleConfig(action="drop", source_labels=("__name__",), regex=f"{RPC}.*")
    made.intake.adopt(Policy(PolicyConfig(metric_relabel_configs=(drop,))))
    assert text_of(made.store) == before, "until the sandbox is asked"
    made.intake.accept(Target(A, "go", ""), body, 0.01)
    assert RPC not in text_of(made.store)
    assert made.store.view(Query()).tag != tag
    made.intake.adopt(Policy(PolicyConfig(metric_relabel_configs=(RuleConfig(action="drop", source_labels=("action",), regex="y"),))))
    made.intake.accept(Target(A, "go", ""), body, 0.01)
    assert f'{RPC}_count{{action="x"}} 1\n' in text_of(made.store)
    assert 'action="y"' not in text_of(made.store)
    made.intake.adopt(Policy())
    made.intake.accept(Target(A, "go", ""), body, 0.01)
    assert text_of(made.store) == before


# --- room ---------------------------------------------------------------------------------------------------------------


def test_limits_of_a_sandbox_that_is_gone_stand_in_nobodys_way() -> None:
    histograms = Histograms()
    take(histograms, A, some("x", limits=("5", "+Inf"), n=9))
    assert list(take(histograms, B, some("x"))) == [RPC]
    histograms.forget(A)
    for identifier in (B, C):
        assert take(histograms, identifier, some("x")) == {}
    assert histograms.statistics() == MergeFacts(1, {})
    assert counts_of(histograms) == {"x": 2}
    assert list(take(histograms, A, some("x", limits=("5", "+Inf"), n=9))) == [RPC], "now its limits are the others"
    assert take(histograms, A, some("x", n=9)) == {}
    assert counts_of(histograms) == {"x": 11}, "what it had counted before went with its limits"


def test_sandboxes_that_went_leave_room_for_others() -> None:
    histograms = Histograms(Room(shown=12, sandbox=9, gone=100))
    for number in range(20):
        assert take(histograms, f"hostile{number}", some("x", *(f"{number}-{each}" for each in range(2)))) == {}
        if number == 3:
            take(histograms, A, some("x"))
        histograms.forget(f"hostile{number}")
    assert counts_of(histograms)["x"] == 21, "in this one there was always one who had a part"
    assert take(histograms, B, some("1", "2")) == {}
    assert list(counts_of(histograms)) == ["1", "2", "x"]
    left = take(histograms, C, some("3", "4"))
    assert left[RPC].n_series == 5, "there is room for one"
    histograms.forget(B)
    take(histograms, "hostile19", some("x", "19-0"))
    assert counts_of(histograms) == {"19-0": 1, "3": 1, "x": 21}, "it was let go of and begins anew"


Move = tuple[str, str, tuple[str, ...], Sequence[str], int]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "take", "forget", "anew"]),
            st.sampled_from("abcd"),
            st.sets(st.sampled_from("uvwxyz"), max_size=4).map(lambda found: tuple(sorted(found))),
            st.sampled_from([("1", "+Inf"), LIMITS]),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_room_is_kept_and_given_back_whatever_comes_and_goes(moves: list[Move]) -> None:
    histograms = Histograms(Room(shown=9, sandbox=8, gone=7))
    for what, name, actions, limits, n in moves:
        if what == "anew":
            histograms.begin_anew()
        elif what == "forget":
            histograms.forget(name)
        else:
            left = take(histograms, name, some(*actions, limits=limits, n=n) if actions else "kata_load 1\n")
            apart = b"".join(fragment.text for fragment in left.values())
            found = counts_of(histograms)
            assert all(found[each] >= n for each in actions if f'action="{each}"'.encode() not in apart)
        lines = shown(histograms)
        assert sum("_bucket{" in line for line in lines) <= 9
        assert histograms.statistics().n_merged == len(counts_of(histograms))
        assert list(histograms.block()[1]) == list(histograms.families())
    for name in "abcd":
        histograms.forget(name)
    assert take(histograms, "new", some("u", "new", limits=("7", "+Inf"))) == {}
    assert counts_of(histograms)["new"] == 1


def test_counts_that_no_reader_counts_exactly_are_not_reached() -> None:
    histograms = Histograms()
    for _ in range(3):
        for counts in ((COUNT_MAX // 3, 0, 0), (0, 0, 0)):
            take(histograms, A, typed(histogram(counts)))
    left = take(histograms, A, typed(histogram((COUNT_MAX // 3, 0, 0))))
    assert left[RPC].n_series == 5
    assert histograms.statistics().apart == {"room": 1}
    assert int(shown(histograms)[-1].rpartition(" ")[2]) == COUNT_MAX // 3 * 3


def test_long_names_have_no_room_and_long_helps_go() -> None:
    histograms = Histograms()
    left = take(histograms, A, typed(histogram((1, 0, 0), labels=f'action="{"x" * NAME_BYTES_MAX}"')))
    assert left[RPC].n_series == 5
    assert histograms.statistics() == MergeFacts(0, {"room": 1})
    body = f"# HELP {RPC} {'x' * 5000}\n# TYPE {RPC} histogram\n{histogram((1, 0, 0))}"
    assert take(histograms, A, body) == {}
    assert histograms.families()[RPC].help == b""


Step = tuple[str, str, str, int]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["observe", "observe", "observe", "look", "look", "restart", "leave"]),
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from(["x", "y"]),
            st.integers(0, 2),
        ),
        max_size=60,
    )
)
def test_the_machines_count_is_what_was_ever_counted_and_never_falls(steps: list[Step]) -> None:
    histograms = Histograms()
    now: dict[str, dict[str, list[int]]] = {name: {"x": [0, 0, 0], "y": [0, 0, 0]} for name in "abc"}
    told: dict[str, dict[str, list[int]]] = {name: {"x": [0, 0, 0], "y": [0, 0, 0]} for name in "abc"}
    past = {"x": [0, 0, 0], "y": [0, 0, 0]}
    before: Mapping[str, float] = {}

    def look(name: str) -> None:
        counts = now[name]
        take(histograms, name, typed(*(histogram(c, f"{sum(c)}.5", labels=f'action="{action}"') for action, c in counts.items() if sum(c))))
        told[name] = {action: list(c) for action, c in counts.items()}

    for what, name, action, bucket in steps:
        if what == "observe":
            now[name][action][bucket] += 1
        elif what == "look":
            look(name)
        elif what == "leave":
            histograms.forget(name)
        else:  # it begins anew, and is looked at with one observation of each kind so that this shows
            for each, c in told[name].items():
                past[each] = [one + more for one, more in zip(past[each], c, strict=True)]
            told[name] = {"x": [0, 0, 0], "y": [0, 0, 0]}
            now[name] = {"x": [0, 0, 0], "y": [0, 0, 0]}
            histograms.take(name, _zeros(name), block(kata_labels(name, Pod("u", name, "prod"))))
        after = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in shown(histograms)}
        for series, value in before.items():
            assert after[series] >= value, series
        before = after
        for each in ("x", "y"):
            expected = sum(past[each]) + sum(sum(told[other][each]) for other in "abc")
            assert after.get(f'{RPC}_count{{action="{each}"}}', 0) == expected


def _zeros(name: str) -> Families:
    body = typed(*(histogram((0, 0, 0), "0", labels=f'action="{action}"') for action in "xy"))
    return core.read(body.encode(), kata_labels(name, Pod("u", name, "prod")), core.Rules(), {}).families


def kept(sim: SimWorld, *identifiers: str) -> Kept:
    made = Kept(sim, merge_histograms=True)
    for identifier in identifiers:
        made.store.add(Target(identifier, "go", f"/run/{identifier}"))
    return made


def text_of(store: Store, query: Query = Query()) -> str:  # noqa: B008 - immutable
    groups = [group for group in store.view(query).groups() if group is not None]
    return "".join(each.text.decode() for group in groups for each in group.fragments)


def test_an_answer_that_comes_late_changes_nothing(sim_world: SimWorld) -> None:
    made = kept(sim_world, A)
    target = Target(A, "go", "/run/a")
    made.intake.accept(target, typed(histogram((1, 0, 0))).encode(), 0.01)
    before = text_of(made.store)
    made.intake.forget(A)
    made.store.remove(A)
    made.intake.accept(target, typed(histogram((9, 0, 0))).encode(), 0.01)
    made.intake.reject(target, "timeout", "too slow", 3.0)
    assert text_of(made.store) == before
    assert f'{RPC}_count{{action="x"}} 1' in before


def test_what_views_show_and_what_their_tags_stand_for(sim_world: SimWorld) -> None:
    made = kept(sim_world, A, B)
    for identifier in (A, B):
        made.intake.accept(Target(identifier, "go", ""), (typed(histogram((1, 0, 0))) + "kata_load 1\n").encode(), 0.01)
    assert text_of(made.store).count(RPC) == 5
    assert text_of(made.store, Query(view="kata", prefixes=("kata_rpc",))).count(RPC) == 5
    assert text_of(made.store, Query(matches=('{__name__=~"kata_rpc.*_count"}',))) == f'{RPC}_count{{action="x"}} 2\n'
    for query in (Query(sandbox=A), Query(namespace="prod"), Query(pod="web"), Query(view="cadvisor"), Query(view="resource")):
        assert RPC not in text_of(made.store, query)
    tag = made.store.view(Query()).tag
    assert made.store.view(Query()).tag == tag
    part = made.store.view(Query(sandbox=A)).tag
    made.intake.accept(Target(A, "go", ""), (typed(histogram((2, 0, 0))) + "kata_load 1\n").encode(), 0.01)
    assert made.store.view(Query()).tag != tag, "only a histogram changed"
    assert made.store.view(Query(sandbox=B)).tag != part


def test_one_sandbox_cannot_take_a_name_from_the_others(sim_world: SimWorld) -> None:
    made = kept(sim_world, A, B, C)
    for identifier in (A, B):
        made.intake.accept(Target(identifier, "go", ""), b"# TYPE kata_load gauge\nkata_load 1\n", 0.01)
    made.intake.accept(Target(C, "go", ""), typed(histogram((1, 0, 0), name="kata_load"), name="kata_load").encode(), 0.01)
    view = made.store.view(Query())
    assert view.chosen.kinds["kata_load"] == "gauge"
    assert view.conflicts == {"kata_load": 1}


def test_rules_come_before(sim_world: SimWorld) -> None:
    made = kept(sim_world, A, B)
    rule = RuleConfig(action="drop", source_labels=("action",), regex="y")
    rename = RuleConfig(action="replace", source_labels=("action",), regex="x", target_label="call", replacement="z")
    made.intake.adopt(Policy(PolicyConfig(metric_relabel_configs=(rule, rename, RuleConfig(action="labeldrop", regex="action")))))
    for identifier in (A, B):
        body = typed(histogram((1, 0, 0)), histogram((1, 0, 0), labels='action="y"'))
        made.intake.accept(Target(identifier, "go", ""), body.encode(), 0.01)
    assert f'{RPC}_count{{call="z"}} 2' in text_of(made.store)
    assert "action" not in text_of(made.store)


def test_what_is_pushed_is_what_is_shown(sim_world: SimWorld) -> None:
    made = kept(sim_world, A)
    made.intake.accept(Target(A, "go", ""), (typed(histogram((1, 0, 0))) + "kata_load 1\n").encode(), 0.01)
    assert b"".join(text for row in rows(made.store, "all", {}) for text in row.texts).count(RPC.encode()) == 5
    assert b"".join(text for row in rows(made.store, "cadvisor", {}) for text in row.texts).count(RPC.encode()) == 0


async def test_a_scrape_shows_each_histogram_once_also_in_seconds(world: World, folder: str) -> None:
    body = (SAMPLES / "shim_sample.prom").read_bytes()
    told = {"merge_histograms": True, "base_units": True}
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, **told) as asked:
        await shims.add(A, body=body)
        await shims.add(B, body=body)
        await asked.until(lambda: asked.up(A, B))
        _, text = await asked.get("/metrics")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        old = {family.name: family for family in text_string_to_metric_families(body.decode())}
        for which in ("rpc", "agent_rpc"):
            new = families[f"kata_shim_{which}_durations_seconds"]
            before = old[f"kata_shim_{which}_durations_histogram_milliseconds"]
            assert new.type == "histogram"
            assert len(new.samples) == len(before.samples)
            assert not any("sandbox_id" in sample.labels for sample in new.samples)
            for sample, one in zip(new.samples, before.samples, strict=True):
                assert sample.labels["action"] == one.labels["action"]
                assert sample.value == pytest.approx(2 * one.value * (0.001 if one.name.endswith("_sum") else 1))
        assert families["kata_pulse_merged_histograms"].samples[0].value == 5
        _, single = await asked.get(f"/metrics?sandbox={A}")
        assert "kata_shim_threads" in single
        assert "durations" not in single
        _, rpc = await asked.get("/metrics?filter_family=kata_shim_rpc")
        assert 'kata_shim_rpc_durations_seconds_bucket{action="' in rpc
        assert "kata_pulse" not in rpc
        await shims.remove(B)
        await asked.until(lambda: asked.up(A))
        _, still = await asked.get("/metrics?filter_family=kata_shim_rpc")
        assert still == rpc
        assert not promtool_complaint(text) if os.path.exists(PROMTOOL) else True


def test_what_was_packed_is_kept_while_nothing_changes() -> None:
    histograms = Histograms()
    take(histograms, A, typed(histogram((1, 2, 3))))
    (row,) = histograms.block()[0].rows
    assert histograms.block()[0].rows[0] is row
    take(histograms, A, typed(histogram((1, 2, 4))))
    assert histograms.block()[0].rows[0] is not row
