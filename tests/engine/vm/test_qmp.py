"""QEMU's control protocol and the driver's steering, against scripted QEMUs that answer, refuse, hang and lie."""

from typing import Any

import pytest

from isopod.engine.vm.drivers.qemu import QemuControl
from isopod.engine.vm.drivers.qmp import LINE_BYTES_MAX, Qmp
from isopod.engine.vm.machine import MachineSpec, Share
from isopod.world.errors import RuntimeFailed, Unsupported
from isopod.world.world import World
from tests.engine.vm.peers import QmpPeer, qemu


def spec_of(folder: str, **changes: Any) -> MachineSpec:
    spec = MachineSpec(
        id="a" * 64,
        name="box",
        vcpus=1,
        memory_bytes=128 << 20,
        kernel="/k",
        initrd="/i",
        cmdline=("quiet",),
        disks=(),
        nics=(),
        shares=(),
        folder=folder,
        accelerator="tcg",
    )
    return spec._replace(**changes)


def migrated(status: str) -> Any:
    """Answer a migration as QEMU does."""

    def answer(peer: QmpPeer, call: dict[str, Any]) -> None:
        peer.write({"return": {}, "id": call["id"]})
        peer.write({"event": "MIGRATION", "data": {"status": "setup"}, "timestamp": {}})
        peer.write({"event": "STOP", "data": {}, "timestamp": {}})
        peer.write({"event": "MIGRATION", "data": {"status": status}, "timestamp": {}})

    return answer


async def test_calls_answers_and_events(world: World, folder: str) -> None:
    def powerdown(peer: QmpPeer, call: dict[str, Any]) -> None:
        peer.write({"event": "POWERDOWN", "data": {}})
        peer.write({"event": "SHUTDOWN", "data": {"guest": True}})
        peer.write({"return": {}, "id": call["id"]})

    async with qemu(world, f"{folder}/qmp.sock", {"query-status": {"status": "running"}, "system_powerdown": powerdown}) as calls:
        qmp = await Qmp.connect(world, f"{folder}/qmp.sock", "box")
        assert await qmp.execute("query-status") == {"status": "running"}
        assert await qmp.execute("system_powerdown") == {}
        assert await qmp.wait_event("SHUTDOWN", "RESET", deadline_s=5) == ("SHUTDOWN", {"guest": True})
        qmp.close()
    assert [call["execute"] for call in calls] == ["qmp_capabilities", "query-status", "system_powerdown"]


async def test_a_refusal_in_its_own_words(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"balloon": "No balloon\ndevice"}):
        qmp = await Qmp.connect(world, f"{folder}/qmp.sock", "box")
        with pytest.raises(RuntimeFailed, match="balloon box: No balloon device"):
            await qmp.execute("balloon", value=1)
        assert await qmp.execute("stop") == {}
        qmp.close()


LIES = {
    "no JSON": b"hello\n",
    "not an object": b"[1]\n",
    "not UTF-8": b'{"return": "\xff"}\n',
    "a line without end": b"x" * (LINE_BYTES_MAX + 1),
    "an answer of another shape": b'{"id": "x"}\n',
    "lines without end": b"{}\n" * 5000,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@pytest.mark.row("V8")
async def test_a_qemu_that_lies(world: World, folder: str, lie: bytes) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"stop": lambda peer, _: peer.write(lie)}):
        qmp = await Qmp.connect(world, f"{folder}/qmp.sock", "box")
        with pytest.raises(RuntimeFailed, match="stop box"):
            await qmp.execute("stop", deadline_s=5)
        qmp.close()


async def test_who_listens_is_not_qemu(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"greeting": {"hello": "there"}}):
        with pytest.raises(RuntimeFailed, match="is not QEMU"):
            await Qmp.connect(world, f"{folder}/qmp.sock", "box")
    with pytest.raises(RuntimeFailed, match="reach QEMU of box"):
        await Qmp.connect(world, f"{folder}/nothing.sock", "box")


@pytest.mark.virtual_time
async def test_a_qemu_that_hangs(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"stop": lambda *_: None}):
        qmp = await Qmp.connect(world, f"{folder}/qmp.sock", "box")
        with pytest.raises(RuntimeFailed, match="no answer within 10 s"):
            await qmp.execute("stop")
        with pytest.raises(RuntimeFailed, match="closed"):  # a late answer is nobody's
            await qmp.execute("query-status")
    async with qemu(world, f"{folder}/qmp.sock", {"greeting": b""}):
        with pytest.raises(RuntimeFailed, match="no answer within 10 s"):
            await Qmp.connect(world, f"{folder}/qmp.sock", "box")


async def test_steering(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"query-status": {"status": "guest-panicked"}}) as calls:
        control = QemuControl(world, spec_of(folder))
        await control.boot()
        assert calls == []  # a cold boot needs no words
        await control.pause()
        await control.resume()
        assert await control.status() == "panicked"
        assert await control.resize(vcpus=2, memory_bytes=64 << 20) == ("the number of processors takes effect at the next start",)
        notes = await control.resize(vcpus=None, memory_bytes=256 << 20)
        assert notes == ("more than 128 MiB of memory takes effect at the next start",)
        await control.power_button()
        await control.quit()
        control.close()
    words = [call["execute"] for call in calls[1:]]
    assert words == ["stop", "cont", "query-status", "balloon", "balloon", "input-send-event", "input-send-event", "quit"]
    assert [call["arguments"]["value"] for call in calls if call["execute"] == "balloon"] == [64 << 20, 128 << 20]
    down, up = (call["arguments"]["events"] for call in calls if call["execute"] == "input-send-event")
    assert [event["data"]["key"]["data"] for event in down] == ["ctrl", "alt", "delete"]
    assert ([event["data"]["down"] for event in down], [event["data"]["down"] for event in up]) == ([True] * 3, [False] * 3)


@pytest.mark.row("V6")
async def test_a_snapshot_with_its_memory(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/state", b"...")
    async with qemu(world, f"{folder}/qmp.sock", {"migrate": migrated("completed")}) as calls:
        control = QemuControl(world, spec_of(folder))
        await control.snapshot(folder)
        control.close()
    assert [call["execute"] for call in calls[1:]] == ["migrate-set-capabilities", "migrate-set-parameters", "migrate"]
    capabilities = {each["capability"]: each["state"] for each in calls[1]["arguments"]["capabilities"]}
    assert capabilities == {"events": True, "x-ignore-shared": False}
    assert (
        calls[3]["arguments"]["uri"]
        == f"exec:cat >{folder}/state.part && sync {folder}/state.part && mv {folder}/state.part {folder}/state"
    )


@pytest.mark.row("V6")
async def test_a_template_leaves_its_memory_where_it_is(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/state", b"...")
    async with qemu(world, f"{folder}/qmp.sock", {"migrate": migrated("completed")}) as calls:
        control = QemuControl(world, spec_of(folder, memory_file=f"{folder}/memory"))
        await control.snapshot(folder)
        control.close()
    assert {"capability": "x-ignore-shared", "state": True} in calls[1]["arguments"]["capabilities"]


@pytest.mark.row("V6")
async def test_going_on_from_a_template_and_from_a_snapshot(world: World, folder: str) -> None:
    answers = {"migrate-incoming": migrated("completed"), "query-status": {"status": "paused"}}
    async with qemu(world, f"{folder}/qmp.sock", answers) as calls:
        control = QemuControl(world, spec_of(folder, restore_from="/t's", memory_file="/t/memory"))
        await control.boot()
        control.close()
        assert [call["execute"] for call in calls[1:]] == ["migrate-set-capabilities", "migrate-incoming"]
        assert calls[2]["arguments"]["uri"] == "exec:cat '/t'\"'\"'s/state'"
        calls.clear()
        control = QemuControl(world, spec_of(folder, restore_from="/s"))
        await control.boot()
        control.close()
    assert [call["execute"] for call in calls[1:]] == ["migrate-set-capabilities", "migrate-incoming", "query-status", "cont"]


@pytest.mark.row("V6")
async def test_what_cannot_be_saved_or_restored(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"migrate": migrated("failed"), "migrate-incoming": migrated("failed")}):
        control = QemuControl(world, spec_of(folder))
        with pytest.raises(RuntimeFailed, match="save box.*is the disk full"):
            await control.snapshot(folder)
        control.close()
        control = QemuControl(world, spec_of(folder, restore_from="/s"))
        with pytest.raises(RuntimeFailed, match="restore box"):
            await control.boot()
        control.close()
    shared = QemuControl(world, spec_of(folder, shares=(Share("share0", "fs0.sock", read_only=False),)))
    with pytest.raises(Unsupported, match="shared folders"):
        await shared.snapshot(folder)


@pytest.mark.virtual_time
@pytest.mark.row("V8")
async def test_a_disk_that_takes_no_state_is_noticed(world: World, folder: str) -> None:
    async with qemu(world, f"{folder}/qmp.sock", {"migrate": migrated("completed")}):
        control = QemuControl(world, spec_of(folder))
        with pytest.raises(RuntimeFailed, match="did not take"):
            await control.snapshot(folder)
        control.close()
