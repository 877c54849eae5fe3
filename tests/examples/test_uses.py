"""Each example, used as its header says."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from isopod.net.ca import Authority, Subject
from isopod.world.host.world import make_host_world
from tests.examples.kit import curl, example, run_example

pytestmark = pytest.mark.row("S32")


@contextmanager
def dial(host_port: str, context: ssl.SSLContext | None = None) -> Iterator[socket.socket]:
    """A raw connection to HOST:PORT, or to unix:PATH."""
    if host_port.startswith("unix:"):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(10)
        plain.connect(host_port.removeprefix("unix:"))
    else:
        host, _, port = host_port.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname="localhost") if context else plain as peer:
        yield peer


def receive(peer: socket.socket, n_bytes: int) -> bytes:
    """Return so many bytes, fewer at the end."""
    found = b""
    while len(found) < n_bytes and (data := peer.recv(n_bytes - len(found))):
        found += data
    return found


def ask(peer: socket.socket, line: str) -> str:
    """Send a line, return the answer."""
    peer.sendall(line.encode() + b"\n")
    found = b""
    while not found.endswith(b"\n"):
        found += (data := peer.recv(4096))
        assert data, f"it ended after {found!r}"
    return found.decode().rstrip("\n")


def test_hello_ends_by_itself(tmp_path: Path) -> None:
    done = run_example("hello", tmp_path, "--every", "0.01", "--times", "3")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ["hello, 1", "hello, 2", "hello, 3", "said it 3 times"]
    assert "3 timers fired" in done.stdout


def test_hello_says_why_it_stopped(tmp_path: Path) -> None:
    with example("hello", tmp_path, "--every", "0.01") as running:
        running.wait_said("hello, 3\n")
        assert "stopped: SIGTERM" in running.stop()


def test_echo_counts_what_it_echoed(tmp_path: Path) -> None:
    with example("echo_server", tmp_path, "--port", "0") as running:
        address = running.wait_said(r"listening on (\S+)\n")
        with dial(address) as peer:
            for size in (1, 1000, 200_000):
                peer.sendall(b"x" * size)
                assert receive(peer, size) == b"x" * size
        said = running.stop()
    assert "accepted         1\n" in said
    assert "bytes written    201001\n" in said


def test_echo_closes_who_is_idle_and_listens_on_a_path(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    with example("echo_server", tmp_path, "--listen", f"unix:{path}", "--idle", "0.2") as running:
        running.wait_said(r"listening on \S+\n")
        with dial(f"unix:{path}") as peer:
            peer.sendall(b"hello")
            assert receive(peer, 5) == b"hello"
            assert peer.recv(1) == b"", "closed for being idle"
        assert "idle closed      1\n" in running.stop()
    assert not path.exists()


def test_http_routes_json_static_and_ids(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("static\n", encoding="utf-8")
    with example("http_server", tmp_path, "--port", "0", "--folder", ".") as running:
        url = running.url()
        assert curl(f"{url}/") == "<h1>isopod</h1>"
        assert msgspec.json.decode(curl("-X", "PUT", "-d", '{"name": "tea", "price": 3.5}', f"{url}/items/1")) == {
            "name": "tea",
            "price": 3.5,
        }
        assert curl(f"{url}/items/1") == '{"name":"tea","price":3.5}'
        assert "x-request-id: " in curl("-D", "-", f"{url}/items/1").lower()
        assert curl(f"{url}/static/page.txt") == "static\n"
        for wanted, *arguments in (
            ("404", f"{url}/items/2"),
            ("404", f"{url}/nothing"),
            ("400", "--path-as-is", f"{url}/static/../secret"),
            ("405", "-X", "DELETE", f"{url}/items/1"),
            ("422", "-X", "PUT", "-d", '{"name": "tea", "price": -1}', f"{url}/items/1"),
            ("400", "-X", "PUT", "-d", "{", f"{url}/items/1"),
        ):
            assert curl("-o", "/dev/null", "-w", "%{http_code}", *arguments) == wanted, arguments
        assert "\nisopod_http_responses_total{" in curl(f"{url}/metrics")
        running.stop()
        assert "http.access" in running.errors()


def test_chat_tells_everybody_and_goes_away_politely(tmp_path: Path) -> None:
    with example("websocket_chat", tmp_path, "--port", "0") as running:
        url = running.url()
        assert "new WebSocket(" in curl(f"{url}/")
        chat = f"{url.replace('http', 'ws')}/chat"
        with connect(chat) as one, connect(chat) as two:
            assert [one.recv(10), one.recv(10), two.recv(10)] == ["1 came, 1 here", "2 came, 2 here", "2 came, 2 here"]
            one.send("good morning")
            assert [one.recv(10), two.recv(10)] == ["1: good morning", "1: good morning"]
            running.stop()
            assert [close_code(one), close_code(two)] == [1001, 1001]


def close_code(ws: Connection) -> int | None:
    """Read to the end; return the code that the server closed with."""
    with pytest.raises(ConnectionClosed):
        while True:
            ws.recv(10)
    return ws.close_code


def test_the_counter_is_in_parts(tmp_path: Path) -> None:
    with example("sharded_counter", tmp_path, "--port", "0", "--shards", "2") as running:
        url = running.url()
        assert curl("-d", "[0, 3]", f"{url}/add") == "3"
        assert curl("-d", "[1, 5]", f"{url}/add") == "5"
        assert curl("-d", "[1, 5]", f"{url}/add") == "10"
        assert curl(f"{url}/parts") == "[3,10]"
        assert curl(f"{url}/total") == "13"
        assert curl("-o", "/dev/null", "-w", "%{http_code}", "-d", "[2, 1]", f"{url}/add") == "400"
        assert curl("-o", "/dev/null", "-w", "%{http_code}", "-d", '["x"]', f"{url}/add") == "422"
        running.stop()


def test_lines_over_tcp_and_tls_with_renewal(tmp_path: Path) -> None:
    with example("line_protocol_tls", tmp_path, "--port", "0", "--tls-port", "0", "--folder", "certificates") as running:
        plain = running.wait_said(r"listening on (\S+)\n")
        secure = running.wait_said(r"with TLS on (\S+),")
        folder = tmp_path / "certificates"
        assert (folder / "tls.key").stat().st_mode & 0o777 == 0o600
        with dial(plain) as peer:
            assert ask(peer, "stressed") == "desserts"
            assert ask(peer, "who").startswith("you are 127.0.0.1:")
            peer.sendall(b"quit\n")
            assert peer.recv(1) == b""
        with dial(secure, ssl.create_default_context(cafile=str(folder / "ca.crt"))) as peer:
            assert ask(peer, "stressed") == "desserts"
        with pytest.raises(ssl.SSLCertVerificationError), dial(secure, ssl.create_default_context()):
            pass

        authority = Authority.create(make_host_world(), "another authority")
        issued = authority.issue(Subject("renewed", dns_names=("localhost",)))
        (tmp_path / "new.crt").write_bytes(authority.certificate)
        (folder / "tls.key").write_bytes(issued.key)
        (folder / "tls.crt").write_bytes(issued.certificate)
        renewed = ssl.create_default_context(cafile=str(tmp_path / "new.crt"))
        running.wait_logged("tls.reloaded error=null")
        with dial(secure, renewed) as peer:
            assert ask(peer, "still here") == "ereh llits"
        with dial(secure):  # who never begins a handshake does not keep it from ending
            running.stop()


def test_an_asgi_application_runs_unmodified(tmp_path: Path) -> None:
    with example("asgi_app", tmp_path, "--port", "0") as running:
        url = running.url()
        assert running.said.startswith("starting\n")
        assert curl(f"{url}/hello/you") == '{"hello":"you"}'
        assert curl("-N", f"{url}/count/3") == "0\n1\n2\n"
        with connect(f"{url.replace('http', 'ws')}/echo") as ws:
            ws.send("again")
            assert ws.recv(10) == "again"
        assert running.stop().endswith("ended\n")


def test_without_starlette_it_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    done = run_example("asgi_app", tmp_path, environment={"PYTHONPATH": str(tmp_path)})

    assert done.returncode == 1
    assert done.stderr == "this example needs starlette (not here): .venv/bin/pip install starlette\n"


@pytest.mark.row("R36")
def test_metadata_survives_a_kill_and_goes_on(tmp_path: Path) -> None:
    with example("metadata", tmp_path, "--folder", "data", "--every", "0.02") as running:
        running.wait_said("found 0 records")
        running.wait_said("refused, all of it: mount of container db already exists: /data")
        change = int(running.wait_said(r"change (\d+): web has {'tier': 'front', 'number': '3'}"))
        running.process.kill()
        running.process.wait()
    done = run_example("metadata", tmp_path, "--folder", "data", "--every", "0", "--times", "2")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    found = int(said[0].removeprefix("found 2 records up to change "))
    assert found >= change, "what it said was durable"
    assert f"change {found + 2}: web has {{'tier': 'front', 'number': '2'}}" in said
    assert "kind=labels" in done.stdout, "the ready-made handler logs"
    assert len(list((tmp_path / "data" / "snapshots").glob("snapshot-*.json"))) >= 1


def test_metadata_of_somebody_else_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "journal.json").write_text("{}", encoding="utf-8")
    done = run_example("metadata", tmp_path, "--folder", "data")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
