"""Fake Kata shims for load tests: an HTTP/1.1 server for each Unix socket BASE/ID/shim-monitor.sock.

    python -m benchmarks.pulse_shims --base /tmp/sbs -n 1000 [--rust-base FOLDER --rust-n N] [--sample FILE] [--rust-sample FILE]
        [--latency-ms MS]           how long every shim takes to answer
        [--slow K --slow-s S]       the first K shims answer after S seconds
        [--hang K]                  the next K take the request and never answer
        [--bad K --bad-dir FOLDER]  the next K serve the files of FOLDER, malformed bodies, one each, in turn
        [--err K]                   the next K answer 500
        [--nosock K]                the next K have a folder and no socket, like one whose shim died
        [--chunked] [--vary]        chunked coding; some figures that move from scrape to scrape
        [--vary-all]                all whole numbers but those of histograms move; SIGUSR1 begins and ends it
        [--churn R]                 R times a second the oldest sandbox goes and a new one comes
        [--pods FILE]               write [{id, uid, name, namespace, runtime_handler, kind}] as JSON, for a runtime's face that is made up
        [--stats FILE]              write counts of requests by path as JSON, each second

Prints "ready N" when all listen; ends on SIGINT and SIGTERM, and takes its folders with it. The routes are those of Kata's shim in Go:
/metrics /agent-url /direct-volume/stats /direct-volume/resize /iptables /ip6tables /policy /debug/vars /debug/pprof/*. A base may have at
most 24 bytes: a socket's path has 107, of which the id and the names take the rest.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

DATA: Final = Path(__file__).resolve().parent.parent / "tests" / "pulse" / "data"
SOCKET_NAME: Final = "shim-monitor.sock"
SOCKET_PATH_BYTES_MAX: Final = 107
HANG_S: Final = 3600.0
CHUNK_BYTES: Final = 4093
REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error", 501: "Not Implemented"}
PLAIN: Final = "text/plain; charset=utf-8"
_SCRAPES: Final = re.compile(rb"(?m)^(kata_agent_scrape_count) \d+")
_CPU: Final = re.compile(rb'(?m)^(kata_guest_cpu_time\{cpu="total",item="user"\}) \S+')
_ANY: Final = re.compile(rb"(?m)^(?!\S*_(?:bucket|count|sum)[{ ])([a-z]\S* )(\d+)$")
_NETWORK: Final = re.compile(rb'(?m)^(kata_guest_netdev_stat\{interface="eth0",item="(?:recv|sent)_bytes"\}) \S+')


class Reply(NamedTuple):
    """What is answered."""

    status: int
    kind: str
    body: bytes


class Request(NamedTuple):
    """What is asked."""

    method: str
    path: str
    query: str
    closes: bool


class Shim:
    """One shim.

    Args:
        options: What all shims are told.
        number: Which one.
        kind: How it behaves: "ok", "slow", "hang", "bad", "err", "nosock".
        text: What its /metrics says.
        hits: Counts requests by path.
        is_rust: Whether it is one of runtime-rs.
    """

    def __init__(
        self, options: argparse.Namespace, number: int, kind: str, *, text: bytes, hits: Counter[str], is_rust: bool = False
    ) -> None:
        self.is_rust = is_rust
        self._options = options
        self._number = number
        self._kind = kind
        self._text = text
        self._hits = hits
        self._n_scrapes = 0
        self._server: asyncio.AbstractServer | None = None
        self.id = hashlib.sha256(f"{options.seed}-{number}-{is_rust}".encode()).hexdigest()
        self._folder = Path(options.rust_base if is_rust else options.base) / self.id

    def pod(self) -> dict[str, str]:
        """Return whose it is."""
        return {
            "id": self.id,
            "uid": str(uuid.uuid5(uuid.NAMESPACE_OID, self.id)),
            "name": f"app-{self._number:04}-{self.id[:5]}",
            "namespace": f"team-{self._number % self._options.namespaces:02}",
            "runtime_handler": "kata-rs" if self.is_rust else "kata",
            "kind": self._kind,
        }

    async def start(self) -> None:
        """Make its folder, and listen."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self._kind == "nosock":
            return
        path = self._folder / SOCKET_NAME
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            sys.exit(f"the path of a socket is too long: {path}")
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path, backlog=16)

    def stop(self) -> None:
        """Close its socket and remove its folder."""
        if self._server is not None:
            self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError, ValueError):
            while await self._serve_one(reader, writer):
                pass
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether another may follow."""
        request = await _request(reader)
        self._hits[request.path] += 1
        if self._kind == "hang":
            await asyncio.sleep(HANG_S)
        delay_s = self._options.latency_ms / 1000 + (self._options.slow_s if self._kind == "slow" else 0)
        if delay_s:
            await asyncio.sleep(delay_s)
        writer.write(self._wire(self._reply(request), closes=request.closes))
        await writer.drain()
        return not request.closes

    def _wire(self, reply: Reply, *, closes: bool) -> bytes:
        is_chunked = self._options.chunked and reply.body
        framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(reply.body)}"
        lines = (
            f"HTTP/1.1 {reply.status} {REASONS[reply.status]}",
            f"Content-Type: {reply.kind}",
            f"Connection: {'close' if closes else 'keep-alive'}",
            framing,
        )
        head = "".join(f"{line}\r\n" for line in (*lines, "")).encode()
        if not is_chunked:
            return head + reply.body
        pieces = (reply.body[start : start + CHUNK_BYTES] for start in range(0, len(reply.body), CHUNK_BYTES))
        return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"

    def _reply(self, request: Request) -> Reply:
        if self._kind == "err":
            return Reply(500, PLAIN, b"rpc error: code = DeadlineExceeded desc = agent gone")
        if request.path == "/metrics" and request.method == "GET":
            self._n_scrapes += 1
            return Reply(200, PLAIN, self._metrics())
        if request.path == "/agent-url":
            return Reply(200, PLAIN, b"vsock://%d:1024" % (1000 + self._number))
        return self._other(request)

    def _other(self, request: Request) -> Reply:
        path, is_go = request.path, not self.is_rust
        if path == "/direct-volume/stats":
            if "path=" not in request.query:
                return Reply(400, PLAIN, b"Required parameter path not found")
            return Reply(200, PLAIN, b'{"usage":[{"available":1,"total":2,"used":1,"unit":1}]}')
        if path == "/direct-volume/resize":
            return Reply(200, PLAIN, b"")
        if path in ("/iptables", "/ip6tables"):
            rules = b"*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n" if request.method == "GET" else b""
            return Reply(200 if request.method in ("GET", "PUT") else 501, PLAIN, rules)
        if path == "/policy" and is_go:
            return Reply(200 if request.method == "PUT" else 501, PLAIN, b"")
        if path == "/debug/vars" and is_go:
            return Reply(200, "application/json", b'{"cmdline":["shim"],"memstats":{}}')
        if path.startswith("/debug/pprof/") and is_go:
            return Reply(200, "text/html; charset=utf-8", b"<html><a href='goroutine?debug=1'>goroutine</a></html>")
        return Reply(404, PLAIN, b"404 page not found\n" if is_go else b"URL NOT FOUND")

    def _metrics(self) -> bytes:
        """Return its text; with --vary some figures grow with each scrape, with --vary-all most."""
        if self._options.vary_all:
            return _ANY.sub(lambda found: b"%b%d" % (found[1], int(found[2]) + self._n_scrapes), self._text)
        if not self._options.vary or self._kind == "bad":
            return self._text
        n_scrapes = self._n_scrapes
        text = _SCRAPES.sub(rb"\1 %d" % n_scrapes, self._text)
        text = _CPU.sub(rb"\1 %d" % (n_scrapes * 730), text)
        return _NETWORK.sub(rb"\1 %d" % (n_scrapes * 65536), text)


class Fleet:
    """All shims.

    Args:
        options: What they are told.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._hits: Counter[str] = Counter()
        self._live: deque[Shim] = deque()
        self._go_text = Path(options.sample).read_bytes()
        self._rust_text = Path(options.rust_sample).read_bytes()
        self._bad_texts = [path.read_bytes() for path in sorted(Path(options.bad_dir).iterdir())] if options.bad else []
        self._next = options.n

    async def start(self) -> int:
        """Start them; return how many."""
        options = self._options
        counts = (("slow", options.slow), ("hang", options.hang), ("bad", options.bad), ("err", options.err), ("nosock", options.nosock))
        kinds = [kind for kind, count in counts for _ in range(count)]
        for number in range(options.n):
            await self._add(number, kinds[number] if number < len(kinds) else "ok")
        for number in range(options.rust_n):
            await self._add(number, "ok", is_rust=True)
        self._write_pods()
        return len(self._live)

    async def go_on(self, stop: asyncio.Event) -> None:
        """Churn, and write counts, until told to stop."""
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1 / self._options.churn if self._options.churn else 1.0)
            if self._options.churn and not stop.is_set():
                oldest = self._live.popleft()
                oldest.stop()
                await self._add(self._next, "ok", is_rust=oldest.is_rust)
                self._next += 1
                self._write_pods()
            if self._options.stats:
                _replace(Path(self._options.stats), dict(self._hits))

    def stop(self) -> None:
        """End them all."""
        for shim in self._live:
            shim.stop()

    async def _add(self, number: int, kind: str, *, is_rust: bool = False) -> None:
        text = self._rust_text if is_rust else self._go_text
        if kind == "bad":
            text = self._bad_texts[number % len(self._bad_texts)]
        shim = Shim(self._options, number, kind, text=text, hits=self._hits, is_rust=is_rust)
        await shim.start()
        self._live.append(shim)

    def _write_pods(self) -> None:
        if self._options.pods:
            _replace(Path(self._options.pods), [shim.pod() for shim in self._live])


async def serve(options: argparse.Namespace) -> None:
    """Run shims until a signal comes."""
    fleet = Fleet(options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(options, "vary_all", not options.vary_all))
    try:
        print("ready", await fleet.start(), flush=True)
        await fleet.go_on(stop)
    finally:
        fleet.stop()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Fake Kata shims for load tests.")
    parser.add_argument("--base", default="/tmp/sbs")
    parser.add_argument("-n", type=int, default=10)
    parser.add_argument("--rust-base", default="/tmp/kata")
    parser.add_argument("--rust-n", type=int, default=0)
    parser.add_argument("--sample", default=str(DATA / "shim_sample.prom"))
    parser.add_argument("--rust-sample", default=str(DATA / "shim_sample_rs.prom"))
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--slow", type=int, default=0)
    parser.add_argument("--slow-s", type=float, default=10.0)
    for name in ("--hang", "--bad", "--err", "--nosock"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--bad-dir", default="")
    parser.add_argument("--chunked", action="store_true")
    parser.add_argument("--vary", action="store_true")
    parser.add_argument("--vary-all", action="store_true")
    parser.add_argument("--churn", type=float, default=0.0)
    parser.add_argument("--pods", default="")
    parser.add_argument("--stats", default="")
    parser.add_argument("--seed", default="s")
    parser.add_argument("--namespaces", type=int, default=20)
    options = parser.parse_args(words)
    if options.bad and not options.bad_dir:
        parser.error("--bad needs --bad-dir")
    return options


async def _request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, target, version = first.split(" ", 2)
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    await reader.readexactly(int(fields.get("content-length", "") or 0))
    path, _, query = re.sub(r"^https?://[^/]*", "", target).partition("?")
    return Request(method, path, query, fields.get("connection", "").lower() == "close" or version == "HTTP/1.0")


def _replace(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    asyncio.run(serve(parse()))
