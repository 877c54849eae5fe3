"""Attached commands, through pipes and through a real pseudo-terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Self

import pytest

from isopod.cli.attach import DetachFilter
from tests.cli.scripted_node import TIMEOUT_S, Peer, ScriptedNode, command_line, environment, isopod, lines

Script = Callable[[Peer], None]


def ran(exit_code: int | None = 0, *, oom_killed: bool = False) -> dict[str, object]:
    return {"id": "c" * 64, "name": "web", "exit_code": exit_code, "oom_killed": oom_killed}


@pytest.mark.row("R2", "R7")
@pytest.mark.parametrize("words,method", [(["run", "img", "x"], "container.run"), (["exec", "web", "x"], "container.exec")])
def test_output_and_exit_code(folder: str, words: list[str], method: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request(method)
        assert (body["rows"], body["columns"]) == (0, 0)
        peer.item(call, type="started", id="c" * 64, name="web")
        peer.item(call, type="stdout", data=b"out \xff\0\n")
        peer.item(call, type="stderr", data=b"err\n")
        peer.item(call, type="stdout", data=b"more")
        peer.reply(call, ran(42))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, *words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (42, b"out \xff\0\nmore", b"err\n")


def test_out_of_memory_is_said(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.reply(call, ran(137, oom_killed=True))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "run", "img")
    assert (ended.returncode, ended.stderr) == (137, b"note: web used more memory than its limit and was killed\n")


def test_more_output_than_a_window_at_a_slow_reader(folder: str) -> None:
    n_items, n_bytes = 96, 64 << 10

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        room = 1 << 20
        for index in range(n_items):
            while room < n_bytes + 64:
                frame = peer.next()
                assert frame[:2] == [6, call]
                room += frame[2]
            peer.item(call, type="stdout", data=bytes([index]) * n_bytes)
            room -= n_bytes + 32
        peer.reply(call, ran())
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "run", "img")
    assert ended.stdout == b"".join(bytes([index]) * n_bytes for index in range(n_items))


def test_stdin_is_sent_within_the_window_and_ended(folder: str) -> None:
    data = os.urandom(3 << 20)
    got: list[bytes] = []

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.run")
        assert body["spec"]["stdin_open"] is True
        n_held = 0
        while True:
            frame = peer.next()
            assert frame[:2] == [4, call]
            if frame[2]["type"] == "stdin_end":
                break
            got.append(frame[2]["data"])
            n_held += len(frame[2]["data"]) + 40
            assert n_held <= 1 << 20
            if n_held > 900_000:
                peer.send(6, call, n_held)
                n_held = 0
        peer.reply(call, ran())
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        assert isopod("-H", node.path, "run", "-i", "img", stdin=data).returncode == 0
    assert b"".join(got) == data


def test_a_closed_stdin_is_at_its_end(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        assert peer.items(call, "stdin_end")[-1] == {"type": "stdin_end"}
        peer.reply(call, ran(0))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command_line("-H", node.path, "run", "-i", "img", "cat")]
        ended = subprocess.run(command, env=environment(), capture_output=True, check=False, timeout=TIMEOUT_S)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_without_i_stdin_is_left_alone(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.exec")
        peer.reply(call, ran())
        with pytest.raises(EOFError):
            raise AssertionError(peer.next())

    read_end, write_end = os.pipe()
    os.write(write_end, b"for somebody else")
    with ScriptedNode(folder, script) as node:
        isopod("-H", node.path, "exec", "web", "x", stdin=read_end)
    assert os.read(read_end, 100) == b"for somebody else"
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_signals_are_passed_on(folder: str, name: str) -> None:
    number = int(signal.Signals[name])

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.item(call, type="started", id="c" * 64, name="web")
        peer.item(call, type="stdout", data=b"ready\n")
        [item] = peer.items(call, "signal")
        peer.reply(call, ran(128 + item["number"]))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node, started(node.path, "run", "img") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 128 + number


def test_ctrl_c_before_the_start_withdraws_the_run(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        process_ready.wait(TIMEOUT_S)
        os.kill(pid[0], signal.SIGINT)
        assert peer.next() == [3, call]
        peer.error(call, "cancelled", "container.run was cancelled", exit_code=3)
        peer.wait_closed()

    process_ready = threading.Event()
    pid: list[int] = []
    with ScriptedNode(folder, script) as node, started(node.path, "run", "img") as process:
        pid.append(process.pid)
        process_ready.set()
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_command_deaf_to_signals_is_left_at_the_third(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.item(call, type="started", id="c" * 64, name="web")
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            assert peer.next() == [4, call, {"type": "signal", "number": 2}]
        os.kill(process.pid, signal.SIGINT)
        peer.wait_closed()

    gate = threading.Event()

    def gated(peer: Peer) -> None:
        gate.wait(TIMEOUT_S)
        script(peer)

    with ScriptedNode(folder, gated) as node, started(node.path, "run", "img") as process:
        gate.set()
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, b"left: web goes on; end it: isopod kill web\n")


def test_a_signal_gets_through_when_nobody_reads_the_output(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.item(call, type="started", id="c" * 64, name="web")
        peer.item(call, type="stdout", data=bytes(900_000))
        gate.set()
        assert peer.items(call, "signal") == [{"type": "signal", "number": 15}]
        peer.reply(call, ran(143))
        peer.wait_closed()

    gate = threading.Event()
    with ScriptedNode(folder, script) as node, started(node.path, "run", "img") as process:
        assert gate.wait(TIMEOUT_S)
        assert process.stdout is not None
        select.select([process.stdout], [], [], TIMEOUT_S)
        process.send_signal(signal.SIGTERM)
        assert len(process.stdout.read()) == 900_000
        assert process.wait(TIMEOUT_S) == 143


def test_the_node_dies_while_attached(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.item(call, type="started", id="c" * 64, name="web")
        peer.item(call, type="stdout", data=b"so far")

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "run", "img")
    assert (ended.returncode, ended.stdout) == (125, b"so far")
    assert lines(ended.stderr) == [
        f"error: isopod node at {node.path}: it closed the connection before the answer",
        "hint: web may go on running: isopod ps -a; isopod logs web",
    ]


def test_a_closed_stdout_ends_it_quietly(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.run")
        peer.item(call, type="stdout", data=bytes(1 << 19))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node, started(node.path, "run", "img") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT_S) == 141


def test_start_attached_asks_what_the_container_has(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.inspect")
        peer.reply(call, {"name": "web", "terminal": False, "stdin_open": True})
        call, body = peer.request("container.start")
        assert body == {"name": "web", "attach": True, "rows": 0, "columns": 0}
        assert peer.items(call, "stdin_end") == [{"type": "stdin", "data": b"typed"}, {"type": "stdin_end"}]
        peer.reply(call, ran(3))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        assert isopod("-H", node.path, "start", "-ai", "web", stdin=b"typed").returncode == 3


def started(path: str, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command_line("-H", path, *words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )


# --- terminals --------------------------------------------------------------------------------------------------------


class AtTerminal:
    """A command line that runs in a pseudo-terminal of its own, as its session's leader."""

    def __init__(self, *words: str, rows: int = 24, columns: int = 80) -> None:
        self._spawn(command_line(*words), rows, columns)

    def _spawn(self, argv: list[str], rows: int, columns: int) -> None:
        self.output = b""
        self._ended: int | None = None
        size = struct.pack("HHHH", rows, columns, 0, 0)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, size)
                os.execve(argv[0], argv, environment())
            finally:
                os._exit(99)  # never back into the test runner

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ended is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def mode(self) -> list[object]:
        return list(termios.tcgetattr(self.fd))

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def read_until(self, mark: bytes) -> None:
        until_s = time.monotonic() + TIMEOUT_S
        while mark not in self.output:
            assert time.monotonic() < until_s, self.output
            assert self._read(), self.output

    def wait(self) -> int:
        """Read to the end and return the exit code."""
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        self._ended = os.waitstatus_to_exitcode(status)
        return self._ended

    def _read(self) -> bool:
        ready, _, _ = select.select([self.fd], [], [], TIMEOUT_S)
        assert ready, self.output
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:
            return False
        self.output += data
        return bool(data)


SANE: Final = termios.ICANON | termios.ECHO | termios.ISIG


def terminal_script(after: Callable[[Peer, int], None], sizes: list[tuple[int, int]] | None = None) -> Script:
    """Return a script that starts an attached terminal, says `ready`, and goes on with `after`."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.run")
        assert body["spec"]["terminal"] is True
        if sizes is not None:
            sizes.append((body["rows"], body["columns"]))
        peer.item(call, type="started", id="c" * 64, name="web")
        peer.item(call, type="stdout", data=b"ready\r\n")
        after(peer, call)
        peer.wait_closed()

    return script


def typed(peer: Peer, call: int, n_bytes: int) -> bytes:
    """Return the next `n_bytes` of standard input."""
    data = b""
    while len(data) < n_bytes:
        frame = peer.next()
        assert frame[:2] == [4, call]
        assert frame[2]["type"] == "stdin"
        data += frame[2]["data"]
    return data


def test_raw_mode_passes_every_key_and_is_restored(folder: str) -> None:
    keys = b"a\r\x03\x1a\x1c\x04\x11\x13\xff"

    def after(peer: Peer, call: int) -> None:
        assert typed(peer, call, len(keys)) == keys
        peer.item(call, type="stdout", data=b"no echo\nhere")
        peer.reply(call, ran(5))

    sizes: list[tuple[int, int]] = []
    with (
        ScriptedNode(folder, terminal_script(after, sizes)) as node,
        AtTerminal("-H", node.path, "run", "-it", "img", rows=40, columns=132) as at,
    ):
        at.read_until(b"ready")
        assert at.is_raw()
        at.type(keys)
        assert at.wait() == 5
        assert b"no echo\nhere" in at.output, "output is not translated while the terminal is raw"
    assert sizes == [(40, 132)]


def mode_after(folder: str, script: Script, act: "Callable[[AtShell], None]") -> int:
    """Run `run -it` under a shell, so that the terminal outlives it; check its mode after; return the exit code."""
    with ScriptedNode(folder, script) as node:
        line = command_line("-H", node.path, "run", "-it", "img")
        with AtShell(line) as at:
            at.read_until(b"ready")
            assert at.is_raw()
            act(at)
            at.read_until(b"ended ")
            at.read_until(b".\r\n")
            flags = termios.tcgetattr(at.fd)
            assert flags[3] & SANE == SANE
            assert flags[1] & termios.OPOST
            at.type(b"\n")
            code = int(at.output.split(b"ended ")[1].split(b".")[0])
            at.wait()
    return code


class AtShell(AtTerminal):
    """The same under a small parent that lives on until a line is typed."""

    def __init__(self, argv: Sequence[str]) -> None:
        shell = """"$@"; printf 'ended %s.\\n' $?; read line"""
        self._spawn(["/bin/sh", "-c", shell, "sh", *argv], 24, 80)

    def signal(self, number: int) -> None:
        os.kill(self.child(), number)

    def child(self) -> int:
        """Return the command line's process id."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children", encoding="ascii") as file:
            return int(file.read().split()[0])


def test_the_mode_is_restored_after_the_end(folder: str) -> None:
    def after(peer: Peer, call: int) -> None:
        typed(peer, call, 1)
        peer.reply(call, ran(7))

    assert mode_after(folder, terminal_script(after), lambda at: at.type(b"q")) == 7


def test_the_mode_is_restored_after_sigterm(folder: str) -> None:
    code = mode_after(folder, terminal_script(lambda peer, call: None), lambda at: at.signal(signal.SIGTERM))
    assert code == 128 + signal.SIGTERM


def test_the_mode_is_restored_when_the_node_dies(folder: str) -> None:
    def after(peer: Peer, call: int) -> None:
        typed(peer, call, 1)
        peer.connection.shutdown(2)

    assert mode_after(folder, terminal_script(after), lambda at: at.type(b"q")) == 125


def test_the_mode_is_restored_after_a_broken_frame(folder: str) -> None:
    def after(peer: Peer, call: int) -> None:
        typed(peer, call, 1)
        peer.connection.sendall(b"\xff\xff\xff\xff")

    assert mode_after(folder, terminal_script(after), lambda at: at.type(b"q")) == 125


def test_detach_keys_leave_the_container_running(folder: str) -> None:
    def act(at: AtShell) -> None:
        at.type(b"\x10")
        at.type(b"\x11")

    assert mode_after(folder, terminal_script(lambda peer, call: None), act) == 0


def test_detaching_says_how_to_go_on(folder: str) -> None:
    with ScriptedNode(folder, terminal_script(lambda peer, call: None)) as node, AtTerminal("-H", node.path, "run", "-it", "img") as at:
        at.read_until(b"ready")
        at.type(b"\x10\x11")
        assert at.wait() == 0
        assert b"detached: web keeps running; its output: isopod logs -f web; end it: isopod stop web" in at.output


def test_a_new_size_is_sent(folder: str) -> None:
    def after(peer: Peer, call: int) -> None:
        [item] = peer.items(call, "resize")
        assert item == {"type": "resize", "rows": 50, "columns": 111}
        peer.reply(call, ran(0))

    with ScriptedNode(folder, terminal_script(after)) as node, AtTerminal("-H", node.path, "run", "-it", "img") as at:
        at.read_until(b"ready")
        at.resize(50, 111)
        assert at.wait() == 0


def test_raw_mode_comes_back_after_a_stop(folder: str) -> None:
    def after(peer: Peer, call: int) -> None:
        peer.items(call, "resize")
        peer.item(call, type="stdout", data=b"again")
        typed(peer, call, 1)
        peer.reply(call, ran(0))

    def act(at: AtShell) -> None:
        pid = at.child()
        os.kill(pid, signal.SIGSTOP)
        until_s = time.monotonic() + TIMEOUT_S
        while process_state(pid) != "T":
            assert time.monotonic() < until_s
        mode = termios.tcgetattr(at.fd)
        mode[3] |= SANE
        termios.tcsetattr(at.fd, termios.TCSANOW, mode)
        os.kill(pid, signal.SIGCONT)
        at.read_until(b"again")
        assert at.is_raw()
        at.type(b"q")

    # At the end the mode of the start comes back, not the one of the stop.
    assert mode_after(folder, terminal_script(after), act) == 0


def process_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().split()[2]


def test_detach_filter() -> None:
    keys = DetachFilter()
    assert keys.feed(b"ab") == (b"ab", False)
    assert keys.feed(b"c\x10") == (b"c", False)
    assert keys.feed(b"d") == (b"\x10d", False)
    assert keys.feed(b"\x10\x10") == (b"\x10", False)
    assert keys.feed(b"\x11x") == (b"", True)
    assert DetachFilter().feed(b"ab\x10\x11cd") == (b"ab", True)
