"""The command line against a real node: what users type, what they read, and the exit codes they get."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import pytest

from tests.node.rig import Rig

pytestmark = pytest.mark.host
PROGRAM: Final = "import sys; sys.path.insert(0, {src!r}); from isopod.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Done(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def argv_of(*words: str) -> list[str]:
    src = next(path for path in sys.path if path.endswith("src"))
    return [sys.executable, "-I", "-S", "-c", PROGRAM.format(src=src), *words]


async def isopod(rig: Rig, *words: str, stdin: bytes = b"") -> Done:
    """Run the command line against the rig's node."""
    env = {"PATH": os.environ["PATH"], "ISOPOD_SOCKET": rig.config.paths["socket"]}
    done = await rig.world.processes.run(argv_of(*words), stdin=stdin, env=env, timeout_s=50)
    assert b"Traceback" not in done.stderr
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.row("R1", "R2")
async def test_run_prints_the_output_and_returns_the_exit_code(host_rig: Rig) -> None:
    async with host_rig as rig:
        script = "echo out; echo err >&2; exit 42"
        assert await isopod(rig, "run", "--rm", "isopod/busybox", "sh", "-c", script) == (42, "out\n", "err\n")
        assert await isopod(rig, "run", "--rm", "-i", "isopod/busybox", "cat", stdin=b"typed\n") == (0, "typed\n", "")


async def test_every_failure_is_one_clear_line_and_a_documented_code(host_rig: Rig) -> None:
    async with host_rig as rig:
        cases = (
            (("run", "nowhere", "true"), 125, "error: no such image: nowhere"),
            (("run", "isopod/busybox", "nope"), 127, "error: cannot run 'nope'"),
            (("run", "isopod/busybox", "/etc/notes"), 126, "error: cannot run '/etc/notes'"),
            (("run", "--netwrk", "none", "isopod/busybox", "true"), 125, "error: "),
            (("run", "-m", "lots", "isopod/busybox", "true"), 125, "error: size 'lots'"),
            (("run", "--network", "elsewhere", "isopod/busybox", "true"), 125, "error: no such network: elsewhere"),
            (("exec", "nobody", "true"), 125, "error: no such container: nobody"),
            (("rm", "nobody"), 1, "error: no such container: nobody"),
            (("inspect", "nobody"), 1, "error: "),
            (("ps", "--format", "yaml"), 2, "error: "),
            (("frobnicate",), 2, "error: "),
            (("network", "create", "--subnet", "10.0.0.0/33", "x"), 2, "error: "),
        )
        for words, code, line in cases:
            done = await isopod(rig, *words)
            lines = done.err.splitlines()
            assert (done.code, done.out) == (code, ""), words
            assert lines[0].startswith(line), words
            assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), lines


async def test_without_a_node_the_error_says_how_to_start_one(host_rig: Rig) -> None:
    missing = f"{host_rig.folder}/missing.sock"
    for words, code in ((("ps",), 3), (("run", "x", "y"), 125)):
        done = await isopod(host_rig, "--socket", missing, *words)
        assert done.code == code
        assert missing in done.err.splitlines()[0]
        assert "isopod node" in done.err
    assert (await isopod(host_rig, "--socket", missing, "--help")).code == 0
    host_rig.backend.close()


@pytest.mark.row("R3", "R4", "R5", "R6", "R7", "R8")
async def test_a_life_by_commands(host_rig: Rig) -> None:
    async with host_rig as rig:
        started = await isopod(rig, "run", "-d", "--name", "web", "-e", "A=b", "isopod/busybox", "sh", "-c", "echo up $A; sleep 1000")
        assert started.code == 0
        identifier = started.out.strip()
        assert len(identifier) == 64
        heading, row = (await isopod(rig, "ps")).out.splitlines()
        assert heading.split()[:5] == ["ID", "NAME", "PID", "COMMAND", "STATUS"]
        assert row.split()[:2] == [identifier[:12], "web"]
        assert await isopod(rig, "exec", "-n", "web", "echo", "inside") == (0, "inside\n", "")
        assert await isopod(rig, "exec", "web", "sh", "-c", "exit 9") == (9, "", "")
        assert (await isopod(rig, "logs", "web")).out == "up b\n"
        assert (await isopod(rig, "start", "web")).code == 1
        assert (await isopod(rig, "rm", "web")).code == 1
        assert (await isopod(rig, "stop", "-t", "0", "web")).code == 0
        assert "Exited (137)" in (await isopod(rig, "ps", "-a")).out
        assert (await isopod(rig, "start", "web")).code == 0
        record = json.loads((await isopod(rig, "inspect", "web")).out)
        assert (record[0] if isinstance(record, list) else record)["status"] == "running"
        rows = json.loads((await isopod(rig, "ps", "--format", "json")).out)
        assert [each["name"] for each in rows] == ["web"]
        assert (await isopod(rig, "rm", "-f", "web")).code == 0
        assert (await isopod(rig, "ps", "-a")).out.split() == heading.split()


@pytest.mark.row("R9", "R10")
async def test_images_and_networks_by_commands(host_rig: Rig) -> None:
    async with host_rig as rig:
        assert (await isopod(rig, "run", "--name", "m", "isopod/busybox", "sh", "-c", "echo kept > /kept")).code == 0
        assert (await isopod(rig, "commit", "m", "made")).code == 0
        assert (await isopod(rig, "run", "--rm", "made", "cat", "/kept")).out == "kept\n"
        assert "made:latest" in (await isopod(rig, "images")).out
        assert (await isopod(rig, "rmi", "made")).code == 0
        created = await isopod(rig, "network", "create", "--subnet", "10.89.9.0/24", "inner")
        assert created.code == 0, created
        script = "ip -4 -o addr show eth0"
        assert "10.89.9." in (await isopod(rig, "run", "--rm", "--network", "inner", "isopod/busybox", "sh", "-c", script)).out
        assert "10.89.9.0/24" in (await isopod(rig, "network", "ls")).out
        assert (await isopod(rig, "network", "rm", "inner")).code == 0


@contextmanager
def typed(rig: Rig, *words: str) -> Iterator[int]:
    """Run a command on a terminal of its own; yields our end."""
    ours, theirs = pty.openpty()
    env = {"PATH": os.environ["PATH"], "ISOPOD_SOCKET": rig.config.paths["socket"], "TERM": "xterm"}
    child = subprocess.Popen(argv_of(*words), stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    try:
        yield ours
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait(20)
        os.close(ours)


def expect(terminal: int, text: bytes, limit_s: float = 20.0) -> bytes:
    """Read from a terminal until a text appears."""
    seen = b""
    deadline = time.monotonic() + limit_s
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{text!r} did not come: {seen!r}"
        seen += os.read(terminal, 4096)
    return seen


async def test_a_terminal_detaches_by_its_keys_and_the_container_goes_on(host_rig: Rig) -> None:
    async with host_rig as rig:
        with typed(rig, "run", "-it", "--name", "shell", "isopod/busybox", "sh") as terminal:
            os.write(terminal, b"echo $((40+2))\n")
            expect(terminal, b"42\r\n")
            os.write(terminal, b"\x10\x11")  # ctrl-p ctrl-q
        assert (await rig.inspect("shell")).status == "running"
        with typed(rig, "exec", "-it", "shell", "sh") as terminal:
            os.write(terminal, b"exit 0\n")
            expect(terminal, b"exit 0")
