"""What goes out: T1, T5 and T13 of the targets as far as they are not speed, which the benchmark measures."""

import asyncio
import gzip
import io
import shutil
import subprocess
import tracemalloc
import zlib
from typing import Final

import pytest
import zstandard
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from isopod.pulse.codings import GATHERED_BYTES
from isopod.pulse.formats import OPENMETRICS, PROTOBUF, TEXT, Coding, Format
from isopod.pulse.merge import Group
from isopod.pulse.model import Families, Fragment, Kind, Pod, Query, Target
from isopod.pulse.render import PIECE_BYTES, etag, header, is_open_counter, render
from isopod.pulse.store import Store
from isopod.pulse.view import View
from isopod.world.world import World
from tests.pulse import metric_family
from tests.pulse.families import fragment, labelled, sandbox

CODINGS: Final[tuple[Coding, ...]] = ("identity", "gzip", "zstd")
FORMATS: Final = (TEXT, OPENMETRICS, PROTOBUF)
PODS: Final = {f"s{n:02d}": Pod(f"uid-{n}", f'pod "{n}"\\', f"team-{n % 3}") for n in range(7)}
OWN: Final = {"kata_monitor_scrape_count": fragment("kata_monitor_scrape_count 3\n", "counter", 'Scrapes, "all" of them.')}

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def filled(n_lines: int = 1) -> Store:
    """Return a store of some sandboxes; with more lines, one of their families is large."""
    store = Store(lambda: 0.0)
    for number, (name, pod) in enumerate(PODS.items(), 1):
        store.add(Target(name, "go", ""))
        store.describe(name, pod)
        families = sandbox(name, pod, number)
        families["kata_wide"] = labelled(name, pod, "kata_wide", {f'item="{n}"': n for n in range(n_lines)})
        store.replace(name, families, containers={"container_x": fragment(f'container_x{{id="{name}"}} {number}\n')})
    return store


async def rendered(view: View, form: Format, coding: Coding = "identity") -> bytes:
    return b"".join([piece async for piece in render(view, form, coding)])


def unpacked(data: bytes, coding: Coding) -> bytes:
    if coding == "gzip":
        whole = gzip.decompress(data)
        decoder = zlib.decompressobj(31)  # of a single member, as most clients read
        assert decoder.decompress(data) == whole
        assert decoder.eof and not decoder.unused_data
        return whole
    if coding == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            return reader.read()
    return data


def series_of(text: str, form: Format) -> Series:
    """Return what a text says, and fail if it says something twice."""
    found: Series = {}
    for family in parse_openmetrics(text) if form is OPENMETRICS else parse_text(text):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            name = sample.name
            if form is TEXT and family.type == "counter" and f"# TYPE {name} counter\n" not in text:
                name = name.removesuffix("_total")  # the parser adds it
            labels = {**sample.labels, **{word: str(float(sample.labels[word])) for word in ("le", "quantile") if word in sample.labels}}
            key = (name, tuple(sorted(labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


@pytest.mark.row("K4")
@pytest.mark.parametrize(("coding", "n_lines"), [("identity", 1), ("gzip", 1), ("zstd", 1), ("gzip", 1500)])
async def test_every_format_in_every_coding_says_the_same(coding: Coding, n_lines: int) -> None:
    """T13 of the targets. The figures are read back by others' parsers and decoders."""
    view = filled(n_lines).view(Query(), OWN)
    expected = series_of((await rendered(view, TEXT)).decode(), TEXT)
    assert len(expected) == len(PODS) * (17 + n_lines) + 1
    for _ in range(2 if n_lines == 1 else 1):  # what is kept after the first time is sent the second
        for form in (TEXT, OPENMETRICS):
            text = unpacked(await rendered(view, form, coding), coding).decode()
            assert series_of(text, form) == expected
        kinds, found = metric_family.series_of(unpacked(await rendered(view, PROTOBUF, coding), coding))
        assert found == expected
        assert kinds["kata_rpc"] == "histogram"
        assert kinds["kata_pause_seconds"] == "summary"


@pytest.mark.row("K4")
@pytest.mark.parametrize("form", [TEXT, OPENMETRICS], ids=["text", "openmetrics"])
async def test_each_family_has_one_header_and_they_come_in_order(form: Format) -> None:
    lines = (await rendered(filled().view(Query(), OWN), form)).decode().splitlines()
    names = [line.split(" ")[2] for line in lines if line.startswith("# TYPE ")]
    assert len(names) == len(set(names)) == 10
    assert "" not in lines
    if form is TEXT:
        assert names == sorted(names)
        assert lines[-1].startswith("kata_wide{")
    else:
        assert lines[-1] == "# EOF"
        assert lines.count("# EOF") == 1


@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_promtool_takes_what_goes_out(coding: Coding) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's prometheus)")
    text = unpacked(await rendered(filled(50).view(Query(), OWN), TEXT, coding), coding)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    # 3 is for matters of taste: names without their unit.
    assert done.returncode in {0, 3}, done.stderr
    assert b"error while linting" not in done.stderr + done.stdout


@pytest.mark.parametrize(("tool", "coding"), [("gzip", "gzip"), ("zstd", "zstd")])
async def test_the_usual_tools_unpack_it(tool: str, coding: Coding) -> None:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"needs {tool}")
    view = filled(3000).view(Query())
    packed = await rendered(view, TEXT, coding)
    done = subprocess.run([path, "-dc"], input=packed, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, await rendered(view, TEXT))


async def test_an_answer_without_families_is_valid_in_every_form() -> None:
    view = Store(lambda: 0.0).view(Query())
    assert await rendered(view, TEXT) == b""
    assert await rendered(view, OPENMETRICS) == b"# EOF\n"
    assert await rendered(view, PROTOBUF) == b""
    for coding in ("gzip", "zstd"):
        assert unpacked(await rendered(view, TEXT, coding), coding) == b""


@pytest.mark.parametrize(
    ("name", "kind", "others", "expected"),
    [
        ("a_total", "counter", {}, "# TYPE a counter"),
        ("a_count", "counter", {}, "# TYPE a_count unknown"),
        ("a_total", "counter", {"a": "gauge"}, "# TYPE a_total unknown"),
        ("a_total", "counter", {"a_created": "gauge"}, "# TYPE a_total unknown"),
        ("_total", "counter", {}, "# TYPE _total unknown"),
        ("a", "untyped", {}, "# TYPE a unknown"),
        ("a_total", "gauge", {}, "# TYPE a_total gauge"),
    ],
)
def test_types_in_openmetrics(name: str, kind: Kind, others: dict[str, Kind], expected: str) -> None:
    kinds: dict[str, Kind] = {**others, name: kind}
    made = header(Group(name, kind, b"", []), "openmetrics", kinds)
    assert made.decode().splitlines() == [expected]
    assert header(Group(name, kind, b"", []), "text", kinds).decode() == f"# TYPE {name} {kind}\n"
    assert is_open_counter(name, kinds) is (expected == "# TYPE a counter") or kind != "counter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b'say "x"', rb"say \"x\""), (rb"back\\slash \n", rb"back\\slash \n"), (rb'\\"', rb"\\\""), (rb"\"", rb"\"")],
)
def test_quotes_in_a_help_are_escaped_in_openmetrics_only(text: bytes, expected: bytes) -> None:
    group = Group("x", "gauge", text, [])
    assert header(group, "text", {"x": "gauge"}) == b"# HELP x " + text + b"\n# TYPE x gauge\n"
    assert header(group, "openmetrics", {"x": "gauge"}) == b"# HELP x " + expected + b"\n# TYPE x gauge\n"


async def test_names_that_clash_in_openmetrics_alone_are_all_there_in_text() -> None:
    store = Store(lambda: 0.0)
    store.add(Target("a", "go", ""))
    families: Families = {
        "bytes": fragment('bytes{x="1"} 1\n'),
        "bytes_total": fragment('bytes_total{x="1"} 2\n', "counter"),
        "h": fragment('h_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n', "histogram"),
        "h_created": fragment("h_created 5\n"),
    }
    store.replace("a", families)
    view = store.view(Query())
    text = series_of((await rendered(view, TEXT)).decode(), TEXT)
    opened = series_of((await rendered(view, OPENMETRICS)).decode(), OPENMETRICS)
    assert set(text) - set(opened) == {("h_created", ())}


async def test_exemplars_and_timestamps_have_their_own_form_in_openmetrics() -> None:
    store = Store(lambda: 0.0)
    store.add(Target("a", "go", ""))
    text, opened = 'x_total{a="1"} 1 1500\n', 'x_total{a="1"} 1 1.5 # {trace="t"} 1\n'
    store.replace("a", {"x_total": fragment(text, "counter", open_text=opened), "y": fragment("y 1\n")})
    view = store.view(Query())
    for coding in CODINGS:
        for _ in range(2):
            assert text.encode() in unpacked(await rendered(view, TEXT, coding), coding)
            answer = unpacked(await rendered(view, OPENMETRICS, coding), coding).decode()
            (family, _y) = list(parse_openmetrics(answer))  # type: ignore[no-untyped-call]
            assert family.samples[0].exemplar is not None


def test_a_validator_is_weak_and_tells_contents_formats_and_codings_apart() -> None:
    store = filled()
    tags = {etag(store.view(Query()), form, coding) for form in FORMATS for coding in CODINGS}
    assert len(tags) == 9
    assert all(tag.startswith('W/"') and tag.endswith('"') for tag in tags)
    assert etag(store.view(Query(), OWN), TEXT, "gzip") in tags
    store.replace("s00", sandbox("s00", PODS["s00"], 77))
    assert etag(store.view(Query()), TEXT, "gzip") not in tags
    assert etag(store.view(Query(sandbox="s01")), TEXT, "gzip") not in tags


def wide(n_sandboxes: int, n_bytes: int) -> Store:
    """Return a store of large families that cost little memory: sandboxes share their texts."""
    store = Store(lambda: 0.0)
    texts = [b"".join([b'x%d{item="%d"} 12345\n' % (family, n) for n in range(n_bytes // 24)]) for family in range(4)]
    for n in range(n_sandboxes):
        store.add(Target(f"{n:04d}", "go", ""))
        store.replace(f"{n:04d}", {f"x{family}": Fragment("gauge", b"", text, 1) for family, text in enumerate(texts)})
    return store


@pytest.mark.parametrize("coding", CODINGS)
async def test_an_answer_of_any_size_costs_some_pieces_of_memory(coding: Coding) -> None:
    """T5 of the targets: at most 8 MB beside what is kept."""
    view = wide(100, 100_000).view(Query())
    await rendered_size(view, TEXT, coding)
    tracemalloc.start()
    try:
        n_bytes, largest = await rendered_size(view, TEXT, coding)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > (35_000_000 if coding == "identity" else 1_000_000)
    assert largest < PIECE_BYTES + GATHERED_BYTES + 110_000
    assert peak < 4 << 20


async def test_large_families_in_protobuf_cost_some_pieces_of_memory_too() -> None:
    view = wide(40, 100_000).view(Query())
    tracemalloc.start()
    try:
        n_bytes, largest = await rendered_size(view, PROTOBUF, "identity")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > 10_000_000
    assert largest < 4 * PIECE_BYTES
    assert peak < 8 << 20


async def rendered_size(view: View, form: Format, coding: Coding) -> tuple[int, int]:
    n_bytes = largest = 0
    async for piece in render(view, form, coding):
        assert piece
        n_bytes += len(piece)
        largest = max(largest, len(piece))
    return n_bytes, largest


@pytest.mark.parametrize("coding", CODINGS)
async def test_others_get_their_turn_between_the_pieces(world: World, coding: Coding) -> None:
    view = wide(200, 100_000).view(Query())
    turns = 0
    is_done = False

    async def other() -> None:
        nonlocal turns
        while not is_done:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.get_running_loop().create_task(other())
    await rendered_size(view, TEXT, coding)
    is_done = True
    await task
    # 80 MB: 300 pieces, or as many goes of packing.
    assert turns >= 4


@pytest.mark.row("K18")
@pytest.mark.parametrize("coding", CODINGS)
async def test_answers_that_stream_while_rounds_come_hold_one_whole_round_of_each_sandbox(world: World, coding: Coding) -> None:
    store = Store(asyncio.get_running_loop().time)
    names = [f"s{n:02d}" for n in range(20)]
    pad = "p" * 3000

    def families(name: str, number: int) -> Families:
        return {f"f{n}": labelled(name, None, f"f{n}", {f'pad="{pad}",n="{k}"': number for k in range(5)}) for n in range(6)}

    for name in names:
        store.add(Target(name, "go", ""))
        store.replace(name, families(name, 0))
    is_done = False

    async def rounds() -> None:
        number = 0
        while not is_done:
            number += 1
            for name in names:
                if number % 5 == 4 and name == "s07":
                    store.remove(name)
                    store.add(Target(name, "go", ""))
                store.replace(name, families(name, number))
                await asyncio.sleep(0)

    task = asyncio.get_running_loop().create_task(rounds())
    try:
        for _ in range(4):
            answer = unpacked(await rendered(store.view(Query()), TEXT, coding), coding).decode()
            seen: dict[str, set[float]] = {name: set() for name in names}
            found = series_of(answer, TEXT)
            for (_name, labels), value in found.items():
                seen[dict(labels)["sandbox_id"]].add(value)
            assert [name for name, values in seen.items() if len(values) != 1] == []
            assert len(found) == len(names) * 30
    finally:
        is_done = True
        await task


async def test_only_codings_that_were_asked_for_are_made_and_new_rounds_get_them_at_once() -> None:
    now_s = 0.0
    store = Store(lambda: now_s)
    store.add(Target("a", "go", ""))

    def made() -> list[tuple[bool, bool]]:
        entry = store.get("a")
        assert entry is not None
        return [("gzip" in row.packs, "zstd" in row.packs) for row in entry.rows if row.fragments]

    store.replace("a", {"x": fragment("x 1\n")})
    await rendered(store.view(Query()), TEXT)
    assert made() == [(False, False)]
    await rendered(store.view(Query()), TEXT, "gzip")
    assert made() == [(True, False)]
    store.replace("a", {"x": fragment("x 2\n")})
    assert made() == [(True, False)]
    now_s += 3600
    store.replace("a", {"x": fragment("x 3\n")})
    assert made() == [(False, False)]
    await rendered(store.view(Query()), TEXT, "zstd")
    store.replace("a", {"x": fragment("x 4\n")})
    assert made() == [(False, True)]
