"""The reader of shims' texts and its encodings, against what others make of the same bytes: Prometheus' Python client, zlib, zstandard.

Keeps K13 and, of the agent's targets, T10 (figures that wrapped); what is damaged has its own file (T7).
"""

import io
import zlib
from pathlib import Path
from typing import Final, NamedTuple, cast

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse import core
from isopod.pulse.core import Rules, read
from isopod.pulse.labels import block, escaped, kata_labels
from isopod.pulse.model import Kind, Labels, Pod
from tests.pulse import metric_family
from tests.pulse.reparsed import as_open, as_text, check_reading, series_of

SAMPLES: Final = sorted((Path(__file__).parent / "data").glob("*.prom"))
POD: Final = Pod("6f1c1b1e-uid", 'na"me', "space", labels=(("app", "a,b}"),))
LABELS: Final = kata_labels("0123456789ab", POD)
VALUES: Final = st.text(st.characters(codec="utf-8"), max_size=30)
LAST_BLOCK: Final = b"\x03\x00"


def lines_of(body: bytes, labels: Labels = (), rules: Rules | None = None) -> list[str]:
    reading = read(body, labels, rules or Rules(), {})
    return b"".join([each.text for each in reading.families.values()]).decode().splitlines()


def test_there_are_three_samples() -> None:
    assert len(SAMPLES) == 3


@pytest.mark.row("K13")
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_real_body_comes_out_as_it_came_in_but_for_labels_and_names(path: Path) -> None:
    text = path.read_text()
    reading = read(text.encode(), LABELS, Rules(), {})
    found, _ = check_reading(reading)
    added = {name: value for name, value in LABELS if value}
    expected = {}
    for (name, labels), figure in series_of(text).items():
        if figure < 1.8e19 or name.endswith("_max_bytes"):
            renamed = f"kata_shim_{name}" if name.startswith(("go_", "process_")) else name
            expected[renamed, tuple(sorted({**dict(labels), **added}.items()))] = figure
    assert str(found) == str({key: expected[key] for key in found})
    assert len(found) == len(expected)
    assert not reading.dropped


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_labels_given_are_one_block_at_the_beginning_of_each_line(path: Path) -> None:
    reading = read(path.read_bytes(), LABELS, Rules(), {})
    for name, each in reading.families.items():
        for line in each.text.splitlines():
            assert line.startswith(name.encode())
            assert line.partition(b"{")[2].startswith(block(LABELS))
            assert line.count(block(LABELS)) == 1


@pytest.mark.row("K13")
@given(st.dictionaries(st.sampled_from(["a", "b", "sandbox_id", "le", "cri_name"]), VALUES, max_size=4), VALUES, VALUES)
def test_any_text_in_a_label_comes_through(own: dict[str, str], identifier: str, name: str) -> None:
    labels = kata_labels(identifier, Pod("", name, ""))
    block_of_own = block(tuple(own.items()))
    reading = read(b"# HELP x A\n# TYPE x gauge\nx{%b} 7\n" % block_of_own, labels, Rules(), {"x": tuple(own)})
    assert reading.values == {"x": ((tuple(own.values()), 7.0),)}
    [sample] = next(iter(text_string_to_metric_families(as_text(reading.families)))).samples
    renamed = {f"exported_{label}" if label in {"sandbox_id", "cri_name"} else label: value for label, value in own.items()}
    assert sample.labels == {**dict(labels), **renamed}
    check_reading(reading)


@pytest.mark.row("K13")
def test_quotes_commas_braces_and_escapes_of_a_line() -> None:
    body = rb'x{path="/a,b}{\"c\"\\",text="one\ntwo # {} 3"} 1' + b"\n"
    reading = read(body, (), Rules(), {"x": ("text", "path", "none")})
    assert reading.families["x"].text == body
    assert reading.values["x"] == ((("one\ntwo # {} 3", '/a,b}{"c"\\', ""), 1.0),)


def test_families_come_in_order_with_type_and_help() -> None:
    body = b'# TYPE b counter\n# HELP b  Of \\\\ b\\n \\x \n# HELP a\nb 1\na 2\nb{c="1"} 3\n'
    families = read(body, (), Rules(), {}).families
    assert [(name, each.kind, each.help, each.n_series) for name, each in families.items()] == [
        ("a", "untyped", b"", 1),
        ("b", "counter", b"Of \\\\ b\\n \\\\x ", 2),
    ]


def test_names_are_changed_by_their_beginnings() -> None:
    body = b"# TYPE go_c counter\ngo_c 1\nprocess_x 2\nkata_shim_go_c 3\nxgo_c 4\n"
    assert lines_of(body) == ["kata_shim_go_c 1", "kata_shim_process_x 2", "xgo_c 4"]
    assert read(body, (), Rules(), {}).dropped == {"duplicate": 1}
    assert lines_of(body, rules=Rules(renames=((b"", b"p_"), (b"go_", b"never_")))) == [
        "p_go_c 1",
        "p_kata_shim_go_c 3",
        "p_process_x 2",
        "p_xgo_c 4",
    ]


def test_labels_that_are_ours_become_exported() -> None:
    labels = (("sandbox_id", "s"), ("cri_name", ""))
    body = b'x{sandbox_id="1",cri_name="2",a="3"} 1\nx{exported_sandbox_id="1",sandbox_id="2"} 2\n'
    assert lines_of(body, labels) == [
        'x{sandbox_id="s",cri_name="",exported_sandbox_id="1",exported_cri_name="2",a="3"} 1',
        'x{sandbox_id="s",cri_name="",exported_sandbox_id="1",exported_exported_sandbox_id="2"} 2',
    ]


@pytest.mark.parametrize("figure", ["1.8446744073709552e+19", "18446744073709551615", "1.8e19", "1.8e300"])
def test_a_figure_that_wrapped_is_left_out_and_counted(figure: str) -> None:
    """T10."""
    reading = read(f"x {figure}\ny 1\n".encode(), (), Rules(), {"x": ()})
    assert list(reading.families) == ["y"]
    assert reading.values == {}
    assert reading.dropped == {"wrapped": 1}
    assert not read(f"x {figure}\n".encode(), (), Rules(wrapped_min=float("inf")), {}).dropped


@pytest.mark.row("T10")
@pytest.mark.parametrize("name", ["process_virtual_memory_max_bytes", "process_max_fds"])
def test_a_limit_that_there_is_not_is_no_wrapped_figure(name: str) -> None:
    """Go's client says of a process without one 2^64 - 1."""
    reading = read(f"{name} 1.8446744073709552e+19\n".encode(), (), Rules(), {})
    assert reading.families[f"kata_shim_{name}"].text.endswith(b" 1.8446744073709552e+19\n")
    assert not reading.dropped


def test_figures_of_wanted_families_alone_are_returned() -> None:
    body = b'x{a="1",b="2"} 3\nx{b="4"} 0x5\nx{b="5"} +Inf\ngo_y 6\nz 7\n# TYPE h histogram\nh_bucket{le="+Inf"} 1\n'
    values = read(body, LABELS, Rules(), {"x": ("b", "a"), "kata_shim_go_y": (), "h": ("le",), "gone": ("a",)}).values
    assert values.pop("h") == ()
    assert values == {"x": ((("2", "1"), 3.0), (("5", ""), float("inf"))), "kata_shim_go_y": (((), 6.0),)}


def test_openmetrics_has_its_own_text_only_where_it_differs() -> None:
    body = (
        b'# TYPE c counter\nc_total 1 # {id="a b"} 0.5 1.5\n# TYPE d gauge\nd 1 1234\nd{a="1"} 2 -1\n# TYPE e gauge\ne 1\n'
        b'# TYPE h histogram\nh_bucket{le="1"} 1 # {id="7"} +inf\nh_bucket{le="+Inf"} 1\nh_count 1\nh_sum 1 5\n'
    )
    reading = read(body, (), Rules(), {})
    opened = {name: each.open_text for name, each in reading.families.items()}
    assert opened == {
        "c_total": b'c_total 1 # {id="a b"} 0.5 1.5\n',
        "d": b'd 1 1.234\nd{a="1"} 2 -0.001\n',
        "e": None,
        "h": b'h_bucket{le="1"} 1 # {id="7"} +Inf\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
    }
    assert reading.families["c_total"].text == b"c_total 1\n"
    assert reading.families["h"].text.endswith(b"h_sum 1 5\nh_count 1\n")
    _, metrics = check_reading(reading)
    assert [metric.samples[0].exemplar.value for metric in metrics if metric.samples[0].exemplar] == [0.5, float("inf")]
    assert not read(body, (), Rules(), {}).dropped


def test_types_of_openmetrics_become_those_of_the_text_format() -> None:
    body = b"# TYPE c counter\n# HELP c A\nc_total 1 2.5\n# TYPE i info\ni_info 1\n# TYPE u unknown\nu 1\n# EOF\n"
    reading = read(body, (), Rules(), {})
    assert {name: each.kind for name, each in reading.families.items()} == {"c_total": "counter", "i_info": "gauge", "u": "untyped"}
    assert reading.families["c_total"].help == b"A"
    assert reading.families["c_total"].text == b"c_total 1 2500\n"
    assert "# TYPE c counter\nc_total 1 2.500\n" in as_open(reading.families)


def test_a_counter_that_openmetrics_cannot_have_keeps_its_series_without_exemplars() -> None:
    body = b'# TYPE c_total counter\nc_total 1 # {id="7"} 1\nc 5\n'
    reading = read(body, (), Rules(), {})
    assert reading.families["c_total"].open_text is None
    assert "# TYPE c_total unknown\nc_total 1\n" in as_open(reading.families)
    check_reading(reading)


def test_names_of_families_are_one_object_for_all_sandboxes() -> None:
    body = SAMPLES[0].read_bytes()
    first, second = (read(body, kata_labels(identifier, None), Rules(), {}).families for identifier in ("a", "b"))
    assert {id(name) for name in first} == {id(name) for name in second}


class Piece(NamedTuple):
    """A piece of a pack."""

    data: bytes
    crc32: int
    n_bytes: int


def pieces_of(coding: str, texts: list[bytes]) -> list[Piece]:
    pack = core.pack(coding, texts)
    return [Piece(*core.gather([pack], number, 0, 1)[:3]) for number in range(len(texts))]


@given(st.lists(st.binary(max_size=400), max_size=8))
def test_deflated_pieces_are_a_stream_in_any_order(texts: list[bytes]) -> None:
    pieces = pieces_of("gzip", texts)
    assert [(piece.crc32, piece.n_bytes) for piece in pieces] == [(zlib.crc32(text), len(text)) for text in texts]
    for some in (pieces, pieces[::-1], pieces[::2] * 2):
        whole = zlib.decompress(b"".join([piece.data for piece in some]) + LAST_BLOCK, wbits=-15)
        assert len(whole) == sum(piece.n_bytes for piece in some)
        assert core.combine_crc((piece.crc32, piece.n_bytes) for piece in some) == zlib.crc32(whole)
    assert zlib.decompress(b"".join([piece.data for piece in pieces]) + LAST_BLOCK, wbits=-15) == b"".join(texts)


def test_pieces_of_a_large_text_and_of_one_that_does_not_shrink() -> None:
    large = b"".join([b'x{item="%d"} %d\n' % (n, n * n) for n in range(50_000)])
    noise = zlib.compress(large)
    pieces = pieces_of("gzip", [large, noise, b""])
    whole = large + noise
    assert zlib.decompress(b"".join([piece.data for piece in pieces]) + LAST_BLOCK, wbits=-15) == whole
    assert core.combine_crc([(piece.crc32, piece.n_bytes) for piece in pieces]) == zlib.crc32(whole)
    assert len(pieces[0].data) < len(large) / 2
    assert len(pieces[1].data) < len(noise) + 1000


def test_no_pieces() -> None:
    assert core.pack("gzip", []) == core.pack("zstd", []) == b""
    assert core.gather([], 0, 0, 9) == (b"", 0, 0, 0)
    assert core.combine_crc([]) == 0


@given(st.lists(st.binary(max_size=400), max_size=8))
def test_frames_are_one_stream(texts: list[bytes]) -> None:
    frames = pieces_of("zstd", texts)
    stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(b"".join([each.data for each in frames])), read_across_frames=True)
    assert stream.read() == b"".join(texts)
    assert [each.n_bytes for each in frames] == [len(text) for text in texts]


@given(st.lists(st.lists(st.binary(max_size=90), min_size=2, max_size=2), max_size=8), st.integers(0, 300))
def test_pieces_of_many_packs_are_joined_until_it_is_enough(rows: list[list[bytes]], n_wanted: int) -> None:
    packs = [core.pack("gzip", row) for row in rows]
    for number in (0, 1):
        first = 0
        stream, checks = b"", []
        while first < len(rows):
            data, crc32, n_bytes, following = core.gather(packs, number, first, n_wanted)
            texts = b"".join([row[number] for row in rows[first:following]])
            assert following > first
            assert following == len(rows) or len(data) >= n_wanted
            assert (crc32, n_bytes) == (zlib.crc32(texts), len(texts))
            stream, first = stream + data, following
            checks.append((crc32, n_bytes))
        whole = b"".join([row[number] for row in rows])
        assert zlib.decompress(stream + LAST_BLOCK, wbits=-15) == whole
        assert core.combine_crc(checks) == zlib.crc32(whole)


def test_a_pack_takes_pieces_of_the_one_before() -> None:
    before = core.pack("gzip", [b"first", b"second", b""])
    assert core.pack("gzip", [0, 1, 2], before) == before
    assert core.pack("gzip", [1, b"third", 0], before) == core.pack("gzip", [b"second", b"third", b"first"])
    with pytest.raises(OSError, match="no such piece"):
        core.pack("gzip", [3], before)
    with pytest.raises(OSError, match="no such piece"):
        core.pack("gzip", [0])
    with pytest.raises(ValueError, match="no such coding"):
        core.pack("br", [b""])


@pytest.mark.parametrize("pack", [b"", b"x", core.pack("zstd", [b"a", b"b"])[:20], b"\xff" * 48])
def test_what_is_no_pack_is_refused(pack: bytes) -> None:
    with pytest.raises(IndexError, match="no such piece"):
        core.gather([pack], 2, 0, 1)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_protobuf_says_what_the_text_says(path: Path) -> None:
    readings = [read(path.read_bytes(), kata_labels(identifier, POD), Rules(), {}) for identifier in ("a", "b")]
    names = readings[0].families
    message = b"".join(
        [core.protobuf(name, each.kind, each.help, [r.families[name].text for r in readings]) for name, each in names.items()]
    )
    kinds, found = metric_family.series_of(message)
    assert kinds == {name: each.kind for name, each in names.items()}
    expected = {}
    for reading in readings:
        expected.update(check_reading(reading)[0])
    spelled = {
        str((name, tuple((label, str(float(value)) if label in {"le", "quantile"} else value) for label, value in labels))): str(figure)
        for (name, labels), figure in expected.items()
    }
    assert {
        str((name, tuple(sorted(own for own in labels if own[1])))): str(float(figure)) for (name, labels), figure in found.items()
    } == spelled


def test_protobuf_of_each_kind() -> None:
    body = (
        b'# HELP h A \\\\ b\\n"c"\n# TYPE h histogram\n'
        b'h_bucket{a="1",le="1"} 1\nh_bucket{a="1",le="+Inf"} 3\nh_sum{a="1"} 2.5\nh_count{a="1"} 3\n'
        b'h_bucket{a="2",le="+Inf"} 0\n# TYPE s summary\ns{quantile="0.5"} NaN\ns_sum 1\ns_count 2\n'
        b'# TYPE g gauge\ng{a="\\"\\n"} -1 -5\nu 1 7\n'
    )
    families = read(body, (), Rules(), {}).families
    decoded = {name: next(metric_family.read(core.protobuf(name, each.kind, each.help, [each.text]))) for name, each in families.items()}
    assert decoded["h"].help == 'A \\ b\n"c"'
    first, second = decoded["h"].metric
    assert [(bucket.cumulative_count, bucket.upper_bound) for bucket in first.histogram.bucket] == [(1, 1.0), (3, float("inf"))]
    assert (first.histogram.sample_count, first.histogram.sample_sum) == (3, 2.5)
    assert [label.value for label in second.label] == ["2"]
    assert [quantile.quantile for quantile in decoded["s"].metric[0].summary.quantile] == [0.5]
    assert decoded["s"].metric[0].summary.sample_count == 2
    assert decoded["g"].metric[0].label[0].value == '"\n'
    assert (decoded["g"].metric[0].gauge.value, decoded["g"].metric[0].timestamp_ms) == (-1.0, -5)
    assert decoded["u"].metric[0].untyped.value == 1.0


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        core.protobuf("x", cast("Kind", "speed"), b"", [])


def test_what_is_escaped_is_read_as_it_was() -> None:
    value = 'a\\n"\n\\'
    assert read(f'x{{v="{escaped(value)}"}} 1\n'.encode(), (), Rules(), {"x": ("v",)}).values["x"][0][0] == (value,)
