"""Bodies that are damaged, odd or made to hurt: each valid line is kept, each other one counted, and what comes out is always valid.

The promise T7: the output re-parses with Prometheus' Python client and with promtool, whatever came in.
"""

import os
import random
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isopod.pulse.core import REASONS, Rules, read
from isopod.pulse.labels import block
from isopod.pulse.model import Labels
from tests.pulse.reparsed import PROMTOOL, as_open, as_text, check_reading, promtool_complaint

pytestmark = pytest.mark.row("T7")

LABELS: Final[Labels] = (("sandbox_id", "0123456789ab"), ("cri_uid", ""), ("cri_name", 'a"b\\c'), ("cri_namespace", "prod"))
SAMPLES: Final = Path(__file__).parent / "data"
AS_IT_CAME: Final = Rules(renames=())


class Case(NamedTuple):
    """A body, the lines that are left of it, and why others are not."""

    name: str
    body: bytes
    kept: tuple[str, ...] = ()
    dropped: dict[str, int] = {}


HISTOGRAM: Final = b'# TYPE h histogram\nh_bucket{le="1"} 1\nh_bucket{le="+Inf"} 2\nh_sum 3\nh_count 2\n'
HISTOGRAM_LINES: Final = ('h_bucket{le="1"} 1', 'h_bucket{le="+Inf"} 2', "h_sum 3", "h_count 2")

CASES: Final = [
    # values of labels
    Case("comma in a value", b'x{a="1,2",b="3"} 1\n', ('x{a="1,2",b="3"} 1',)),
    Case("brace in a value", b'x{a="}{",b="}"} 1\n', ('x{a="}{",b="}"} 1',)),
    Case("escapes in a value", rb'x{a="q\"q\\",b="n\nn"} 1' + b"\n", (r'x{a="q\"q\\",b="n\nn"} 1',)),
    Case("escape that there is not", rb'x{a="C:\dir"} 1' + b"\n", (r'x{a="C:\\dir"} 1',)),
    Case("blank and hash in a value", b'x{a="1 # 2"} 1\n', ('x{a="1 # 2"} 1',)),
    Case("text beyond ASCII", 'x{a="Zoë €"} 1\n'.encode(), ('x{a="Zoë €"} 1',)),
    Case("zero byte in a value", b'x{a="\0"} 1\n', ('x{a="\0"} 1',)),
    Case("newline in a value", b'x{a="1\n2"} 1\ny 1\n', ("y 1",), {"labels": 1, "name": 1}),
    Case("carriage return in a value", b'x{a="1\r2"} 1\n', ('x{a="1\r2"} 1',)),
    Case("quote that is not closed", b'x{a="1} 1\ny 1\n', ("y 1",), {"labels": 1}),
    Case("escape at the end", b'x{a="\\\ny 1\n', ("y 1",), {"labels": 1}),
    Case("value without quotes", b"x{a=1} 1\ny 1\n", ("y 1",), {"labels": 1}),
    # labels
    Case("trailing comma", b'x{a="1",} 1\n', ('x{a="1"} 1',)),
    Case("two commas", b'x{a="1",,b="2"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("leading comma", b'x{,a="1"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("no comma", b'x{a="1" b="2"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("empty label set", b"x{} 1\n", ("x 1",)),
    Case("blanks everywhere", b' \tx \t{ a = "1" ,\tb="2" , }\t 1 \t\n', ('x{a="1",b="2"} 1',)),
    Case("no blank before the value", b'x{a="1"}2\n', ('x{a="1"} 2',)),
    Case("label named twice", b'x{a="1",a="2"} 1\nx{a="1",b="",a="1"} 1\nx 1\n', ("x 1",), {"labels": 2}),
    Case("label without a name", b'x{="1"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("label with a colon", b'x{a:b="1"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("label that is reserved", b'x{__name__="y"} 1\nx{__a="1"} 1\nx{_a="1"} 1\n', ('x{_a="1"} 1',), {"labels": 2}),
    Case("label that begins with a digit", b'x{1a="1"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("label in quotes", b'x{"a.b"="1"} 1\nx 1\n', ("x 1",), {"labels": 1}),
    Case("brace that is not closed", b'x{a="1" 1\nx 1\n', ("x 1",), {"labels": 1}),
    # names
    Case("empty name", b'{a="1"} 1\n 1\nx 1\n', ("x 1",), {"name": 2}),
    Case("name that begins with a digit", b"1x 1\nx 1\n", ("x 1",), {"name": 1}),
    Case("name with a colon", b":x:y: 1\n", (":x:y: 1",)),
    Case("name with a hyphen", b"x-y 1\nx 1\n", ("x 1",), {"name": 1}),
    Case("name with a dot", b'x.y{a="1"} 1\nx 1\n', ("x 1",), {"name": 1}),
    Case("name beyond ASCII", "Zoë 1\nx 1\n".encode(), ("x 1",), {"name": 1}),
    Case("zero byte in a name", b"x\0y 1\nx 1\n", ("x 1",), {"name": 1}),
    Case("zero bytes", b"\0\0\0\0\nx 1\n", ("x 1",), {"name": 1}),
    Case("no value", b'x\nx{a="1"}\nx \ny 1\n', ("y 1",), {"value": 3}),
    # numbers
    Case("infinities", b"a +Inf\nb -Inf\nc Inf\nd inf\ne -infinity\n", ("a +Inf", "b -Inf", "c +Inf", "d +Inf", "e -Inf")),
    Case("not a number", b"a NaN\nb nan\nc NAN\nd +NaN\ne -nan\n", ("a NaN", "b NaN", "c NaN"), {"value": 2}),
    Case("hexadecimal", b"a 0x10\nb 0x1p-2\nc 1\n", ("c 1",), {"value": 2}),
    Case("underscores", b"a 1_000\nb 1\n", ("b 1",), {"value": 1}),
    Case(
        "forms of numbers",
        b"a +1\nb -1\nc .5\nd 5.\ne 1e3\nf 1.5E-3\ng -0\n",
        ("a +1", "b -1", "c .5", "d 5.", "e 1e3", "f 1.5E-3", "g -0"),
    ),
    Case("no numbers", b"a .\nb e5\nc 1e\nd +\ne --1\nf 1,5\ng true\nh 1\n", ("h 1",), {"value": 7}),
    Case("beyond 64 bits", b"a 1e400\nb -1e400\nc 1e-400\nd " + b"9" * 400 + b"\n", ("c 1e-400",), {"value": 3}),
    Case("digits beyond ASCII", "a ١٢\nb 1\n".encode(), ("b 1",), {"value": 1}),
    Case(
        "wrapped", b"a 1.8446744073709552e+19\nb 18446744073709551615\nc 1.79e19\nd -1.9e19\n", ("c 1.79e19", "d -1.9e19"), {"wrapped": 2}
    ),
    Case("counter below zero", b'# TYPE c counter\nc -1\nc{a="1"} NaN\nc{a="2"} 1\n', ('c{a="2"} 1',), {"counter": 2}),
    # time
    Case("timestamps", b"a 1 1700000000000\nb 1 -1\nc 1 +5\n", ("a 1 1700000000000", "b 1 -1", "c 1 5")),
    Case("timestamps out of range", b"a 1 9223372036854775808\nb 1 9223372036854775807\n", ("b 1 9223372036854775807",), {"timestamp": 1}),
    Case("timestamps that are none", b"a 1 1.5\nb 1 now\nc 1 1 1\nd 1 0x1\ne 1\n", ("e 1",), {"timestamp": 4}),
    Case("same series at another time", b"a 1 1000\na 2 2000\n", ("a 1 1000",), {"duplicate": 1}),
    # lines
    Case("empty body", b""),
    Case("comments only", b"# hello\n#\n#HELPLESS x\n# EOF\n"),
    Case("blank lines", b"\n \n\t\r\n\nx 1\n\n", ("x 1",)),
    Case("cut in a value", b"x 1\ny 12", ("x 1",), {"no_newline": 1}),
    Case("cut in labels", b'x 1\ny{a="1', ("x 1",), {"no_newline": 1}),
    Case("cut in a type", b"x 1\n# TYPE x cou", ("x 1",), {"no_newline": 1}),
    Case("end without a newline", b"x 1 5\n# EOF", ("x 1 5000",)),
    Case("carriage returns", b'# TYPE x gauge\r\nx 1\r\nx{a="1"} 2 3\r\n', ("x 1", 'x{a="1"} 2 3')),
    Case("carriage returns alone", b"x 1\ry 2\rz 3\n", (), {"value": 1}),
    Case("byte order mark", b"\xef\xbb\xbfx 1\n", ("x 1",)),
    Case("byte order mark of another coding", b"\xff\xfex\0 \0001\0\ny 1\n", ("y 1",), {"name": 1}),
    Case("invalid UTF-8", b'x{a="\xff"} 1\n# HELP y \xff\ny 1\n# \xff\n', ("y 1",), {"utf8": 2}),
    Case("cut UTF-8", b'x{a="\xe2\x82"} 1\nx{a="\xe2\x82\xac"} 1\n', ('x{a="€"} 1',), {"utf8": 1}),
    Case("too long a line", b'x{a="' + b"1" * 70000 + b'"} 1\nx 1\n', ("x 1",), {"too_long": 1}),
    Case("too long a help", b"# HELP x " + b"1" * 70000 + b"\nx 1\n", ("x 1",), {"too_long": 1}),
    Case("page instead of metrics", b"<!DOCTYPE html>\n<html><body>\n<h1>404 Not Found</h1>\n</body></html>\n", (), {"name": 4}),
    Case("JSON instead of metrics", b'{"error": "no such sandbox"}\n', (), {"name": 1}),
    Case("words instead of metrics", b"no cached metrics available\n", (), {"value": 1}),
    Case("headers before metrics", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nx 1\n", ("x 1",), {"name": 2}),
    Case("headers of chunks between lines", b"4\r\nx 1\n\r\n4\r\ny 2\n\r\n0\r\n\r\n", ("x 1", "y 2"), {"chunk": 3}),
    Case("headers of chunks in values", b"x 1\ny 12\r\n800\r\n34\nz 5\n", ("x 1", "z 5"), {"chunk": 3}),
    Case("headers of chunks in names", b"x 1\nkata_gue\r\n1a\r\nst_load 2\nz 5\r\n0\r\n\r\n", ("x 1",), {"chunk": 5}),
    Case("small chunks", b"x 1\ny 1\r\n2\r\n23\r\n2\r\n45\nz 5\n", ("x 1", "z 5"), {"chunk": 5}),
    # series and families
    Case("series twice", b"x 1\nx 2\n", ("x 1",), {"duplicate": 1}),
    Case("series twice in another order", b'x{a="1",b="2"} 1\nx{b="2",a="1"} 2\n', ('x{a="1",b="2"} 1',), {"duplicate": 1}),
    Case(
        "series twice with an empty label", b'x{a="1"} 1\nx{b="",a="1"} 2\nx{a=""} 3\nx 4\n', ('x{a="1"} 1', 'x{a=""} 3'), {"duplicate": 2}
    ),
    Case(
        "series that only look alike",
        b'x{a="1",b="2"} 1\nx{a="1,b=2"} 2\nx{ab="12"} 3\n',
        ('x{a="1",b="2"} 1', 'x{a="1,b=2"} 2', 'x{ab="12"} 3'),
    ),
    Case("scattered families", b'b 1\na 1\nb{a="1"} 2\na{a="1"} 2\n', ("a 1", 'a{a="1"} 2', "b 1", 'b{a="1"} 2')),
    Case("second help and type", b"# HELP x A\n# HELP x B\n# TYPE x gauge\n# TYPE x counter\nx -1\n", ("x -1",), {"metadata": 2}),
    Case("type after samples", b'# TYPE y gauge\nx 1\n# TYPE x counter\nx{a="1"} -2\n', ("x 1",), {"counter": 1}),
    Case("type that there is not", b"# TYPE x speed\n# TYPE y\n# TYPE z gauge 1\nx -1\n", ("x -1",), {"type": 3}),
    Case("type of what is no name", b"# TYPE 1x gauge\n# HELP \xc3\xa4 x\n# TYPE\nx 1\n", ("x 1",), {"name": 3}),
    Case("announced, but not there", b"# HELP x A\n# TYPE x gauge\n"),
    Case("announced without blanks", b"#TYPE x counter\n#\tHELP\tx\tA\nx -1\n", (), {"counter": 1}),
    Case("histogram", HISTOGRAM, HISTOGRAM_LINES),
    Case("histogram announced last", HISTOGRAM.partition(b"\n")[2] + b"# TYPE h histogram\n", HISTOGRAM_LINES),
    Case(
        "histogram in disorder",
        b'# TYPE h histogram\nh_count 2\nh_bucket{le="+Inf"} 2\nx 1\nh_sum 3\nh_bucket{le="1"} 1\n',
        (*HISTOGRAM_LINES, "x 1"),
    ),
    Case(
        "histograms mixed",
        b'# TYPE h histogram\nh_bucket{a="1",le="+Inf"} 1\nh_bucket{a="2",le="+Inf"} 1\nh_sum{a="1"} 1\nh_count{a="1"} 1\n',
        ('h_bucket{a="1",le="+Inf"} 1', 'h_sum{a="1"} 1', 'h_count{a="1"} 1', 'h_bucket{a="2",le="+Inf"} 1'),
    ),
    Case("bucket without a limit", HISTOGRAM + b'h_bucket 7\nh_bucket{a="1"} 7\n', HISTOGRAM_LINES, {"bucket": 2}),
    Case(
        "bucket with a bad limit",
        HISTOGRAM + b'h_bucket{le="x"} 1\nh_bucket{le="NaN"} 1\nh_bucket{le="0x1"} 1\n',
        HISTOGRAM_LINES,
        {"bucket": 3},
    ),
    Case(
        "limits spelled otherwise",
        b'# TYPE h histogram\nh_bucket{le="inf"} 2\nh_bucket{le="Inf"} 2\n',
        ('h_bucket{le="+Inf"} 2',),
        {"duplicate": 1},
    ),
    Case("sum with a limit", HISTOGRAM + b'h_sum{le="x"} 1\nh_count{le="1"} 1\n', HISTOGRAM_LINES, {"bucket": 2}),
    Case(
        "buckets that are no counts",
        HISTOGRAM + b'h_bucket{le="2"} 1.5\nh_bucket{le="3"} -1\nh_bucket{le="4"} NaN\nh_bucket{le="5"} +Inf\n',
        HISTOGRAM_LINES,
        {"value": 4},
    ),
    Case("value of a histogram", HISTOGRAM + b"h 5\n", HISTOGRAM_LINES, {"suffix": 1}),
    Case(
        "no last bucket",
        b'# TYPE h histogram\nh_bucket{le="1"} 1\nh_sum 1\nh_count 1\n',
        ('h_bucket{le="1"} 1', "h_sum 1", "h_count 1"),
        {"incoherent": 3},
    ),
    Case(
        "buckets that fall",
        b'# TYPE h histogram\nh_bucket{le="1"} 5\nh_bucket{le="+Inf"} 2\n',
        ('h_bucket{le="1"} 5', 'h_bucket{le="+Inf"} 2'),
        {"incoherent": 2},
    ),
    Case(
        "count of another histogram",
        b'# TYPE h histogram\nh_bucket{le="+Inf"} 2\nh_sum 1\nh_count 3\n',
        ('h_bucket{le="+Inf"} 2', "h_sum 1", "h_count 3"),
        {"incoherent": 3},
    ),
    Case("buckets of nobody", b'h_bucket{le="1"} 1\nh_count -1\n', ('h_bucket{le="1"} 1', "h_count -1")),
    Case(
        "native histogram", b"# TYPE h histogram\nh {count:1,sum:2,schema:0,zero_threshold:0,zero_count:0} \nx 1\n", ("x 1",), {"labels": 1}
    ),
    Case("summary", b'# TYPE s summary\ns{quantile="0.5"} NaN\ns_sum 1\ns_count 2\n', ('s{quantile="0.5"} NaN', "s_sum 1", "s_count 2")),
    Case(
        "nonsense of quantiles",
        b'# TYPE s summary\ns{quantile="2"} 1\ns{quantile="-1"} 1\ns{quantile="x"} 1\ns{quantile="NaN"} 1\ns{quantile=""} 1\n'
        b's 1\ns{quantile="1"} 1\n',
        ('s{quantile="1"} 1',),
        {"quantile": 6},
    ),
    Case("summary below zero", b'# TYPE s summary\ns{quantile="1"} -1\ns_sum -1\n', ('s{quantile="1"} -1', "s_sum -1"), {"incoherent": 2}),
    Case("counts that are no counts", b"# TYPE s summary\ns_count 1.5\ns_count -1\ns_sum 1\n", ("s_sum 1",), {"value": 2}),
    Case("buckets of a summary", b'# TYPE s summary\ns_sum 1\ns_bucket{le="1"} 1\n', ("s_sum 1", 's_bucket{le="1"} 1')),
    Case(
        "counter named like a part",
        b"# TYPE kata_agent_scrape_count counter\nkata_agent_scrape_count 42\n",
        ("kata_agent_scrape_count 42",),
    ),
    Case(
        "gauge named like a part of a histogram",
        HISTOGRAM + b'# TYPE h_count gauge\nh_count{a="1"} 7\nh_count 8\n# TYPE x gauge\n',
        HISTOGRAM_LINES,
        {"type_conflict": 2},
    ),
    Case("gauge named like a part of nothing", b"# TYPE h histogram\n# TYPE h_count gauge\nh_count 8\n", ("h_count 8",)),
    Case("clash by renaming", b"x 1\n# TYPE x gauge\n", ("x 1",)),
    # OpenMetrics
    Case(
        "OpenMetrics",
        b'# TYPE c counter\n# UNIT c seconds\n# HELP c A \\"b\\"\nc_total 5 1700000000.5\nc_created 1.6e9\n# TYPE i info\ni_info{v="1"} 1\n'
        b'# TYPE e stateset\ne{e="on"} 1\ne{e="off"} 0\n# TYPE u unknown\nu 1\n# EOF\n',
        ("c_created 1.6e9", "c_total 5 1700000000500", 'e{e="on"} 1', 'e{e="off"} 0', 'i_info{v="1"} 1', "u 1"),
    ),
    Case(
        "histogram of gauges",
        b'# TYPE g gaugehistogram\ng_bucket{le="+Inf"} -1\ng_gsum -1\ng_gcount -1\n# EOF\n',
        ('g_bucket{le="+Inf"} -1', "g_gcount -1", "g_gsum -1"),
    ),
    Case("times of creation", HISTOGRAM + b"h_created 1\n", HISTOGRAM_LINES, {"suffix": 1}),
    Case(
        "exemplars",
        b'# TYPE c counter\nc_total 1 # {id="7"} 0.5\n# TYPE g gauge\ng 1 # {id="7"} 1\n# EOF\n',
        ("c_total 1", "g 1"),
        {"exemplar": 1},
    ),
    Case(
        "bad exemplars",
        b'# TYPE c counter\nc_total{a="1"} 1 # 5\nc_total{a="2"} 1 # {id="7"\nc_total{a="3"} 1 # {id="7"} x\n'
        b'c_total{a="4"} 1 # {a="1",a="2"} 1\nc_total{a="5"} 1 # {id="'
        + b"7" * 127
        + b'"} 1\nc_total{a="6"} 1 # {id="7"} 1 NaN\nc_total{a="7"} 1 # {id="7"} 1 1 1\nc_total{a="8"} 1 #\n',
        tuple(f'c_total{{a="{n}"}} 1' for n in range(1, 9)),
        {"exemplar": 8},
    ),
]
BY_NAME: Final = {case.name: case for case in CASES}


def test_there_are_enough_of_them() -> None:
    assert len(BY_NAME) == len(CASES) >= 40
    counted = set().union(*(case.dropped for case in CASES))
    assert counted | {"too_many"} == set(REASONS)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_valid_lines_are_kept_and_others_counted(case: Case) -> None:
    reading = read(case.body, (), AS_IT_CAME, {})
    lines = "".join([each.text.decode() for each in reading.families.values()])
    assert lines.split("\n")[:-1] == list(case.kept)
    assert reading.dropped == case.dropped
    check_reading(reading)
    labelled = read(case.body, LABELS, AS_IT_CAME, {})
    assert labelled.dropped == case.dropped
    assert labelled.n_series == reading.n_series
    check_reading(labelled)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_reading_its_own_output_changes_nothing(case: Case) -> None:
    check_idempotent(case.body)


def check_idempotent(body: bytes) -> None:
    first = read(body, (), AS_IT_CAME, {})
    as_it_is = as_text(first.families)
    second = read(as_it_is.encode(), (), AS_IT_CAME, {})
    assert as_text(second.families) == as_it_is
    assert set(second.dropped) <= {"incoherent"}
    in_open = as_open({name: each for name, each in first.families.items() if each.open_text != b""})
    third = read(in_open.encode(), (), AS_IT_CAME, {})
    assert as_open(third.families) == in_open
    assert not third.dropped


@pytest.mark.skipif(not os.access(PROMTOOL, os.X_OK), reason="promtool is not installed (Debian: prometheus)")
def test_promtool_takes_what_is_left_of_all_of_them() -> None:
    texts = []
    for number, case in enumerate(CASES):
        rules = Rules(renames=((b"", b"case_%d_" % number),))
        texts.append(as_text(read(case.body, LABELS, rules, {}).families))
    for path in sorted(SAMPLES.glob("*.prom")):
        texts.append(as_text(read(path.read_bytes(), LABELS, Rules(renames=((b"", path.stem.encode() + b"_"),)), {}).families))
    chaos = random.Random(7)
    whole = (SAMPLES / "shim_sample.prom").read_bytes()
    for number in range(40):
        body = bytearray(whole)
        for _ in range(60):
            body[chaos.randrange(len(body))] = chaos.randrange(256)
        texts.append(as_text(read(bytes(body), LABELS, Rules(renames=((b"", b"broken_%d_" % number),)), {}).families))
    assert promtool_complaint("".join(texts)) == ""


def test_more_lines_than_allowed() -> None:
    body = b"".join([b"x%d 1\n" % n for n in range(30)]) + b"# TYPE y gauge\n# comment\n\n"
    reading = read(body, (), Rules(series_max=10), {})
    assert list(reading.families) == [f"x{n}" for n in range(10)]
    assert reading.dropped == {"too_many": 20}
    announced = read(b"".join([b"# TYPE x%d counter\n" % n for n in range(30)]) + b"x1 -1\nx29 -1\n", (), Rules(series_max=10), {})
    assert announced.dropped == {"too_many": 20, "counter": 1}
    assert announced.families["x29"].kind == "untyped"


def test_longer_lines_than_allowed() -> None:
    reading = read(b"abc 12345\nabc 123456\n", (), Rules(line_bytes_max=9), {})
    assert reading.families["abc"].text == b"abc 12345\n"
    assert reading.dropped == {"too_long": 1}


@pytest.mark.parametrize("what", ["lines", "labels", "quotes", "prefixes", "announcements", "scattered", "escapes"])
def test_output_is_bounded_by_input(what: str) -> None:
    """Work is bounded by counted comparisons in the core's own tests; here it is what comes out."""
    n = 60_000
    body = {
        "lines": b"a\n" * n,
        "labels": b"x{" + b",".join([b'a%d=""' % i for i in range(n // 8)]) + b"} 1\n",
        "quotes": b'x{a="' * n + b"\n",
        "prefixes": b"x{" + b",".join([b"exported_" * i + b'sandbox_id="1"' for i in range(80)]) + b"} 1\n",
        "announcements": b"".join([b"# TYPE x%d histogram\n" % i for i in range(n)]),
        "scattered": b"".join([b'x%d{a="%d"} 1\n' % (i % 100, n - i) for i in range(n)]),
        "escapes": b'x{a="' + b"\\x" * 30_000 + b'"} 1\n',
    }[what]
    rules = Rules()
    reading = read(body, LABELS, rules, {})
    n_out = sum(len(each.text) for each in reading.families.values())
    assert n_out <= 2 * len(body) + reading.n_series * (len(block(LABELS)) + 40)
    assert reading.n_series <= rules.series_max


def test_a_line_of_many_prefixes_keeps_its_labels_apart() -> None:
    body = b'x{sandbox_id="1",exported_sandbox_id="2"} 1\nx{exported_exported_sandbox_id="1",exported_sandbox_id="2"} 2\n'
    reading = read(body, LABELS, Rules(), {})
    assert reading.dropped == {"duplicate": 1}
    assert b'exported_exported_sandbox_id="1",exported_sandbox_id="2"' in reading.families["x"].text
    check_reading(reading)


@given(st.binary(max_size=400))
def test_any_bytes_give_valid_output(body: bytes) -> None:
    check_reading(read(body, LABELS, Rules(), {}))
    check_idempotent(body)


TOKENS: Final = st.sampled_from(
    [
        *"x h h_bucket h_count h_sum s s_total s_created c_total c:d # TYPE HELP EOF counter gauge histogram summary untyped info".split(),
        *"{ } {} , = a le quantile sandbox_id exported_sandbox_id __name__ \\".split(),
        *"1 2 -1 0.5 +Inf NaN 1e400 1.9e19 1700000000.5 0x1 1_0".split(),
        *('"', '"1"', '"+Inf"', '"0.5"', '""', '"a\\"b\\n"', " ", " ", " ", " ", "\t", "\n", "\n", "\n", "\r\n"),
        *(' # {id="7"} 1', "\n# TYPE ", "\n# EOF\n", "\x00", "\x85", "é"),
    ]
)
LINES: Final = st.builds(
    lambda name, labels, value, tail: f"{name}{{{','.join(labels)}}} {value}{tail}\n",
    st.sampled_from(["h", "h_bucket", "h_count", "h_sum", "c", "c_total", "s", "s_count", "s_sum", "x", "x_created", "h_created"]),
    st.lists(
        st.sampled_from(['le="1"', 'le="2"', 'le="+Inf"', 'a="1"', 'a="2"', 'b=""', 'quantile="0"', 'quantile="1"', 'sandbox_id="z"']),
        max_size=3,
    ),
    st.sampled_from(["0", "1", "2", "1.0", "-1", "NaN", "+Inf", "0.5"]),
    st.sampled_from(["", "", "", " 5", " 6", ' # {id="7"} 1', " 5 # {} 1 2"]),
)
HEADERS: Final = st.builds(
    lambda name, kind: f"# TYPE {name} {kind}\n",
    st.sampled_from(["h", "s", "c", "c_total", "x", "h_count", "s_sum", "x_created"]),
    st.sampled_from(["histogram", "summary", "counter", "gauge", "untyped", "info", "gaugehistogram", "stateset"]),
)


@given(st.lists(TOKENS, max_size=60).map("".join), st.booleans())
def test_any_tokens_give_valid_output(text: str, is_open: bool) -> None:
    body = (text + ("\n# EOF\n" if is_open else "")).encode()
    check_reading(read(body, LABELS, Rules(), {}))
    check_idempotent(body)


@settings(max_examples=300)
@given(st.lists(st.one_of(LINES, LINES, LINES, HEADERS), max_size=25).map("".join), st.booleans())
@example('# TYPE h histogram\nh_bucket{le="+Inf"} 1 5\nh_count{} 1\nh_sum{} 1\n', False)
def test_any_lines_give_valid_output(text: str, is_open: bool) -> None:
    body = (text + ("# EOF\n" if is_open else "")).encode()
    check_reading(read(body, LABELS, Rules(), {}))
    check_idempotent(body)


@settings(max_examples=30)
@given(st.data())
def test_any_damage_of_a_real_body_gives_valid_output(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(["shim_sample.prom", "shim_sample_rs.prom"]))
    body = bytearray((SAMPLES / path).read_bytes()[:8000])
    for at, junk, n_bytes in data.draw(
        st.lists(st.tuples(st.integers(0, len(body)), st.binary(max_size=6), st.integers(0, 60)), max_size=8)
    ):
        body[at : at + n_bytes] = junk
    reading = read(bytes(body), LABELS, Rules(), {})
    check_reading(reading)
    assert reading.n_series > 0
    check_idempotent(bytes(body))
