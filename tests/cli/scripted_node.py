"""A node that follows a test's script: a real Unix socket, real frames (packed by msgspec), no engine behind them.

The script is a plain function that gets each connection as a `Peer` and says, step by step, what the node reads and answers. What
goes wrong in it is raised when the node is closed, so that a test cannot miss it.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec

SOURCE: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "src")
LAUNCH: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; sys.exit(main(sys.argv[1:]))"
TIMEOUT_S: Final = 30.0

Frame = list[Any]


class Peer:
    """The node's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection: Final = connection
        self._inbox = b""
        self.hello: dict[str, Any] = {}

    def greet(self, lowest: int = 1, highest: int = 1) -> None:
        """Send our hello and read the client's."""
        packed = msgspec.msgpack.encode({"versions": [lowest, highest], "peer": "scripted", "group": "", "unknown": 1})
        self.connection.sendall(b"ISO1" + len(packed).to_bytes(4, "little") + packed)
        assert self._take(4) == b"ISO1"
        self.hello = msgspec.msgpack.decode(self._take(int.from_bytes(self._take(4), "little")))

    def next(self) -> Frame:
        """Return the next frame; EOFError at the end."""
        length = int.from_bytes(self._take(4), "little")
        assert length <= 1 << 20
        frame: Frame = msgspec.msgpack.decode(self._take(length))
        return frame

    def request(self, method: str) -> tuple[int, Any]:
        """Read a request of that method; return its id and body."""
        frame = self.next()
        assert frame[0] == 0, frame
        assert frame[2] == method, frame
        return frame[1], frame[4]

    def items(self, call: int, until: str = "") -> list[Any]:
        """Return the items of a call up to its END, or up to one of type `until`."""
        found: list[Any] = []
        while True:
            frame = self.next()
            if frame[0] == 5:
                return found
            if frame[0] == 4:
                assert frame[1] == call
                found.append(frame[2])
                if frame[2]["type"] == until:
                    return found

    def send(self, *frame: object) -> None:
        """Send a frame."""
        packed = msgspec.msgpack.encode(frame)
        self.connection.sendall(len(packed).to_bytes(4, "little") + packed)

    def reply(self, call: int, body: object) -> None:
        """Answer a call."""
        self.send(1, call, body, 17)

    def error(self, call: int, code: str, message: str, *, hint: str = "", exit_code: int = 1) -> None:
        """Refuse a call."""
        self.send(2, call, code, message, hint, exit_code)

    def item(self, call: int, **body: object) -> None:
        """Send an item."""
        self.send(4, call, body)

    def wait_closed(self) -> None:
        """Wait until the client closes; what it still says is dropped."""
        with suppress(ConnectionResetError):
            while self.connection.recv(1 << 16):
                pass

    def _take(self, n_bytes: int) -> bytes:
        while len(self._inbox) < n_bytes:
            data = self.connection.recv(1 << 16)
            if not data:
                raise EOFError
            self._inbox += data
        taken, self._inbox = self._inbox[:n_bytes], self._inbox[n_bytes:]
        return taken


class ScriptedNode:
    """Serves connections one after another, the n-th by the n-th script, the last script for all others."""

    def __init__(self, folder: str, *scripts: Callable[[Peer], None]) -> None:
        self.path: Final = os.path.join(folder, "node.sock")
        self._scripts: Final = scripts
        self._failures: Final[list[BaseException]] = []
        self._listener: Final = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._is_closing = False
        self._thread: Final = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closing = True
        with socket.socket(socket.AF_UNIX) as waker:
            waker.connect(self.path)
        self._thread.join(TIMEOUT_S)
        self._listener.close()
        os.unlink(self.path)
        if self._failures and error is None:
            raise self._failures[0]

    def _serve(self) -> None:
        n_served = 0
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if self._is_closing:
                    return
                connection.settimeout(TIMEOUT_S)
                try:
                    self._scripts[min(n_served, len(self._scripts) - 1)](Peer(connection))
                except BaseException as failure:  # noqa: BLE001  kept for the test's own thread
                    self._failures.append(failure)
                n_served += 1


def command_line(*words: str) -> list[str]:
    """Return how the command line is started: isolated, without installed packages, as its launcher does it."""
    return [sys.executable, "-I", "-S", "-c", LAUNCH, SOURCE, *words]


def isopod(
    *words: str, stdin: bytes | int = b"", env: dict[str, str] | None = None, cwd: str | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command line to its end; return what it printed and its exit code."""
    keywords: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(
        command_line(*words), capture_output=True, timeout=TIMEOUT_S, env=environment(env), cwd=cwd, check=False, **keywords
    )


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which no setting of this machine counts."""
    return {"PATH": os.environ["PATH"], "ISOPOD_CONFIG": "/nonexistent/config.toml", "LC_ALL": "C.UTF-8", **(extra or {})}


def answering(method: str, reply: object) -> Callable[[Peer], None]:
    """Return a script that answers one call and hangs up when the client does."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request(method)
        peer.reply(call, reply)
        peer.wait_closed()

    return script


def refusing(method: str, code: str, message: str, **more: Any) -> Callable[[Peer], None]:
    """Return a script that refuses one call."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request(method)
        peer.error(call, code, message, **more)
        peer.wait_closed()

    return script


def lines(output: bytes) -> Sequence[str]:
    """Return an output's lines."""
    return output.decode().splitlines()
