"""The agent without any privilege: no capability, nothing that can be written, and the system calls of its unit alone."""

import asyncio
import base64
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import bcrypt
import msgspec
import pytest

from isopod.net.http.client import HttpClient
from isopod.world.world import World
from tests.pulse.confined import command
from tests.pulse.shims import FakeShims

pytestmark = [pytest.mark.host, pytest.mark.row("T21")]
UNIT: Final = Path(__file__).parents[2] / "deploy" / "systemd" / "isopod-pulse.service"
NUMBERS: Final = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
PROGRAM: Final = "import sys; sys.path.insert(0, {src!r}); from isopod.cli.main import main; sys.exit(main(sys.argv[1:]))"
NOBODY: Final = 65534
LIMIT_S: Final = 60.0
STOP_S: Final = 10.0
BASIC: Final = "Basic " + base64.b64encode(b"anna:sesame").decode()


def groups(text: str) -> dict[str, list[str]]:
    """Return the sets of system calls that systemd knows, with what is in them."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        word = line.strip()
        if line.startswith("@"):
            name = word
            found[name] = []
        elif word and not word.startswith("#") and name:
            found[name].append(word)
    return found


def calls_of(words: list[str], known: dict[str, list[str]]) -> list[str]:
    """Return the calls of sets and names."""
    found: list[str] = []
    for word in words:
        found += calls_of(known[word], known) if word.startswith("@") else [word]
    return found


def allowed() -> list[int]:
    """Return the numbers of the system calls that the unit's filters leave; skips where nobody knows them."""
    for tool in ("setpriv", "unshare", "systemd-analyze"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not NUMBERS.exists():
        pytest.skip(f"{NUMBERS} is missing: the numbers of the system calls of this kind of processor")
    told = subprocess.run(["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True, timeout=30)
    known = groups(told.stdout)
    left: dict[str, None] = {}
    for line in re.findall(r"(?m)^SystemCallFilter=(.*)$", UNIT.read_text()):
        calls = calls_of([*line.removeprefix("~").split(), *([] if line.startswith("~") else ["@default"])], known)
        left = {call: None for call in left if call not in calls} if line.startswith("~") else {**left, **dict.fromkeys(calls)}
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text()))
    return [int(numbers[call]) for call in left if call in numbers]


def may_be_read_by_others() -> bool:
    """Return whether this checkout and its interpreter can be used by any user."""
    src = next(path for path in sys.path if path.endswith("src"))
    return all(
        os.stat(folder).st_mode & stat.S_IXOTH
        for path in (src, sys.prefix, os.path.realpath(sys.executable))
        for folder in (str(each) for each in (*Path(path).parents, Path(path)))
    )


@contextmanager
def running(user: int, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    src = next(path for path in sys.path if path.endswith("src"))
    argv = command(user, allowed(), [sys.executable, "-c", PROGRAM.format(src=src), "pulse", *words])
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, env={"PATH": os.environ["PATH"]}, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(LIMIT_S)


async def until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return where it serves; a program that begins gives no event, so its log is looked at."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            for line in log.read_text().splitlines():
                if line.startswith("{") and (event := msgspec.json.decode(line))["event"] == "pulse.ready":
                    return str(event["address"])
            assert process.poll() is None, log.read_text()
            await asyncio.sleep(0.05)


class Asking:
    """A client of the agent."""

    def __init__(self, client: HttpClient, address: str) -> None:
        self._client = client
        self._address = address

    async def ask(self, path: str, method: str = "GET", authorization: str = BASIC) -> tuple[int, str]:
        """Return status and body."""
        answer = await self._client.request(
            method, f"http://{self._address}{path}", headers=(("authorization", authorization),), timeout_s=LIMIT_S
        )
        return answer.status, (await answer.read()).decode()

    async def until(self, wanted: str) -> str:
        """Return a scrape that says something."""
        text = ""
        async with asyncio.timeout(LIMIT_S):
            while wanted not in text:
                await asyncio.sleep(0.05)
                text = (await self.ask("/metrics"))[1]
        return text


@asynccontextmanager
async def client_of(world: World, address: str) -> AsyncIterator[Asking]:
    client = HttpClient(world)
    try:
        yield Asking(client, address)
    finally:
        await client.close()


def write_files(folder: str) -> list[str]:
    """Write what the agent is told by files; return the flags."""
    users = b"anna:" + bcrypt.hashpw(b"sesame", bcrypt.gensalt(4)) + b"\n"
    for name, content in (("policy", b"namespaces: {deny: [kube-system]}\n"), ("token", b"the-token\n"), ("users", users)):
        path = Path(folder, name)
        path.write_bytes(content)
        path.chmod(0o644)
    flags = [f"--policy-file={folder}/policy", f"--token-file={folder}/token", f"--basic-auth-file={folder}/users"]
    return [*flags, f"--go-root={folder}/sbs", f"--rust-root={folder}/kata", f"--runtime-endpoint={folder}/none.sock", "--enable-lifecycle"]


@pytest.mark.parametrize(("user", "shards"), [(0, 1), (NOBODY, 1), (0, 2)], ids=["root", "nobody", "root-2"])
async def test_it_works_without_any_privilege(host_world: World, folder: str, user: int, shards: int) -> None:
    if user and not may_be_read_by_others():
        pytest.skip("this checkout, or its interpreter, lies where other users cannot read")
    os.chmod(folder, 0o755)
    log = Path(folder, "log")
    flags = [*write_files(folder), "--listen-address=127.0.0.1:0", "--metrics-interval-secs=1", f"--shards={shards}"]
    async with FakeShims(host_world, f"{folder}/sbs") as shims:
        os.chmod(f"{folder}/sbs", 0o755)
        await add(shims, "a" * 64, user)
        with running(user, log, *flags) as process:
            async with client_of(host_world, await until_ready(process, log)) as agent:
                confinement(process.pid, user)
                assert (await agent.ask("/metrics", authorization=""))[0] == 401
                assert "a" * 64 in await agent.until('kata_shim_threads{sandbox_id="aaa')
                await add(shims, "b" * 64, user)
                assert "b" * 64 in await agent.until('kata_shim_threads{sandbox_id="bbb'), "what comes later is seen"
                for path in ("/sandboxes", "/targets", "/top", "/config", "/metrics/resource", f"/agent-url?sandbox={'a' * 64}"):
                    assert (await agent.ask(path))[0] == 200, path
                status, text = await agent.ask("/-/reload", "PUT", "Bearer the-token")
                assert (status, text.count(": read\n")) == (200, 3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, log.read_text()
    assert '"level":"error"' not in log.read_text()


async def add(shims: FakeShims, identifier: str, user: int) -> None:
    """Add a sandbox; whoever is not root needs the right to write to its socket."""
    shim = await shims.add(identifier)
    if user:
        os.chmod(os.path.dirname(shim.socket), 0o755)
        os.chmod(shim.socket, 0o666)


def confinement(pid: int, user: int) -> None:
    """Assert that it holds."""
    status = dict(re.findall(r"(?m)^(\w+):\t(.*)$", Path(f"/proc/{pid}/status").read_text()))
    assert [status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == ["0" * 16] * 5
    assert (status["NoNewPrivs"], status["Seccomp"], status["Uid"].split()) == ("1", "2", [str(user)] * 4)
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    writable = [mount[4] for mount in mounts if "rw" in mount[5].split(",") and not mount[4].startswith(("/proc", "/dev"))]
    assert writable == []


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "Address family not supported"),
        ("mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)", "Operation not permitted"),
        ("ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and exit(os.strerror(ctypes.get_errno()))", "Operation not permitted"),
        ("ctypes.CDLL(None).syscall(175, 0, 0, 0)", -signal.SIGSYS),
    ],
    ids=["netlink", "writable-code", "namespace", "module"],
)
def test_the_confinement_is_one(words: str, ending: str | int) -> None:
    argv = command(0, allowed(), [sys.executable, "-c", f"import socket, mmap, ctypes, os\n{words}"])
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if isinstance(ending, int):
        assert ended.returncode == ending
    else:
        assert (ended.returncode, ending in ended.stderr) == (1, True), ended.stderr


def test_systemd_finds_little_that_the_unit_leaves_open(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "isopod-pulse.service"
    unit.write_text(UNIT.read_text().replace("@ISOPOD@", "/bin/true"))
    words = ["systemd-analyze", "--no-pager", "security", "--offline=true", "--threshold=20", str(unit)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout[-2000:]
