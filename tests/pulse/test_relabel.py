"""Relabelling: each action, what is refused, and that what comes out is an exposition whatever the rules did."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import core
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Families, Pod
from isopod.pulse.relabel import Protected, Relabeler, RuleConfig
from isopod.world.errors import InvalidArgument

pytestmark = pytest.mark.row("T19")

LABELS = kata_labels("s1", Pod("u", "web", "prod"))
BODY = b"""# TYPE kata_guest_load gauge
kata_guest_load{item="load1"} 1
kata_guest_load{item="load5"} 2
# TYPE kata_rpc_ms histogram
kata_rpc_ms_bucket{action="Create",le="1"} 1
kata_rpc_ms_bucket{action="Create",le="+Inf"} 2
kata_rpc_ms_sum{action="Create"} 3
kata_rpc_ms_count{action="Create"} 2
# TYPE go_threads gauge
go_threads 7
"""


def families() -> Families:
    return core.read(BODY, LABELS, core.Rules(), {}).families


def relabelled(*rules: dict[str, Any]) -> tuple[dict[str, list[tuple[dict[str, str], float]]], int]:
    """Return the series that rules leave, by name, without the labels of the sandbox."""
    protected = [name for name, _ in LABELS]
    relabeler = Relabeler([RuleConfig(**rule) for rule in rules], Protected(protected))
    left, n_dropped = relabeler.apply(families())
    again, n_again = relabeler.apply(families())
    assert ({name: each.text for name, each in left.items()}, n_dropped) == ({name: each.text for name, each in again.items()}, n_again)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    text = "".join(f"# TYPE {name} {each.kind}\n{each.text.decode()}" for name, each in left.items())
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert {name: sample.labels.pop(name) for name in protected} == dict(LABELS)
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found, n_dropped


def test_without_rules_all_stays_as_it_is() -> None:
    before = families()
    after, n_dropped = Relabeler([], Protected()).apply(before)
    assert after is before
    assert n_dropped == 0


def test_drop_and_keep_by_name() -> None:
    found, n_dropped = relabelled({"source_labels": ("__name__",), "regex": "kata_shim_go_.*", "action": "drop"})
    assert "kata_shim_go_threads" not in found
    assert n_dropped == 1
    found, n_dropped = relabelled({"source_labels": ("__name__",), "regex": "kata_guest_.*", "action": "keep"})
    assert sorted(found) == ["kata_guest_load"]
    assert n_dropped == 5


def test_a_part_of_a_histogram_may_go() -> None:
    found, n_dropped = relabelled({"source_labels": ("__name__",), "regex": "kata_rpc_ms_bucket", "action": "drop"})
    assert "kata_rpc_ms_bucket" not in found
    assert found["kata_rpc_ms_sum"] == [({"action": "Create"}, 3)]
    assert n_dropped == 2


def test_drop_by_a_label_and_by_whose_it_is() -> None:
    found, _ = relabelled({"source_labels": ("item",), "regex": "load5", "action": "drop"})
    assert found["kata_guest_load"] == [({"item": "load1"}, 1)]
    found, _ = relabelled({"source_labels": ("cri_namespace", "cri_name"), "regex": "prod;web", "action": "drop"})
    assert found == {}
    found, _ = relabelled({"source_labels": ("cri_namespace",), "regex": "pro", "action": "drop"})
    assert len(found) > 1, "expressions are anchored"


def test_replace_with_groups_renames_and_makes_labels() -> None:
    found, _ = relabelled({"source_labels": ("item",), "regex": "load([0-9]+)", "target_label": "minutes", "replacement": "${1}m"})
    assert found["kata_guest_load"] == [({"item": "load1", "minutes": "1m"}, 1), ({"item": "load5", "minutes": "5m"}, 2)]
    found, _ = relabelled(
        {"source_labels": ("__name__",), "regex": "kata_(.*)", "target_label": "__name__", "replacement": "vm_$1"},
        {"source_labels": ("item",), "regex": "load1", "target_label": "item", "replacement": ""},
    )
    assert found["vm_guest_load"] == [({}, 1), ({"item": "load5"}, 2)]
    assert found["vm_rpc_ms_sum"] == [({"action": "Create"}, 3)]


def test_scratch_labels_go_and_named_groups_are_known() -> None:
    found, _ = relabelled(
        {"source_labels": ("item",), "regex": "(?P<word>[a-z]+).*", "target_label": "__tmp", "replacement": "$word"},
        {"source_labels": ("__tmp",), "regex": "load", "target_label": "kind", "replacement": "a$$b"},
    )
    assert found["kata_guest_load"][0] == ({"item": "load1", "kind": "a$b"}, 1)


def test_series_that_become_equal_are_one() -> None:
    found, n_dropped = relabelled({"regex": "item", "action": "labeldrop"})
    assert found["kata_guest_load"] == [({}, 1)]
    assert n_dropped == 1


def test_labelkeep_and_labelmap() -> None:
    found, _ = relabelled({"regex": "le", "action": "labelkeep"})
    assert found["kata_rpc_ms_sum"] == [({}, 3)]
    found, _ = relabelled({"regex": "it(.*)", "action": "labelmap", "replacement": "x_$1"})
    assert found["kata_guest_load"][0] == ({"item": "load1", "x_em": "load1"}, 1)


def test_case_equality_and_hashes() -> None:
    found, _ = relabelled({"source_labels": ("action",), "target_label": "action", "action": "lowercase"})
    assert found["kata_rpc_ms_sum"] == [({"action": "create"}, 3)]
    found, _ = relabelled({"source_labels": ("action",), "target_label": "action", "action": "uppercase"})
    assert found["kata_rpc_ms_sum"] == [({"action": "CREATE"}, 3)]
    found, _ = relabelled({"source_labels": ("item",), "target_label": "shard", "action": "hashmod", "modulus": 8})
    wanted = int.from_bytes(hashlib.md5(b"load1", usedforsecurity=False).digest()[8:]) % 8
    assert found["kata_guest_load"][0][0]["shard"] == str(wanted)
    found, _ = relabelled({"source_labels": ("cri_name",), "target_label": "item", "action": "keepequal"})
    assert found == {}
    found, n_dropped = relabelled({"source_labels": ("cri_name",), "target_label": "item", "action": "dropequal"})
    assert n_dropped == 0


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"regex": "("}, "rule|missing"),
        ({"regex": "(?=a)", "target_label": "a"}, "perl operator"),
        ({"regex": "a" * 5 + "{1000}{1000}", "target_label": "a"}, "repetition"),
        ({"regex": "((a{100}){100}){100}", "target_label": "a"}, "repetition|too large"),
        ({}, "wants one"),
        ({"target_label": "sandbox_id"}, "says whose"),
        ({"target_label": "cri_name", "action": "lowercase"}, "says whose"),
        ({"target_label": "a b"}, "no label's name"),
        ({"action": "hashmod", "target_label": "a"}, "above 0"),
        ({"action": "labeldrop", "source_labels": ("a",)}, "nothing else"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_its_number(rule: dict[str, Any], why: str) -> None:
    good = RuleConfig(action="labeldrop", regex="x")
    with pytest.raises(InvalidArgument, match=why) as caught:
        Relabeler([good, RuleConfig(**rule)], Protected([name for name, _ in LABELS]))
    assert "rule: '2'" in caught.value.message or "rule 2" in caught.value.message or "2" in caught.value.message


def test_whose_a_series_is_cannot_be_taken_away() -> None:
    found, _ = relabelled(
        {"regex": ".*", "action": "labeldrop"},
        {"regex": "(.*)", "action": "labelmap", "replacement": "sandbox_id"},
        {"source_labels": ("__name__",), "regex": "(.*)", "target_label": "${1}x", "replacement": "y"},
    )
    assert found["kata_shim_go_threads"][0][1] == 7  # its labels are compared in `relabelled`


words = st.sampled_from(["item", "action", "le", "__name__", "cri_name", "sandbox_id", "odd", "x_count"])
regexes = st.sampled_from(["(.*)", ".*", "load1", "(a|b)?", "kata_(.+)", "", "[^x]+", "(.)(.*)"])
rules = st.fixed_dictionaries(  # those that would be refused are left out
    {
        "action": st.sampled_from(["replace", "keep", "drop", "labelmap", "lowercase", "uppercase", "keepequal", "dropequal"]),
        "source_labels": st.lists(words, max_size=2).map(tuple),
        "regex": regexes,
        "target_label": st.sampled_from(["__name__", "item", "new", "le", "quantile", "$1"]),
        "replacement": st.sampled_from(["$1", "", "x_$2", "kata_rpc_ms_count", 'quo"te\\\n', "é", "1"]),
    }
).filter(lambda rule: rule["target_label"] != "$1" or rule["action"] in {"replace", "keep", "drop", "keepequal", "dropequal", "labelmap"})


@given(st.lists(rules, max_size=4))
def test_what_comes_out_is_valid_whatever_the_rules_are(given_rules: list[dict[str, Any]]) -> None:
    relabelled(*given_rules)


@pytest.mark.parametrize("odd", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", '\\"}', "\\\\"])
def test_values_may_hold_what_others_take_for_the_end_of_a_line(odd: str) -> None:
    body = f'# TYPE kata_x gauge\nkata_x{{a="1{odd}2"}} 1\nkata_x{{a="3"}} 2\n'.encode()
    read = core.read(body, LABELS, core.Rules(), {}).families
    left, n_dropped = Relabeler([RuleConfig(source_labels=("a",), regex="3", action="drop")], Protected()).apply(read)
    assert n_dropped == 1
    assert odd.encode() in left["kata_x"].text
    assert left["kata_x"].n_series == 1
