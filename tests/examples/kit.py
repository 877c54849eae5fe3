"""Running an example as its user would: a process of its own, whose address is read from what it prints."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

PROJECT: Final = Path(__file__).resolve().parents[2]
EXAMPLES: Final = tuple(sorted(path.stem for path in (PROJECT / "examples").glob("*.py")))
MARK: Final = "ISOPOD_TEST_RUN"
START_S: Final = 30.0
STOP_S: Final = 10.0
"""They end within a second; a machine that does much else may take longer."""


class Running:
    """An example that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", run: str, errors: Path) -> None:
        self.process = process
        self._run = run
        self._errors = errors
        self.said = ""

    def wait_said(self, pattern: str) -> str:
        """Wait until it printed what matches, and return the match's first group (or all of it)."""
        until = time.monotonic() + START_S
        while (found := re.search(pattern, self.said)) is None:
            self._read_more(max(0.0, until - time.monotonic()), pattern)
        return found.group(1) if found.groups() else found.group(0)

    def url(self) -> str:
        """Return where it serves HTTP."""
        return self.wait_said(r"listening on (http://\S+)\n")

    def wait_logged(self, text: str) -> None:
        """Wait until it wrote that to standard error."""
        until = time.monotonic() + START_S
        while text not in self.errors():
            assert time.monotonic() < until, self.errors()
            time.sleep(0.02)

    def stop(self, signum: int = signal.SIGTERM) -> str:
        """Ask it to end, look whether it did so well, and return all it printed."""
        self.process.send_signal(signum)
        assert self.process.wait(STOP_S) == 0, self.errors()
        assert self.process.stdout is not None
        self.said += self.process.stdout.read().decode()
        assert self.processes() == [], "processes are left"
        assert "Traceback" not in self.errors(), self.errors()
        return self.said

    def processes(self) -> list[int]:
        """Return the processes that live, those it started among them."""
        return processes_of(self._run)

    def errors(self) -> str:
        """Return what it wrote to standard error."""
        return self._errors.read_text(encoding="utf-8")

    def _read_more(self, timeout_s: float, wanted: str) -> None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        data = os.read(self.process.stdout.fileno(), 65_536) if ready else b""
        if not data:
            pytest.fail(f"{wanted!r} was not printed, but {self.said!r}; standard error: {self.errors()}")
        self.said += data.decode()


@contextmanager
def example(name: str, folder: Path, *arguments: str) -> Iterator[Running]:
    """Run an example for the length of a block; if the block has not stopped it, it is killed with all it started."""
    errors = folder / "errors.txt"
    run = uuid.uuid4().hex
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command(name, *arguments),
            cwd=folder,
            env={**os.environ, MARK: run},
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield Running(process, run, errors)
    finally:
        process.kill()
        process.wait()
        for pid in processes_of(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def run_example(
    name: str, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run an example that ends by itself."""
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command(name, *arguments), cwd=folder, capture_output=True, text=True, timeout=START_S, env=env, check=False)


def command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs an example."""
    return [sys.executable, str(PROJECT / "examples" / f"{name}.py"), *arguments]


def curl(*arguments: str) -> str:
    """Return the body of an answer; fails for a status from 400 on unless told otherwise."""
    done = subprocess.run(["curl", "-sS", "--max-time", "10", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes_of(run: str) -> list[int]:
    """Return the processes of a run that still live, whatever session they are in: all inherit its mark."""
    mark = f"{MARK}={run}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
