"""The simulated conmon behaves as conmon 2.1.6 does: pipes, log, attach, exit file, exec sessions, death."""

import asyncio
import signal

import pytest

from isopod.world.sim import SimWorld
from tests.world.sim.bundles import configure, crun, furnish, receive_all, receive_until, started, state, supervise

EXEC = {"args": ["sh", "-c", "echo out; echo err >&2; exit 5"], "env": ["PATH=/bin"], "cwd": "/"}


async def test_from_the_start_pipe_to_the_exit_file(sim_world: SimWorld) -> None:
    furnish(sim_world)
    configure(sim_world, "sh", "-c", "echo one; echo two >&2; printf three; exit 7")
    supervised = await supervise(sim_world)
    await asyncio.sleep(10)
    assert await sim_world.world.disk.stat("/bundle/pid") is None  # it waits for the word
    await supervised.go()
    message = await supervised.message()
    assert message == {"data": int(await sim_world.world.disk.read("/bundle/pid"))}
    assert await state(sim_world) == "created"
    await crun(sim_world, "start", "c1")
    assert await supervised.process.wait() == 7
    assert await sim_world.world.disk.read("/exits/c1") == b"7"
    assert await sim_world.world.disk.list("/exits") == ["c1"]
    lines = [line.split(b" ", 3) for line in (await sim_world.world.disk.read("/log")).splitlines()]
    assert [line[1:] for line in lines] == [[b"stdout", b"F", b"one"], [b"stderr", b"F", b"two"], [b"stdout", b"P", b"three"]]
    assert lines[0][0].startswith(b"2026-01-01T00:00:10.")
    assert lines[0][0].endswith(b"+00:00")


async def test_a_create_that_fails_is_told_with_its_words(sim_world: SimWorld) -> None:
    furnish(sim_world)
    configure(sim_world, "nope")
    supervised = await supervise(sim_world)
    await supervised.go()
    message = await supervised.message()
    assert message == {"data": -1, "message": "executable file `nope` not found in $PATH: No such file or directory\n"}
    assert await supervised.process.wait() == 1
    assert await sim_world.world.disk.list("/exits") == []


async def test_attaching_carries_stdio(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["cat"], "-i")
    first = await sim_world.world.network.connect_packets("/bundle/attach")
    second = await sim_world.world.network.connect_packets("/bundle/attach")
    await asyncio.sleep(0.01)
    await first.send(b"hello\n")
    assert await first.receive() == b"\x02hello\n"
    assert await second.receive() == b"\x02hello\n"
    first.shutdown_write()
    assert await receive_all(first) == b""
    assert await supervised.process.wait() == 0


async def test_without_stdin_the_command_reads_nothing(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["cat"])
    assert await supervised.process.wait() == 0


async def test_an_exec_session(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await started(sim_world, ["sleep", "100"])
    session = await supervise(sim_world, exec_spec=EXEC)
    await session.go()
    assert await session.message("_OCI_ATTACHPIPE") == {"data": 0}
    connection = await sim_world.world.network.connect_packets("/bundle/session/attach")
    await asyncio.sleep(10)
    assert await sim_world.world.disk.stat("/bundle/session/pid") is None  # nothing runs before the client is there
    await session.go()
    message = await session.message()
    assert message is not None
    assert message["data"] > 0
    assert await receive_all(connection) == b"\x02out\n\x03err\n"
    assert await session.message() == {"data": 5}
    assert await session.process.wait() == 5
    assert await sim_world.world.disk.read("/bundle/session/c1") == b"5"
    assert await state(sim_world) == "running"


async def test_an_exec_that_fails(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await started(sim_world, ["sleep", "100"])
    session = await supervise(sim_world, exec_spec={**EXEC, "args": ["nope"]})
    await session.go()
    await session.message("_OCI_ATTACHPIPE")
    await session.go()
    message = await session.message()
    assert message is not None
    assert message["data"] == -1
    assert "`nope` not found" in message["message"]
    assert await session.message() is None
    assert await session.process.wait() == 1


async def test_the_log_starts_anew_over_its_size(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(
        sim_world, ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; sleep 1; done"], "--log-size-max", "200"
    )
    await supervised.process.wait()
    log = await sim_world.world.disk.read("/log")
    assert len(log) <= 200
    assert log.endswith(b"line 9\n")
    assert b"line 1\n" not in log


async def test_a_signal_ends_as_128_and_more(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["sleep", "100"])
    await crun(sim_world, "kill", "c1", "KILL")
    assert await supervised.process.wait() == 137
    assert await sim_world.world.disk.read("/exits/c1") == b"137"


async def test_a_dead_supervisor_stops_no_container(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["sleep", "100"])
    sim_world.world.processes.signal(supervised.process.identity, signal.SIGKILL)
    await asyncio.sleep(1)
    assert await state(sim_world) == "running"
    with pytest.raises(ConnectionRefusedError):
        await sim_world.world.network.connect_packets("/bundle/attach")
    await asyncio.sleep(200)
    assert await state(sim_world) == "stopped"
    assert await sim_world.world.disk.list("/exits") == []


async def test_sigterm_is_passed_on(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["sh", "-c", "trap 'exit 3' TERM; while true; do sleep 0.1; done"])
    await asyncio.sleep(1)
    sim_world.world.processes.signal(supervised.process.identity, signal.SIGTERM)
    assert await supervised.process.wait() == 3


async def test_a_terminal(sim_world: SimWorld) -> None:
    furnish(sim_world)
    supervised = await started(sim_world, ["sh"], "-t", "-i", terminal=True)
    connection = await sim_world.world.network.connect_packets("/bundle/attach")
    control = await sim_world.world.disk.open_append("/bundle/ctl")
    await control.append(b"1 50 132\n")
    control.close()
    await asyncio.sleep(0.1)
    await connection.send(b"stty size; tty\r")
    seen = await receive_until(connection, b"/dev/pts/0\r\n")
    assert b"stty size; tty\r\n" in seen
    assert b"50 132\r\n" in seen
    await connection.send(b"sleep 1000\r")
    await receive_until(connection, b"sleep 1000\r\n")
    await asyncio.sleep(0.5)
    began = sim_world.loop.time()
    await connection.send(b"\x03")
    await receive_until(connection, b"^C")
    await connection.send(b"exit 4\r")
    assert await supervised.process.wait() == 4
    assert sim_world.loop.time() - began < 10
    connection.close()


async def test_wrong_calls(sim_world: SimWorld) -> None:
    processes = sim_world.world.processes
    assert (await processes.run(["/usr/bin/conmon", "--version"])).stdout.startswith(b"conmon version 2.1.6\n")
    assert (await processes.run(["/usr/bin/conmon", "-c", "c1"])).returncode == 1
