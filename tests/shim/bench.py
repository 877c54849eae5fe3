"""A shim on a bench: started as the engine starts it, with a fake machine, and spoken to over its socket with blocking calls.

Everything waits for a condition, with one deadline for all; what a bench started ends with it.
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import pytest

from isopod.wire.agent import TAKES_CREDIT, Decoder, Frame, Kind, encode, encode_credit, encode_json

PROJECT: Final = Path(__file__).parents[2]
CRATE: Final = PROJECT / "rust/guest"
FAKE: Final = str(Path(__file__).with_name("fake_machine.py"))
DEADLINE_S: Final = 60.0
TARGET: Final = f"{platform.machine()}-unknown-linux-gnu"
Json = dict[str, Any]


@functools.cache
def find_shim() -> str:
    """Return the shim's path: what set-up installed, or where its source is newer one built from that; skips where there is neither."""
    installed = Path(sys.prefix, "share/isopod/guest/isopod-shim")
    sources = [CRATE / "Cargo.lock", CRATE / "src/protocol.rs", *CRATE.glob("src/shim/*.rs")]
    if installed.exists() and installed.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return str(installed)
    target = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "build/target-guest"))
    build = ["cargo", "build", "--release", "--locked", "--bin", "isopod-shim", "--target", TARGET]
    env = {**os.environ, "CARGO_TARGET_DIR": str(target), "RUSTFLAGS": "-C target-feature=+crt-static -C relocation-model=static"}
    if shutil.which("cargo") is None or subprocess.run(build, cwd=CRATE, env=env, capture_output=True, check=False).returncode != 0:
        pytest.skip("isopod-shim was not built: run make setup-vm")
    return str(target / TARGET / "release/isopod-shim")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once `condition` holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


class Client:
    """A connection to a shim. Frames that nobody asked for yet are kept."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._n_streams = 100

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, kind: Kind, stream: int, payload: bytes = b"") -> None:
        self.socket.sendall(encode(kind, stream, payload))

    def open(self, op: str, **arguments: object) -> int:
        """Ask for something; return its stream."""
        self._n_streams += 1
        self.socket.sendall(encode_json(Kind.REQUEST, self._n_streams, {"op": op, **arguments}))
        return self._n_streams

    def grant(self, stream: int, n_bytes: int) -> None:
        """Let the shim send more; one that has just ended needs it no more."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(encode_credit(stream, n_bytes))

    def next(self, stream: int) -> Frame:
        """Return the next frame of a stream.

        Raises:
            ConnectionResetError: The shim closed the connection.
        """
        while True:
            for index, frame in enumerate(self._frames):
                if frame.stream == stream:
                    return self._frames.pop(index)
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the shim closed the connection")
            self._frames += self._decoder.feed(data)

    def response(self, stream: int) -> Json:
        frame = self.next(stream)
        assert frame.kind is Kind.RESPONSE, frame
        answer: Json = frame.json()
        return answer

    def call(self, op: str, **arguments: object) -> Json:
        """Ask for something and return what it gave; an answer that says no fails the test."""
        answer = self.response(self.open(op, **arguments))
        assert "ok" in answer, answer
        found: Json = answer["ok"]
        return found

    def refusal(self, op: str, **arguments: object) -> tuple[str, str]:
        """Ask for something and return code and message of the error."""
        error = self.response(self.open(op, **arguments))["error"]
        return error["code"], error["message"]

    def begin(self, op: str, *argv: str, **arguments: object) -> int:
        """Start a command and return its stream."""
        stream = self.open(op, argv=argv, **arguments)
        answer = self.response(stream)
        assert "ok" in answer, answer
        return stream

    def read_to_end(self, stream: int, *, grants: bool = True) -> tuple[bytes, bytes, Json | None]:
        """Return stdout, stderr and exit of a stream; None as exit if it was closed."""
        outputs: dict[Kind, list[bytes]] = {Kind.STDOUT: [], Kind.STDERR: [], Kind.DATA: []}
        while True:
            frame = self.next(stream)
            if frame.kind in TAKES_CREDIT:
                outputs[frame.kind].append(frame.payload)
                if grants:
                    self.grant(stream, len(frame.payload))
            elif frame.kind in (Kind.EXIT, Kind.CLOSE, Kind.DATA_END):
                stdout = b"".join(outputs[Kind.STDOUT] + outputs[Kind.DATA])
                return stdout, b"".join(outputs[Kind.STDERR]), frame.json() if frame.kind is Kind.EXIT else None

    def read_bytes(self, stream: int, end: bytes) -> bytes:
        """Read a stream's output until it ends with `end`."""
        found = b""
        while not found.endswith(end):
            frame = self.next(stream)
            assert frame.kind in (Kind.STDOUT, Kind.CREDIT), frame
            found += frame.payload if frame.kind is Kind.STDOUT else b""
        return found

    def is_dropped(self) -> bool:
        """Whether the shim closes the connection, within the deadline."""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while self.socket.recv(1 << 16):
                continue
        return True


class Bench:
    """One shim. Changes to its configuration are made before `start`.

    Args:
        folder: Where its files go.
    """

    def __init__(self, folder: str) -> None:
        self.shim = find_shim()
        self.folder = Path(folder)
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.wrapper: list[str] = []
        self.config: Json = {
            "version": 1,
            "id": "a" * 64,
            "name": "bench",
            "argv": [],
            "env": {"LANG": "C.UTF-8"},
            "cwd": "/",
            "files": [],
            "console": "socket",
            "agent": "socket",
            "own_network": False,
            "cgroup_procs": [],
            "log": f"{folder}/container.log",
            "log_bytes_max": 1 << 20,
            "console_log": f"{folder}/console.log",
            "console_bytes_max": 1 << 20,
            "exit_file": f"{folder}/exit",
            "end_file": f"{folder}/end.json",
            "socket": f"{folder}/shim.sock",
            "monitor_socket": None,
            "stop_argv": None,
            "boot_timeout_s": DEADLINE_S,
            "silent_timeout_s": DEADLINE_S,
            "stop_timeout_s": DEADLINE_S,
            "vcpus": 1,
            "memory_bytes": 1 << 27,
            "hypervisor": "fake",
        }

    def use_fake(self, role: str = "good", *, console: str = "socket", agent: str = "socket", files: Sequence[Json] = ()) -> Self:
        """Let the fake machine play a role."""
        argv = [sys.executable, "-E", "-S", FAKE, role]
        kinds: list[Json] = [*files]
        for kind, where in (("console", console), ("agent", agent)):
            if where == "socket":
                argv += [f"--{kind}", str(3 + len(kinds))]
                kinds.append({"kind": kind})
        self.config |= {"argv": argv, "files": kinds, "console": console, "agent": agent}
        return self

    def spawn(self) -> tuple[int, int]:
        """Start the shim; return our ends of its start and sync pipes."""
        Path(self.folder, "shim.json").write_bytes(msgspec.json.encode(self.config))
        start_read, start_write = os.pipe()
        sync_read, sync_write = os.pipe()
        self.process = subprocess.Popen(
            [*self.wrapper, self.shim, f"{self.folder}/shim.json"],
            env={"_OCI_STARTPIPE": str(start_read), "_OCI_SYNCPIPE": str(sync_write), "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(start_read, sync_write),
            start_new_session=True,
        )
        os.close(start_read)
        os.close(sync_write)
        return start_write, sync_read

    def begin(self) -> Json:
        """Start the shim, let it go on, and return what it said."""
        start, sync = self.spawn()
        os.write(start, b"\0")
        os.close(start)
        with os.fdopen(sync, "rb") as pipe:
            message: Json = json.loads(pipe.read())
        self.pid = message["data"]
        return message

    def start(self) -> Self:
        """Start the shim and its machine."""
        message = self.begin()
        assert message["data"] > 0, message
        return self

    def connect(self) -> Client:
        return Client(self.config["socket"])

    def ready(self) -> Client:
        """Connect and wait for the agent."""
        client = self.connect()
        client.call("ready")
        return client

    @property
    def shim_pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait(self) -> int:
        """Wait for the shim's end and return its status."""
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def end(self) -> Json:
        """Wait for the shim's end; return what end.json says, with the exit file's code as `exit_file`."""
        assert self.wait() == 0
        end: Json = json.loads(Path(self.config["end_file"]).read_bytes())
        return {**end, "exit_file": int(Path(self.config["exit_file"]).read_bytes())}

    def log(self) -> str:
        return Path(self.config["log"]).read_text()

    def close(self) -> None:
        """End what is left, and see that nothing is."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.pid > 0:
            wait_until(lambda: not is_alive(self.pid), "the machine's end")


def is_alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def small_disk(path: Path, n_bytes: int) -> Iterator[Path]:
    """A disk of that size at `path`; skips where it cannot be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no tmpfs can be mounted")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def proportional_bytes(pid: int) -> int:
    """Return the memory of a process, shared pages by their share."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) << 10 for row in rows if row.startswith("Pss:"))


def cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def texts(log: str) -> Mapping[str, bytes]:
    """Return what a log in conmon's format says of each stream."""
    found: dict[str, list[str]] = {"stdout": [], "stderr": []}
    for line in log.splitlines():
        _, stream, tag, text = line.split(" ", 3)
        found[stream].append(text + ("\n" if tag == "F" else ""))
    return {stream: "".join(parts).encode() for stream, parts in found.items()}
