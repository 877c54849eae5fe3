"""A simulated microVM from its shim to its last word: what the engine's own client sees of one that behaves."""

import asyncio

import pytest

from isopod.engine.vm.machine import Nic
from isopod.engine.vm.shim import Process
from isopod.world.errors import CommandNotRunnable, InvalidArgument, NotFound, RuntimeFailed
from isopod.world.sim import SimWorld
from isopod.world.sim.programs import GUEST_FOLDER
from isopod.world.sim.programs.guest_world import RELEASE
from tests.node.machines import MIB, Machines, collect


def machines(sim: SimWorld) -> Machines:
    sim.machine.view.make_folders("/vms")
    return Machines(sim.world, GUEST_FOLDER, "/vms")


def alive(sim: SimWorld) -> list[str]:
    return [each.argv[0] for each in sim.machine.table.live()]


async def test_from_the_start_pipe_to_the_exit_file(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    assert sim_world.world.processes.identify(machine.message["data"]) is not None
    assert await machine.run("sh", "-c", "echo one; echo two >&2; printf three; exit 7") == (7, b"one\nthree", b"two\n")
    end = await machine.end()
    assert (end.kind, end.code, end.out_of_memory) == ("command", 7, False)
    assert await machine.exit_file() == b"7"
    lines = [line.split(b" ", 3)[1:] for line in (await sim_world.world.disk.read("/vms/vm1/log")).splitlines()]
    assert sorted(lines) == [[b"stderr", b"F", b"two"], [b"stdout", b"F", b"one"], [b"stdout", b"P", b"three"]]
    assert b"Linux version" in await sim_world.world.disk.read("/vms/vm1/console.log")
    assert alive(sim_world) == []
    left = await sim_world.world.disk.list("/vms/vm1")
    assert left == ["console.log", "end.json", "exit", "log", "shim.json", "upper.img", "vmm.log"]


async def test_the_guest_is_a_machine_of_its_own(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted(vcpus=3, memory_mib=200)
    hello = await machine.client.ready(1)
    assert (hello.cpus, hello.kernel) == (3, RELEASE)
    assert 0.75 * 200 * MIB < hello.memory_bytes <= 200 * MIB
    assert (await machine.exec("uname", "-nr")).stdout == f"box {RELEASE}\n".encode()
    assert (await machine.exec("nproc")).stdout == b"3\n"
    assert (await machine.exec("sh", "-c", "echo $$")).stdout != f"{machine.message['data']}\n".encode()
    assert sim_world.world.processes.find("/usr/bin/qemu-system-x86_64")[0][0].pid == machine.message["data"]
    assert len(sim_world.world.processes.find(f"{GUEST_FOLDER}/isopod-shim")) == 1


async def test_a_boot_takes_its_time_and_less_under_kvm(sim_world: SimWorld) -> None:
    vms, times = machines(sim_world), []
    sim_world.machine.vms.kvm = "works"
    for accelerator in ("tcg", "kvm"):
        started = sim_world.loop.time()
        machine = await vms.launch(accelerator, accelerator=accelerator)
        await machine.client.ready(60)
        times.append(sim_world.loop.time() - started)
    assert times[0] > 1.0
    assert times[1] < 0.6


async def test_commands_are_refused_as_by_execvp(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    for command, code in (("/bin/nope", 127), ("nope", 127), ("/etc/notes", 126)):
        with pytest.raises(CommandNotRunnable) as refused:
            await machine.exec(command)
        assert refused.value.exit_code == code
    with pytest.raises(CommandNotRunnable):
        await machine.start("nope")
    assert await machine.run("sh", "-c", "kill -9 $$") == (137, b"", b"")
    assert (await machine.end()).code == 137


async def test_users_folders_and_the_environment_are_the_roots_own(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    assert (await machine.exec("id", user="user")).stdout == b"uid=1000 gid=1000\n"
    assert (await machine.exec("id", user="user:extra")).stdout == b"uid=1000 gid=2000\n"
    assert (await machine.exec("id", user="77:78")).stdout == b"uid=77 gid=78\n"
    assert (await machine.exec("pwd", cwd="/home")).stdout == b"/home\n"
    assert (await machine.exec("sh", "-c", "echo $COLOUR", env={"PATH": "/bin", "COLOUR": "red"})).stdout == b"red\n"
    with pytest.raises(InvalidArgument):
        await machine.exec("id", user="nobody-here")
    with pytest.raises(CommandNotRunnable):
        await machine.exec("pwd", cwd="/nowhere")


async def test_stdin_signals_and_a_terminal(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    session = await machine.client.exec(Process(("cat",), {"PATH": "/bin"}, "/", "", terminal=False, stdin=True))
    assert await session.attached.write(b"x" * 300_000)
    session.attached.end_input()
    assert (await collect(session.attached)).stdout == b"x" * 300_000
    session = await machine.client.exec(Process(("sleep", "1000"), {"PATH": "/bin"}, "/", "", terminal=False, stdin=False))
    await session.signal(15)
    assert await session.wait() == 143
    session.close()
    attached = await machine.start("sh", "-c", "stty size; read line; stty size; echo got $line", terminal=True)
    async for output in attached.outputs():
        assert output.data == b"24 80\r\n"
        break
    await attached.resize(50, 132)
    await attached.write(b"abc\n")
    assert await collect(attached) == (0, b"abc\r\n50 132\r\ngot abc\r\n", b"")


async def test_a_slow_reader_holds_nobody_up_and_is_dropped(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    slow = await machine.client.attach(stdin=False)
    attached = await machine.start("sh", "-c", "head -c 2000000 /dev/zero; echo done >&2")
    ran = await collect(attached)
    assert (ran.exit_code, len(ran.stdout), ran.stderr) == (0, 2_000_000, b"done\n")
    assert (await machine.end()).code == 0
    n_bytes = sum([len(output.data) async for output in slow.outputs()])
    assert n_bytes < 2_000_000
    slow.close()


async def test_files_go_in_and_out(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    await machine.exec("sh", "-c", "mkdir -p /data/deep; echo hello > /data/deep/file; head -c 500000 /dev/zero > /data/big")
    transfer = await machine.client.archive("/data")
    tar = b"".join([piece async for piece in transfer.pieces()])
    transfer.close()
    assert len(tar) > 500_000
    into = await machine.client.extract("/tmp")
    assert await into.write(tar)
    await into.finish()
    into.close()
    assert (await machine.exec("cat", "/tmp/data/deep/file")).stdout == b"hello\n"
    assert (await machine.exec("wc", "-c", "/tmp/data/big")).stdout == b"500000 /tmp/data/big\n"
    with pytest.raises(NotFound):
        await machine.client.archive("/nowhere")


async def test_the_network_is_what_it_was_told(sim_world: SimWorld) -> None:
    await sim_world.world.kernel.create_bridge("b0", "10.77.0.1/24")
    await sim_world.world.kernel.create_tap("t0", bridge="b0")
    vms = machines(sim_world)
    machine = await vms.launch(taps=[Nic("t0", "02:00:00:00:00:01")])
    network = {"mac": "02:00:00:00:00:09", "address": "10.77.0.5/24", "gateway": "10.77.0.1", "mtu": 1500}
    await machine.configure(network=network)
    assert (await machine.exec("cat", "/sys/class/net/eth0/address")).stdout == b"02:00:00:00:00:09\n"
    refused = await vms.launch("vm2", taps=[Nic("t9", "02:00:00:00:00:02")])
    assert refused.message["data"] == -1
    assert "t9" in refused.message["message"]
    assert alive(sim_world) == ["/usr/share/isopod/guest/isopod-shim", "/usr/bin/qemu-system-x86_64", "[guest]"]


async def test_mounts_limits_and_metrics(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).launch(memory_mib=128)
    tmpfs = {"kind": "tmpfs", "tag": "", "path": "/scratch", "read_only": False, "file": None, "n_bytes": 8192}
    await machine.configure(mounts=[tmpfs], pids_max=4)
    ran = await machine.exec("sh", "-c", "echo x > /scratch/a; head -c 20000 /dev/zero > /scratch/b")
    assert ran.exit_code != 0
    assert (await machine.exec("cat", "/scratch/a")).stdout == b"x\n"
    assert b"can't fork" in (await machine.exec("sh", "-c", "for i in 1 2 3 4 5 6; do sleep 5 & done; wait")).stderr
    facts = await machine.client.request("metrics")
    assert facts["memory"]["total"] <= 128 * MIB
    assert facts["main"]["n_pids"] >= 0
    watching = asyncio.ensure_future(machine.events())
    ran = await machine.run("tail", "/dev/zero")
    assert ran.exit_code == 137
    end = await machine.end()
    assert (end.code, end.out_of_memory) == (137, True)
    assert any(event.get("event") == "oom" for event in await watching)


async def test_the_console_shows_what_was_and_takes_what_is_typed(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    console = await machine.client.console(4096)
    await console.write(b"anybody?\n")
    seen = b""
    async for output in console.outputs():
        seen += output.data
        if b"anybody?\r\n" in seen:
            break
    assert b"Run /init as init process" in seen
    console.close()


async def test_stop_and_hold_and_status(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    attached = await machine.start("sleep", "1000")
    status = await machine.client.status()
    assert (status.main, status.paused, status.vmm_pid) == ("running", False, machine.message["data"])
    control = await machine.control()
    await machine.client.request("hold", paused=True)
    await control.pause()
    assert await control.status() == "paused"
    await asyncio.sleep(300)
    assert (await machine.client.status()).paused
    await control.resume()
    await machine.client.request("hold", paused=False)
    control.close()
    assert (await machine.exec("echo", "awake")).stdout == b"awake\n"
    with pytest.raises(RuntimeFailed):
        await machine.client.start(Process(("true",), {}, "/", "", terminal=False, stdin=False))
    started = sim_world.loop.time()
    await machine.client.request("stop", timeout_s=5.0)
    end = await machine.end()
    assert (end.kind, end.code) == ("stopped", 137)
    assert sim_world.loop.time() - started < 1
    assert await attached.exit_code() == 137
    attached.close()


async def test_the_death_of_the_shim_is_the_machines(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    attached = await machine.start("sleep", "1000")
    assert sim_world.world.processes.signal(machine.shim.identity, 9)
    assert await machine.shim.wait() == -9
    await asyncio.sleep(0.1)
    assert alive(sim_world) == []
    assert await attached.exit_code() is None
    attached.close()
    assert await sim_world.world.disk.stat("/vms/vm1/exit") is None
