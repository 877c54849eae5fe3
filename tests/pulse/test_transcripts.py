"""Every route's status, header fields and body, as they are written down: what a client may rely on.

`ISOPOD_REWRITE_TRANSCRIPTS=1 pytest tests/pulse/test_transcripts.py` writes the transcripts anew, to be reviewed as a diff. They are made
in the simulation. Left out are the date, the version's number, what depends on how fast the simulation's machine is, and settings that are
defaults, but for the first.
"""

import os
import re
from pathlib import Path
from typing import Any, Final

import pytest

from isopod.net.http.status import REASONS
from isopod.pulse.own import Durations, Facts
from isopod.pulse.policy import PolicyFile
from isopod.pulse.rates import Row
from isopod.pulse.server import ROUTES
from isopod.pulse.shims import ShimAnswer, ShimError
from isopod.pulse.strict import ENDPOINTS
from isopod.world.sim import SimWorld
from tests.pulse.server_kit import HOSTILE, ROOTS, WEB, Rig
from tests.telemetry.kit import Memo

HERE: Final = Path(__file__).parent / "transcripts"
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "pulse.md"
BROWSER: Final = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
OPEN: Final = {"accept": "application/openmetrics-text;version=1.0.0"}
PROTOBUF: Final = {"accept": "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}
LEFT_OUT: Final = frozenset(("date",))
VERSION: Final = re.compile(r'(?<=version=")[0-9.]+|(?<="version":")[0-9.]+|(?<=^# isopod pulse )[0-9.]+')
DEFAULTS: Final = re.compile(
    r"(?m)^  (?!listen)\w+: .*  # default\n|^<tr><td>(?!listen)\w+</td><td>.*?</td><td>default</td></tr>\n"
    r'|,\{"name":"(?!listen)\w+","value":[^{}]*?,"origin":"default"\}'
)
READ_AT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
SECONDS: Final = re.compile(
    r"(?m)^((?:kata_monitor_process_(?:cpu|start_time)|kata_pulse_(?:cache_age|sandbox_age|stage))_seconds(?:_total)?(?:\{.*\})?) .*$"
)

Asked = tuple[str, str, dict[str, str]]

ROUTES_ASKED: Final[tuple[Asked, ...]] = (
    ("GET", "/", {}),
    ("GET", "/", BROWSER),
    ("GET", "/?format=json", {}),
    ("HEAD", "/", {}),
    ("GET", "/metrics", {}),
    ("HEAD", "/metrics", {}),
    ("GET", "/metrics?sandbox=a", {}),
    ("GET", "/metrics?sandbox=a", OPEN),
    ("GET", "/metrics?filter_family=kata_guest,kata_agent&namespace=prod", {}),
    ("GET", "/metrics?family=kata_guest_load,kata_pulse_sandboxes_up&family=nothing", {}),
    ("GET", "/metrics?family=kata_guest_load&pod=web-0&view=kata", {}),
    ("GET", "/metrics?match[]=kata_guest_load", {}),
    ("GET", "/metrics?family=kata_guest_load", PROTOBUF),
    ("GET", "/metrics?family=kata_guest_load", {"accept-encoding": "gzip"}),
    ("GET", "/metrics?family=kata_guest_load", {"accept-encoding": "gzip;q=0.5, zstd"}),
    ("GET", "/metrics?family=kata_guest_load", {"if-none-match": "*"}),
    ("GET", "/metrics/cadvisor", {}),
    ("HEAD", "/metrics/cadvisor", {}),
    ("GET", "/metrics/cadvisor?family=container_memory_usage_bytes", {}),
    ("GET", "/metrics/cadvisor", OPEN),
    ("GET", "/metrics/resource", {}),
    ("GET", "/metrics/resource?namespace=nowhere", {}),
    ("GET", "/sandboxes", {}),
    ("GET", "/sandboxes", BROWSER),
    ("GET", "/sandboxes", {"accept": "application/json"}),
    ("GET", "/targets", {}),
    ("GET", "/targets", BROWSER),
    ("GET", "/targets?format=json", {}),
    ("GET", "/top", {}),
    ("GET", "/top", BROWSER),
    ("GET", "/top?format=json", {}),
    ("GET", "/config", {}),
    ("GET", "/config", BROWSER),
    ("GET", "/config?format=json", {}),
    ("GET", "/agent-url?sandbox=a", {}),
    ("GET", "/healthz", {}),
    ("GET", "/readyz", {}),
)
FAILURES_ASKED: Final[tuple[Asked, ...]] = (
    ("GET", "/nowhere", {}),
    ("GET", "/nowhere", BROWSER),
    ("POST", "/metrics", {}),
    ("OPTIONS", "/metrics", {}),
    ("GET", "/metrics?sandbox=nobody", {}),
    ("GET", "/metrics?sandbox=new", {}),
    ("GET", "/metrics?sandbox=down", {}),
    ("GET", "/metrics?namespace=nowhere", {}),
    ("GET", "/metrics?match[]={", {}),
    ("GET", "/metrics?view=other", {}),
    ("GET", "/metrics?sandbox=%ff", {}),
    ("GET", "/metrics?x=" + "y" * 8200, {}),
    ("GET", "/metrics", {"x": "y" * 17_000}),
    ("GET", "/metrics/resource?sandbox=nobody", {}),
    ("GET", "/sandboxes?format=xml", {}),
    ("GET", "/agent-url", {}),
    ("GET", "/agent-url?sandbox=../a", {}),
    ("GET", "/agent-url?sandbox=nobody", {}),
    ("GET", "/agent-url?sandbox=down", {}),
    ("GET", "/agent-url?sandbox=plain", {}),
    ("GET", "/debug/vars?sandbox=a", {}),
    ("GET", "/debug/pprof/", {}),
    ("PUT", "/config", {}),
    ("GET", "/-/reload", {}),
    ("PUT", "/-/reload", {}),
    ("POST", "/-/reload", {}),
    ("GET", "/healthz", {"host": "evil.example"}),
    ("PUT", "/-/reload", {"host": "evil.example"}),
    ("GET", "/readyz", {}),
)
STRICT_ASKED: Final[tuple[Asked, ...]] = (
    ("GET", "/", {}),
    ("GET", "/nowhere", {"accept": "text/html"}),
    ("GET", "/metrics", {}),
    ("GET", "/metrics?filter_family=kata_guest,kata_agent", {}),
    ("GET", "/metrics?sandbox=a", {}),
    ("GET", "/metrics?sandbox=nobody", {}),
    ("GET", "/sandboxes", {}),
    ("GET", "/sandboxes", {"accept": "text/html"}),
    ("GET", "/agent-url?sandbox=a", {}),
    ("GET", "/agent-url", {}),
    ("GET", "/agent-url?sandbox=down", {}),
    ("GET", "/readyz", {}),
    ("GET", "/debug/vars?sandbox=a", {}),
    ("GET", "/debug/pprof/", {}),
    ("GET", "/debug/pprof/?sandbox=a", {}),
    ("GET", "/debug/pprof/heap?sandbox=down", {}),
)
PPROF_ASKED: Final[tuple[Asked, ...]] = (
    ("GET", "/debug/vars?sandbox=a", {}),
    ("GET", "/debug/pprof/", {}),
    ("GET", "/debug/pprof/?sandbox=a", {}),
    ("GET", "/debug/pprof/heap?sandbox=down", {}),
    ("GET", "/debug/pprof/../vars?sandbox=a", {}),
)
BEARER: Final = {"authorization": "Bearer the-token"}
GUARDED_ASKED: Final[tuple[Asked, ...]] = (
    ("GET", "/healthz", {}),
    ("GET", "/readyz", {}),
    ("GET", "/metrics", {}),
    ("GET", "/nowhere", {}),
    ("PUT", "/-/reload", {}),
    ("GET", "/metrics?family=kata_guest_load&sandbox=a", BEARER),
    ("GET", "/metrics?family=kata_guest_load&sandbox=a", {"authorization": "Basic YW5uYTpzZXNhbWU="}),
    ("GET", "/sandboxes", {"authorization": "Basic YW5uYTpzZXNhbQ=="}),
    ("GET", "/sandboxes", {"authorization": "Basic bm9ib2R5OnNlc2FtZQ=="}),
    ("GET", "/-/reload", BEARER),
    ("PUT", "/-/reload", BEARER),
    ("POST", "/-/reload", {**BEARER, "accept": "application/json"}),
    ("POST", "/-/reload", {**BEARER, "origin": "http://evil.example"}),
    ("PUT", "/-/reload", {**BEARER, "host": "evil.example"}),
    ("GET", "/config", BEARER),
    ("GET", "/config?format=json", BEARER),
)
REFUSED_ASKED: Final[tuple[Asked, ...]] = (
    ("PUT", "/-/reload", {}),
    ("PUT", "/-/reload", {"accept": "application/json"}),
    ("GET", "/config", {}),
)
SCENES: Final[dict[str, tuple[tuple[Asked, ...], dict[str, Any]]]] = {
    "routes": (ROUTES_ASKED, {}),
    "failures": (FAILURES_ASKED, {}),
    "strict": (STRICT_ASKED, {"strict_compat": True, "pprof": True}),
    "pprof": (PPROF_ASKED, {"pprof": True}),
    "guarded": (GUARDED_ASKED, {"enable_lifecycle": True, "token_file": "token", "basic_auth_file": "users", "policy_file": "policy"}),
    "refused": (REFUSED_ASKED, {"enable_lifecycle": True, "policy_file": "policy"}),
}
FILES: Final = {
    "token": b"the-token\n",
    "users": b"anna:$2b$04$abcdefghijklmnopqrstuuinwY/tkBVrn3xrxQI/TgnMHhkvl85RW\n",
    "policy": b"namespaces: {deny: [kube-system]}\nfamily_intervals_s: {kata_guest_vm_stat: 300}\n",
}
"""Where a setting of a scene names one of them, it lies in the test's folder."""
NONSENSE: Final = b"namespaces: {forbid: [kube-system]}\n"


@pytest.mark.row("K27", "K3", "K6", "K19")
@pytest.mark.parametrize("name", SCENES)
async def test_transcript(sim_world: SimWorld, folder: str, name: str) -> None:
    asked, settings = SCENES[name]
    world = sim_world.world
    for file, content in FILES.items():
        await world.disk.write(f"{folder}/{file}", content)
    told: dict[str, Any] = {key: f"{folder}/{value}" if value in FILES else value for key, value in settings.items()}
    policy = None
    if "policy_file" in told:
        policy = PolicyFile(world.disk, told["policy_file"], on_change=lambda _: None, clock=world.clock, logger=Memo(world.clock).logger)
        await policy.open()
    origins = {field: f"flag --{field.replace('_', '-')}" for field in settings}
    async with Rig(world, facts=facts_of(name), policy=policy, origins=origins, **told) as rig:
        furnish(rig)
        if name == "refused":
            await world.disk.write_atomic(f"{folder}/policy", NONSENSE)
        text = "\n".join([await exchange(rig, *each) for each in asked])
    path = HERE / f"{name}.txt"
    if os.environ.get("ISOPOD_REWRITE_TRANSCRIPTS") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.row("K27")
def test_every_route_is_in_a_transcript() -> None:
    seen = {path.partition("?")[0] for asked, _ in SCENES.values() for _, path, _ in asked}
    assert {*ROUTES} <= seen
    strict = {path.partition("?")[0] for _, path, _ in STRICT_ASKED}
    assert {path for path in ENDPOINTS if not path.startswith("/debug/pprof/")} <= strict


@pytest.mark.row("K27")
def test_what_the_documentation_says_is_in_a_transcript() -> None:
    """Its paths, its codes, and the fields of answers; what needs time or a crowd has tests of its own."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("\n## What the agent serves\n")[2].partition("\n## ")[0]
    table = section.partition("| path | what |")[2].partition("\n\n")[0]
    paths = {path.partition("?")[0].rstrip("*") for path in re.findall(r"`(/[^`]*)`", table)}
    assert paths == {"/", *ROUTES}
    written = "".join((HERE / f"{name}.txt").read_text(encoding="utf-8") for name in SCENES)
    shown = {int(code) for code in re.findall(r"(?m)^< (\d{3})$", written)}
    told = {int(code) for code in re.findall(r"\b\d{3}\b", section) if int(code) in REASONS}
    assert told - shown == {307, 408, 429}, "the first is followed by the client here"
    assert shown - told == set()
    fields = {"allow", "cache-control", "content-encoding", "content-security-policy", "content-type", "etag", "location"}
    fields |= {"referrer-policy", "retry-after", "transfer-encoding", "vary", "www-authenticate", "x-content-type-options", "x-go-pprof"}
    assert set(re.findall(r"(?m)^< ([a-z-]+):", written)) - {"connection", "content-length"} <= fields
    for name in ("ETag", "Retry-After", "Allow", "WWW-Authenticate"):
        assert f"`{name}" in section and f"< {name.lower()}: " in written, name


def facts_of(name: str) -> Facts:
    row = Row(
        id="a", name="web-0", namespace="prod", cpu_cores=0.25, memory_bytes=4096, received_bytes_per_s=10.0, sent_bytes_per_s=None,
        read_bytes_per_s=0.0, written_bytes_per_s=1.5, age_s=2.5, up=True,
    )  # fmt: skip
    return Facts(
        roots=dict.fromkeys(ROOTS, False) if name == "failures" else ROOTS,
        rows=lambda: [row],
        requests={"ok": 2, "timeout": 1},
        durations=Durations((0.001, 0.01), (1, 1, 1), 3.004),
        cri_calls={"ok": 1},
        cri_up=True,
        stages_s={"read": 0.001},
    )


def furnish(rig: Rig) -> None:
    """Fill the store: one that is well, one new, one down, one whose pod is named by an enemy, a container of isopod's."""
    socket = rig.fill("a", WEB)
    rig.fill("hostile", HOSTILE)
    rig.add("new", "rust")
    down = rig.add("down")
    rig.store.fail("down", "timeout", 3.0)
    rig.fill("plain", runtime="isopod")
    answers = rig.shims.answers
    answers[socket, "/agent-url"] = ShimAnswer(200, (), b"vsock://3:1024")
    answers[down, "/agent-url"] = ShimError("timeout", "no answer within 3 s")
    for path in ("/debug/vars", "/debug/pprof/"):
        body = b"<a href='heap?debug=1'>heap</a>\n" if path.endswith("/") else b'{"cmdline": []}\n'
        answers[socket, f"{path}?sandbox=a"] = ShimAnswer(200, (("Content-Type", "text/html"), ("Server", "x")), body)
    answers[down, "/debug/pprof/heap?sandbox=down"] = ShimError("refused", "cannot connect")


async def exchange(rig: Rig, method: str, path: str, headers: dict[str, str]) -> str:
    """Return a request and its answer as text."""
    answer = await rig.ask(path, method, **headers)
    is_binary = "content-encoding" in answer.headers or "protobuf" in answer.headers.get("content-type", "")
    text = "(binary)\n" if is_binary else READ_AT.sub("TIME", DEFAULTS.sub("", answer.text))
    body = SECONDS.sub(r"\1 SECONDS", VERSION.sub("VERSION", text))
    if is_binary or body != answer.text or "etag" in answer.headers:
        answer.headers.pop("content-length", None)
    lines = [f"> {method} {_short(path)}", *(f"> {name}: {_short(value)}" for name, value in headers.items()), f"< {answer.status}"]
    lines += [f"< {name}: {value}" for name, value in sorted(answer.headers.items()) if name not in LEFT_OUT]
    return "\n".join(lines) + "\n" + (f"\n{body}" if body else "") + ("" if body.endswith("\n") or not body else "\n(no line end)\n")


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:40]}... ({len(text)} characters)"
