"""Scenes: sandboxes as they are put before kata-monitor and before the agent, and what both are asked.

A scene is data. `stage` plays it: folders and sockets below two roots, a shim behind each socket that answers what stands here. Sandboxes
have short names, so that recordings can be read; kata-monitor takes any.

What depends on chance is not asked: kata-monitor prints families in random order and cuts its answer at the first type that differs, so
bodies that break it stand in a scene of their own and are asked for by the family.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from isopod.pulse.pods import PodRow

DATA: Final = Path(__file__).parent.parent / "data"
GO_SAMPLE: Final = (DATA / "shim_sample.prom").read_bytes()
RUST_SAMPLE: Final = (DATA / "shim_sample_rs.prom").read_bytes()
HTML: Final = "text/html"
PLAIN: Final = "text/plain; charset=utf-8"
PROTOBUF: Final = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding="
ECHO: Final = b"asked for TARGET"
"""A shim puts the target of the request in the place of TARGET."""

Body = Literal["figures", "counts", "page", "lines", "bytes", "none"]
"""What is looked at of an answer: all families; what kata-monitor counts of itself; HTML; text; every byte; nothing."""


class Reply(NamedTuple):
    """What a shim answers; it is silent if `hangs`."""

    body: bytes
    status: int = 200
    kind: str = PLAIN
    disposition: str = ""
    hangs: bool = False


class Sandbox(NamedTuple):
    """A sandbox.

    Args:
        id: Its folder's name.
        replies: What its shim answers, by path; 404 to others. Without any there is no socket.
        root: Below which root.
    """

    id: str
    replies: Mapping[str, Reply]
    root: Literal["go", "rust"] = "go"


class Ask(NamedTuple):
    """A request.

    Args:
        name: Of the case.
        target: Path and query.
        body: What is looked at of a good answer; of one that is not 200, its lines.
        method: As it is sent.
        headers: Sent with it.
    """

    name: str
    target: str
    body: Body
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()


class Scene(NamedTuple):
    """Sandboxes, what the runtime says of them, and requests in their order."""

    name: str
    sandboxes: tuple[Sandbox, ...]
    pods: tuple[PodRow, ...]
    asks: tuple[Ask, ...]


# --- what shims say ---------------------------------------------------------------------------------------------------------------------

ODD: Final = rb"""# HELP kata_guest_odd A backslash \\ and \n a new line.
# TYPE kata_guest_odd gauge
kata_guest_odd{path="a\"b\\c\nd,}",empty=""} 1.5 1700000000123
kata_guest_odd{path="e"} +Inf
kata_guest_odd{path="f"} -Inf
kata_guest_odd{path="g"} NaN
kata_guest_odd{path="h"} 1e-300
kata_plain{a="1"} 3
# TYPE kata_untold untyped
kata_untold 4
# TYPE kata_reads_total counter
kata_reads_total 12345678901
# TYPE go_other gauge
go_other 1
# TYPE process_other counter
process_other 2
# TYPE kata_shim_threads gauge
# HELP kata_shim_threads THREADS
kata_shim_threads 9
"""
_THREADS: Final = next(line for line in GO_SAMPLE.split(b"\n") if line.startswith(b"# HELP kata_shim_threads "))


def _debug(owner: str) -> dict[str, Reply]:
    """Return what Go's debug pages of a shim say."""
    index = b"<html><a href='heap?debug=1'>h</a><a href=\"goroutine?debug=2\">g</a><a href='/x?y=z'>x</a><a href=trace?seconds=5>t</a>"
    return {
        "/agent-url": Reply(f"vsock://{owner}:1024".encode()),
        "/debug/vars": Reply(b'{"cmdline": ["shim"]}', kind="application/json; charset=utf-8"),
        "/debug/pprof/": Reply(index, kind="text/html; charset=utf-8"),
        "/debug/pprof/cmdline": Reply(b"shim\0-id\0" + owner.encode()),
        "/debug/pprof/profile": Reply(b"\x1f\x8bprofile", kind="application/octet-stream", disposition='attachment; filename="profile"'),
        "/debug/pprof/symbol": Reply(b"num_symbols: 1\n"),
        "/debug/pprof/trace": Reply(b"go 1.24 trace", kind="application/octet-stream"),
        "/debug/pprof/heap": Reply(ECHO),
        "/debug/pprof/goroutine": Reply(b"stopped", 500),
    }


def _says(text: bytes) -> dict[str, Reply]:
    return {"/metrics": Reply(text, kind="text/plain; version=0.0.4; charset=utf-8")}


# --- scenes -----------------------------------------------------------------------------------------------------------------------------


def _accept(kind: str) -> tuple[tuple[str, str], ...]:
    return (("accept", kind),)


def _coding(word: str) -> tuple[tuple[str, str], ...]:
    return (("accept-encoding", word),)


_INDEX: Final = (
    Ask("index", "/", "lines"),
    Ask("index html", "/", "page", headers=_accept(HTML)),
    Ask("index html second", "/", "page", headers=_accept("application/xml,text/html")),
    Ask("index html blank", "/", "lines", headers=_accept("*/*, text/html")),
    Ask("index html weight", "/", "lines", headers=_accept("text/html;q=0.9,*/*")),
    Ask("index html twice", "/", "page", headers=(("accept", "*/*"), ("accept", HTML))),
    Ask("index html all", "/", "lines", headers=_accept("*/*")),
    Ask("index POST", "/", "lines", "POST"),
    Ask("index HEAD", "/", "lines", "HEAD"),
    Ask("unknown", "/nowhere/at/all?x=y", "lines"),
    Ask("unknown html", "/nowhere", "page", headers=_accept(HTML)),
    Ask("unknown DELETE", "/nowhere", "lines", "DELETE"),
    Ask("no healthz", "/healthz", "lines"),
    Ask("no cadvisor", "/metrics/cadvisor", "lines"),
    Ask("no targets", "/targets", "lines"),
    Ask("readyz", "/readyz", "lines"),
    Ask("metrics slash", "/metrics/", "lines"),
    Ask("sandboxes slash", "/sandboxes/", "lines"),
    Ask("agent-url slash", "/agent-url/", "lines"),
    Ask("vars slash", "/debug/vars/", "lines"),
    Ask("debug", "/debug", "lines"),
    Ask("pprof without slash", "/debug/pprof", "lines"),
    Ask("pprof without slash query", "/debug/pprof?sandbox=web", "lines"),
    Ask("pprof without slash HEAD", "/debug/pprof", "lines", "HEAD"),
    Ask("pprof without slash POST", "/debug/pprof", "lines", "POST"),
    Ask("two slashes", "//sandboxes?a=b", "lines"),
    Ask("two slashes unknown", "/a//b", "lines"),
    Ask("two slashes pprof", "/debug//pprof/?sandbox=web", "lines"),
    Ask("dot", "/sandboxes/.", "lines"),
    Ask("dots", "/a/../sandboxes", "lines"),
    Ask("dots beyond", "/../../sandboxes", "lines"),
    Ask("escaped path", "/%73andboxes", "lines"),
    Ask("odd bytes in a path", "/%ff%00", "lines"),
    Ask("upper case", "/Sandboxes", "lines"),
)  # fmt: skip
_ONE: Final = "/metrics?filter_family=kata_guest_load"
_METRICS: Final = (
    Ask("metrics", "/metrics", "figures"),
    Ask("metrics openmetrics", _ONE, "figures", headers=_accept("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")),
    Ask("metrics any", _ONE, "figures", headers=_accept("*/*")),
    Ask("metrics application", _ONE, "figures", headers=_accept("application/*")),
    Ask("metrics text", _ONE, "figures", headers=_accept("text/plain;version=0.0.4")),
    Ask("metrics other version", _ONE, "figures", headers=_accept("text/plain;version=1.0.0")),
    Ask("metrics escaping", _ONE, "figures", headers=_accept("text/plain;version=0.0.4;escaping=dots")),
    Ask("metrics allow-utf-8", _ONE, "figures", headers=_accept("text/plain;version=0.0.4;escaping=allow-utf-8")),
    Ask("metrics protobuf", "/metrics?filter_family=kata_shim_", "figures", headers=_accept(f"{PROTOBUF}delimited")),
    Ask("metrics protobuf weight", _ONE, "figures", headers=_accept(f"{PROTOBUF}delimited;q=0.3,text/plain;q=0.7")),
    Ask("metrics protobuf text", _ONE, "none", headers=_accept(f"{PROTOBUF}text")),
    Ask("metrics protobuf compact", _ONE, "none", headers=_accept(f"{PROTOBUF}compact-text")),
    Ask("metrics gzip", _ONE, "figures", headers=_coding("gzip")),
    Ask("counts gzip", "/metrics", "counts", headers=_coding("gzip")),
    Ask("metrics gzip weight", _ONE, "figures", headers=_coding("deflate;q=1, gzip;q=0.5")),
    Ask("metrics gzip refused", _ONE, "figures", headers=_coding("gzip;q=0")),
    Ask("metrics identity", _ONE, "figures", headers=_coding("identity, gzip;q=0.5")),
    Ask("metrics x-gzip", _ONE, "figures", headers=_coding("x-gzip")),
    Ask("metrics zstd", _ONE, "figures", headers=_coding("zstd")),
    Ask("metrics zstd or gzip", _ONE, "figures", headers=_coding("zstd, gzip")),
    Ask("metrics any coding", _ONE, "figures", headers=_coding("*")),
    Ask("metrics other coding", _ONE, "figures", headers=_coding("deflate, br")),
    Ask("metrics gzip protobuf", _ONE, "figures", headers=(*_coding("gzip"), *_accept(f"{PROTOBUF}delimited"))),
    Ask("metrics POST", _ONE, "figures", "POST"),
    Ask("metrics PUT", _ONE, "figures", "PUT"),
    Ask("metrics DELETE", _ONE, "figures", "DELETE"),
    Ask("metrics OPTIONS", _ONE, "figures", "OPTIONS"),
    Ask("metrics HEAD", _ONE, "none", "HEAD"),
    Ask("metrics HEAD gzip", _ONE, "none", "HEAD", _coding("gzip")),
    Ask("filter several", "/metrics?filter_family=kata_guest_load,kata_agent_total_", "figures"),
    Ask("filter overlapping", "/metrics?filter_family=kata_agent_total_,kata_agent_total_rss", "figures"),
    Ask("filter same", "/metrics?filter_family=kata_shim_threads,kata_shim_threads", "figures"),
    Ask("filter blanks", "/metrics?filter_family=kata_guest_load,%20kata_agent_total_", "figures"),
    Ask("filter plus", "/metrics?filter_family=kata_guest_load,+kata_agent_total_", "figures"),
    Ask("filter only blank", "/metrics?filter_family=%20", "figures"),
    Ask("filter unknown", "/metrics?filter_family=nothing", "figures"),
    Ask("filter unknown gzip", "/metrics?filter_family=nothing", "figures", headers=_coding("gzip")),
    Ask("filter empty", "/metrics?filter_family=", "counts"),
    Ask("filter own", "/metrics?filter_family=kata_monitor", "figures"),
    Ask("filter upper case", "/metrics?filter_family=KATA_GUEST_LOAD", "figures"),
    Ask("filter before renaming", "/metrics?filter_family=go_,process_", "figures"),
    Ask("filter renamed", "/metrics?filter_family=kata_shim_go_,kata_shim_process_", "figures"),
    Ask("filter odd", "/metrics?filter_family=kata_guest_odd,kata_plain,kata_untold,kata_reads_total", "figures"),
    Ask("filter escaped comma", "/metrics?filter_family=kata_guest_load%2Ckata_shim_threads", "figures"),
    Ask("filter escaped name", "/metrics?filter%5Ffamily=kata%5Fguest%5Fload", "figures"),
    Ask("filter twice", "/metrics?filter_family=kata_guest_load&filter_family=kata_shim_threads", "figures"),
    Ask("filter after empty", "/metrics?filter_family=&filter_family=kata_shim_threads", "counts"),
    Ask("filter among others", "/metrics?match[]=up&filter_family=kata_guest_load&view=cadvisor&namespace=nobody", "figures"),
    Ask("filter after malformed", "/metrics?x=%zz&filter_family=kata_guest_load", "figures"),
    Ask("filter malformed", "/metrics?filter_family=kata_%zz", "counts"),
    Ask("filter semicolon", "/metrics?a=b;filter_family=kata_guest_load", "counts"),
    Ask("filter no utf-8", "/metrics?filter_family=%ff&x=%fe", "figures"),
    Ask("filter upper name", "/metrics?Filter_Family=kata_guest_load", "counts"),
    Ask("sandbox", "/metrics?sandbox=web", "bytes"),
    Ask("sandbox rust", "/metrics?sandbox=rs", "bytes"),
    Ask("sandbox odd", "/metrics?sandbox=db", "bytes"),
    Ask("sandbox both roots", "/metrics?sandbox=both", "bytes"),
    Ask("sandbox filter", "/metrics?sandbox=db&filter_family=kata_plain", "bytes"),
    Ask("sandbox gzip", "/metrics?sandbox=web", "bytes", headers=(*_coding("gzip"), *_accept(f"{PROTOBUF}delimited"))),
    Ask("sandbox html", "/metrics?sandbox=web", "bytes", headers=_accept(HTML)),
    Ask("sandbox POST", "/metrics?sandbox=db", "bytes", "POST"),
    Ask("sandbox HEAD", "/metrics?sandbox=db", "none", "HEAD"),
    Ask("sandbox escaped", "/metrics?sandbox=%77eb", "bytes"),
    Ask("sandbox twice", "/metrics?sandbox=db&sandbox=web", "bytes"),
    Ask("sandbox empty", "/metrics?sandbox=", "counts"),
    Ask("sandbox unknown", "/metrics?sandbox=nobody", "lines"),
    Ask("sandbox upper case", "/metrics?sandbox=WEB", "lines"),
    Ask("sandbox no socket", "/metrics?sandbox=late", "lines"),
    Ask("sandbox other folder", "/metrics?sandbox=../sbs/db", "bytes"),
    Ask("sandbox other folder escaped", "/metrics?sandbox=..%2Fkata%2Frs", "bytes"),
    Ask("sandbox slash", "/metrics?sandbox=/db/", "bytes"),
    Ask("sandbox dot", "/metrics?sandbox=.", "lines"),
)  # fmt: skip
_SANDBOXES: Final = (
    Ask("sandboxes", "/sandboxes", "lines"),
    Ask("sandboxes html", "/sandboxes", "page", headers=_accept("text/html,application/xhtml+xml;q=0.9")),
    Ask("sandboxes json", "/sandboxes?format=json", "lines", headers=_accept("application/json")),
    Ask("sandboxes PUT", "/sandboxes", "lines", "PUT"),
    Ask("sandboxes HEAD", "/sandboxes", "lines", "HEAD"),
)
_AGENT_URL: Final = (
    Ask("agent-url", "/agent-url?sandbox=web", "bytes"),
    Ask("agent-url rust", "/agent-url?sandbox=rs", "bytes"),
    Ask("agent-url failing", "/agent-url?sandbox=db", "bytes"),
    Ask("agent-url html", "/agent-url?sandbox=web", "bytes", headers=_accept(HTML)),
    Ask("agent-url POST", "/agent-url?sandbox=web", "bytes", "POST"),
    Ask("agent-url HEAD", "/agent-url?sandbox=web", "none", "HEAD"),
    Ask("agent-url missing", "/agent-url", "lines"),
    Ask("agent-url empty", "/agent-url?sandbox=", "lines"),
    Ask("agent-url unknown", "/agent-url?sandbox=nobody", "lines"),
    Ask("agent-url no socket", "/agent-url?sandbox=late", "lines"),
    Ask("agent-url other folder", "/agent-url?sandbox=../sbs/web", "bytes"),
)
_DEBUG: Final = (
    *(
        Ask(f"{page} {name}", f"{path}{query}", "bytes")
        for page, path in (
            ("vars", "/debug/vars"),
            ("pprof", "/debug/pprof/"),
            ("cmdline", "/debug/pprof/cmdline"),
            ("profile", "/debug/pprof/profile"),
            ("symbol", "/debug/pprof/symbol"),
            ("trace", "/debug/pprof/trace"),
            ("heap", "/debug/pprof/heap"),
        )
        for name, query in (("of one", "?sandbox=web"), ("of none", ""), ("of nobody", "?sandbox=nobody"))
    ),
    Ask("profile seconds", "/debug/pprof/profile?seconds=1&sandbox=web", "bytes"),
    Ask("heap query", "/debug/pprof/heap?debug=1&sandbox=web&gc=%31", "bytes"),
    Ask("heap other order", "/debug/pprof/heap?sandbox=web&gc=1+2&debug", "bytes"),
    Ask("failing page", "/debug/pprof/goroutine?sandbox=web", "bytes"),
    Ask("unknown page", "/debug/pprof/nosuch?sandbox=web", "bytes"),
    Ask("unknown page of none", "/debug/pprof/nosuch", "bytes"),
    Ask("page below", "/debug/pprof/a/b?sandbox=web", "bytes"),
    Ask("odd page", "/debug/pprof/a%20b?sandbox=web", "bytes"),
    Ask("debug other folder", "/debug/pprof/heap?sandbox=../sbs/web", "bytes"),
    Ask("debug no socket", "/debug/pprof/heap?sandbox=late", "bytes"),
    Ask("debug rust", "/debug/pprof/heap?sandbox=rs", "bytes"),
    Ask("debug POST", "/debug/pprof/symbol?sandbox=web", "bytes", "POST"),
    Ask("debug HEAD", "/debug/pprof/heap?sandbox=web", "none", "HEAD"),
)
PLAIN_SCENE: Final = Scene(
    "plain",
    (
        Sandbox("web", _says(GO_SAMPLE) | _debug("web")),
        Sandbox("db", _says(ODD.replace(b"# HELP kata_shim_threads THREADS", _THREADS)) | {"/agent-url": Reply(b"no agent", 500)}),
        Sandbox("rs", _says(RUST_SAMPLE) | {"/agent-url": Reply(b"hvsock:///x:1024")}, "rust"),
        Sandbox("both", _says(_THREADS + b"\n# TYPE kata_shim_threads gauge\nkata_shim_threads 1\n")),
        Sandbox("both", _says(b"kata_shim_threads 2\n"), "rust"),
        Sandbox("late", {}),
    ),
    (
        PodRow("web", "uid-web", "web-0", "prod", labels=(("app", "web"),), runtime_handler="kata"),
        PodRow("db", "uid-db", 'd"b\\', "te\nam"),
        PodRow("rs", "uid-rs", "rs-0", "prod"),
        PodRow("other", "uid-other", "other-0", "prod"),
    ),
    (*_INDEX, *_METRICS, *_SANDBOXES, *_AGENT_URL, *_DEBUG, Ask("counts last", "/metrics", "counts")),
)
EMPTY_SCENE: Final = Scene(
    "empty",
    (),
    (),
    (
        Ask("metrics", "/metrics", "figures"),
        Ask("metrics filter", _ONE, "figures"),
        Ask("metrics gzip", _ONE, "figures", headers=_coding("gzip")),
        Ask("sandbox", "/metrics?sandbox=web", "lines"),
        Ask("sandboxes", "/sandboxes", "lines"),
        Ask("sandboxes html", "/sandboxes", "page", headers=_accept(HTML)),
        Ask("agent-url", "/agent-url?sandbox=web", "lines"),
        Ask("debug", "/debug/vars?sandbox=web", "lines"),
        Ask("index", "/", "lines"),
    ),
)
BROKEN_SCENE: Final = Scene(
    "broken",
    (
        Sandbox("good", _says(b"# TYPE kata_x gauge\nkata_x 1\n# TYPE kata_kind gauge\nkata_kind 1\n")),
        Sandbox("line", _says(b"# TYPE kata_line gauge\nkata_line 1\nthis is no line\n")),
        Sandbox("kind", _says(b"# TYPE kata_kind counter\nkata_kind 2\n")),
        Sandbox("label", _says(b'# TYPE kata_label gauge\nkata_label{sandbox_id="mine"} 1\n')),
        Sandbox("twice", _says(b"# TYPE kata_twice gauge\nkata_twice 1\nkata_twice 2\n")),
        Sandbox("again", _says(b'# TYPE kata_again gauge\nkata_again 1\n# TYPE kata_between gauge\nkata_between 1\nkata_again{a="b"} 2\n')),
        Sandbox("cut", _says(b"# TYPE kata_cut gauge\nkata_cut 1\nkata_cut2 12")),
        Sandbox("fails", {"/metrics": Reply(b"# TYPE kata_fails gauge\nkata_fails 1\n", 500)}),
        Sandbox("page", _says(b"<html><script>alert(1)</script></html>\n")),
        Sandbox("empty", _says(b"")),
        Sandbox("wrapped", _says(b'# TYPE kata_wrapped gauge\nkata_wrapped{a="1"} 18446744073709551000\nkata_wrapped{a="2"} 5\n')),
    ),
    (),
    (
        *(Ask(name, f"/metrics?filter_family=kata_{name}", "figures") for name in ("x", "line", "label", "twice", "cut", "fails")),
        Ask("kind", "/metrics?filter_family=kata_kind,kata_x", "figures"),
        Ask("again", "/metrics?filter_family=kata_again", "figures"),
        Ask("wrapped", "/metrics?filter_family=kata_wrapped", "figures"),
        Ask("counted", "/metrics", "counts"),
        Ask("sandboxes", "/sandboxes", "lines"),
        *(Ask(f"sandbox {name}", f"/metrics?sandbox={name}", "bytes") for name in ("line", "cut", "fails", "page", "empty")),
    ),
)  # fmt: skip
HUNG_SCENE: Final = Scene(
    "hung",
    (
        Sandbox("good", _says(b"# TYPE kata_x gauge\nkata_x 1\n")),
        Sandbox("hung", {"/metrics": Reply(b"", hangs=True), "/agent-url": Reply(b"", hangs=True)}),
    ),
    (),
    (
        Ask("metrics", "/metrics?filter_family=kata_x", "figures"),
        Ask("sandbox", "/metrics?sandbox=hung", "lines"),
        Ask("agent-url", "/agent-url?sandbox=hung", "lines"),
        Ask("sandboxes", "/sandboxes", "lines"),
        Ask("counted", "/metrics", "counts"),
    ),
)
SCENES: Final = (PLAIN_SCENE, EMPTY_SCENE, BROKEN_SCENE, HUNG_SCENE)
