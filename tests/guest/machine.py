"""A microVM with the agent in it and nothing between: QEMU under TCG, the agent's port at the end of a socket pair.

No shim and no daemon: what is tested here is the guest. `Machine` is the process and its end; `Channel` speaks frames, keeps the credit
it gives, and files what comes by stream. All waits end after `WAIT_S`: a boot takes 2 seconds alone, and many times that under load.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from isopod.wire.agent import WINDOW_BYTES, Decoder, Frame, Kind, encode, encode_credit, encode_data, encode_json, encode_size

QEMU: Final = "qemu-system-x86_64"
GUEST: Final = Path(os.environ.get("ISOPOD_TEST_GUEST", f"{sys.prefix}/share/isopod/guest"))
WAIT_S: Final = 60.0
MEMORY_MIB: Final = 160
MAC: Final = "02:00:00:00:00:05"
WORDS: Final = (
    *("console=ttyS0", "reboot=t", "panic=-1", "quiet", "loglevel=1", "isopod.channel=serial", "pci=off"),
    *("cryptomgr.notests", "8250.nr_uarts=1", "audit=0", "random.trust_cpu=on", "rcupdate.rcu_expedited=1"),
    *("initcall_blacklist=jent_mod_init,load_system_certificate_list", "lsm=capability,landlock,yama"),
    *("tsc=reliable", "no_timer_check"),
)


class Disk(NamedTuple):
    """A file that the guest sees as a disk."""

    path: Path
    serial: str
    read_only: bool = True


class Failed(Exception):
    """The agent answered with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Ended(NamedTuple):
    """What a command wrote, and how it ended."""

    stdout: bytes
    stderr: bytes
    code: int
    signal: int | None
    out_of_memory: bool


def missing() -> str | None:
    """Return what keeps a machine from being started here, None if nothing does."""
    if shutil.which(QEMU) is None or not (GUEST / "initrd.img").exists():
        return f"no {QEMU} or no guest in {GUEST}: run `make setup-vm`"
    absent = [name for name in ("mkfs.erofs", "/bin/busybox") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Channel:
    """The host's end of the agent's port."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.hello: Any = None
        self.events: list[Any] = []
        self.pongs: list[bytes] = []
        self.silent_streams: set[int] = set()
        """Streams whose output is not credited."""
        self._decoder = Decoder()
        self._frames: dict[int, list[Frame]] = {}
        self._window: dict[int, int] = {}
        self._next = 100

    def greet(self) -> Any:
        """Say HELLO, and return the guest's. All that came for other streams is forgotten."""
        self.hello = None
        self._frames.clear()
        self._window.clear()
        self.send(encode_json(Kind.HELLO, 0, {"version": 1}))
        self.wait(lambda: self.hello is not None, "no HELLO")
        return self.hello

    def new_stream(self) -> int:
        """Return a number that is not in use."""
        self._next += 1
        return self._next

    def send(self, data: bytes) -> None:
        """Send bytes as they are, and take what comes meanwhile."""
        view = memoryview(data)
        until = time.monotonic() + WAIT_S
        while view:
            self.socket.settimeout(0.05)
            try:
                view = view[self.socket.send(view) :]
            except TimeoutError:
                assert time.monotonic() < until, "the guest takes nothing"
            self.poll(0)

    def poll(self, timeout_s: float) -> bool:
        """Take what came. Return whether it was anything."""
        self.socket.settimeout(timeout_s or 0.000001)
        try:
            data = self.socket.recv(1 << 20)
        except (TimeoutError, BlockingIOError):
            return False
        if not data:
            raise ConnectionError("the machine is gone")
        for frame in self._decoder.feed(data):
            self._take(frame)
        return True

    def wait(self, condition: Any, what: str) -> None:
        """Take what comes until the condition holds."""
        until = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < until, what
            self.poll(0.2)

    def request(self, op: str, stream: int | None = None, **arguments: Any) -> Any:
        """Ask, and return what follows "ok".

        Raises:
            Failed: The answer is an error.
        """
        stream = self.new_stream() if stream is None else stream
        self.send(encode_json(Kind.REQUEST, stream, {"op": op, **arguments}))
        return self.answer(stream)

    def answer(self, stream: int) -> Any:
        """Return the next answer on a stream.

        Raises:
            Failed: It is an error.
        """
        answer = self.take(stream, Kind.RESPONSE).json()
        if "error" in answer:
            raise Failed(answer["error"]["code"], answer["error"]["message"])
        return answer["ok"]

    def take(self, stream: int, *kinds: Kind) -> Frame:
        """Return the next frame of some kinds on a stream, and drop it."""
        self.wait(lambda: self.has(stream, *kinds), f"no {kinds} on stream {stream}: {self._frames.get(stream)}")
        frames = self._frames[stream]
        return frames.pop(next(index for index, frame in enumerate(frames) if frame.kind in kinds))

    def has(self, stream: int, *kinds: Kind) -> bool:
        """Return whether such a frame has come."""
        return any(frame.kind in kinds for frame in self._frames.get(stream, ()))

    def output(self, stream: int, kind: Kind = Kind.STDOUT) -> bytes:
        """Return what has come so far of a kind, and leave it."""
        return b"".join(frame.payload for frame in self._frames.get(stream, ()) if frame.kind is kind)

    def window(self, stream: int) -> int:
        """Return how much the guest takes on a stream."""
        return self._window.get(stream, WINDOW_BYTES)

    def write(self, stream: int, data: bytes, kind: Kind = Kind.STDIN) -> None:
        """Send data as far as the guest's credit goes, wait for more, send on."""
        for start in range(0, len(data), 32_768):
            piece = data[start : start + 32_768]
            self.wait(lambda piece=piece: self.window(stream) >= len(piece), "no credit")
            self._window[stream] = self.window(stream) - len(piece)
            for frame in encode_data(kind, stream, piece):
                self.send(frame)

    def begin(self, *argv: str, stream: int | None = None, op: str = "exec", **more: Any) -> int:
        """Start a command, and return its stream.

        Raises:
            Failed: It could not be started.
        """
        stream = self.new_stream() if stream is None else stream
        self.request(op, stream, argv=argv, **more)
        return stream

    def end(self, stream: int) -> Ended:
        """Wait until a command has ended."""
        how = self.take(stream, Kind.EXIT).json()
        frames = self._frames.pop(stream, [])
        out, err = (b"".join(frame.payload for frame in frames if frame.kind is kind) for kind in (Kind.STDOUT, Kind.STDERR))
        return Ended(out, err, how["code"], how["signal"], how["out_of_memory"])

    def run(self, *argv: str, stdin: bytes | None = None, **more: Any) -> Ended:
        """Run a command to its end."""
        stream = self.begin(*argv, stdin=stdin is not None, **more)
        if stdin is not None:
            self.write(stream, stdin)
            self.send(encode(Kind.STDIN_END, stream))
        return self.end(stream)

    def shell(self, script: str, **more: Any) -> Ended:
        """Run a script to its end."""
        return self.run("/bin/sh", "-c", script, **more)

    def text(self, script: str, **more: Any) -> str:
        """Return what a script writes; it must succeed."""
        ended = self.shell(script, **more)
        assert ended.code == 0, ended
        return ended.stdout.decode()

    def archive(self, path: str) -> tuple[Any, bytes]:
        """Return what is said of a file or folder, and its tar."""
        stream = self.new_stream()
        facts = self.request("archive", stream, path=path)
        self.take(stream, Kind.DATA_END, Kind.RESPONSE)
        data = self.output(stream, Kind.DATA)
        return facts, data

    def extract(self, path: str, data: bytes) -> Any:
        """Unpack a tar into a folder.

        Raises:
            Failed: It could not be, or not wholly.
        """
        stream = self.new_stream()
        self.send(encode_json(Kind.REQUEST, stream, {"op": "extract", "path": path}))
        for start in range(0, len(data), 32_768):
            piece = data[start : start + 32_768]
            self.wait(lambda piece=piece: self.window(stream) >= len(piece) or self.has(stream, Kind.RESPONSE), "no credit")
            if self.has(stream, Kind.RESPONSE):
                break
            self._window[stream] = self.window(stream) - len(piece)
            self.send(encode(Kind.DATA, stream, piece))
        self.send(encode(Kind.DATA_END, stream))
        return self.answer(stream)

    def resize(self, stream: int, rows: int, columns: int) -> None:
        """Give a terminal another size."""
        self.send(encode_size(stream, rows, columns))

    def kill(self, stream: int, number: int) -> None:
        """Send a signal to a command."""
        self.send(encode(Kind.SIGNAL, stream, bytes([number])))

    def _take(self, frame: Frame) -> None:
        if frame.stream == 0:
            self._take_own(frame)
        elif frame.kind is Kind.CREDIT:
            self._window[frame.stream] = self.window(frame.stream) + frame.number()
        else:
            self._frames.setdefault(frame.stream, []).append(frame)
            if frame.kind in (Kind.STDOUT, Kind.STDERR, Kind.DATA) and frame.stream not in self.silent_streams:
                self.socket.settimeout(WAIT_S)
                self.socket.sendall(encode_credit(frame.stream, len(frame.payload)))

    def _take_own(self, frame: Frame) -> None:
        if frame.kind is Kind.HELLO:
            self.hello = frame.json()
        elif frame.kind is Kind.EVENT:
            self.events.append(frame.json())
        elif frame.kind is Kind.PONG:
            self.pongs.append(frame.payload)


class Machine:
    """QEMU's process."""

    def __init__(
        self, folder: Path, disks: Sequence[Disk], *, memory_mib: int = MEMORY_MIB, words: Sequence[str] = (), incoming: str = ""
    ) -> None:
        self.folder = folder
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.monitor, monitor_end = socket.socketpair()
        self.console = folder / f"console-{id(self)}.log"
        argv = _command(self.console, disks, (theirs.fileno(), monitor_end.fileno()), memory_mib, words)
        argv += ("-incoming", incoming) if incoming else ()
        with (folder / "qemu.log").open("ab") as log:
            self.process = subprocess.Popen(
                # Should this process be killed itself, the kernel kills the machine.
                ("setpriv", "--pdeathsig", "KILL", *argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), monitor_end.fileno()),
                start_new_session=True,
            )
        theirs.close()
        monitor_end.close()
        self._lines = self.monitor.makefile("rwb")
        self.monitor.settimeout(WAIT_S)

    def command(self, name: str, **arguments: object) -> Any:
        """Give QEMU a command, and return its answer."""
        self._lines.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._lines.flush()
        while True:
            answer = json.loads(self._lines.readline())
            if "return" in answer or "error" in answer:
                assert "return" in answer, answer
                return answer["return"]

    def open_monitor(self) -> None:
        """Begin the conversation with QEMU."""
        self.command("qmp_capabilities")

    def snapshot(self, path: Path) -> None:
        """Stop the machine and write its memory and devices to a file."""
        self.command("stop")
        self.command("migrate", uri=f"exec:cat >{path}")
        until = time.monotonic() + WAIT_S
        while self.command("query-migrate").get("status") != "completed":
            assert time.monotonic() < until, "the snapshot is not written"
            time.sleep(0.01)

    def resume(self) -> None:
        """Let a restored machine run, once it is read."""
        until = time.monotonic() + WAIT_S
        while self.command("query-status")["status"] == "inmigrate":
            assert time.monotonic() < until, "the snapshot is not read"
            time.sleep(0.01)
        self.command("cont")

    def wait_gone(self) -> int:
        """Wait until the process has ended by itself, and return its exit code."""
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """Kill what is left."""
        self._lines.close()
        self.monitor.close()
        self.channel.socket.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def booted(folder: Path, disks: Sequence[Disk], **more: Any) -> Iterator[Machine]:
    """A machine whose agent has greeted."""
    machine = Machine(folder, disks, **more)
    try:
        machine.open_monitor()
        machine.channel.greet()
        yield machine
    except (AssertionError, ConnectionError) as error:
        error.add_note(f"console: {machine.console.read_text(errors='replace') if machine.console.exists() else ''}")
        raise
    finally:
        machine.close()


def configuration(layers: Sequence[Sequence[str | None]], **more: Any) -> dict[str, Any]:
    """Return the arguments of `configure`."""
    network = {"mac": MAC, "address": "10.88.0.5/24", "gateway": "10.88.0.1", "mtu": 1400}
    return {
        "hostname": "guest-a",
        "time_ns": time.time_ns(),
        "entropy": os.urandom(64).hex(),
        "layers": layers,
        "upper": None,
        "network": network,
        "hosts": "127.0.0.1 localhost\n10.88.0.5 guest-a\n",
        "resolv": "nameserver 10.88.0.1\n",
        "mounts": [],
        "pids_max": None,
        **more,
    }


def _command(console: Path, disks: Sequence[Disk], ends: tuple[int, int], memory_mib: int, words: Sequence[str]) -> tuple[str, ...]:
    agent, monitor = ends
    return (
        *(QEMU, "-M", "microvm,acpi=on,pit=off,pic=off,rtc=on,pcie=off,isa-serial=on", "-global", "virtio-mmio.force-legacy=false"),
        *("-accel", "tcg,tb-size=32", "-cpu", "max", "-m", str(memory_mib), "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(GUEST / "vmlinux"), "-initrd", str(GUEST / "initrd.img")),
        *("-append", " ".join((*WORDS, *words, f"tsc_early_khz={_host_khz()}")), "-serial", f"file:{console}"),
        *("-chardev", f"socket,id=qmp,fd={monitor}", "-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-device"),
        *("-chardev", f"socket,id=agent,fd={agent}", "-device", "virtserialport,chardev=agent,name=isopod.agent.0"),
        *(word for number, disk in enumerate(disks) for word in _disk(number, disk)),
        *("-netdev", "hubport,id=n0,hubid=0", "-device", f"virtio-net-device,netdev=n0,mac={MAC}"),
        *("-device", "virtio-rng-device", "-device", "virtio-balloon-device", "-device", "i8042"),
    )


def _disk(number: int, disk: Disk) -> Sequence[str]:
    access = "read-only=on" if disk.read_only else "read-only=off"
    drive = f"if=none,id=d{number},format=raw,{access},file={disk.path}"
    return ("-drive", drive, "-device", f"virtio-blk-device,drive=d{number},serial={disk.serial}")


def _host_khz() -> int:
    rate = re.search(r"^cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
    assert rate is not None, "/proc/cpuinfo does not tell the rate of the time-stamp counter"
    return int(float(rate.group(1)) * 1000)
