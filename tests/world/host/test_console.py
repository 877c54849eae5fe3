"""What the lean command line may touch of the machine."""

import os
import signal
import termios
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from isopod.world.host import console


class Pipe(NamedTuple):
    """Both ends of a pipe."""

    read_end: int
    write_end: int


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe, closed afterwards."""
    ends = Pipe(*os.pipe())
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize(
    "path,expected",
    [("/a//b/./c/../d/", "/a/b/d"), ("/..", "/"), ("/", "/"), ("x", "{cwd}/x"), ("./x/..", "{cwd}"), ("../y", "{parent}/y")],
)
def test_absolute(path: str, expected: str) -> None:
    cwd = os.getcwd()
    assert console.absolute(path) == expected.format(cwd=cwd, parent=os.path.dirname(cwd))


@pytest.mark.parametrize(
    "text,number",
    [("9", 9), ("KILL", 9), ("sigkill", 9), ("SigTerm", 15), ("usr1", 10), ("RTMIN", int(signal.SIGRTMIN))]
    + [(wrong, None) for wrong in ("", "0", "65", "-9", "999999999999", "SIG", "SIGFOO", "_DFL", "SIG_DFL", "SIGnal", "9.0", "é", "٣")],
)
def test_signal_number(text: str, number: int | None) -> None:
    assert console.signal_number(text) == number


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.environment("PATH") == os.environ["PATH"]
    assert console.environment("ISOPOD_NOT_SET_AT_ALL") is None


def test_files(folder: str) -> None:
    path = os.path.join(folder, "file")
    assert console.read_small_file(path) is None
    assert console.read_small_file(path + "/below") is None
    with open(path, "wb") as file:
        file.write(b"x" * 100_000)
    assert console.read_small_file(path) == b"x" * 100_000
    assert not console.is_folder(path)
    assert console.is_folder(folder)
    assert not console.is_folder(path + "-not")
    fd = console.open_to_read(path)
    try:
        assert (console.size_bytes(fd), console.is_regular(fd)) == (100_000, True)
    finally:
        console.close(fd)
    assert not console.is_regular(fd)
    with pytest.raises(IsADirectoryError):
        console.read_small_file(folder)


def test_wait(pipe: Pipe) -> None:
    assert console.wait([pipe.read_end], [pipe.write_end], 5) == ([], [pipe.write_end])
    assert console.wait([pipe.read_end], [], 0.01) == ([], [])
    os.write(pipe.write_end, b"x")
    assert console.wait([pipe.read_end], [], 5) == ([pipe.read_end], [])
    assert console.size_bytes(pipe.read_end) == 0


def test_a_hung_up_pipe_is_readable_and_at_its_end() -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    assert console.wait([read_end], [], 5) == ([read_end], [])
    assert console.read(read_end, 10) == b""
    os.close(read_end)
    assert console.read(read_end, 10) == b"", "a closed descriptor gives nothing, too"


def test_write_to_a_full_pipe(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    while console.write(pipe.write_end, bytes(4096)):
        pass
    assert console.wait([], [pipe.write_end], 0) == ([], [])


def test_signals_come_as_numbers_and_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with console.SignalPipe(["USR1", "INT"]) as pipe:
        assert pipe.take() == []
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert console.wait([pipe.fd], [], 5) == ([pipe.fd], [])
        assert sorted(pipe.take()) == [signal.SIGINT, signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_raw_mode_is_put_back_when_something_fails() -> None:
    ours, theirs = os.openpty()
    try:
        before = termios.tcgetattr(theirs)
        with pytest.raises(ZeroDivisionError), console.RawMode(theirs):
            assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            raise ZeroDivisionError
        assert termios.tcgetattr(theirs) == before
        assert console.terminal_size(0xFFFF, theirs) == (0, 0)
        termios.tcsetwinsize(theirs, (24, 80))
        assert console.terminal_size(0xFFFF, theirs) == (24, 80)
    finally:
        os.close(ours)
        os.close(theirs)


def test_child() -> None:
    child = console.Child(["sh", "-c", "cat; echo out; exit 3"])
    assert console.read(child.fd, 100) == b"out\n"
    assert console.read(child.fd, 100) == b""
    assert child.finish() == 3
    endless = console.Child(["cat", "/dev/zero"])
    assert console.read(endless.fd, 1) == b"\0"
    assert endless.finish() != 0, "nobody reads it any more"
    with pytest.raises(FileNotFoundError):
        console.Child(["isopod-has-no-such-program"])


def test_clock() -> None:
    before = console.monotonic_s()
    console.pause(0.01)
    assert console.monotonic_s() >= before + 0.01
    assert abs(console.unix_time_ns() - time.time_ns()) < 60 * 10**9
