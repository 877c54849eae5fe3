"""Rereading: whatever bodies follow one another, what comes out is what reading each of them whole gives."""

import re
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.pulse import core
from isopod.pulse.cadvisor import WANTED
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Families, Pod, Reading
from isopod.pulse.rereading import PIECES_MAX, SHARED_MAX, Rereader

DATA: Final = Path(__file__).parent / "data"
LABELS: Final = kata_labels("a" * 64, Pod("uid", "web", "shop"))
RULES: Final = core.Rules()


def shown(reading: Reading) -> tuple[object, ...]:
    families = [(name, each.kind, each.help, each.text, each.n_series, each.open_text) for name, each in reading.families.items()]
    return families, reading.values, reading.n_series, reading.dropped


def follow(bodies: list[bytes], *, rules: core.Rules = RULES) -> Rereader:
    """Read bodies one after another, as one sandbox's, and compare each with what it says alone."""
    reader = Rereader(rules, WANTED)
    before: Families = {}
    for body in bodies:
        reading = reader.read("a", body, LABELS, before)
        assert shown(reading) == shown(core.read(body, LABELS, rules, WANTED))
        reader.keep("a")
        before = reading.families
    return reader


@pytest.mark.row("T2")
@pytest.mark.parametrize("sample", ["shim_sample.prom", "shim_sample_full.prom", "shim_sample_rs.prom"])
def test_of_a_sample_only_what_is_new_is_read(sample: str) -> None:
    body = (DATA / sample).read_bytes()
    changed = re.sub(rb"(?m)^(kata_agent_scrape_count) \d+", rb"\1 77", body)
    assert changed != body
    n_families = body.count(b"# HELP ")
    reader = follow([body, changed])
    assert reader.n_kept == n_families - 1
    busy = re.sub(rb"(?m)^(kata_guest_cpu_time\{.*\}) \d+", rb"\1 77", changed)
    follow([body, changed, busy, busy, changed, body, body.replace(b"# HELP kata_agent_threads", b"# HELP kata_agent_thread"), body])


@pytest.mark.row("T2")
def test_fragments_that_were_kept_are_the_same_objects() -> None:
    reader = Rereader(RULES, {})
    first = reader.read("a", b"# HELP x A.\n# TYPE x gauge\nx 1\n# HELP y B.\n# TYPE y gauge\ny 1\n", LABELS, {})
    reader.keep("a")
    second = reader.read("a", b"# HELP x A.\n# TYPE x gauge\nx 1\n# HELP y B.\n# TYPE y gauge\ny 2\n", LABELS, first.families)
    assert second.families["x"] is first.families["x"]
    assert second.families["y"].text.endswith(b" 2\n")


FIRST: Final = b"# HELP p P.\n# TYPE p gauge\np 1\n# HELP pq Q.\n# TYPE pq gauge\npq 1\n"
TRAPS: Final = {
    "another's line went out of a piece": (FIRST.replace(b"p 1\n", b'p 1\npq{a="b"} 1\n', 1), FIRST),
    "another's line came into a piece": (FIRST, FIRST.replace(b"p 1\n", b'p 1\npq{a="b"} 1\n', 1)),
    "a line became invalid": (FIRST, FIRST.replace(b"pq 1", b"pq one")),
    "an invalid line became valid": (FIRST.replace(b"pq 1", b"pq one"), FIRST),
    "an invalid line stays, and another family changes": (
        FIRST.replace(b"pq 1", b'pq one\npq{a="b"} 1'),
        FIRST.replace(b"pq 1", b'pq one\npq{a="b"} 1').replace(b"\np 1", b"\np 2"),
    ),
    "a family changed its type": (FIRST, FIRST.replace(b"# TYPE pq gauge", b"# TYPE pq counter")),
    "a type that makes another's name its own": (
        b"# HELP x X.\n# TYPE x gauge\nx 1\n# HELP x_count C.\n# TYPE x_count gauge\nx_count 1\n",
        b'# HELP x X.\n# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n# HELP x_count C.\n# TYPE x_count gauge\nx_count 1\n',
    ),
    "two pieces of one family": (FIRST, FIRST + b"# HELP p P.\n# TYPE p gauge\np 3\n"),
    "the order changed": (FIRST, b"".join(sorted(FIRST.partition(b"# HELP pq")[::2]))),
    "a family came": (FIRST, FIRST + b"# HELP r R.\n# TYPE r gauge\nr 1\n"),
    "a family went": (FIRST + b"# HELP r R.\n# TYPE r gauge\nr 1\n", FIRST),
    "a series came": (FIRST, FIRST + b'pq{a="b"} 1\n'),
    "a series twice": (FIRST, FIRST + b"pq 7\n"),
    "cut within a number": (FIRST.replace(b"pq 1", b"pq 1234"), FIRST.replace(b"pq 1\n", b"pq 12")),
    "OpenMetrics": (FIRST, FIRST.replace(b"pq 1", b"pq 2 1.5") + b"# EOF\n"),
    "a comment": (FIRST, FIRST.replace(b"pq 1", b"# pq\npq 1")),
    "a blank line": (FIRST, FIRST.replace(b"pq 1", b"\npq 1")),
    "no help": (FIRST, FIRST.replace(b"# HELP pq Q.\n", b"")),
    "a help without words": (FIRST.replace(b"pq Q.", b"pq"), FIRST.replace(b"pq Q.", b"pq").replace(b"\np 1", b"\np 2")),
    "blanks before names": (FIRST.replace(b"\npq 1", b"\n  pq 1"), FIRST.replace(b"\npq 1", b"\n  pq 2")),
    "a renamed family": (FIRST.replace(b"pq", b"go_x"), FIRST.replace(b"pq", b"go_x").replace(b"go_x 1", b"go_x 2")),
    "a piece without a line": (FIRST + b"# HELP r R.\n# TYPE r gauge\n", FIRST.replace(b"p 1", b"p 2") + b"# HELP r R.\n# TYPE r gauge\n"),
    "wrapped, all of a family": (
        FIRST.replace(b"pq 1", b"pq 1.8446e+19"),
        FIRST.replace(b"pq 1", b"pq 1.8446e+19").replace(b"p 1", b"p 2"),
    ),
    "not UTF-8": (FIRST, FIRST.replace(b"Q.", b"\xff")),
    "carriage returns": (FIRST.replace(b"\n", b"\r\n"), FIRST.replace(b"p 1", b"p 2").replace(b"\n", b"\r\n")),
    "a chunk's header": (FIRST, FIRST.replace(b"pq 1", b"pq 1\r\n1f4\r\n23")),
    "exemplars that another family decides over": (
        b'# HELP a A.\n# TYPE a gauge\na 1\n# HELP a_total T.\n# TYPE a_total counter\na_total 1 # {t="q"} 1\n',
        b'# HELP a A.\n# TYPE a gauge\na 1\n# HELP a_total T.\n# TYPE a_total counter\na_total 2 # {t="q"} 1\n',
    ),
    "another name in a piece without lines": (
        b"# HELP a A.\n# TYPE a untyped\n# HELP a_total T.\n# TYPE a_total counter\na_total 1\n",
        b"# HELP b A.\n# TYPE b counter\n# HELP a_total T.\n# TYPE a_total counter\na_total 1\n",
    ),
    "a type of another name": (FIRST, FIRST.replace(b"# TYPE p gauge\np 1", b"# TYPE pq counter\np 1")),
    "a family without lines changes another's type": (
        b"# HELP c C.\n# TYPE c histogram\n# HELP c_created D.\n# TYPE c_created gauge\nc_created 1\n",
        b"# HELP c C.\n# TYPE c counter\n# HELP c_created D.\n# TYPE c_created gauge\nc_created 1\n",
    ),
    "parts of a histogram whose lines are all dropped": (
        b'# HELP x X.\n# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_sum 1\n# HELP x_count C.\n# TYPE x_count gauge\nx_count y\n',
        b'# HELP x X.\n# TYPE x histogram\nx_bucket{le="+Inf"} 2\nx_sum 1\n# HELP x_count C.\n# TYPE x_count gauge\nx_count y\n',
    ),
    "nothing": (FIRST, b""),
    "only a help": (b"# HELP ", b"# HELP \n"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_not_a_family_alone_is_read_whole(trap: str) -> None:
    one, other = TRAPS[trap]
    follow([one, other, one, other, other])


def test_bounds_hold_for_all_families_together() -> None:
    rules = core.Rules(series_max=4)
    more = FIRST.replace(b"\np 1", b'\np 1\np{a="1"} 1\np{a="2"} 1')
    follow([FIRST, more, FIRST], rules=rules)
    assert core.read(more + b'pq{a="3"} 1\n', LABELS, rules, {}).dropped
    follow([FIRST, more + b'pq{a="3"} 1\n', FIRST], rules=rules)


NAMES = st.sampled_from(["p", "pq", "p_count", "p_sum", "p_total", "p_created", "go_p", "kata_shim_go_p", "kata_guest_load"])
LINES = st.builds(
    lambda name, labels, value: f"{name}{labels} {value}\n",
    NAMES,
    st.sampled_from(["", "{}", '{a="1"}', '{a="2"}', '{item="load1"}', "{a=", '{le="1"}', '{le="+Inf"}']),
    st.sampled_from(["1", "2", "x", "1.8e19", "-1", "", '1 # {t="q"} 1']),
)
PIECES = st.builds(
    lambda name, kind, lines: f"# HELP {name} Help.\n# TYPE {name} {kind}\n{''.join(lines)}",
    NAMES,
    st.sampled_from(["gauge", "counter", "histogram", "summary", "untyped", "odd"]),
    st.lists(LINES, max_size=3),
)


@given(
    st.lists(st.lists(PIECES, min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 9), LINES), max_size=8)
)
@settings(max_examples=400, deadline=None)
def test_reading_again_is_reading(bodies: list[list[str]], edits: list[tuple[int, str]]) -> None:
    """Bodies that differ in a line here and there, as those of one sandbox do."""
    texts = ["".join(pieces) for pieces in bodies]
    for place, line in edits:
        lines = texts[-1].splitlines(keepends=True)
        lines[place % len(lines) : place % len(lines) + 1] = [line]
        texts.append("".join(lines))
    follow([text.encode() for text in texts])


def test_a_sandbox_that_is_forgotten_is_read_whole() -> None:
    reader = Rereader(RULES, {})
    reading = reader.read("a", FIRST, LABELS, {})
    reader.keep("a")
    reader.forget("a")
    reader.read("a", FIRST.replace(b"p 1", b"p 2"), LABELS, reading.families)
    reader.keep("a")
    reader.clear()
    reader.read("a", FIRST, LABELS, reading.families)
    assert reader.n_kept == 0


def test_a_body_that_was_not_kept_is_not_compared_with() -> None:
    reader = Rereader(RULES, {})
    kept = reader.read("a", FIRST, LABELS, {}).families
    reader.keep("a")
    reader.read("a", FIRST.replace(b"pq 1", b"pq 2"), LABELS, kept)  # and not kept
    again = reader.read("a", FIRST.replace(b"pq 1", b"pq 2").replace(b"p 1", b"p 3"), LABELS, kept)
    assert again.families["pq"].text.endswith(b" 2\n")


def test_a_body_of_very_many_pieces_is_read_whole() -> None:
    body = b"".join(b"# HELP a%d A.\n# TYPE a%d gauge\na%d 1\n" % (n, n, n) for n in range(PIECES_MAX + 1))
    reader = follow([body, body.replace(b"a7 1", b"a7 2")], rules=core.Rules(series_max=2 * PIECES_MAX))
    assert reader.n_kept == 0


def test_what_nobody_else_can_have_is_not_shared() -> None:
    reader = Rereader(core.Rules(), {"w": ("l",)})
    for round_number in range(3):
        families = b"".join(b"# HELP r%d_%d A.\n# TYPE r%d_%d gauge\nr%d_%d 1\n" % ((round_number, n) * 3) for n in range(SHARED_MAX + 1))
        wanted = b"# HELP w W.\n# TYPE w gauge\n" + b"".join(b'w{l="%d-%d"} 1\n' % (round_number, n) for n in range(SHARED_MAX + 1))
        reader.read("a", families + wanted, LABELS, {})
        reader.keep("a")
    assert reader.n_shared == 0
