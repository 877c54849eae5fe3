"""Every route's status, header fields and body, as they are written down: what a client may rely on.

`ISOPOD_REWRITE_TRANSCRIPTS=1 pytest tests/pulse/test_transcripts.py` writes the transcripts anew, to be reviewed as a diff. They are made
in the simulation. Left out are the date, the version's number, and what depends on how fast the simulation's machine is.
"""

import os
import re
from pathlib import Path
from typing import Any, Final

import pytest

from isopod.pulse.own import Durations, Facts
from isopod.pulse.rates import Row
from isopod.pulse.server import ROUTES
from isopod.pulse.shims import ShimAnswer, ShimError
from isopod.pulse.strict import ENDPOINTS
from isopod.world.sim import SimWorld
from tests.pulse.server_kit import HOSTILE, ROOTS, WEB, Rig

HERE: Final = Path(__file__).parent / "transcripts"
BROWSER: Final = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
OPEN: Final = {"accept": "application/openmetrics-text;version=1.0.0"}
LEFT_OUT: Final = frozenset(("date",))
VERSION: Final = re.compile(r'(?<=version=")[0-9.]+')
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
    ("GET", "/metrics?match[]=kata_guest_load", {}),
    ("GET", "/metrics/cadvisor", {}),
    ("GET", "/metrics/cadvisor", OPEN),
    ("GET", "/metrics/resource", {}),
    ("GET", "/sandboxes", {}),
    ("GET", "/sandboxes", BROWSER),
    ("GET", "/sandboxes", {"accept": "application/json"}),
    ("GET", "/targets", {}),
    ("GET", "/targets", BROWSER),
    ("GET", "/targets?format=json", {}),
    ("GET", "/top", {}),
    ("GET", "/top", BROWSER),
    ("GET", "/top?format=json", {}),
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
    ("GET", "/metrics/resource?sandbox=nobody", {}),
    ("GET", "/sandboxes?format=xml", {}),
    ("GET", "/agent-url", {}),
    ("GET", "/agent-url?sandbox=../a", {}),
    ("GET", "/agent-url?sandbox=nobody", {}),
    ("GET", "/agent-url?sandbox=down", {}),
    ("GET", "/agent-url?sandbox=plain", {}),
    ("GET", "/debug/vars?sandbox=a", {}),
    ("GET", "/debug/pprof/", {}),
    ("GET", "/healthz", {"host": "evil.example"}),
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
SCENES: Final[dict[str, tuple[tuple[Asked, ...], dict[str, Any]]]] = {
    "routes": (ROUTES_ASKED, {}),
    "failures": (FAILURES_ASKED, {}),
    "strict": (STRICT_ASKED, {"strict_compat": True, "pprof": True}),
    "pprof": (PPROF_ASKED, {"pprof": True}),
}


@pytest.mark.row("K27", "K3", "K6", "K19")
@pytest.mark.parametrize("name", SCENES)
async def test_transcript(sim_world: SimWorld, name: str) -> None:
    asked, settings = SCENES[name]
    async with Rig(sim_world.world, facts=facts_of(name), **settings) as rig:
        furnish(rig)
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
    body = SECONDS.sub(r"\1 SECONDS", VERSION.sub("VERSION", answer.text))
    if body != answer.text or "etag" in answer.headers:
        answer.headers.pop("content-length", None)
    lines = [f"> {method} {path}", *(f"> {name}: {value}" for name, value in headers.items()), f"< {answer.status}"]
    lines += [f"< {name}: {value}" for name, value in sorted(answer.headers.items()) if name not in LEFT_OUT]
    return "\n".join(lines) + "\n" + (f"\n{body}" if body else "") + ("" if body.endswith("\n") or not body else "\n(no line end)\n")
