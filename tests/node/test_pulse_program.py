"""`isopod pulse` and `isopod pulse demo` as programs: what they print, how they end, what they leave."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host
PROGRAM = "import sys; from isopod.cli.main import main; sys.exit(main(sys.argv[1:]))"
LIMIT_S = 30.0


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "pulse", *words]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path.endswith("src"))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": paths, **more}


@contextmanager
def running(*words: str, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(command(*words), env=environment(**more), stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(LIMIT_S)


class Over(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self._path)


def ask(path: str, target: str) -> tuple[int, str]:
    """Return an answer; a program that begins gives no event, so that it is asked until it listens."""
    until_s = time.monotonic() + LIMIT_S
    while True:
        connection: Any = Over(path)
        try:
            connection.request("GET", target)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < until_s, "it does not listen"
            time.sleep(0.02)
        finally:
            connection.close()


@pytest.mark.row("K1")
def test_it_is_told_by_its_environment_and_ends_in_order(tmp_path: Path) -> None:
    path = f"{tmp_path}/p.sock"
    told = {"KATA_PULSE_LISTEN": f"unix:{path}", "RUNTIME_ENDPOINT": f"{tmp_path}/none.sock", "KATA_PULSE_METRICS_INTERVAL": "7"}
    with running("--go-root", f"{tmp_path}/go", "--rust-root", f"{tmp_path}/rust", log=tmp_path / "log", **told) as process:
        status, text = ask(path, "/metrics")
        assert status == 200
        assert "kata_monitor_running_shim_count 0\n" in text
        assert ask(path, "/readyz")[0] == 503, "no root is there"
        (tmp_path / "go").mkdir()
        until_s = time.monotonic() + LIMIT_S
        while ask(path, "/readyz")[0] != 200:
            assert time.monotonic() < until_s
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
    log = (tmp_path / "log").read_text()
    assert '"interval_s":7.0' in log
    assert '"level":"error"' not in log
    assert not os.path.exists(path)


@pytest.mark.row("K2")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--metrics-interval-secs", "0"), "want seconds"),
        (("--listen",), "did you mean --listen-address"),
        (("--listen-address", "192.0.2.1:1"), "listen on"),
        (("--policy-file", "/nowhere/policy.yaml"), "policy"),
        (("demo", "--sandboxes", "many"), "want a whole number"),
    ],
)
def test_what_cannot_be_done_is_two_lines_and_an_exit_code(words: tuple[str, ...], why: str) -> None:
    ended = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert ended.returncode not in (0, 70)
    assert why in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not ended.stdout


@pytest.mark.row("K26")
@pytest.mark.parametrize("variable", ["KATA_PULSE_LISTEN", "ISOPOD_PULSE_LISTEN"])
def test_the_demo_serves_where_the_variables_say(folder: str, variable: str) -> None:
    path, log = f"{folder}/p.sock", Path(folder) / "log"
    with running("demo", "--sandboxes", "1", log=log, TMPDIR=folder, **{variable: f"unix:{path}"}) as process:
        until_s = time.monotonic() + LIMIT_S
        while not os.path.exists(path):
            assert time.monotonic() < until_s and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0


@pytest.mark.row("K26")
def test_the_demo_says_where_it_is_and_takes_its_folder_along(folder: str) -> None:
    path, log = f"{folder}/p.sock", Path(folder) / "log"
    with running("demo", "--sandboxes", "2", "--listen-address", f"unix:{path}", log=log, TMPDIR=folder) as process:
        until_s = time.monotonic() + LIMIT_S
        while ask(path, "/metrics")[1].count("kata_shim_threads{") != 2:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert [name for name in os.listdir(folder) if name.startswith("isopod-demo-")]
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
    assert os.listdir(folder) == ["log"]
