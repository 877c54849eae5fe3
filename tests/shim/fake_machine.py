"""A machine that is none: the guest's side of the protocol as a small program, started by the shim under test as if it were QEMU.

    fake_machine.py ROLE [--console FD] [--agent FD | --vsock PATH]

Roles: good; mute (never says hello); panic (the kernel's last words on the console, then the end); hang (the same, then nothing); die (an
error on stderr, then the end); echo (no agent: what comes on stdin goes to stdout, until its end); print (no agent: some output, then 7).
A command's words say what it does: exit N, echo TEXT, error TEXT, cat, flood BYTES, wait (for a signal), misbehave HOW. Nothing of isopod
is imported, so that it starts at once and repeats no mistake.
"""

import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

HEAD = struct.Struct("<IBI")
HELLO, REQUEST, RESPONSE, STDIN, STDIN_END, STDOUT, STDERR, RESIZE, SIGNAL, EXIT = range(1, 11)
CREDIT, DATA, DATA_END, EVENT, CLOSE, PING, PONG = range(11, 18)
PANIC = b"[    0.512345] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"
METRICS = {
    "uptime_s": 1.5,
    "load1": 0.5,
    "load5": 0.25,
    "load15": 0.125,
    "memory": {"total": 1 << 27, "free": 1 << 26, "available": 1 << 26, "cached": 4096, "buffers": 0, "swap_total": 0, "swap_free": 0},
    "cpu": {"user": 1.5, "nice": 0, "system": 0.5, "idle": 10, "iowait": 0, "irq": 0, "softirq": 0, "steal": 0},
    "n_cpus": 1,
    "processes": 5,
    "threads": 7,
    "disks": [{"name": "vda", "reads": 3, "read_bytes": 5120, "writes": 1, "written_bytes": 512, "busy_s": 0.25}],
    "interfaces": [{"name": "eth0", "received_bytes": 70, "received_packets": 1, "sent_bytes": 50, "sent_packets": 2}],
    "agent": {"cpu_s": 0.25, "resident_bytes": 1 << 20, "n_fds": 9, "n_threads": 1},
    "main": {"memory_bytes": 1 << 20, "cpu_s": 1.0, "n_pids": 1, "oom_kills": 0},
}


class Guest:
    """An agent with its commands."""

    def __init__(self, channel: socket.socket, console: int | None, listener: socket.socket | None) -> None:
        self.listener = listener
        self.channel = channel
        self.console = console
        self.buffer = b""
        self.out = b""
        self.credit: dict[int, int] = {}
        self.flood: dict[int, int] = {}
        self.argv: dict[int, list[str]] = {}
        self.is_silent = False
        self.is_stubborn = False
        self.slow_metrics = False
        self.events = self.teller = 0
        self.taken: dict[int, int] = {}

    def send(self, kind: int, stream: int, payload: bytes = b"") -> None:
        self.out += HEAD.pack(len(payload) + 5, kind, stream) + payload

    def send_json(self, kind: int, stream: int, value: object) -> None:
        self.send(kind, stream, json.dumps(value).encode())

    def run(self) -> None:
        while True:
            writers = [self.channel] if self.out else []
            readers: list[Any] = [self.channel] + ([self.console] if self.console is not None else [])
            ready, writable, _ = select.select(readers, writers, [])
            if writable:
                self.out = self.out[self.channel.send(self.out) :]
            if self.channel in ready:
                data = self.channel.recv(1 << 16)
                if not data:
                    sys.exit(9)
                self.feed(data)
            if self.console in ready and self.console is not None:
                typed = os.read(self.console, 4096)
                os.write(self.console, b"you typed " + typed)
            self.pump()

    def feed(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= 9:
            length, kind, stream = HEAD.unpack_from(self.buffer)
            if len(self.buffer) < 4 + length:
                return
            payload, self.buffer = self.buffer[9 : 4 + length], self.buffer[4 + length :]
            if not self.is_silent:
                self.take(kind, stream, payload)

    def take(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == HELLO:
            hello = {
                "version": 1,
                "agent": "0.1.0",
                "kernel": "6.12-fake",
                "cpus": 1,
                "memory_bytes": 1 << 27,
                "boot_id": "b",
                "main": "running" if 1 in self.argv else "none",
            }
            self.send_json(HELLO, 0, hello)
        elif kind == PING:
            self.send(PONG, 0, payload)
        elif kind == REQUEST:
            self.credit[stream] = 262144
            self.request(stream, json.loads(payload))
        elif kind == CREDIT:
            self.credit[stream] = self.credit.get(stream, 0) + struct.unpack("<I", payload)[0]
        elif kind in (STDIN, DATA) and stream in self.argv:
            self.take_input(kind, stream, payload)
        elif kind == STDIN_END and self.argv.get(stream, [""])[0] == "cat":
            self.exit(stream, 0)
        elif kind == DATA_END and stream in self.argv:
            self.send_json(RESPONSE, stream, {"ok": {"n_bytes": self.taken.pop(stream, 0)}})
            del self.argv[stream]
        elif kind == SIGNAL and stream in self.argv:
            self.exit(stream, 128 + payload[0], payload[0])
        elif kind == RESIZE:
            self.send(STDOUT, stream, b"%d rows, %d columns\n" % struct.unpack("<HH", payload))
        elif kind == CLOSE:
            self.argv.pop(stream, None)
            self.flood.pop(stream, None)

    def take_input(self, kind: int, stream: int, payload: bytes) -> None:
        if self.argv[stream][0] == "deaf":
            return
        self.send(CREDIT, stream, struct.pack("<I", len(payload)))
        if kind == STDIN:
            self.send(STDOUT, stream, payload)
        else:
            self.taken[stream] = self.taken.get(stream, 0) + len(payload)

    def request(self, stream: int, request: dict[str, Any]) -> None:
        op = request["op"]
        if op in ("start", "exec"):
            self.begin(stream, request["argv"])
        elif op == "metrics":
            if not self.slow_metrics:
                self.send_json(RESPONSE, stream, {"ok": METRICS})
        elif op == "poweroff":
            self.send_json(RESPONSE, stream, {"ok": {}})
            if not self.is_stubborn:
                self.channel.setblocking(True)
                self.channel.sendall(self.out)
                os._exit(0)
        elif op == "archive":
            self.send_json(RESPONSE, stream, {"ok": {"mode": 0o644, "n_bytes": 10, "is_folder": False}})
            self.send(DATA, stream, b"0123456789")
            self.send(DATA_END, stream)
        elif op == "extract":
            self.argv[stream] = ["extract"]
        elif op == "sync":
            self.send_json(RESPONSE, stream, {"ok": {}})
        else:
            self.send_json(RESPONSE, stream, {"error": {"code": "unsupported", "message": f"what is {op}?"}})

    def begin(self, stream: int, argv: list[str]) -> None:
        word, rest = argv[0], argv[1:]
        if word == "missing":
            self.send_json(RESPONSE, stream, {"error": {"code": "not_found", "message": "no such command"}})
            return
        self.argv[stream] = argv
        self.send_json(RESPONSE, stream, {"ok": {"pid": 40 + stream}})
        if word == "exit":
            self.exit(stream, int(rest[0]))
        elif word in ("echo", "error"):
            self.send(STDOUT if word == "echo" else STDERR, stream, rest[0].encode())
            self.exit(stream, 0)
        elif word == "flood":
            self.flood[stream] = int(rest[0])
        elif word == "misbehave":
            getattr(self, f"misbehave_{rest[0]}")(stream)

    def exit(self, stream: int, code: int, signum: int | None = None) -> None:
        self.argv.pop(stream, None)
        self.send_json(EXIT, stream, {"code": code, "signal": signum, "out_of_memory": False})

    def pump(self) -> None:
        for stream in list(self.flood):
            left = self.flood[stream]
            while left and self.credit[stream] and len(self.out) < 1 << 20:
                n_bytes = min(left, self.credit[stream], 65536)
                self.send(STDOUT, stream, (b"%063d\n" % left) * (n_bytes // 64) + b"." * (n_bytes % 64))
                left -= n_bytes
                self.credit[stream] -= n_bytes
            self.flood[stream] = left
            if not left:
                del self.flood[stream]
                self.exit(stream, 0)
        while self.events and len(self.out) < 1 << 16:
            self.events -= 1
            self.send_json(EVENT, 0, {"event": "oom", "pid": 1, "command": "x" * 1000})
            if not self.events:
                self.exit(self.teller, 0)

    def misbehave_garbage(self, _: int) -> None:
        self.out += b"\xff" * 100

    def misbehave_stranger(self, _: int) -> None:
        self.send(STDOUT, 4711, b"who am I?")

    def misbehave_greedy(self, stream: int) -> None:
        for _ in range(5):
            self.send(STDOUT, stream, bytes(65536))

    def misbehave_liar(self, stream: int) -> None:
        self.send_json(EXIT, stream, {"code": 4711, "signal": None, "out_of_memory": False})

    def misbehave_silent(self, _: int) -> None:
        self.is_silent = True

    def misbehave_stubborn(self, stream: int) -> None:
        self.is_stubborn = True
        self.exit(stream, 5)

    def misbehave_slow_metrics(self, _: int) -> None:
        self.slow_metrics = True

    def misbehave_events(self, stream: int) -> None:
        self.events, self.teller = 5000, stream

    def misbehave_spoof(self, _: int) -> None:
        self.send_json(EVENT, 0, {"event": "panic", "message": "made up"})
        self.send_json(EVENT, 0, {"event": "oom", "pid": 3, "command": "hog"})

    def misbehave_console(self, stream: int) -> None:
        if self.console is not None:
            for number in range(20000):
                os.write(self.console, b"%063d\n" % number)
        self.exit(stream, 0)

    def misbehave_panic(self, _: int) -> None:
        if self.console is not None:
            os.write(self.console, PANIC)
        self.is_silent = True

    def misbehave_pretend(self, _: int) -> None:
        if self.console is not None:
            os.write(self.console, PANIC)

    def misbehave_poweroff(self, _: int) -> None:
        os._exit(0)

    def misbehave_crash(self, _: int) -> None:
        os.write(2, b"fake: an internal error\n")
        os._exit(3)

    def misbehave_redial(self, _: int) -> None:
        self.channel.close()
        self.buffer = self.out = b""
        self.argv = {1: self.argv[1]}
        assert self.listener is not None
        self.channel = accept_vsock(self.listener)

    def misbehave_hangup(self, _: int) -> None:
        self.channel.close()
        time.sleep(100)


def accept_vsock(listener: socket.socket) -> socket.socket:
    """Refuse the first caller as Firecracker does while its guest does not listen, and greet the second."""
    listener.accept()[0].close()
    channel = listener.accept()[0]
    line = b""
    while not line.endswith(b"\n"):
        line += channel.recv(1)
    assert line == b"CONNECT 1024\n", line
    channel.sendall(b"OK 1073741824\n")
    return channel


def main() -> None:
    """Play the role."""
    role, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    console = int(options["--console"]) if "--console" in options else None
    if role == "die":
        os.write(2, b"fake: -device nonsense: no such device\n")
        os._exit(1)
    if role == "echo":
        os.write(1, b"ready\n")
        while data := os.read(0, 4096):
            os.write(1, data)
        os._exit(0)
    if role == "print":
        os.write(1, b"one\ntwo\nhalf")
        time.sleep(0.05)
        os.write(2, b"bad\n")
        os._exit(7)
    if role in ("panic", "hang") and console is not None:
        os.write(console, b"booting\r\n" + PANIC)
        if role == "panic":
            os._exit(0)
    if role in ("mute", "hang", "wait"):
        time.sleep(1000)
    if "--vsock" in options:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options["--vsock"])
        listener.listen()
        Guest(accept_vsock(listener), console, listener).run()
    Guest(socket.socket(fileno=int(options["--agent"])), console, None).run()


if __name__ == "__main__":
    main()
