"""The simulated shim, monitor and guest against the real ones: the same bodies, the same words, on both Worlds.

What the simulation promises about a machine is worth what these tests compare. No engine takes part: a shim is told what to start by the
engine's driver, and asked by its client.
"""

from collections.abc import Iterator

import pytest

from isopod.engine.vm.shim import Process
from isopod.world.errors import CommandNotRunnable, InvalidArgument, NotFound
from isopod.world.sim.programs import GUEST_FOLDER
from tests.node.machines import ENV, Machine, Machines, collect
from tests.node.vms import HOST_GUEST, MIB, missing_for_vms

ON_HOST = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(params=[pytest.param("host", marks=ON_HOST), "sim"])
def vms(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Starts machines on each World."""
    if request.param == "sim":
        sim = request.getfixturevalue("sim_world")
        yield Machines(sim.world, GUEST_FOLDER, request.getfixturevalue("folder"))
        return
    if missing := missing_for_vms():
        pytest.skip(missing)
    yield Machines(request.getfixturevalue("host_world"), HOST_GUEST, request.getfixturevalue("folder"))


async def end(machine: Machine, code: int) -> None:
    """Let the main command end the machine."""
    ran = await machine.run("sh", "-c", f"exit {code}")
    assert ran.exit_code == code
    ended = await machine.end()
    assert (ended.kind, ended.code, ended.out_of_memory) == ("command", code, False)


@pytest.mark.row("V3")
async def test_from_the_start_pipe_to_the_exit_file(vms: Machines) -> None:
    machine = await vms.booted(memory_mib=160, vcpus=1)
    assert vms.world.processes.identify(machine.message["data"]) is not None
    hello = await machine.client.ready(10)
    assert hello.cpus == 1
    assert 0.7 * 160 * MIB < hello.memory_bytes <= 160 * MIB
    assert (await machine.exec("uname", "-nr")).stdout == f"box {hello.kernel}\n".encode()
    ran = await machine.run("sh", "-c", "echo one; echo two >&2; printf three; exit 7")
    assert ran == (7, b"one\nthree", b"two\n")
    ended = await machine.end()
    assert (ended.kind, ended.code) == ("command", 7)
    assert await machine.exit_file() == b"7"
    lines = [line.split(b" ", 3)[1:] for line in (await vms.world.disk.read(f"{machine.folder}/log")).splitlines()]
    assert [b"stderr", b"F", b"two"] in lines
    assert b"".join(text for stream, _, text in lines if stream == b"stdout") == b"onethree"
    left = await vms.world.disk.list(machine.folder)
    assert left == ["console.log", "end.json", "exit", "log", "shim.json", "upper.img", "vmm.log"]


@pytest.mark.row("V3", "V4")
async def test_commands_users_and_folders(vms: Machines) -> None:
    machine = await vms.booted()
    for command, code in (("/bin/nope", 127), ("nope", 127), ("/etc/notes", 126)):
        with pytest.raises(CommandNotRunnable) as refused:
            await machine.exec(command)
        assert refused.value.exit_code == code
    assert (await machine.exec("id", "-u", user="user")).stdout == b"1000\n"
    assert (await machine.exec("id", "-g", user="user:extra")).stdout == b"2000\n"
    assert (await machine.exec("id", "-g", user="77:78")).stdout == b"78\n"
    assert (await machine.exec("pwd", cwd="/home")).stdout == b"/home\n"
    assert (await machine.exec("sh", "-c", "echo $HOME $HOSTNAME $COLOUR", env={"COLOUR": "red"})).stdout == b"/root box red\n"
    with pytest.raises((InvalidArgument, NotFound)):
        await machine.exec("id", user="nobody-here")
    assert (await machine.exec("sh", "-c", "kill -9 $$")).exit_code == 137
    assert (await machine.exec("cat", "/etc/resolv.conf")).stdout == b"nameserver 10.77.0.1\n"
    await end(machine, 3)


@pytest.mark.row("V3")
async def test_stdin_signals_terminals_and_files(vms: Machines) -> None:
    machine = await vms.booted()
    session = await machine.client.exec(Process(("cat",), ENV, "/", "", terminal=False, stdin=True))
    assert await session.attached.write(b"x" * 300_000)
    session.attached.end_input()
    assert (await collect(session.attached)).stdout == b"x" * 300_000
    session = await machine.client.exec(Process(("sleep", "1000"), ENV, "/", "", terminal=False, stdin=False))
    await session.signal(15)
    assert await session.wait() == 143
    session.close()
    assert (await machine.exec("stty", "size", terminal=True)).stdout == b"24 80\r\n"
    await machine.exec("sh", "-c", "mkdir -p /data/deep; echo hello > /data/deep/file; head -c 300000 /dev/zero > /data/big")
    transfer = await machine.client.archive("/data")
    tar = b"".join([piece async for piece in transfer.pieces()])
    transfer.close()
    into = await machine.client.extract("/tmp")
    assert await into.write(tar)
    await into.finish()
    into.close()
    assert (await machine.exec("cat", "/tmp/data/deep/file")).stdout == b"hello\n"
    assert (await machine.exec("wc", "-c", "/tmp/data/big")).stdout == b"300000 /tmp/data/big\n"
    with pytest.raises(NotFound):
        await machine.client.archive("/nowhere")
    await end(machine, 0)


@pytest.mark.row("V5", "V6")
async def test_a_clean_end_keeps_what_was_written_and_a_pause_keeps_everything(vms: Machines) -> None:
    machine = await vms.booted()
    await machine.exec("sh", "-c", "echo kept > /kept; rm /etc/notes")
    control = await machine.control()
    await machine.client.request("hold", paused=True)
    await control.pause()
    assert (await control.status(), (await machine.client.status()).paused) == ("paused", True)
    await control.resume()
    await machine.client.request("hold", paused=False)
    control.close()
    await end(machine, 0)
    again = await vms.booted()
    assert (await again.exec("sh", "-c", "cat /kept; ls /etc/notes")) == (1, b"kept\n", b"ls: /etc/notes: No such file or directory\n")
    attached = await again.start("sleep", "1000")
    await again.client.request("stop", timeout_s=10.0, deadline_s=30)
    ended = await again.end()
    assert (ended.kind, ended.code) == ("stopped", 137)
    assert await attached.exit_code() == 137
    attached.close()
