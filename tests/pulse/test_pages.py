"""Pages: what is chosen by whom, and that names written by others stay text."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from isopod.net.http.messages import HttpError
from isopod.pulse import pages
from isopod.pulse.own import Facts
from isopod.pulse.rates import Row
from isopod.world.errors import InvalidArgument
from isopod.world.world import World
from tests.pulse.server_kit import DB, HOSTILE, ROOTS, WEB, Rig

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
ROW = Row(
    id="a",
    name="web-0",
    namespace="prod",
    cpu_cores=0.25,
    memory_bytes=4096,
    received_bytes_per_s=10.0,
    sent_bytes_per_s=None,
    read_bytes_per_s=0.0,
    written_bytes_per_s=1.5,
    age_s=2.5,
    up=True,
)


@pytest.mark.row("K3")
@pytest.mark.parametrize(
    ("wanted", "accept", "kind"),
    [
        ("", "", "text"),
        ("", "*/*", "text"),
        ("", BROWSER, "html"),
        ("", "application/json", "json"),
        ("", "application/*", "json"),
        ("", "text/*", "text"),
        ("", "text/html;q=0.2, application/json;q=0.9", "json"),
        ("", "text/html;q=0", "text"),
        ("", "text/html;q=nonsense, */*;q=0.1", "text"),
        ("", "text/html;q=2", "text"),
        ("", "image/png", "text"),
        ("", ",;,;;q=1,", "text"),
        ("", "TEXT/HTML", "html"),
        ("json", BROWSER, "json"),
        ("html", "", "html"),
        ("text", BROWSER, "text"),
    ],
)
def test_the_form_is_chosen_by_format_then_by_accept(wanted: str, accept: str, kind: str) -> None:
    assert pages.choose(wanted, accept) == kind


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(HttpError, match="no such format: x") as caught:
        pages.choose("xml", "")
    assert caught.value.status == 400


@pytest.mark.row("K3")
async def test_the_index_names_all_routes(world: World) -> None:
    async with Rig(world) as rig:
        plain, shown, told = await rig.ask("/"), await rig.ask("/", accept=BROWSER), await rig.ask("/?format=json")
    assert plain.text.startswith("Available HTTP endpoints:\n/metrics ")
    paths = [entry["path"] for entry in json.loads(told.body)["endpoints"]]
    assert {
        "/metrics",
        "/metrics/cadvisor",
        "/metrics/resource",
        "/sandboxes",
        "/agent-url",
        "/targets",
        "/top",
        "/healthz",
        "/readyz",
    } <= {*paths}
    for path in paths:
        assert re.search(rf"^{re.escape(path)} +: \S", plain.text, re.MULTILINE)
        assert path in shown.text
    assert (plain.headers["content-type"], shown.headers["content-type"]) == ("text/plain; charset=utf-8", "text/html; charset=utf-8")


@pytest.mark.row("K6", "K25")
async def test_sandboxes_in_three_forms(world: World) -> None:
    async with Rig(world) as rig:
        assert (await rig.ask("/sandboxes")).text == "No sandboxes running\n"
        assert json.loads((await rig.ask("/sandboxes?format=json")).body) == {"sandboxes": []}
        rig.fill("a", WEB)
        rig.add("b")
        rig.store.fail("b", "timeout", 3.0)
        plain = (await rig.ask("/sandboxes")).text
        shown = (await rig.ask("/sandboxes", accept=BROWSER)).text
        first, second = json.loads((await rig.ask("/sandboxes", accept="application/json")).body)["sandboxes"]
    assert plain.startswith("ID: a\n  UID: 0d3b\n  Name: web-0\n  Namespace: prod\n")
    assert "ID: b\n  UID: <unknown>\n  Name: <unknown>\n  Namespace: <unknown>\n" in plain
    assert re.search(r"^  Age: [0-9.]+s$", plain, re.MULTILINE) and "  Took: 0.002s\n" in plain and "  Error: timeout\n" in plain
    age_s = first.pop("age_s")
    assert 0 <= age_s < 60
    assert first == {
        "id": "a", "uid": "0d3b", "name": "web-0", "namespace": "prod", "runtime": "go", "up": True, "error": "",
        "took_s": 0.002, "bytes": 99, "series": 8, "failures": 0, "dropped": {},
    }  # fmt: skip
    assert (second["up"], second["error"], second["age_s"], second["failures"], second["took_s"]) == (False, "timeout", None, 1, 3.0)
    assert "<th>ID</th><th>UID</th><th>Name</th><th>Namespace</th>" in shown
    assert '<a href="/metrics?sandbox=a">' in shown
    assert "&lt;unknown&gt;" in shown, "not invisible, as a tag would be"


@pytest.mark.row("K25")
async def test_targets_say_how_asking_goes(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        for name in ("b", "c"):
            rig.add(name, "rust")
        rig.store.fail("b", "refused", 0.1)
        rows = json.loads((await rig.ask("/targets?format=json")).body)["targets"]
        lines = (await rig.ask("/targets")).text.splitlines()
        shown = (await rig.ask("/targets", accept="text/html")).text
    assert [(row["id"], row["state"], row["error"], row["failures"], row["rounds"]) for row in rows] == [
        ("a", "up", "", 0, 1),
        ("b", "down", "refused", 1, 0),
        ("c", "pending", "", 0, 0),
    ]
    assert rows[0]["socket"] == "/run/vc/sbs/a/shim-monitor.sock"
    assert [line.split()[:3] for line in lines] == [
        ["STATE", "SANDBOX", "RUNTIME"],
        ["up", "a", "go"],
        ["down", "b", "rust"],
        ["pending", "c", "rust"],
    ]
    assert '<td class="bad">refused</td>' in shown


async def test_top_shows_rates(world: World) -> None:
    async with Rig(world, facts=Facts(roots=ROOTS, rows=lambda: [ROW])) as rig:
        assert json.loads((await rig.ask("/top?format=json")).body) == {
            "sandboxes": [
                {
                    "id": "a", "name": "web-0", "namespace": "prod", "cpu_cores": 0.25, "memory_bytes": 4096, "received_bytes_per_s": 10.0,
                    "sent_bytes_per_s": None, "read_bytes_per_s": 0.0, "written_bytes_per_s": 1.5, "age_s": 2.5, "up": True,
                }
            ]
        }  # fmt: skip
        plain = (await rig.ask("/top")).text.splitlines()
        assert plain[1].split() == ["a", "prod", "web-0", "0.250", "4096", "10.000", "-", "0.000", "1.500", "2.500s"]
        assert '<td class="number">0.250</td>' in (await rig.ask("/top", accept="text/html")).text


class Tags(HTMLParser):
    """Collects what is markup in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


async def test_names_written_by_others_stay_text(world: World) -> None:
    """Names of pods may hold anything: no tag, no attribute, no script, no line and no terminal's escape comes of them."""
    async with Rig(world) as rig:
        rig.fill("a", HOSTILE)
        rig.fill('x"><img src=x onerror=alert(1)>', DB)
        row = Row(**{name: getattr(ROW, name) for name in Row.__struct_fields__} | {"name": HOSTILE.name})
        rig.facts = rig.facts._replace(rows=lambda: [row])
        for path in ("/sandboxes", "/targets", "/top"):
            answer = await rig.ask(path, accept=BROWSER)
            found = Tags(answer.text)
            assert {"script", "img", "i"}.isdisjoint(found.tags), path
            assert {*found.attributes} <= {"lang", "charset", "href", "class"}, path
            plain = (await rig.ask(path)).text
            assert "\x1b" not in plain
            assert "\nID: forged" not in plain
        shown = (await rig.ask("/sandboxes", accept=BROWSER)).text
        assert html.escape("<script>alert(1)</script>") in shown
        link = re.search(r'href="(/metrics\?sandbox=x[^"]*)"', shown)
        assert link is not None
        assert (await rig.ask(html.unescape(link[1]))).status == 200, "the link leads to the sandbox for all its quotes"


async def test_pages_let_nothing_run(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        for path in ("/", "/sandboxes", "/targets", "/top"):
            answer = await rig.ask(path, accept="text/html")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "<script" not in answer.text


def test_what_cannot_be_printed_is_escaped() -> None:
    assert pages.printable("plain – text") == "plain – text"
    assert pages.printable("a\nb\x1b[0m\u202e\x00") == "a\\nb\\x1b[0m\\u202e\\x00"
    assert pages.escaped("'\"<>&\n") == "&#x27;&quot;&lt;&gt;&amp;\\n"
    answer = pages.error_text(400, InvalidArgument("x", "y\r\nz", "why").message, "do\nthat")
    assert answer.body.count(b"\n") == 2  # type: ignore[union-attr]  # it is bytes
