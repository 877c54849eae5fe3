"""The simulated crun says what crun 1.8.1 says (texts and codes taken from the real one)."""

import pytest

from isopod.world.sim import SimWorld
from tests.world.sim.bundles import ROOT, configure, create, create_failing, crun, furnish, state


async def test_a_life(sim_world: SimWorld) -> None:
    furnish(sim_world)
    disk = sim_world.world.disk
    await create(sim_world, "sleep", "100")
    assert await disk.list(f"{ROOT}/c1") == ["config.json", "exec.fifo", "status"]
    assert await state(sim_world) == "created"
    pid = int(await disk.read("/bundle/pid"))
    assert sim_world.kernel.cgroup_usage("/t/c1").n_pids == 1
    assert (await crun(sim_world, "start", "c1")).returncode == 0
    assert await state(sim_world) == "running"
    assert (await crun(sim_world, "pause", "c1")).returncode == 0
    assert await state(sim_world) == "paused"
    assert (await crun(sim_world, "kill", "c1", "KILL")).returncode == 0
    assert sim_world.world.processes.identify(pid) is not None  # frozen: the signal waits
    assert (await crun(sim_world, "resume", "c1")).returncode == 0
    assert sim_world.world.processes.identify(pid) is None
    assert await state(sim_world) == "stopped"
    assert (await crun(sim_world, "delete", "c1")).returncode == 0
    assert await disk.list(ROOT) == []
    assert sim_world.kernel.cgroup_usage("/t/c1").n_pids is None
    assert sim_world.kernel.cgroup_usage("/t").n_pids == 0


@pytest.mark.parametrize(
    "command, text",
    [
        ("nope", "executable file `nope` not found in $PATH: No such file or directory\n"),
        ("/nope", "executable file `/nope` not found in $PATH: No such file or directory\n"),
        ("/etc/notes", "open executable: Permission denied\n"),
        ("/etc", "open executable: Operation not permitted\n"),
    ],
)
async def test_commands_that_cannot_run(sim_world: SimWorld, command: str, text: str) -> None:
    furnish(sim_world)
    assert await create_failing(sim_world, command) == (1, b"", text.encode())
    assert await sim_world.world.disk.list(ROOT) == []
    assert sim_world.kernel.cgroup_usage("/t/c1").n_pids is None
    await create(sim_world, "sleep", "100")
    await crun(sim_world, "start", "c1")
    assert await crun(sim_world, "exec", "c1", command) == (255, b"", text.encode())


async def test_unknown_containers(sim_world: SimWorld) -> None:
    furnish(sim_world)
    unknown = b"error opening file `/run/runtime/c1/status`: No such file or directory\n"
    for command in (("state",), ("start",), ("pause",), ("kill",), ("exec",)):
        assert await crun(sim_world, *command, "c1", "true") == (1, b"", unknown)
    assert await crun(sim_world, "delete", "c1") == (1, b"", b"cannot open directory '/run/runtime/c1': No such file or directory\n")
    assert (await crun(sim_world, "delete", "--force", "c1")).returncode == 0
    assert await crun(sim_world, "nosuch") == (1, b"", b"unknown command nosuch\n")


async def test_wrong_states(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await create(sim_world, "sleep", "100")
    assert (await create_failing(sim_world, "sleep", "100")).stderr == b"container `c1` already exists\n"
    await crun(sim_world, "start", "c1")
    assert (await crun(sim_world, "start", "c1")).stderr == b"cannot open `/run/runtime/c1/exec.fifo`: No such file or directory\n"
    assert (await crun(sim_world, "delete", "c1")).stderr == b"the container `c1` is not in `created` or `stopped` state\n"
    assert (await crun(sim_world, "kill", "c1", "77")).stderr == b"send signal to pidfd: Invalid argument\n"
    await crun(sim_world, "kill", "--all", "c1", "KILL")
    assert (await crun(sim_world, "kill", "c1", "TERM")).stderr == b"open pidfd: No such process\n"
    assert (await crun(sim_world, "start", "c1")).stderr == b"container `c1` is not running\n"
    assert (await crun(sim_world, "exec", "c1", "true")).stderr == b"the container `c1` is not running\n"
    assert (await crun(sim_world, "pause", "c1")).stderr == b"the container `c1` is not running: No such process\n"
    assert b"stopped" in (await crun(sim_world, "list")).stdout


async def test_the_first_process_heeds_only_what_it_handles(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await create(sim_world, "sleep", "100")
    await crun(sim_world, "start", "c1")
    await crun(sim_world, "kill", "c1", "TERM")
    assert await state(sim_world) == "running"
    await crun(sim_world, "delete", "--force", "c1")
    assert sim_world.machine.table.live() == []


async def test_a_memory_limit_holds(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await create(sim_world, "tail", "/dev/zero", resources={"memory": {"limit": 64 << 20}})
    process = sim_world.machine.table.lately(int(await sim_world.world.disk.read("/bundle/pid")))
    assert process is not None
    await crun(sim_world, "start", "c1")
    assert await process.wait() == -9
    usage = sim_world.kernel.cgroup_usage("/t/c1")
    assert usage.n_oom_kills == 1
    assert usage.memory_bytes == 0


async def test_runc_has_its_own_words(sim_world: SimWorld) -> None:
    furnish(sim_world)
    configure(sim_world, "nope")
    failed = await crun(sim_world, "create", "--bundle", "/bundle", "c1", program="runc")
    assert failed.returncode == 1
    assert b'exec: \\"nope\\": executable file not found in $PATH' in failed.stderr
    assert b"container does not exist" in (await crun(sim_world, "state", "c1", program="runc")).stderr
    assert (await crun(sim_world, "--version", program="runc")).stdout.startswith(b"runc version 1.1.5\n")
    assert (await crun(sim_world, "--version")).stdout.startswith(b"crun version 1.8.1\n")
