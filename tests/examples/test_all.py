"""What holds for every example: how it is called, how it ends, and that it keeps to the public names."""

import ast
import signal
import socket
import time
from pathlib import Path
from typing import Final

import pytest

from tests.examples.kit import EXAMPLES, PROJECT, example, run_example

pytestmark = pytest.mark.row("S32")
ARGUMENTS: Final = {
    "hello": ("--every", "0.05"),
    "line_protocol_tls": ("--port", "0", "--tls-port", "0"),
    "metadata": ("--every", "0.05", "--folder", "data"),
}
READY: Final = {"hello": "hello, 1\n", "metadata": "'number': '1'", "line_protocol_tls": r"listening with TLS on \S+"}
SERVERS: Final = tuple(name for name in EXAMPLES if name not in ("hello", "metadata"))


def test_the_examples_are_all_here() -> None:
    assert EXAMPLES == (
        "asgi_app", "echo_server", "hello", "http_server", "line_protocol_tls", "metadata", "sharded_counter", "websocket_chat"
    )  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_says_what_it_takes(name: str, tmp_path: Path) -> None:
    done = run_example(name, tmp_path, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}.py")
    for flag in ARGUMENTS.get(name, ("--port",))[::2]:
        assert flag in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_signal_ends_it_with_success(name: str, signum: int, tmp_path: Path) -> None:
    with example(name, tmp_path, *ARGUMENTS.get(name, ("--port", "0"))) as running:
        running.wait_said(READY.get(name, r"listening on \S+\n"))
        running.stop(signum)


@pytest.mark.parametrize("name", SERVERS)
def test_a_port_that_cannot_be_had_is_one_line(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_example(name, tmp_path, "--port", str(taken.getsockname()[1]))
        assert done.returncode == 1
        assert "error: " in done.stderr
        assert "Traceback" not in done.stderr
    done = run_example(name, tmp_path, "--port", "70000")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_a_silent_peer_does_not_keep_it_from_ending(name: str, tmp_path: Path) -> None:
    with example(name, tmp_path, *ARGUMENTS.get(name, ("--port", "0"))) as running:
        host, _, port = running.wait_said(r"listening (?:with TLS )?on (?:http://)?(127\.0\.0\.1:\d+)").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent, socket.create_connection((host, int(port))) as asking:
            asking.sendall(b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n")
            asking.sendall(b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
            assert asking.recv(1) != b"", "a WebSocket, an answer, an echo: it was heard"
            running.stop()
            assert silent.recv(1) == b""


def test_shards_end_when_their_first_is_killed(tmp_path: Path) -> None:
    with example("sharded_counter", tmp_path, "--port", "0", "--shards", "3") as running:
        running.url()
        assert len(running.processes()) == 3
        running.process.kill()
        running.process.wait()
        until_s = time.monotonic() + 10
        while running.processes():
            assert time.monotonic() < until_s, "shards are left"
            time.sleep(0.02)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_a_model_program(name: str) -> None:
    text = (PROJECT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)

    assert f".venv/bin/python examples/{name}.py" in (ast.get_docstring(tree) or "")
    assert len(text.splitlines()) <= 100
    private = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        if node.attr != "_asdict"  # of a NamedTuple: public, whatever its name
    ]
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name[0] == "_"
    ]
    assert private + imported == []
