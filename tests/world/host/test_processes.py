"""The host's processes, with real programs, on both loops."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from isopod.world.errors import DeadlineExceeded
from isopod.world.host.processes import parse_stat
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

SH = "/bin/sh"
BASH = "/bin/bash"  # redirects to descriptors over 9, which dash does not


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_run_gives_back_status_and_output(host_world: World) -> None:
    done = await host_world.processes.run([SH, "-c", "cat; echo no >&2; exit 3"], stdin=b"hello")
    assert done == (3, b"hello", b"no\n")
    assert (await host_world.processes.run([SH, "-c", "kill -TERM $$"])).returncode == -signal.SIGTERM
    assert (await host_world.processes.run(["true"])).returncode == 0


async def test_run_moves_megabytes_both_ways_at_once(host_world: World) -> None:
    data = os.urandom(4 << 20)
    done = await host_world.processes.run(["/bin/cat"], stdin=data)
    assert done.stdout == data


async def test_run_does_not_mind_unread_input(host_world: World) -> None:
    assert (await host_world.processes.run(["/bin/true"], stdin=bytes(1 << 20))).returncode == 0


async def test_run_looks_for_a_bare_name_on_the_path(host_world: World) -> None:
    assert (await host_world.processes.run(["echo", "found"])).stdout == b"found\n"
    with pytest.raises(FileNotFoundError):
        await host_world.processes.run(["isopod-no-such-program"])


async def test_run_gives_its_environment(host_world: World) -> None:
    done = await host_world.processes.run(["/usr/bin/env"], env={"ONLY": "this"})
    assert done.stdout == b"ONLY=this\n"


async def test_run_is_bounded_in_output(host_world: World) -> None:
    before = n_descriptors()
    with pytest.raises(OSError, match="bytes of output"):
        await host_world.processes.run([SH, "-c", "exec cat /dev/zero"])
    assert n_descriptors() == before


async def test_run_is_bounded_in_time_and_kills_the_whole_session(host_world: World) -> None:
    before = n_descriptors()
    with pytest.raises(DeadlineExceeded, match="sh took longer than"):
        await host_world.processes.run([SH, "-c", "sleep 987 & sleep 987"], timeout_s=0.2)
    assert n_descriptors() == before
    async with asyncio.timeout(40):  # who is killed but not our child may take a moment to be gone
        while any("987" in argv for _, argv in host_world.processes.find("/bin/sleep")):
            await asyncio.sleep(0.001)


async def test_a_cancelled_run_is_killed_and_reaped(host_world: World, folder: str) -> None:
    task = asyncio.ensure_future(host_world.processes.run([SH, "-c", f"echo $$ > {folder}/pid; exec sleep 986"]))
    async with asyncio.timeout(40):
        while not (os.path.exists(f"{folder}/pid") and os.stat(f"{folder}/pid").st_size):
            await asyncio.sleep(0.005)
    pid = int(await host_world.disk.read(f"{folder}/pid"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not os.path.exists(f"/proc/{pid}")


async def test_run_does_not_wait_for_a_helper_that_keeps_the_output_open(host_world: World) -> None:
    done = await host_world.processes.run([SH, "-c", "echo out; sleep 985 & echo $!"])
    helper = int(done.stdout.split()[1])
    assert done.stdout.startswith(b"out\n")
    os.kill(helper, signal.SIGKILL)  # it was there


async def test_a_spawned_program_talks_through_its_pipes(host_world: World) -> None:
    script = 'read line <&"$ASK"; echo "got $line" >&"$TELL"'
    before = n_descriptors()
    child = await host_world.processes.spawn([BASH, "-c", script], env={"PATH": "/bin"}, pipes={"ASK": "write", "TELL": "read"})
    await child.pipes["ASK"].write(b"hello\n")
    assert await child.pipes["TELL"].read() == b"got hello\n"
    assert await child.pipes["TELL"].read() == b""
    assert await child.wait() == 0
    assert await child.wait() == 0
    child.pipes["ASK"].close()
    child.pipes["TELL"].close()
    assert n_descriptors() == before


async def test_a_spawned_program_leads_a_session_with_nothing_of_ours(host_world: World, folder: str) -> None:
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    out = f"{folder}/out"
    script = f"ls -l /proc/self/fd > {out}; cut -d' ' -f1,6 /proc/$$/stat >> {out}; pwd >> {out}"
    child = await host_world.processes.spawn([SH, "-c", script], env={"PATH": "/bin:/usr/bin"}, cwd="/usr")
    assert await child.wait() == 0
    os.close(leak)
    lines = (await host_world.disk.read(out)).decode().splitlines()
    assert lines[-1] == "/usr"
    assert lines[-2] == f"{child.identity.pid} {child.identity.pid}"
    targets = [line.split("-> ")[1] for line in lines if "-> " in line]
    assert [target for target in targets if not target.startswith("/proc/")] == ["/dev/null", out, "/dev/null"]


async def test_statuses_of_spawned_programs(host_world: World) -> None:
    statuses = [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", -9), ("kill -TERM $$", -15)]
    children = [await host_world.processes.spawn([SH, "-c", script], env={}) for script, _ in statuses]
    assert await asyncio.gather(*(child.wait() for child in children)) == [status for _, status in statuses]
    assert all(not os.path.exists(f"/proc/{child.identity.pid}") for child in children)


async def test_a_cancelled_wait_leaves_the_child_alone(host_world: World) -> None:
    child = await host_world.processes.spawn(["/bin/sleep", "60"], env={})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await child.wait()
    assert host_world.processes.identify(child.identity.pid) == child.identity
    assert host_world.processes.signal(child.identity, signal.SIGKILL)
    assert await child.wait() == -9


async def test_writing_to_a_pipe_waits_for_its_reader(host_world: World) -> None:
    script = 'read go <&"$GO"; cat <&"$IN" >/dev/null'
    child = await host_world.processes.spawn([BASH, "-c", script], env={}, pipes={"GO": "write", "IN": "write"})
    writing = asyncio.ensure_future(child.pipes["IN"].write(bytes(1 << 20)))
    await asyncio.sleep(0.05)
    assert not writing.done()
    await child.pipes["GO"].write(b"go\n")
    await writing
    child.pipes["IN"].close()
    child.pipes["GO"].close()
    assert await child.wait() == 0


async def test_closing_a_pipe_wakes_its_reader(host_world: World) -> None:
    child = await host_world.processes.spawn(["/bin/sleep", "60"], env={}, pipes={"OUT": "read"})
    reading = asyncio.ensure_future(child.pipes["OUT"].read())
    await asyncio.sleep(0.01)
    child.pipes["OUT"].close()
    assert await reading == b""
    host_world.processes.signal(child.identity, signal.SIGKILL)
    await child.wait()


async def test_waiting_for_one_who_is_not_our_child(host_world: World) -> None:
    done = await host_world.processes.run([SH, "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"])
    async with asyncio.timeout(40):
        while (stranger := host_world.processes.identify(int(done.stdout))) is None:
            await asyncio.sleep(0.005)
    waiting = asyncio.ensure_future(host_world.processes.wait_gone(stranger))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert host_world.processes.signal(stranger, signal.SIGKILL)
    await asyncio.wait_for(waiting, 40)
    assert host_world.processes.identify(stranger.pid) is None


async def test_a_reused_number_is_another_process(host_world: World) -> None:
    child = await host_world.processes.spawn(["/bin/sleep", "60"], env={})
    other = ProcessIdentity(child.identity.pid, child.identity.started_ticks - 1)
    assert host_world.processes.signal(other, signal.SIGKILL) is False
    await asyncio.wait_for(host_world.processes.wait_gone(other), 1)
    assert host_world.processes.identify(child.identity.pid) == child.identity
    host_world.processes.signal(child.identity, signal.SIGKILL)
    await child.wait()


async def test_a_zombie_is_gone(host_world: World) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert host_world.processes.identify(pid) is None
    finally:
        os.waitpid(pid, 0)


async def test_find_lists_by_the_program_s_own_word(host_world: World) -> None:
    name = "/bin/sleep"
    children = [await host_world.processes.spawn([name, "61.5"], env={}) for _ in range(2)]
    async with asyncio.timeout(40):  # the kernel shows a new program's arguments a moment after its exec has been reported
        while len(found := [(identity, list(argv)) for identity, argv in host_world.processes.find(name) if "61.5" in argv]) < 2:
            await asyncio.sleep(0.001)
    assert found == sorted((child.identity, [name, "61.5"]) for child in children)
    for child in children:
        host_world.processes.signal(child.identity, signal.SIGKILL)
        await child.wait()


async def test_programs_of_the_administrator_are_found(host_world: World, folder: str) -> None:
    assert host_world.processes.which("sh") is not None
    assert host_world.processes.which("ldconfig") == "/usr/sbin/ldconfig"


async def test_fifty_at_once(host_world: World) -> None:
    done = await asyncio.gather(*(host_world.processes.run([SH, "-c", f"echo {index}"]) for index in range(50)))
    assert [int(one.stdout) for one in done] == list(range(50))


def test_a_command_s_name_may_hold_anything() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    assert parse_stat(f"42 (a) S (b) Z {fields}\n") == ("Z", 22)


@pytest.mark.host
async def test_find_believes_the_file_that_runs_and_no_argument(host_world: World) -> None:
    sleep = os.path.realpath("/bin/sleep")
    processes = host_world.processes
    liar = subprocess.Popen(["bash", "-c", f"exec -a {sleep} cat"], stdin=subprocess.PIPE)
    other = subprocess.Popen([sleep, "301"], user=65534)
    inside = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", sleep, "300"])
    honest = await processes.spawn([sleep, "300"], env={})
    try:
        async with asyncio.timeout(40):
            while (honest.identity, [sleep, "300"]) not in processes.find(sleep) or arguments_of(liar.pid) != [sleep]:
                await asyncio.sleep(0.01)
            while [arguments_of(pid) for pid in children_of(inside.pid)] != [[sleep, "300"]] or arguments_of(other.pid) != [sleep, "301"]:
                await asyncio.sleep(0.01)
        found = [identity.pid for identity, _ in processes.find(sleep)]
        assert honest.identity.pid in found
        assert not {liar.pid, other.pid, *children_of(inside.pid)} & set(found)
    finally:
        await honest.end()
        for stranger in (inside, liar, other):
            stranger.kill()
            stranger.communicate()


async def test_find_means_the_file_by_whatever_path_it_was_started(host_world: World, folder: str) -> None:
    shutil.copy("/bin/sleep", f"{folder}/program")
    os.link(f"{folder}/program", f"{folder}/hard")
    os.symlink("program", f"{folder}/soft")
    children = [await host_world.processes.spawn([f"{folder}/{name}", "300"], env={}) for name in ("program", "hard", "soft")]
    assert [identity for identity, _ in host_world.processes.find(f"{folder}/soft")] == sorted(child.identity for child in children)
    for child in children:
        await child.end()
    assert host_world.processes.find(f"{folder}/program") == []
    with pytest.raises(FileNotFoundError):
        host_world.processes.find(f"{folder}/missing")


async def test_end_kills_the_whole_session(host_world: World) -> None:
    child = await host_world.processes.spawn(["/bin/bash", "-c", "sleep 300 & echo $! >&$OUT; wait"], env={}, pipes={"OUT": "read"})
    grandchild = host_world.processes.identify(int((await child.pipes["OUT"].read()).split()[0]))
    assert grandchild is not None
    await child.end()
    await child.end()
    await host_world.processes.wait_gone(grandchild)
    assert await child.wait() == -9
    child.pipes["OUT"].close()


async def test_a_groups_leader_is_checked_before_the_group_is_signalled(host_world: World) -> None:
    child = await host_world.processes.spawn(["/bin/sleep", "300"], env={})
    identity = child.identity
    assert not host_world.processes.signal_group(identity._replace(started_ticks=identity.started_ticks + 1), 9)
    assert host_world.processes.identify(identity.pid) == identity
    assert host_world.processes.signal_group(identity, 9)
    assert await child.wait() == -9
    assert not host_world.processes.signal_group(identity, 9)


@pytest.mark.parametrize("n_free", range(10))
async def test_a_start_without_descriptors_leaves_none_open(host_world: World, n_free: int) -> None:
    before = n_descriptors()
    for start in (start_with_pipes, run_true):
        with few_descriptors(n_free), contextlib.suppress(OSError):
            await start(host_world)
        assert n_descriptors() == before


async def start_with_pipes(world: World) -> None:
    child = await world.processes.spawn(["/bin/true"], env={}, pipes={"A": "read", "B": "write", "C": "read"})
    for pipe in child.pipes.values():
        pipe.close()
    await child.wait()


async def run_true(world: World) -> None:
    await world.processes.run(["/bin/true"])


@contextlib.contextmanager
def few_descriptors(n_free: int) -> Iterator[None]:
    """Let the process open so many descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 16, hard))
    fillers: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(n_free):
            os.close(fillers.pop())
        yield
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def arguments_of(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
