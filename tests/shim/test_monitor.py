"""The monitor socket: Kata's routes and families, as Prometheus' own parser reads them."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.shim.bench import DEADLINE_S, Bench, is_alive, wait_until

pytestmark = pytest.mark.host


class Monitor:
    """A connection to the monitor socket, one request after another."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)

    def ask(self, request: str) -> tuple[int, dict[str, str], str]:
        """Send a head; return status, fields and body."""
        self.socket.sendall(request.encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while not request.startswith("HEAD") and len(body) < int(fields["content-length"]):
            body += self._more()
        return int(status.split()[1]), fields, body.decode()

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        return self.ask(f"GET {path} HTTP/1.1\r\nHost: shim\r\n\r\n")

    def metrics(self) -> dict[str, Metric]:
        status, fields, body = self.get("/metrics")
        assert (status, fields["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        families = list(text_string_to_metric_families(body))
        assert len({family.name for family in families}) == len(families)
        return {family.name: family for family in families}

    def _more(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        return data


Connect = Callable[[], Monitor]


@pytest.fixture
def connect(bench: Bench) -> Iterator[Connect]:
    """Opens connections to the bench's monitor socket; they are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect() -> Monitor:
            monitor = Monitor(bench.config["monitor_socket"])
            stack.enter_context(monitor.socket)
            return monitor

        yield connect


@pytest.fixture
def monitored(bench: Bench) -> Bench:
    """A machine with a monitor socket, and an agent that answers."""
    bench.config["monitor_socket"] = f"{bench.folder}/sbs/a/shim-monitor.sock"
    bench.use_fake().start()
    bench.ready().close()
    return bench


def value(family: Metric, **labels: str) -> float:
    """Return the value of the sample with those labels."""
    (found,) = [sample.value for sample in family.samples if labels.items() <= sample.labels.items()]
    return float(found)


def test_families_and_units_are_katas(monitored: Bench, connect: Connect) -> None:
    families = connect().metrics()
    assert {name for name in families if name.startswith(("kata_agent", "kata_guest"))} == {
        "kata_agent_scrape_count",
        "kata_agent_threads",
        "kata_agent_total_rss",
        "kata_agent_total_time",
        "kata_guest_cpu_time",
        "kata_guest_diskstat",
        "kata_guest_load",
        "kata_guest_meminfo",
        "kata_guest_netdev_stat",
        "kata_guest_tasks",
    }
    for who in ("hypervisor", "shim"):
        assert {f"kata_{who}_{what}" for what in ("fds", "io_stat", "proc_stat", "proc_status", "threads")} <= families.keys()
    assert value(families["kata_guest_cpu_time"], cpu="total", item="user") == 1500  # milliseconds
    assert value(families["kata_guest_meminfo"], item="mem_total") == 1 << 27
    assert value(families["kata_guest_diskstat"], disk="vda", item="sectors_read") == 10
    assert value(families["kata_agent_total_time"]) == 0.25
    assert value(families["kata_shim_agent_answers"]) == 1
    fds = len(os.listdir(f"/proc/{monitored.pid}/fd"))
    assert value(families["kata_hypervisor_fds"]) == fds
    rows = Path(f"/proc/{monitored.pid}/status").read_text().splitlines()
    (peak,) = [int(row.split()[1]) << 10 for row in rows if row.startswith("VmPeak:")]
    assert value(families["kata_hypervisor_proc_status"], item="vmpeak") == peak
    assert value(families["kata_shim_agent_rpc_durations_histogram_milliseconds"], action="metrics", le="+Inf") == 1
    assert {family.type for family in families.values()} == {"gauge", "counter", "histogram"}


def test_routes_methods_and_keep_alive(monitored: Bench, connect: Connect) -> None:
    monitor = connect()
    status, fields, body = monitor.get("/agent-url")
    assert (status, body, fields["connection"]) == (200, f"unix://{monitored.config['socket']}", "keep-alive")
    length = int(monitor.get("/metrics")[1]["content-length"])
    status, fields, body = monitor.ask("HEAD /metrics?x=y HTTP/1.1\r\nHost: shim\r\n\r\n")
    assert (status, body) == (200, "")
    assert abs(int(fields["content-length"]) - length) < 1000
    assert monitor.get("/debug/pprof/")[0] == 404
    status, fields, _ = monitor.ask("POST /metrics HTTP/1.1\r\nHost: shim\r\nContent-Length: 0\r\n\r\n")
    assert (status, fields["allow"], fields["connection"]) == (405, "GET, HEAD", "keep-alive")
    status, fields, _ = monitor.ask("GET /agent-url HTTP/1.0\r\n\r\n")
    assert (status, fields["connection"]) == (200, "close")
    with pytest.raises(ConnectionResetError):
        monitor._more()


@pytest.mark.parametrize(("head", "status"), [("nonsense\r\n\r\n", 400), ("GET /metrics HTTP/1.1\r\nx: " + "y" * 20000, 431)])
def test_what_is_no_request_is_refused_and_the_end(monitored: Bench, connect: Connect, head: str, status: int) -> None:
    monitor = connect()
    found, fields, _ = monitor.ask(head)
    assert (found, fields["connection"]) == (status, "close")
    with pytest.raises(ConnectionResetError):
        monitor._more()


def test_quiet_connections_make_room_for_new_ones(monitored: Bench, connect: Connect) -> None:
    crowd = [connect() for _ in range(40)]
    assert crowd[-1].get("/agent-url")[0] == 200
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        crowd[0].get("/agent-url")


def test_requests_sent_in_one_go_are_answered_in_turn(monitored: Bench, connect: Connect) -> None:
    monitor = connect()
    monitor.socket.sendall(b"GET /agent-url HTTP/1.1\r\n\r\n" * 3)
    data = b""
    while data.count(b"unix://") < 3:
        data += monitor._more()
    assert data.count(b"HTTP/1.1 200 OK") == 3


def test_a_guest_that_does_not_answer_leaves_its_families_out(monitored: Bench, connect: Connect) -> None:
    with monitored.connect() as client:
        client.begin("exec", "misbehave", "slow_metrics")
        families = connect().metrics()
        assert value(families["kata_shim_agent_answers"]) == 0
        assert not any(name.startswith(("kata_guest", "kata_agent")) for name in families)
        assert "kata_hypervisor_threads" in families
        assert client.call("sync") == {}


def test_many_scrapes_ask_the_guest_once_a_second(monitored: Bench, connect: Connect) -> None:
    monitor = connect()
    began = time.monotonic()
    counts = [value(monitor.metrics()["kata_agent_scrape_count"]) for _ in range(50)]
    assert counts[-1] <= 2 + (time.monotonic() - began)


def test_its_folder_goes_with_the_machine(monitored: Bench) -> None:
    folder = Path(monitored.config["monitor_socket"]).parent
    assert folder.exists()
    with monitored.connect() as client:
        client.call("stop", timeout_s=30)
    monitored.end()
    assert not folder.exists()
    wait_until(lambda: not is_alive(monitored.pid), "the machine's end")


def test_without_a_tap_there_is_no_network(monitored: Bench, connect: Connect) -> None:
    assert "kata_hypervisor_netdev" not in connect().metrics()


@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("ip") is None, reason="unshare or ip is not installed")
def test_its_taps_are_counted_where_they_are(bench: Bench, connect: Connect) -> None:
    """The shim runs in a network namespace made for it, with the tap; the machine in an empty one of its own."""
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    make = 'ip tuntap add isotap0 mode tap vnet_hdr && ip link set isotap0 up && exec "$@"'
    bench.wrapper = ["unshare", "-n", "sh", "-c", make, "sh"]
    bench.config |= {"monitor_socket": f"{bench.folder}/monitor.sock", "own_network": True}
    bench.use_fake(files=[{"kind": "tap", "name": "isotap0"}]).start()
    netdev = connect().metrics()["kata_hypervisor_netdev"]
    assert {sample.labels["interface"] for sample in netdev.samples} == {"isotap0"}
    assert len(netdev.samples) == 16
    assert "isotap0" not in Path(f"/proc/{bench.pid}/net/dev").read_text()
