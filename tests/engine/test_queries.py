"""Queries: filters one by one and together, orders, limits, and sums in which limits and use stay apart."""

from typing import Any

import msgspec
import pytest

from isopod.api.messages import Container, ListContainers, Resources
from isopod.engine import queries
from isopod.world.errors import InvalidArgument
from isopod.world.kernel import CgroupUsage
from tests.engine.test_bundle import RECORD


def record(name: str, status: Any = "running", **changes: Any) -> Container:
    return msgspec.structs.replace(RECORD, id=name[0] * 64, name=name, status=status, **changes)


RECORDS = (
    record("alpha", created_at_ns=10, labels={"tier": "web", "x": ""}, resources=Resources(memory_bytes_max=64 << 20, cpus=0.5)),
    record("beta", "exited", created_at_ns=20, labels={"tier": "db"}, resources=Resources(memory_bytes_max=32 << 20, pids_max=5)),
    record("gamma", "paused", created_at_ns=30, labels={"tier": "web"}),
    record("delta", "created", created_at_ns=40),
    record("echo", "starting", created_at_ns=50),
)
USED = {
    "alpha": CgroupUsage(50 << 20, 0, 3_000_000_000, 4),
    "gamma": CgroupUsage(70 << 20, 0, 1_000_000_000, 1),
}


def measure(found: Container) -> CgroupUsage:
    return USED.get(found.name, queries.NOT_MEASURED)


def names(**request: Any) -> list[str]:
    return [found.name for found in queries.select(RECORDS, ListContainers(**request), measure)]


@pytest.mark.row("R28")
@pytest.mark.parametrize(
    "request_,expected",
    [
        ({}, ["echo", "gamma", "alpha"]),
        ({"all": True}, ["echo", "delta", "gamma", "beta", "alpha"]),
        ({"status": ("exited",)}, ["beta"]),
        ({"status": ("Stopped", "PAUSED")}, ["gamma", "beta"]),
        ({"all": True, "labels": ("tier",)}, ["gamma", "beta", "alpha"]),
        ({"all": True, "labels": ("tier=web",)}, ["gamma", "alpha"]),
        ({"all": True, "labels": ("tier=web", "x")}, ["alpha"]),
        ({"all": True, "labels": ("tier=web", "x=y")}, []),
        ({"all": True, "name": "ta"}, ["delta", "beta"]),
        ({"all": True, "name": "?eta"}, ["beta"]),
        ({"all": True, "name": "*a"}, ["delta", "gamma", "beta", "alpha"]),
        ({"all": True, "name": "[a-z]*"}, []),
        ({"all": True, "created_since_ns": 20, "created_until_ns": 40}, ["delta", "gamma", "beta"]),
        ({"all": True, "memory_bytes_min": 50 << 20}, ["gamma", "alpha"]),
        ({"all": True, "memory_bytes_min": (50 << 20) + 1}, ["gamma"]),
        ({"cpu_ns_min": 2_000_000_000}, ["alpha"]),
        ({"pids_min": 0}, ["gamma", "alpha"]),
        ({"sort": "name"}, ["alpha", "echo", "gamma"]),
        ({"sort": "memory"}, ["gamma", "alpha", "echo"]),
        ({"sort": "cpu", "limit": 1}, ["alpha"]),
        ({"all": True, "limit": 2}, ["echo", "delta"]),
        ({"all": True, "limit": 0}, []),
        ({"all": True, "limit": 99, "name": "z"}, []),
    ],
)
def test_filters_orders_and_limits(request_: dict[str, Any], expected: list[str]) -> None:
    assert names(**request_) == expected


def test_an_unknown_state_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="running"):
        names(status=("dancing",))


def test_only_what_passes_the_other_filters_is_measured() -> None:
    asked: list[str] = []

    def count(found: Container) -> CgroupUsage:
        asked.append(found.name)
        return measure(found)

    queries.select(RECORDS, ListContainers(all=True, name="alpha", memory_bytes_min=1), count)
    queries.select(RECORDS, ListContainers(all=True), count)
    assert asked == ["alpha"]


@pytest.mark.row("R29")
def test_limits_and_use_are_summed_apart() -> None:
    limits = queries.sum_limits(RECORDS)
    assert (limits.memory_bytes, limits.memory_unlimited) == (96 << 20, 3)
    assert (limits.cpus, limits.cpus_unlimited, limits.pids, limits.pids_unlimited) == (0.5, 4, 5, 4)
    used = queries.sum_usage([measure(found) for found in RECORDS if found.status in ("running", "paused", "starting")])
    assert (used.memory_bytes, used.cpu_ns, used.pids, used.unmeasured) == (120 << 20, 4_000_000_000, 5, 1)
    assert queries.by_status(RECORDS) == {"created": 1, "starting": 1, "running": 1, "paused": 1, "exited": 1}


def test_nothing_adds_up_to_nothing() -> None:
    assert queries.by_status(()) == {}
    assert set(msgspec.to_builtins(queries.sum_limits(())).values()) == {0}
    assert set(msgspec.to_builtins(queries.sum_usage(())).values()) == {0}
