"""The programs around simulated microVMs, one by one: frames, mke2fs, cp, QEMU without a shim. Whole machines: tests/node/test_vm_shim*."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.world.errors import DeadlineExceeded
from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.sim.programs import GUEST_FOLDER
from isopod.world.sim.programs.frames import BadFrame, Decoder, Frame, Kind
from isopod.world.sim.programs.guest_disks import Ext4
from isopod.world.sim.programs.guest_state import BadSnapshot, GuestState, Saved, decode, encode
from tests.world.recorder import Recorder

QEMU = "/usr/bin/qemu-system-x86_64"
KERNEL = f"{GUEST_FOLDER}/vmlinux"
MIB = 1 << 20


@given(st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(0, 2**32 - 1), st.binary(max_size=300))), st.integers(1, 50))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[tuple[Kind, int, bytes]], step: int) -> None:
    data = b"".join(Frame(*each).encode() for each in frames)
    decoder, out = Decoder(), []
    for start in range(0, len(data), step):
        out += decoder.feed(data[start : start + step])
    assert out == [Frame(*each) for each in frames]


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x04\0\0\0\x01\0\0\0\0", b"\x05\0\0\0\x12\0\0\0\0", b"\x06\0\x01\0\x04\0\0\0\0"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        Decoder().feed(data)


async def test_mke2fs_makes_a_file_system_that_keeps_what_was_written_back(sim_world: SimWorld) -> None:
    done = await sim_world.world.processes.run(["mke2fs", "-q", "-F", "-t", "ext4", "/tmp/disk", "8M"])
    assert (done.returncode, done.stderr) == (0, b"")
    disk = Ext4(sim_world.machine, "/tmp/disk", sim_world.machine.clock.now_ns)
    for text in (b"one", b"two" * 1000, b"three"):
        file = disk.file_system.new("file", 0o644)
        file.fill(text)
        disk.root.attach("file", file)
        disk.write_back()
        again = Ext4(sim_world.machine, "/tmp/disk", sim_world.machine.clock.now_ns)
        assert bytes(again.root.names["file"].data) == text
        sim_world.machine.view.node("/tmp/disk").inode.content.lose()
    with pytest.raises(OSError, match="No space left"):
        disk.root.names["file"].resize(8 * MIB)
    sim_world.disk.faults.bit_rot("/tmp/disk", n_bits=3, offset=1024, n_bytes=40)
    with pytest.raises(OSError, match=r"Invalid argument|needs cleaning"):
        Ext4(sim_world.machine, "/tmp/disk", sim_world.machine.clock.now_ns)
    assert (await sim_world.world.processes.run(["mke2fs", "/tmp/nothing"])).returncode == 1


async def test_cp_keeps_holes_and_tells_what_failed(sim_world: SimWorld) -> None:
    inode = sim_world.machine.view.write("/tmp/sparse", b"head")
    inode.resize(4 << 30)
    done = await sim_world.world.processes.run(["cp", "--sparse=always", "--", "/tmp/sparse", "/tmp/copy"])
    assert done.returncode == 0
    made = sim_world.machine.view.node("/tmp/copy").inode
    assert (made.content.size, made.content.head()) == (4 << 30, b"head")
    sim_world.disk.faults.fill()
    done = await sim_world.world.processes.run(["cp", "--", "/tmp/sparse", "/tmp/third"])
    assert done.returncode == 1
    assert b"No space left" in done.stderr


async def test_qemu_says_its_version_and_what_is_wrong(sim_world: SimWorld) -> None:
    run = sim_world.world.processes.run
    assert (await run([QEMU, "--version"])).stdout.startswith(b"QEMU emulator version 7.2")
    for argv, why in (
        (["-nonsense"], b"-nonsense: invalid option"),
        (["-m"], b"-m: requires an argument"),
        (["-kernel", "/nowhere"], b"could not open kernel file"),
        (["-m", "99G", "-kernel", KERNEL], b"Cannot allocate memory"),
        (["-accel", "kvm", "-kernel", KERNEL], b"failed to initialize kvm"),
        (["-kernel", KERNEL, "-drive", "id=a,file=/nowhere,if=none", "-device", "virtio-blk-device,drive=a"], b"Could not open"),
        (["-kernel", KERNEL, "-chardev", "socket,id=q,fd=3"], b"File descriptor '3' is not valid"),
    ):
        done = await run([QEMU, *argv])
        assert done.returncode == 1
        assert why in done.stderr, argv


async def test_a_kernel_alone_panics_and_is_reset_or_hangs(sim_world: SimWorld) -> None:
    argv = [QEMU, "-m", "128M", "-nodefaults", "-no-reboot", "-serial", "stdio", "-kernel", KERNEL]
    done = await sim_world.world.processes.run([*argv, "-append", "console=ttyS0 panic=-1"])
    assert done.returncode == 0
    assert b"Kernel panic - not syncing: VFS: Unable to mount root fs" in done.stdout
    with pytest.raises(DeadlineExceeded):
        await sim_world.world.processes.run([*argv, "-append", "console=ttyS0"], timeout_s=100)
    assert [each.argv[0] for each in sim_world.machine.table.live()] == []


async def test_qmp_wants_to_be_greeted_and_answers_in_turn(sim_world: SimWorld) -> None:
    from isopod.world.sim.programs.qmp import Qmp
    from isopod.world.sim.programs.sockets import serve

    async def answer(_arguments: Any) -> object:
        return {"status": "running"}

    backlog = await serve(sim_world.machine, "/tmp/qmp")
    server = Qmp(backlog, {"query-status": answer}, faults=sim_world.machine.vms.draw(), clock=sim_world.clock)
    serving = asyncio.ensure_future(server.serve())
    transport, client = await sim_world.world.network.connect(UnixAddress("/tmp/qmp"), Recorder)
    assert isinstance(client, Recorder)
    for command in ("query-status", "qmp_capabilities", "query-status", "nothing"):
        transport.write(json.dumps({"execute": command, "id": command}).encode() + b"\n")
    while client.received.count(b"\r\n") < 5:
        await asyncio.sleep(0.001)
    greeting, *answers = [json.loads(line) for line in bytes(client.received).splitlines()]
    assert "QMP" in greeting
    assert [next(iter(each)) for each in answers] == ["error", "return", "return", "error"]
    assert answers[2] == {"return": {"status": "running"}, "id": "query-status"}
    transport.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert backlog.listener is not None
    await backlog.listener.close()


def test_a_snapshot_is_whole_or_refused_or_nonsense() -> None:
    saved = Saved(GuestState("boot", "entropy"), b"tree", 5)
    data = encode(saved, [1], was_running=True, apart=False)
    assert decode(data, [1], None) == (saved, True)
    for wrong in (b"", data[:20], b"X" + data[1:], data[:16] + b"\xff" + data[17:], data[: len(data) // 2]):
        with pytest.raises(BadSnapshot):
            decode(wrong, [1], None)
    with pytest.raises(BadSnapshot, match="Size mismatch"):
        decode(data, [2], None)
    at = data.index(b"entropy")
    assert decode(data[:at] + b"E" + data[at + 1 :], [1], None).saved.is_damaged
