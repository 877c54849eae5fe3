"""Simulated processes: pipes, signals, identities."""

import asyncio
import errno
import signal

import pytest

from isopod.world.errors import DeadlineExceeded
from isopod.world.processes import ProcessIdentity
from isopod.world.sim import SimWorld
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.stdio import read_in, write_error, write_out
from isopod.world.sim.table import PidNamespace, SimProcess


async def upper(_: Machine, process: SimProcess) -> int:
    """Write stdin in capitals to stdout, and its arguments to stderr."""
    while data := await read_in(process):
        await write_out(process, data.upper())
    await write_error(process, " ".join(process.argv[1:]).encode())
    return 3


async def piped(_: Machine, process: SimProcess) -> int:
    """Copy from one pipe to the other, backwards."""
    source, sink = process.pipes["IN"], process.pipes["OUT"]
    data = b""
    while part := await source.read():
        data += part
    await sink.write(data[::-1])
    return 0


async def patient(_: Machine, process: SimProcess) -> int:
    """Sleep for ever, but end well on SIGTERM."""
    ending = asyncio.Event()
    process.handlers[int(signal.SIGTERM)] = ending.set
    process.handlers[int(signal.SIGHUP)] = "ignore"
    await ending.wait()
    return 5


def install(sim: SimWorld) -> None:
    for name, program in (("upper", upper), ("piped", piped), ("patient", patient)):
        sim.processes.install(f"/usr/bin/{name}", program)


async def test_run_gathers_what_a_program_does(sim_world: SimWorld) -> None:
    install(sim_world)
    done = await sim_world.world.processes.run(["/usr/bin/upper", "a", "b"], stdin=b"x" * 200_000)
    assert done == (3, b"X" * 200_000, b"a b")


async def test_a_program_that_takes_too_long_is_killed(sim_world: SimWorld) -> None:
    install(sim_world)
    with pytest.raises(DeadlineExceeded):
        await sim_world.world.processes.run(["/usr/bin/patient"], timeout_s=10)
    assert sim_world.world.processes.find("/usr/bin/patient") == []


async def test_programs_that_cannot_be(sim_world: SimWorld) -> None:
    processes = sim_world.world.processes
    for path, number in (("/usr/bin/absent", errno.ENOENT), ("/etc/hostname", errno.EACCES), ("/usr/bin/odd", errno.ENOEXEC)):
        sim_world.machine.view.write("/usr/bin/odd", b"data", 0o755)
        with pytest.raises(OSError) as refused:
            await processes.spawn([path], env={}, pipes={"P": "read"})
        assert refused.value.errno == number
    assert processes.which("absent") is None
    assert processes.which("crun") == "/usr/bin/crun"
    assert processes.which("conmon") == "/usr/bin/conmon"


async def test_pipes_by_name(sim_world: SimWorld) -> None:
    install(sim_world)
    child = await sim_world.world.processes.spawn(["/usr/bin/piped"], env={}, pipes={"IN": "write", "OUT": "read"})
    await child.pipes["IN"].write(b"abc")
    child.pipes["IN"].close()
    assert await child.pipes["OUT"].read() == b"cba"
    assert await child.pipes["OUT"].read() == b""
    assert await child.wait() == 0


async def test_a_pipe_nobody_reads(sim_world: SimWorld) -> None:
    install(sim_world)
    child = await sim_world.world.processes.spawn(["/usr/bin/patient"], env={}, pipes={"IN": "write"})
    writing = asyncio.ensure_future(child.pipes["IN"].write(bytes(70_000)))
    await asyncio.sleep(1)
    assert not writing.done()
    sim_world.world.processes.signal(child.identity, signal.SIGKILL)
    with pytest.raises(BrokenPipeError):
        await writing


async def test_signals_and_identities(sim_world: SimWorld) -> None:
    install(sim_world)
    processes = sim_world.world.processes
    child = await processes.spawn(["/usr/bin/patient", "x"], env={})
    assert processes.find("/usr/bin/patient") == [(child.identity, ("/usr/bin/patient", "x"))]
    assert processes.identify(child.identity.pid) == child.identity
    other = child.identity._replace(started_ticks=child.identity.started_ticks - 1)
    assert processes.signal(other, signal.SIGKILL) is False
    await asyncio.wait_for(processes.wait_gone(other), 1)
    await asyncio.sleep(0.1)
    assert processes.signal(child.identity, signal.SIGHUP)
    assert processes.signal(child.identity, signal.SIGTERM)
    assert await child.wait() == 5
    await processes.wait_gone(child.identity)
    assert processes.signal(child.identity, signal.SIGTERM) is False
    assert processes.identify(child.identity.pid) is None


async def test_cancelling_a_wait_leaves_the_child_alone(sim_world: SimWorld) -> None:
    install(sim_world)
    child = await sim_world.world.processes.spawn(["/usr/bin/patient"], env={})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(child.wait(), 5)
    assert sim_world.world.processes.identify(child.identity.pid) is not None
    sim_world.world.processes.signal(child.identity, signal.SIGINT)
    assert await child.wait() == -signal.SIGINT


async def test_find_means_the_file_and_no_argument(sim_world: SimWorld) -> None:
    install(sim_world)
    processes = sim_world.world.processes
    sim_world.machine.view.symlink("patient", "/usr/bin/other")
    sim_world.processes.registry["/usr/bin/other"] = patient
    named = [await processes.spawn([path], env={}) for path in ("/usr/bin/patient", "/usr/bin/other")]
    liar, inside, foreign = [await processes.spawn(["/usr/bin/patient"], env={}) for _ in range(3)]
    table = sim_world.processes.table
    live = {process.pid: process for process in table.live()}
    live[liar.identity.pid].program = None
    PidNamespace().join(live[inside.identity.pid])
    live[foreign.identity.pid].uid = 1000
    assert [identity for identity, _ in processes.find("/usr/bin/patient")] == [child.identity for child in named]
    with pytest.raises(FileNotFoundError):
        processes.find("/usr/bin/missing")
    for child in (*named, liar, inside, foreign):
        await child.end()


async def test_an_end_takes_the_whole_session_and_no_other(sim_world: SimWorld) -> None:
    install(sim_world)
    processes, table = sim_world.world.processes, sim_world.processes.table
    for signalled in (False, True):
        child, other = [await processes.spawn(["/usr/bin/patient"], env={}) for _ in range(2)]
        leader = table.get(child.identity.pid)
        assert leader is not None
        helper = table.fork(leader, ["helper"])
        wrong = child.identity._replace(started_ticks=child.identity.started_ticks - 1)
        assert not processes.signal_group(wrong, signal.SIGKILL)
        assert table.get(helper.pid) is helper
        if signalled:
            assert processes.signal_group(child.identity, signal.SIGKILL)
            assert not processes.signal_group(child.identity, signal.SIGKILL)
        await child.end()
        assert await child.wait() == -signal.SIGKILL
        assert table.get(helper.pid) is None
        await child.end()
        assert processes.signal_group(other.identity, signal.SIGKILL)


async def test_a_dead_node_ends_nobody(sim_world: SimWorld) -> None:
    install(sim_world)
    spawned: list[ProcessIdentity] = []

    async def node() -> None:
        child = await sim_world.world.processes.spawn(["/usr/bin/patient"], env={})
        spawned.append(child.identity)
        try:
            await asyncio.sleep(100)
        finally:
            await child.end()

    handle = sim_world.spawn_node(node())
    await asyncio.sleep(1)
    handle.kill()
    await asyncio.sleep(1)
    assert sim_world.world.processes.identify(spawned[0].pid) == spawned[0]
    assert sim_world.world.processes.signal(spawned[0], signal.SIGKILL)
