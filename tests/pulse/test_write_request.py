"""What a round looks like on the wire of remote write, and which series are said to have ended."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import core, write_request
from isopod.pulse.labels import block, given_labels, kata_labels
from isopod.pulse.model import Labels, Pod
from isopod.pulse.write_request import Encoder, Request, Row
from isopod.world.errors import InvalidArgument
from tests.pulse.receiver import Sample, decode
from tests.pulse.shims import DATA

AT_MS = 1_790_000_000_123
WEB, DB = Pod("u1", "web", "prod"), Pod("u2", "db", "prod")


async def requests(encoder: Encoder, *rows: Row, at_ms: int = AT_MS) -> list[Request]:
    """Encode one round."""
    made: list[Request] = []
    await encoder.encode(rows, at_ms, made.append)
    return made


async def samples(encoder: Encoder, *rows: Row, at_ms: int = AT_MS) -> list[Sample]:
    """Encode one round, and take it apart."""
    made = await requests(encoder, *rows, at_ms=at_ms)
    found = [decode(request.body) for request in made]
    assert [len(each) for each in found] == [request.n_samples for request in made]
    assert [sum(sample.is_stale for sample in each) for each in found] == [request.n_stale for request in made]
    return [sample for each in found for sample in each]


def row(identifier: str, text: str, pod: Pod | None = WEB) -> Row:
    """A sandbox's lines: `{` stands for the brace and its labels."""
    begun = block(kata_labels(identifier, pod))
    return Row(begun, [text.encode().replace(b"{,", b"{" + begun + b",").replace(b"{}", b"{" + begun + b"}")])


def shown(found: Sequence[Sample]) -> list[tuple[str, float]]:
    """Series without the sandbox's labels, and figures."""
    hidden = ("cri_uid", "cri_name", "cri_namespace", "sandbox_id")
    return [(",".join(f"{n}={v}" for n, v in each.labels if n not in hidden), each.value) for each in found]


@pytest.mark.row("T20")
async def test_a_line_becomes_a_series_with_its_labels_in_order() -> None:
    found = await samples(Encoder(), row("a", 'kata_x{,item="one",Zone="z"} 1.5\nkata_y{} -2\n'), Row(b"", [b"kata_up 1\n"]))
    assert found[0] == Sample(
        (
            ("Zone", "z"),
            ("__name__", "kata_x"),
            ("cri_name", "web"),
            ("cri_namespace", "prod"),
            ("cri_uid", "u1"),
            ("item", "one"),
            ("sandbox_id", "a"),
        ),
        1.5,
        AT_MS,
    )
    assert [(each.name, each.value) for each in found[1:]] == [("kata_y", -2.0), ("kata_up", 1.0)]
    assert found[2].labels == (("__name__", "kata_up"),)


@pytest.mark.row("T20")
async def test_labels_without_a_value_are_left_out() -> None:
    found = await samples(Encoder(), row("a", 'kata_x{,item=""} 1\n', None))
    assert found[0].labels == (("__name__", "kata_x"), ("sandbox_id", "a"))


@pytest.mark.row("T20")
async def test_given_labels_never_take_the_place_of_a_series_own() -> None:
    given_ = given_labels(("cluster=lab", "cri_name=other", "item=given", "empty="))
    found = await samples(
        Encoder(given_), row("a", 'kata_x{,item="own"} 1\nkata_x{,item=""} 2\nkata_y{} 3\n'), row("b", "kata_y{} 4\n", None)
    )
    assert [dict(each.labels).get("item") for each in found] == ["own", "given", "given", "given"]
    assert [dict(each.labels)["cri_name"] for each in found] == ["web", "web", "web", "other"]
    assert all(dict(each.labels)["cluster"] == "lab" and "empty" not in dict(each.labels) for each in found)


@pytest.mark.parametrize("word", ["cluster", "=x", "1a=x", "a-b=x", "__name__=x", "é=x"])
def test_words_that_are_no_labels_are_refused(word: str) -> None:
    with pytest.raises(InvalidArgument, match="want NAME=VALUE"):
        given_labels((word,))


def test_a_label_is_given_once() -> None:
    with pytest.raises(InvalidArgument, match="another value"):
        given_labels(("a=1", "a=2"))


@pytest.mark.row("T20")
async def test_escapes_figures_and_times_are_what_the_text_says() -> None:
    text = (
        'kata_a{,path="a\\\\b\\"c\\nd\\\\n,}{ 5"} +Inf\n'
        "kata_b{} NaN\n"
        "kata_c{} 1e-3 1700000000000\n"
        "kata_d{} 7 -5\n"
        'kata_e_bucket{,le="+Inf"} 12345678901234567890\n'
    )
    found = await samples(Encoder(), row("a", text))
    assert dict(found[0].labels)["path"] == 'a\\b"c\nd\\n,}{ 5'
    assert (found[0].value, found[2].value, found[2].at_ms) == (math.inf, 0.001, 1_700_000_000_000)
    assert math.isnan(found[1].value)
    assert not found[1].is_stale, "a figure that is no number is no end"
    assert (found[3].value, found[3].at_ms) == (7.0, -5)
    assert found[4].value == 12345678901234567890.0


async def test_what_is_no_sample_is_counted_and_harms_nothing() -> None:
    encoder = Encoder()
    text = b'ok 1\n{} 1\nno-name 1\nkata_x soon\nkata_x 1 2 3\nkata_x 1 99999999999999999999\nkata_x{a="b} 1\nkata_x\n\nok_too 2\n'
    found = await samples(encoder, Row(b"", [text]))
    assert [(each.name, each.value) for each in found] == [("ok", 1.0), ("ok_too", 2.0)]
    assert encoder.n_unreadable == 8


@pytest.mark.row("T20")
async def test_a_request_has_a_bounded_number_of_samples() -> None:
    lines = "".join([f'kata_x{{,n="{n}"}} {n}\n' for n in range(5001)])
    made = await requests(Encoder(), row("a", lines))
    assert [each.n_samples for each in made] == [2000, 2000, 1001]
    assert [sample.value for each in made for sample in decode(each.body)] == list(range(5001))


async def test_a_request_has_bounded_bytes() -> None:
    long = "x" * 60_000
    made = await requests(Encoder(), row("a", "".join([f'kata_x{{,n="{n}{long}"}} 1\n' for n in range(100)])))
    assert len(made) == 2
    assert all(len(each.body) < write_request.REQUEST_BYTES_MAX + 100_000 for each in made)


@pytest.mark.row("T20")
async def test_a_series_that_went_gets_its_marker_once() -> None:
    encoder = Encoder()
    both = ('kata_x{,n="1"} 1\nkata_x{,n="2"} 2\n', "kata_y{} 3\n")
    await samples(encoder, row("a", both[0]), row("b", both[1], DB))
    second = await samples(encoder, row("a", 'kata_x{,n="2"} 5\n'), row("b", both[1], DB), at_ms=AT_MS + 1)
    assert [name for (name, _), each in zip(shown(second), second, strict=True) if each.is_stale] == ["__name__=kata_x,n=1"]
    third = await samples(encoder, row("a", 'kata_x{,n="2"} 6\n'), at_ms=AT_MS + 2)
    assert [(each.name, each.sandbox, each.at_ms) for each in third if each.is_stale] == [("kata_y", "b", AT_MS + 2)]
    fourth = await samples(encoder, row("a", 'kata_x{,n="2"} 7\n'))
    assert [each.is_stale for each in fourth] == [False]
    assert [each.is_stale for each in await samples(encoder)] == [True]
    assert await requests(encoder) == []


@pytest.mark.row("T20")
async def test_a_series_that_stands_elsewhere_did_not_go() -> None:
    encoder = Encoder((("cluster", "lab"),))
    await samples(encoder, row("a", 'kata_x{,n="1",m="2"} 1\n'), Row(b"", [b'kata_x{sandbox_id="b"} 2\n']))
    moved = await samples(encoder, row("a", 'kata_x{,m="2",n="1"} 1\n'), row("b", "kata_x{} 2\n", None))
    assert not [each for each in moved if each.is_stale]


@pytest.mark.row("T20")
async def test_whose_a_sandbox_is_ends_the_series_of_nobodys() -> None:
    encoder = Encoder()
    await samples(encoder, row("a", "kata_x{} 1\n", None))
    found = await samples(encoder, row("a", "kata_x{} 1\n", WEB))
    assert [(dict(each.labels).get("cri_name"), each.is_stale) for each in found] == [("web", False), (None, True)]


async def test_stems_are_bounded_and_what_was_shown_is_not_forgotten() -> None:
    encoder = Encoder(stems_max=8)
    for number in range(20):
        text = "".join([f'kata_x{{,n="{each}"}} 1\n' for each in range(number, number + 30)])
        found = await samples(encoder, row("a", text), row("b", text, None), at_ms=AT_MS + number)
        assert len([each for each in found if not each.is_stale]) == 60
        gone = [dict(each.labels)["n"] for each in found if each.is_stale]
        assert gone == ([str(number - 1)] * 2 if number else [])


async def test_others_get_their_turn_meanwhile() -> None:
    text = "".join([f'kata_x{{,n="{n}"}} {n}\n' for n in range(20_000)])
    made: list[Request] = []
    encoding = asyncio.get_running_loop().create_task(Encoder().encode([row("a", text)], AT_MS, made.append))
    n_turns = 0
    while not encoding.done():
        n_turns += 1
        await asyncio.sleep(0)
    assert n_turns >= 20
    assert len(made) == 10


@pytest.mark.row("T20")
@pytest.mark.parametrize("name", ["shim_sample.prom", "shim_sample_full.prom", "shim_sample_rs.prom"])
async def test_all_that_a_shim_says_arrives(name: str) -> None:
    with open(f"{DATA}/{name}", "rb") as file:
        body = file.read()
    labels = kata_labels("a" * 64, WEB)
    families = core.read(body, labels, core.Rules(), {}).families
    texts = [fragment.text for fragment in families.values()]
    expected = {
        (tuple(sorted([("__name__", sample.name), *((n, v) for n, v in sample.labels.items() if v)])), sample.value)
        for text in texts
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    found = await samples(Encoder(), Row(block(labels), texts))
    assert len(found) == len(expected)
    assert {(each.labels, each.value) for each in found} == expected


VALUES = st.text(st.characters(codec="utf-8"), max_size=8)
NAMES = st.sampled_from(["a", "le", "Z", "item", "sandbox", "zz", "cri_p"])


@given(st.lists(st.tuples(st.dictionaries(NAMES, VALUES, max_size=4), st.floats(allow_nan=False)), max_size=6), st.booleans())
def test_any_labels_arrive_as_they_are(lines: list[tuple[dict[str, str], float]], has_pod: bool) -> None:
    own = kata_labels("id", WEB if has_pod else None)

    def written(labels: Labels) -> bytes:
        return block((*own, *labels))

    text = b"".join([b"kata_x{%b} %b\n" % (written(tuple(labels.items())), repr(value).encode()) for labels, value in lines])
    found = asyncio.run(samples(Encoder(), Row(block(own), [text])))
    wanted = [(tuple(sorted(p for p in (("__name__", "kata_x"), *own, *labels.items()) if p[1])), value) for labels, value in lines]
    assert [(each.labels, each.value) for each in found] == wanted
