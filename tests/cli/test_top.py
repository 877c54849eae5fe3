"""`isopod top`: tables into pipes, a drawn view on a terminal, agents that fail. The agent is scripted."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from isopod.cli import top
from isopod.cli.fetch import parse_address
from isopod.pulse.rates import Row, as_json
from isopod.world.errors import InvalidArgument
from tests.cli.scripted_node import SOURCE, TIMEOUT_S, command_line, environment, isopod, lines
from tests.cli.test_attach import SANE, AtShell, AtTerminal
from tests.cli.test_import_cost import BANNED, REPORT


def row(name: str, **figures: float | None) -> Row:
    known = {
        "cpu_cores": 0.5,
        "memory_bytes": 64 << 20,
        "received_bytes_per_s": 10.0,
        "sent_bytes_per_s": 20.0,
        "read_bytes_per_s": 0.0,
        "written_bytes_per_s": 2048.0,
        "age_s": 1.4,
        **figures,
    }
    return Row(id=name.encode().hex() * 4, name=name, namespace="team", up=True, **known)  # type: ignore[arg-type]  # figures by name


ROWS: Final = (
    row("quiet", cpu_cores=0.01, memory_bytes=900 << 20, received_bytes_per_s=None, sent_bytes_per_s=None),
    row("busy", cpu_cores=1.5, read_bytes_per_s=5e6),
    row("talks", cpu_cores=0.2, received_bytes_per_s=3e6),
)


def answer(body: bytes, *, status: str = "200 OK", fields: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{fields or f'Content-Length: {len(body)}'}\r\n\r\n".encode() + body


class ScriptedAgent:
    """Answers connections one after another, the n-th with the n-th answer, the last one for all others."""

    def __init__(self, address: str | tuple[str, int], *answers: bytes | Callable[[socket.socket], None]) -> None:
        self._listener: Final = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._listener.bind(address)
        self._listener.listen(8)
        self._answers: Final = answers
        self._is_closing = False
        self.asked: Final[list[bytes]] = []
        name = self._listener.getsockname()
        self.address: Final = f"unix:{name}" if isinstance(name, str) else f"{name[0]}:{name[1]}"
        self._thread: Final = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        with socket.socket(self._listener.family) as waker:
            waker.connect(self._listener.getsockname())
        self._thread.join(TIMEOUT_S)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if self._is_closing:
                    return
                connection.settimeout(TIMEOUT_S)
                said = self._answers[min(len(self.asked), len(self._answers) - 1)]
                with suppress(ConnectionError):
                    self.asked.append(connection.recv(1 << 16))
                    if isinstance(said, bytes):
                        connection.sendall(said)
                    else:
                        said(connection)


def agent(folder: str, *answers: bytes | Callable[[socket.socket], None]) -> ScriptedAgent:
    return ScriptedAgent(os.path.join(folder, "agent.sock"), *answers)


def names(output: bytes) -> list[str]:
    return [line.split()[1] for line in lines(output)[1:]]


@pytest.mark.parametrize(
    "sort,order",
    [("cpu", ["busy", "talks", "quiet"]), ("memory", ["quiet", "busy", "talks"]), ("network", ["talks", "busy", "quiet"])],
)
def test_one_table(folder: str, sort: str, order: list[str]) -> None:
    with agent(folder, answer(as_json(ROWS))) as serving:
        ended = isopod("top", "--once", "--sort", sort, "--address", serving.address)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert lines(ended.stdout)[0].split() == list(top.TITLES)
    assert names(ended.stdout) == order
    assert serving.asked[0].startswith(b"GET /top?format=json HTTP/1.1\r\n")


def test_a_row_is_readable(folder: str) -> None:
    with agent(folder, answer(as_json(ROWS[:1]))) as serving:
        ended = isopod("pulse", "top", "--once", "--address", serving.address)
    assert lines(ended.stdout)[1].split() == ["team", "quiet", "0.010", "900.0MiB", "-", "-", "0B", "2.0KiB", "1s"]


def test_over_tcp_chunked_and_with_a_token(folder: str) -> None:
    body = as_json(ROWS)
    chunks = b"".join(b"%x;x=y\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
    token = Path(folder, "token")
    token.write_text("secret\n", encoding="ascii")
    with ScriptedAgent(("127.0.0.1", 0), answer(chunks, fields="Transfer-Encoding: chunked")) as serving:
        port = serving.address.rpartition(":")[2]
        ended = isopod("top", "--once", "--token-file", str(token), env={"KATA_PULSE_LISTEN": f"localhost:{port}"})
    assert (ended.returncode, names(ended.stdout)) == (0, ["busy", "talks", "quiet"])
    assert b"\r\nAuthorization: Bearer secret\r\n" in serving.asked[0]


@pytest.mark.row("T21")
def test_with_a_password_from_a_file(folder: str) -> None:
    pair = Path(folder, "pair")
    pair.write_bytes("anna:open: sesame \u00e9\r\na second line\n".encode())
    with agent(folder, answer(as_json(ROWS))) as serving:
        ended = isopod("top", "--once", "--basic-file", str(pair), "--address", serving.address)
    assert (ended.returncode, names(ended.stdout)) == (0, ["busy", "talks", "quiet"])
    (said,) = [line for line in serving.asked[0].split(b"\r\n") if line.startswith(b"Authorization: Basic ")]
    assert base64.b64decode(said.split()[-1]).decode() == "anna:open: sesame \u00e9"


@pytest.mark.row("T21")
@pytest.mark.parametrize(
    ("flag", "content", "why"),
    [
        ("--basic-file", b"anna\n", "want USER:PASSWORD"),
        ("--basic-file", b":sesame\n", "want USER:PASSWORD"),
        ("--basic-file", b"", "want USER:PASSWORD"),
        ("--token-file", b"\n", "no token"),
        ("--token-file", b"caf\xc3\xa9\n", "no token"),
    ],
)
def test_a_file_that_does_not_say_who_asks_is_refused(folder: str, flag: str, content: bytes, why: str) -> None:
    path = Path(folder, "who")
    path.write_bytes(content)
    ended = isopod("top", "--once", flag, str(path))
    assert (ended.returncode, why in lines(ended.stderr)[0]) == (2, True)
    assert "sesame" not in "".join(lines(ended.stderr)), "what it holds is not told"


def test_a_token_and_a_password_do_not_go_together(folder: str) -> None:
    path = Path(folder, "who")
    path.write_bytes(b"anna:sesame\n")
    ended = isopod("top", "--once", "--basic-file", str(path), "--token-file", str(path))
    assert (ended.returncode, "do not go together" in lines(ended.stderr)[0]) == (2, True)


def test_json_is_handed_on_as_it_came(folder: str) -> None:
    body = as_json(ROWS)
    with agent(folder, answer(body, fields="Connection: close")) as serving:
        ended = isopod("top", "--once", "--format", "json", "--address", serving.address)
    assert (ended.returncode, ended.stdout) == (0, body + b"\n")
    assert len(json.loads(ended.stdout)["sandboxes"]) == 3


def test_hostile_names_and_figures_do_no_harm() -> None:
    told = [
        {"name": "\x1b[2J\nx", "namespace": 7, "cpu_cores": "9", "memory_bytes": True, "age_s": float("nan"), "up": False},
        {"id": "a" * 300, "memory_bytes": -1, "read_bytes_per_s": 1e300},
        {},
    ]
    table = top.table(told)
    assert [line.split() for line in table[1:]] == [
        ["-", "[2J", "x", "-", "-", "-", "-", "-", "-", "down", "-"],
        ["-", "a" * 12, "-", "-", "-", "-", "-", "-", "down", "-"],
        ["-", "-", "-", "-", "-", "-", "-", "-", "down", "-"],
    ]
    assert all(c.isprintable() for c in "".join(table))


FAILURES: Final = {
    "http": (b"\x15\x03\x01\x00\x02\x02\x16", 3, "its answer is no HTTP", "TLS"),
    "short": (answer(b"{", fields="Content-Length: 9"), 3, "it closed the connection in the middle of the answer", "isopod pulse"),
    "silent": (b"", 3, "it closed the connection before the answer", "isopod pulse"),
    "lengths": (answer(b"{}", fields="Content-Length: x"), 3, "a length that is none", ""),
    "chunks": (answer(b"zz\r\n", fields="Transfer-Encoding: chunked"), 3, "chunked, but not well", ""),
    "missing": (answer(b"no such page\n", status="404 Not Found"), 3, "status 404: no such page", "--address"),
    "refused": (answer(b"no", status="401 Unauthorized"), 1, "wants to know who asks", "--basic-file"),
    "busy": (answer(b"no", status="429 Too Many Requests"), 4, "checks too many passwords", "try again"),
    "nonsense": (answer(b"[1]"), 3, "what it says at /top is no table of sandboxes", ""),
    "rows": (answer(b'{"sandboxes":[3]}'), 3, "what it says at /top is no table of sandboxes", ""),
}


@pytest.mark.parametrize("said,code,why,hint", FAILURES.values(), ids=FAILURES)
def test_what_an_agent_may_do_wrong(folder: str, said: bytes, code: int, why: str, hint: str) -> None:
    with agent(folder, said) as serving:
        ended = isopod("top", "--once", "--address", serving.address)
    first, *rest = lines(ended.stderr)
    assert (ended.returncode, ended.stdout) == (code, b"")
    assert first.startswith("error: ")
    assert why in first
    assert hint in "".join(rest)


def test_no_agent(folder: str) -> None:
    ended = isopod("top", "--address", f"unix:{folder}/none.sock")
    assert ended.returncode == 3
    assert lines(ended.stderr) == [
        f"error: cannot reach the metrics agent at unix:{folder}/none.sock: No such file or directory",
        "hint: start one: isopod pulse; or say where: --address",
    ]


@pytest.mark.parametrize(
    "words", [("--interval", "0"), ("--interval", "2h"), ("--interval", "x"), ("--sort", "age"), ("--address", "nowhere"), ("web",)]
)
def test_what_makes_no_sense_is_refused(words: Sequence[str]) -> None:
    assert isopod("top", "--once", *words).returncode == 2


@pytest.mark.parametrize(
    "text,meant",
    [
        ("unix:/run/x.sock", "/run/x.sock"),
        ("unix:///run/x.sock", "/run/x.sock"),
        (":8090", ("127.0.0.1", 8090)),
        ("0.0.0.0:8090", ("127.0.0.1", 8090)),
        ("[::]:1", ("::1", 1)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_addresses(text: str, meant: object) -> None:
    assert parse_address(text) == meant


@pytest.mark.parametrize("text", ["", "x", "unix:", "host:", "host:0", "host:65536", "::1:80", "host:٣"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_address(text)


def test_tables_follow_one_another_in_a_pipe_and_outlive_the_agent(folder: str) -> None:
    first, second = answer(as_json(ROWS[:1])), answer(as_json(ROWS[1:2]))
    with agent(folder, first, b"", b"", second) as serving:
        argv = command_line("top", "--interval", "100ms", "--address", serving.address)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            read = [process.stdout.readline() for _ in range(4)]
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 130
            trouble = process.stderr.read().decode()
    assert [line.split()[1] for line in read] == [b"NAME", b"quiet", b"NAME", b"busy"]
    assert trouble.count("it closed the connection before the answer; trying again\n") == 1
    assert not trouble.startswith("error")


def test_a_reader_that_leaves_ends_it(folder: str) -> None:
    with agent(folder, answer(as_json(ROWS))) as serving:
        argv = command_line("top", "--interval", "100ms", "--address", serving.address)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(TIMEOUT_S) == 141
            assert process.stderr.read() == b""


def test_drawn_on_a_terminal(folder: str) -> None:
    with agent(folder, answer(as_json(ROWS))) as serving:
        with AtTerminal("top", "--interval", "1h", "--address", serving.address, rows=5, columns=60) as terminal:
            terminal.read_until(b"\x1b[J")
            assert terminal.output.startswith(b"\x1b[?1049h\x1b[?25l\x1b[H")
            assert b"3 sandboxes, 3 up" in terminal.output
            assert b"busy" in terminal.output
            assert b"quiet" not in terminal.output, "five lines have room for two rows"
            shown = terminal.output.rpartition(b"\x1b[H")[2].replace(b"\x1b[7m", b"").replace(b"\x1b[0m", b"").replace(b"\x1b[K", b"")
            assert max(len(line) for line in shown.replace(b"\x1b[J", b"").split(b"\r\n")) <= 60
            terminal.output = b""
            terminal.resize(30, 120)
            terminal.read_until(b"quiet")
            terminal.output = b""
            terminal.type(b"m")
            terminal.read_until(b"\x1b[J")
            assert b" by memory" in terminal.output
            assert terminal.output.index(b"quiet") < terminal.output.index(b"busy")
            terminal.type(b"q")
            assert terminal.wait() == 0
            assert terminal.output.endswith(b"\x1b[?25h\x1b[?1049l")
        assert len(serving.asked) == 1


@pytest.mark.parametrize("end,code", [(b"q", 0), (b"\x03", 130), ("TERM", 143), ("INT", 130)])
def test_the_terminal_is_put_back(folder: str, end: bytes | str, code: int) -> None:
    with agent(folder, answer(as_json(ROWS))) as serving:
        line = command_line("top", "--interval", "1h", "--address", serving.address)
        with AtShell(line) as at:
            at.read_until(b"\x1b[J")
            assert at.is_raw()
            if isinstance(end, bytes):
                at.type(end)
            else:
                at.signal(signal.Signals[f"SIG{end}"])
            at.read_until(b"\x1b[?25h\x1b[?1049lended %d." % code)
            flags = termios.tcgetattr(at.fd)
            assert flags[3] & SANE == SANE
            assert flags[1] & termios.OPOST
            at.type(b"\n")
            at.wait()


def test_an_agent_that_goes_and_comes_back_is_waited_for_on_the_screen(folder: str) -> None:
    serving = agent(folder, answer(as_json(ROWS[:1])))
    with serving, AtTerminal("top", "--interval", "100ms", "--address", serving.address) as terminal:
        terminal.read_until(b"quiet")
        serving.stop()
        os.unlink(os.path.join(folder, "agent.sock"))
        terminal.read_until(b"! cannot reach the metrics agent")
        terminal.output = b""
        with agent(folder, answer(as_json(ROWS[1:2]))):
            terminal.read_until(b"busy")
            terminal.type(b"q")
            assert terminal.wait() == 0


def test_it_imports_little(folder: str) -> None:
    with agent(folder, answer(as_json(ROWS))) as serving:
        argv = [sys.executable, "-I", "-S", "-c", REPORT, SOURCE, "top", "--once", "--address", serving.address]
        ended = subprocess.run(argv, capture_output=True, env=environment(), timeout=TIMEOUT_S, check=False)
    imported = set(ended.stderr.decode().splitlines())
    assert ended.returncode == 0
    assert "isopod.cli.top" in imported
    assert len([name for name in imported if name.startswith("isopod")]) <= 22
    with_json = {"json", "re", "enum", "functools", "collections", "operator"}
    assert imported & (BANNED - with_json) == set()
