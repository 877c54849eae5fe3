"""The names that a Seastar user looks for, at the places where the documentation says they are."""

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Final, NamedTuple

import pytest

from tests.project.sources import PROJECT

NAMES: Final = {
    "isopod.runtime.reactor": ("Reactor", "ReactorStats"),
    "isopod.runtime.future": (
        "Future", "Promise", "make_ready_future", "make_exception_future", "make_future", "when_all", "when_all_succeed",
    ),
    "isopod.runtime.scheduling": ("SchedulingGroup", "Priority", "current_group", "maybe_yield", "need_preempt"),
    "isopod.runtime.shards": (
        "PeeringShardedService", "Sharded", "Smp", "SmpConfig", "SmpService", "SmpServiceGroup", "submit_to", "this_shard_id",
    ),
    "isopod.runtime.gate": ("Gate",),
    "isopod.runtime.abort": ("AbortSource", "AbortOnExpiry", "deadline"),
    "isopod.runtime.shutdown": ("ShutdownCoordinator", "ShutdownResource", "ShutdownPhase"),
    "isopod.runtime.timers": ("Timer", "TimerWheel"),
    "isopod.runtime.sync": ("Semaphore", "SharedMutex", "ConditionVariable", "Latch", "Barrier"),
    "isopod.runtime.files": ("File", "open_file_dma", "file_exists", "file_size", "remove_file"),
    "isopod.runtime.file_streams": ("make_file_input_stream", "make_file_output_stream"),
    "isopod.runtime.mmap_files": ("MappedFile", "MappedFileMut"),
    "isopod.runtime.buffers": ("AlignedBuffer", "BufferPool", "ScatterGatherBuffer"),
    "isopod.runtime.io_queue": ("IoQueue", "IoProperties"),
    "isopod.runtime.metrics": ("Registry", "ShardMetrics"),
    "isopod.runtime.config": ("ConfigLoader", "ConfigBuilder", "RuntimeConfig"),
    "isopod.net.tcp": ("TcpServer", "TcpClient", "Connection", "connect_tcp"),
    "isopod.net.udp": ("UdpSocket", "UdpServer", "open_udp_socket"),
    "isopod.net.pool": ("ConnectionPool",),
    "isopod.net.balancer": ("Balancer",),
    "isopod.net.dns": ("Resolver", "DnsClient"),
    "isopod.net.tls": ("open_server_tls", "open_client_tls"),
    "isopod.net.protocols": ("ProtocolRegistry", "Endpoints"),
    "isopod.net.http": ("HttpServer", "Request", "Response"),
    "isopod.net.http.client": ("HttpClient",),
    "isopod.net.http.router": ("Router",),
    "isopod.net.http.websocket": ("WebSocket", "WebSocketHub", "websocket_route", "connect_websocket"),
    "isopod.net.rpc": ("Server", "Client", "connect"),
}  # fmt: skip
CRATES: Final = ("core", "net", "http", "rpc", "config", "distributed", "testing", "util")
HEADING: Final = "## Where things are"


@pytest.mark.row("S41")
@pytest.mark.parametrize("module", sorted(NAMES))
def test_a_name_is_where_a_seastar_user_looks_for_it(module: str) -> None:
    found = import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []
    undocumented = [name for name in NAMES[module] if not getattr(found, name).__doc__]
    assert undocumented == []


class Row(NamedTuple):
    """One row of the table: the crate, the packages, the names that stayed. A crate may have several rows."""

    crate: str
    packages: tuple[str, ...]
    names: tuple[str, ...]
    is_later: bool


def table() -> list[Row]:
    """Return what docs/runtime.md says of the crates of the reference."""
    text = (PROJECT / "docs" / "runtime.md").read_text(encoding="utf-8")
    assert HEADING in text
    found = []
    for line in text.partition(HEADING)[2].partition("\n## ")[0].splitlines():
        if (crate := re.match(r"\|\s*`?seastar-(\w+)", line)) is not None:
            _, _, packages, names, _ = (cell.strip() for cell in line.split("|"))
            found.append(
                Row(crate.group(1), tuple(re.findall(r"isopod(?:\.\w+)+", packages)), tuple(re.findall(r"\w+", names)), packages == "later")
            )
    return found


@pytest.mark.row("S41")
def test_every_crate_has_a_row() -> None:
    rows = table()
    assert [crate for crate in CRATES if crate not in {row.crate for row in rows}] == []
    assert [row for row in rows if not row.packages and not row.is_later] == []


@pytest.mark.row("S41")
def test_every_package_of_the_table_imports_and_has_the_names_that_stayed() -> None:
    missing = []
    for row in table():
        if not row.is_later:
            public = {name for package in row.packages for module in modules_of(package) for name in vars(module)}
            missing += [f"seastar-{row.crate}: {name}" for name in row.names if name not in public]
    assert missing == []


def modules_of(package: str) -> Iterator[ModuleType]:
    """Import a module, and those in it."""
    module = import_module(package)
    yield module
    for info in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{package}."):
        yield import_module(info.name)
