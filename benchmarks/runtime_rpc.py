"""RPC beside grpcio's asyncio API: rate and server CPU with 256 calls at once, median latency of one call, CPU for a mebibyte of a stream.

Server and load are processes of their own; the server's CPU time is the kernel's count of all its threads over the measured time, a warm-up
left out. Both echo the same small message: ours typed (decoded, validated, encoded) from a coroutine and from a plain function, grpcio's as
bytes that nobody looks at ("grpcio aio") and decoded and encoded as ours ("grpcio aio + msgpack"). Streams are 64 KiB pieces of bytes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row

VENV: Final = PROJECT / "build" / "peers" / "rpc-venv"
PACKAGES: Final = ("grpcio==1.85.1", "msgspec")
N_AT_ONCE: Final = 256
LOAD_DEADLINE_S: Final = 60.0
INSTALL_DEADLINE_S: Final = 300.0
STOP_DEADLINE_S: Final = 10.0
_OURS: Final = (sys.executable, "-m", "benchmarks._rpc_ours")
_GRPC: Final = (str(VENV / "bin" / "python"), str(PROJECT / "benchmarks" / "_rpc_grpc.py"))


class Outcome(msgspec.Struct, frozen=True):
    """What a load printed."""

    n: int
    seconds: float
    server_s: float
    p50_us: float


class Served(NamedTuple):
    """A server under test."""

    base: tuple[str, ...]
    pid: int
    unix: str
    port: str


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows; servers run while the rows are measured."""
    for_s, n_runs = (0.5, 1) if quick else (2.0, 5)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="isopod-bench-rpc-"))
        ours = stack.enter_context(_serve(_OURS, folder, "ours.sock"))
        problem = _install()
        peer = None if problem else stack.enter_context(_serve(_GRPC, folder, "grpc.sock"))
        if problem:
            print(f"grpcio not measured because it could not be installed: {problem}", file=sys.stderr)

        def contenders(read: Callable[[Outcome], float], what: str, n_at_once: int, place: str = "unix") -> list[Contender]:
            def sample(served: Served, verb: str) -> Callable[[], float]:
                return lambda: read(_load(served, served.unix if place == "unix" else served.port, verb, [n_at_once, for_s]))

            found = [Contender(OURS, sample(ours, what))]
            if peer is not None:
                found.append(Contender("grpcio aio", sample(peer, what if what == "bulk" else "echo")))
                if what != "bulk":
                    found.append(Contender("grpcio aio + msgpack", sample(peer, "plain")))
            return found

        yield Row(f"rpc: {N_AT_ONCE} calls at once, Unix", "1/s", contenders(_rate, "echo", N_AT_ONCE), n_runs)
        yield Row(f"rpc: {N_AT_ONCE} calls at once, TCP", "1/s", contenders(_rate, "echo", N_AT_ONCE, "tcp"), n_runs)
        yield Row("rpc: the same, plain function, Unix", "1/s", contenders(_rate, "plain", N_AT_ONCE), n_runs)
        yield Row("rpc: server CPU per call, Unix", "us", contenders(_cpu_us, "echo", N_AT_ONCE), n_runs)
        yield Row("rpc: server CPU per call, TCP", "us", contenders(_cpu_us, "echo", N_AT_ONCE, "tcp"), n_runs)
        yield Row("rpc: server CPU per call, plain function", "us", contenders(_cpu_us, "plain", N_AT_ONCE), n_runs)
        yield Row("rpc: median of one call, Unix", "us", contenders(_p50_us, "echo", 1), n_runs)
        yield Row("rpc: median of one call, TCP", "us", contenders(_p50_us, "echo", 1, "tcp"), n_runs)
        yield Row("rpc: server CPU per MiB streamed, Unix", "us", contenders(_mebibyte_us, "bulk", 1), n_runs)
        yield Row("rpc: MiB streamed, Unix", "1/s", contenders(_mebibytes, "bulk", 1), n_runs)


def _rate(outcome: Outcome) -> float:
    return outcome.n / outcome.seconds


def _cpu_us(outcome: Outcome) -> float:
    return outcome.server_s * 1e6 / max(1, outcome.n)


def _p50_us(outcome: Outcome) -> float:
    return outcome.p50_us


def _mebibyte_us(outcome: Outcome) -> float:
    return outcome.server_s * 1e6 / (outcome.n / (1 << 20))


def _mebibytes(outcome: Outcome) -> float:
    return outcome.n / (1 << 20) / outcome.seconds


def _load(served: Served, address: str, what: str, numbers: list[float]) -> Outcome:
    argv = [*served.base, "load", address, what, str(int(numbers[0])), str(numbers[1]), str(served.pid)]
    try:
        done = subprocess.run(argv, cwd=PROJECT, capture_output=True, timeout=LOAD_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(argv, -1, "it did not end") from error
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
    return msgspec.json.decode(done.stdout, type=Outcome)


@contextmanager
def _serve(base: tuple[str, ...], folder: str, name: str) -> Iterator[Served]:
    """Run a server for the time of a block."""
    process = subprocess.Popen([*base, "serve", folder], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        if not port:
            raise CommandFailed([*base, "serve"], process.wait(STOP_DEADLINE_S))
        yield Served(base, process.pid, str(Path(folder) / name), port)
    finally:
        process.kill()
        process.wait(STOP_DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


def _install() -> str:
    """Have grpcio in a virtual environment of its own; return what went wrong, "" if nothing."""
    if (VENV / "bin" / "python").exists() and subprocess.run([*_GRPC[:1], "-c", "import grpc, msgspec"], check=False).returncode == 0:
        return ""
    commands = [[sys.executable, "-m", "venv", str(VENV)], [str(VENV / "bin" / "pip"), "install", "--quiet", *PACKAGES]]
    try:
        for argv in commands:
            subprocess.run(argv, check=True, capture_output=True, timeout=INSTALL_DEADLINE_S)
    except (subprocess.SubprocessError, OSError) as error:
        return str(error)
    return ""
