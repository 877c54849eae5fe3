"""How tests run: async bodies, the two Worlds, temporary folders, and what is checked after each.

An `async def test_...` runs on the loop of its World fixture (a plain fresh loop if it asks for none):

- `world` runs the body on the host and in the simulation;
- `host_world` gives the host's `World`, `sim_world` the `SimWorld` (its ports are `sim_world.world`, beside the handles for faults);
- `folder` is an empty folder on the disk of the World in use.

What depends on who is faster (a call against its deadline, a pause against a time-out) is marked `virtual_time`: its `world` is the
simulation only, where a machine that stands still decides nothing. On the host the same deadlines are tested where only one side can win.

Host loops are uvloop; below tests/world every host test runs on asyncio's own loop too, and those of sockets on the polling one. A body
that leaves a task running, or during which a callback failed unseen, or that leaves a transport open, fails.
"""

import asyncio
import ctypes
import gc
import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.world import World

if TYPE_CHECKING:
    from isopod.world.sim import SimWorld

HERE: Final = os.path.dirname(os.path.abspath(__file__))
CLEANING_S: Final = 10.0
"""How long before pytest-timeout's limit a body is cancelled."""
POLLED: Final = frozenset(("test_network.py", "test_network_tls.py"))
"""Test files whose bodies run on the polling loop too: the other ports do not care where their callbacks come from."""
GRACE_TURNS: Final = 10
"""Loop turns in which tasks and transports that are already ending may end."""


class Stage(NamedTuple):
    """The loop and the World a test runs on."""

    loop: asyncio.AbstractEventLoop
    world: World


STAGE: Final = pytest.StashKey[Stage]()
PASSED: Final = pytest.StashKey[bool]()
"""Whether the body passed: what a failed one left open is not worth a second complaint."""
GROWN: Final = pytest.StashKey[int]()
"""Of the session: the process's size after memory was last given back."""
GROWTH_BYTES_MAX: Final = 200 << 20


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take no notice of how long hypothesis' examples take: that says something about the machine only."""
    config.addinivalue_line("markers", "virtual_time: depends on short times, so `world` is the simulation only")
    unhurried = [*settings().suppress_health_check, HealthCheck.too_slow]
    settings.register_profile("unhurried", settings(), deadline=None, suppress_health_check=unhurried)
    settings.load_profile("unhurried")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run bodies that take `world` on both Worlds; below tests/world also on both host loops."""
    is_port_test = os.path.dirname(str(metafunc.definition.path)).startswith(os.path.join(HERE, "world"))
    kinds = ["uvloop", "asyncio"] if is_port_test else ["uvloop"]
    if is_port_test and metafunc.definition.path.name in POLLED:
        kinds.append("polling")
    if "world" in metafunc.fixturenames and metafunc.definition.get_closest_marker("virtual_time"):
        metafunc.parametrize("world", ["sim"], indirect=True)
    elif "world" in metafunc.fixturenames:
        names = ["host" if kind == "uvloop" else f"host-{kind}" for kind in kinds]
        metafunc.parametrize("world", [*kinds, "sim"], ids=[*names, "sim"], indirect=True)
    elif "host_world" in metafunc.fixturenames and is_port_test:
        metafunc.parametrize("host_world", kinds, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Literal[True] | None:
    """Run a coroutine test on its stage's loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters if name in pyfuncitem.funcargs}
    limit_s = time_limit_s(pyfuncitem) - CLEANING_S
    stage = pyfuncitem.stash.get(STAGE, None)
    if stage is not None:
        pyfuncitem.stash[PASSED] = False
        # Virtual time says nothing about a hang; the simulation itself ends deadlocks and run-away loops.
        run_checked(stage.loop, pyfuncitem.obj(**arguments), limit_s=None if stage.world.name == "sim" else limit_s)
        pyfuncitem.stash[PASSED] = True
        return True
    with host_loop("uvloop") as loop:
        run_checked(loop, pyfuncitem.obj(**arguments), limit_s=limit_s)
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After a test that left much freed memory with the allocator, give it back to the kernel.

    Simulated clusters are cycles of hundreds of megabytes, which the collector looks at ever more rarely in a large process, and glibc
    keeps what lies below anything that is still in use: mallopt(3), malloc_trim(3).
    """
    if resident_bytes() > item.session.stash.get(GROWN, 0) + GROWTH_BYTES_MAX:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        item.session.stash[GROWN] = resident_bytes()


def resident_bytes() -> int:
    """Return how much of the process lies in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def time_limit_s(item: pytest.Function) -> float:
    """Return after how many seconds pytest-timeout ends the whole run because of this test, without any cleaning up."""
    marker = item.get_closest_marker("timeout")
    if marker is not None and marker.args:
        return float(marker.args[0])
    return float(item.config.getoption("timeout") or item.config.getini("timeout"))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """The ports, once per World."""
    if request.param == "sim":
        with open_sim(request) as sim:
            yield sim.world
    else:
        with open_host(request, request.param) as host:
            yield host


@pytest.fixture
def host_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """The host's ports."""
    with open_host(request, getattr(request, "param", "uvloop")) as host:
        yield host


@pytest.fixture
def sim_world(request: pytest.FixtureRequest) -> "Iterator[SimWorld]":
    """The simulation: its ports are `.world`."""
    with open_sim(request) as sim:
        yield sim


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty folder on the disk of the World in use (the host's, if the test uses none)."""
    for name in ("world", "host_world", "sim_world"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    stage = request.node.stash.get(STAGE, None)
    if stage is not None and stage.world.name == "sim":
        path = "/tmp/folder"
        stage.loop.run_until_complete(stage.world.disk.make_directory(path))
        yield path
        return
    path = os.path.realpath(tempfile.mkdtemp(prefix="isopod-test-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def host_loop(kind: LoopKind) -> Iterator[asyncio.AbstractEventLoop]:
    """Open a fresh host loop with asyncio's debug checks on."""
    loop = new_loop(kind)
    loop.set_debug(True)
    try:
        yield loop
    except BaseException:
        _close(loop)
        raise
    left = _close(loop)
    if left:
        pytest.fail("left open:\n  " + "\n  ".join(left))


@contextmanager
def open_host(request: pytest.FixtureRequest, kind: LoopKind) -> Iterator[World]:
    """Open the host World on a fresh loop and make it the test's stage."""
    from isopod.world.host.world import make_host_world

    with host_loop(kind) as loop:
        host = make_host_world()
        request.node.stash[STAGE] = Stage(loop, host)
        try:
            yield host
        finally:
            host.close()
            _forget(request)
        if not request.node.stash.get(PASSED, True):
            _close(loop)


@contextmanager
def open_sim(request: pytest.FixtureRequest) -> "Iterator[SimWorld]":
    """Open a simulation and make it the test's stage."""
    from isopod.world.sim import make_sim_world

    sim = make_sim_world()
    request.node.stash[STAGE] = Stage(sim.loop, sim.world)
    try:
        yield sim
    finally:
        sim.close()
        _forget(request)


def _forget(request: pytest.FixtureRequest) -> None:
    """Let go of the stage: pytest keeps every test and its stash until the run ends, and a simulated World is megabytes."""
    del request.node.stash[STAGE]


def run_checked(loop: asyncio.AbstractEventLoop, body: Coroutine[Any, Any, None], *, limit_s: float | None) -> None:
    """Run a test's body to its end; fail it for tasks it left and for failures nobody saw.

    A body that takes longer than `limit_s` is cancelled, so that what it opened is closed.

    Raises:
        Exception: Whatever the body raised.
        pytest.fail.Exception: A task was left running, or a callback failed.
    """
    unseen: list[str] = []
    loop.set_exception_handler(lambda _, context: unseen.append(_describe(context)))
    try:
        left = loop.run_until_complete(_finish(body, limit_s))
    finally:
        _cancel_all(loop)
        loop.set_exception_handler(None)
    if left:
        pytest.fail("tasks left running:\n  " + "\n  ".join(left))
    if unseen:
        pytest.fail("failures nobody saw:\n  " + "\n  ".join(unseen))


async def _finish(body: Coroutine[Any, Any, None], limit_s: float | None) -> list[str]:
    async with asyncio.timeout(limit_s):
        await body
    own = asyncio.current_task()
    for _ in range(GRACE_TURNS):
        await asyncio.sleep(0)
    return sorted(repr(task) for task in asyncio.all_tasks() if task is not own)


def _close(loop: asyncio.AbstractEventLoop) -> list[str]:
    """Close a loop; return what was still open on it. The warnings are caught: raised inside uvloop's close they would make it hang."""
    if loop.is_closed():
        return []
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        loop.close()
    return [str(warning.message).splitlines()[0] for warning in caught]


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


def _describe(context: dict[str, Any]) -> str:
    return f"{context.get('message')}: {context.get('exception')!r}"
