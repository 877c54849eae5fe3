"""Firecracker's and Cloud Hypervisor's drivers against fakes that enforce the documented rules, and against what was recorded of them.

`ISOPOD_REWRITE_TRANSCRIPTS=1 pytest tests/engine/vm/test_drivers_rest_vmms.py` writes the transcripts anew, to be reviewed as a diff.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.machine import Control, DriverCheck, MachineSpec, PlannedFile, Share, Vsock
from isopod.world.errors import InvalidArgument, RuntimeFailed, UnavailableError, Unsupported
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.engine.vm.fakes.kit import CLOUD_HYPERVISOR, FIRECRACKER, MIB, VMMS, Vmm, make_spec, with_kvm, without_kvm
from tests.engine.vm.fakes.launch import ended, launched
from tests.engine.vm.fakes.rules import Asked, Rules
from tests.engine.vm.fakes.server import Stage, served

HERE: Final = os.path.dirname(os.path.abspath(__file__))
TRANSCRIPTS: Final = os.path.join(HERE, "transcripts")
both_vmms: Final = pytest.mark.parametrize("vmm", VMMS, ids=[vmm.name for vmm in VMMS])


@contextlib.asynccontextmanager
async def running(world: World, vmm: Vmm, spec: MachineSpec) -> AsyncIterator[tuple[Control, Rules, Stage]]:
    """Serve a fake where the plan says, and connect to it."""
    driver = vmm.driver(world)
    await driver.plan(spec)
    rules = vmm.rules(world)
    async with served(world, f"{spec.folder}/api.sock", rules) as stage:
        yield await driver.connect(spec), rules, stage


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("B11")
@both_vmms
async def test_plan(world: World, folder: str, vmm: Vmm) -> None:
    spec = await make_spec(world, folder)
    stale = f"{spec.folder}/agent.sock"
    await world.disk.write(stale, b"left by an earlier one")
    plan = await vmm.driver(world).plan(spec)
    api = f"{spec.folder}/api.sock"
    assert plan.argv[0].startswith("/")
    assert (plan.cwd, plan.console, plan.agent, plan.own_network) == (spec.folder, "stdio", Vsock(stale, 1024), False)
    assert plan.env == {"PATH": plan.env["PATH"]}
    assert plan.stop_argv == ()
    assert await world.disk.stat(stale) is None
    if vmm is FIRECRACKER:
        assert (plan.argv[1:], plan.files) == (("--api-sock", api, "--id", spec.id, "--level", "Error"), ())
    else:
        assert (plan.argv[1:], plan.files) == (("--api-socket", "fd=3"), (PlannedFile("listen", api),))


@both_vmms
async def test_what_it_cannot_run_is_refused_with_the_reason(world: World, folder: str, vmm: Vmm) -> None:
    driver = vmm.driver(world)
    spec = await make_spec(world, folder)
    with pytest.raises(Unsupported, match="needs KVM"):
        await driver.plan(spec._replace(accelerator="tcg"))
    with pytest.raises(Unsupported, match="q35"):
        await driver.plan(spec._replace(machine="q35"))
    with pytest.raises(Unsupported, match="1000 vcpus"):
        await driver.plan(spec._replace(vcpus=1000))
    with pytest.raises(InvalidArgument, match="MiB"):
        await driver.plan(spec._replace(memory_bytes=MIB + 1))
    with pytest.raises(InvalidArgument, match="socket"):
        await driver.plan(spec._replace(folder="/" + "long" * 30))
    shared = spec._replace(shares=(Share("data", "/run/x.sock", read_only=True),))
    if vmm is FIRECRACKER:
        with pytest.raises(Unsupported, match="virtiofs"):
            await driver.plan(shared)
        with pytest.raises(Unsupported, match="19 devices"):
            await driver.plan(spec._replace(disks=tuple(spec.disks[0]._replace(serial=f"l{number}i") for number in range(16))))
        with pytest.raises(InvalidArgument, match="serial"):
            await driver.plan(spec._replace(disks=(spec.disks[0]._replace(serial="a/../b"),)))
    else:
        await driver.plan(shared)


@pytest.mark.parametrize("driver", [FirecrackerDriver, CloudHypervisorDriver])
async def test_check(world: World, driver: type[FirecrackerDriver] | type[CloudHypervisorDriver]) -> None:
    missing = driver(world, kvm=with_kvm, command=("no-such-vmm",))
    found = await missing.check()
    assert not found.usable
    assert "not installed" in found.why
    with pytest.raises(Unsupported, match="no-such-vmm"):
        await missing.plan(await make_spec(world, "/tmp"))


@pytest.mark.parametrize("vmm", VMMS, ids=[vmm.name for vmm in VMMS])
async def test_check_of_a_program_that_runs(host_world: World, vmm: Vmm) -> None:
    kind = FirecrackerDriver if vmm is FIRECRACKER else CloudHypervisorDriver
    works = await kind(host_world, kvm=with_kvm, command=vmm.fake).check()
    assert works.usable
    assert works.why in ("Firecracker v1.10.1", "cloud-hypervisor v44.0")
    lame = await kind(host_world, kvm=without_kvm, command=vmm.fake).check()
    assert lame == DriverCheck(usable=False, why=f"{works.why}, but it needs KVM: a probe guest did not come up under KVM")
    broken = await kind(host_world, kvm=with_kvm, command=("false",)).check()
    assert not broken.usable
    assert "does not run" in broken.why


# --- the verbs, and what they send ------------------------------------------------------------------------------------


@pytest.mark.row("B11")
@pytest.mark.row("V6")
@both_vmms
async def test_every_verb_sends_what_was_recorded(world: World, folder: str, vmm: Vmm) -> None:
    written: list[str] = []
    spec = await make_spec(world, folder)
    snapshot = f"{folder}/snapshot"
    await world.disk.make_directory(snapshot)

    def note(title: str, rules: Rules, since: int) -> None:
        written.append(f"## {title}\n" + "".join(line(each, folder) for each in rules.asked[since:]))

    async with running(world, vmm, spec) as (control, rules, _):
        for title, verb in (
            ("boot", control.boot),
            ("status", control.status),
            ("pause", control.pause),
            ("snapshot", lambda: control.snapshot(snapshot)),
            ("resume", control.resume),
            ("resize", lambda: control.resize(vcpus=4, memory_bytes=512 * MIB)),
            ("power_button", control.power_button),
        ):
            since = len(rules.asked)
            await verb()
            note(title, rules, since)
        if vmm is CLOUD_HYPERVISOR:
            since = len(rules.asked)
            await control.quit()
            note("quit", rules, since)
        assert rules.refused == []
        control.close()
    assert sorted(await world.disk.list(snapshot)) == sorted((*vmm.snapshot_files, "machine.json"))

    async with running(world, vmm, spec._replace(restore_from=snapshot)) as (control, rules, _):
        await control.boot()
        note("boot from its own snapshot", rules, 0)
        assert await control.status() == "running"
        assert rules.refused == []

    clone = (await make_spec(world, folder, "vm2"))._replace(restore_from=snapshot)
    async with running(world, vmm, clone) as (control, rules, _):
        await control.boot()
        note("boot as a clone, with a disk and a tap of its own", rules, 0)
        assert await world.disk.stat(f"{clone.folder}/restore") is None
        assert await control.status() == "running"
        assert rules.refused == []
    compare(vmm.name, "\n".join(written))


@pytest.mark.row("V6")
async def test_a_clone_has_its_own_disks_and_tap(world: World, folder: str) -> None:
    for vmm in VMMS:
        first, second = await make_spec(world, f"{folder}/{vmm.name}"), await make_spec(world, f"{folder}/{vmm.name}", "vm2")
        snapshot = f"{first.folder}/snapshot"
        await world.disk.make_directory(snapshot)
        async with running(world, vmm, first) as (control, _, _):
            await control.boot()
            await control.pause()
            await control.snapshot(snapshot)
        async with running(world, vmm, second._replace(restore_from=snapshot)) as (control, rules, _):
            await control.boot()
        disks, taps = devices(rules)
        assert disks == {disk.serial: disk.path for disk in second.disks}
        assert taps == [nic.tap for nic in second.nics]


def devices(rules: Rules) -> tuple[dict[str, str], list[str]]:
    """Return a fake machine's disks by name, and its taps."""
    from tests.engine.vm.fakes.cloud_hypervisor import CloudHypervisorRules
    from tests.engine.vm.fakes.firecracker import FirecrackerRules

    if isinstance(rules, FirecrackerRules):
        return {key: each["path_on_host"] for key, each in rules.drives.items()}, [
            each["host_dev_name"] for each in rules.interfaces.values()
        ]
    assert isinstance(rules, CloudHypervisorRules)
    return {each["serial"]: each["path"] for each in rules.config["disks"]}, [each["tap"] for each in rules.config["net"]]


@both_vmms
async def test_status_follows_the_machine(world: World, folder: str, vmm: Vmm) -> None:
    async with running(world, vmm, await make_spec(world, folder)) as (control, rules, _):
        seen = [await control.status()]
        for verb in (control.boot, control.pause, control.pause, control.resume, control.resume):
            await verb()
            seen.append(await control.status())
        assert seen == ["unknown", "running", "paused", "paused", "running", "running"]
        assert rules.refused == []


async def test_resize_within_what_was_set_aside(world: World, folder: str) -> None:
    async with running(world, CLOUD_HYPERVISOR, await make_spec(world, folder)) as (control, rules, _):
        await control.boot()
        assert await control.resize(vcpus=8, memory_bytes=1024 * MIB) == ()
        assert await control.resize(vcpus=8, memory_bytes=1024 * MIB) == ()
        assert await control.resize(vcpus=1, memory_bytes=None) == ()
        notes = await control.resize(vcpus=9, memory_bytes=2048 * MIB)
        assert [note.partition(":")[0] for note in notes] == ["vcpus", "memory"]
        assert "8 were set aside" in notes[0]
        assert len(await control.resize(vcpus=None, memory_bytes=512 * MIB)) == 1
        assert len(await control.resize(vcpus=None, memory_bytes=1000 * MIB)) == 1
        assert rules.refused == []
        assert [each.path for each in rules.asked if each.path.endswith("vm.resize")] == ["/api/v1/vm.resize"] * 2


async def test_firecracker_resizes_at_the_next_start_only(world: World, folder: str) -> None:
    async with running(world, FIRECRACKER, await make_spec(world, folder)) as (control, rules, _):
        await control.boot()
        assert await control.resize(vcpus=2, memory_bytes=None) == ()
        assert len(await control.resize(vcpus=4, memory_bytes=512 * MIB)) == 2
        assert rules.refused == []


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("B11")
@both_vmms
async def test_a_machine_that_does_not_boot_says_why(world: World, folder: str, vmm: Vmm) -> None:
    spec = (await make_spec(world, folder))._replace(kernel="/nowhere/vmlinux")
    async with running(world, vmm, spec) as (control, _, _):
        with pytest.raises(RuntimeFailed, match=r"boot vm1|configure vm1|create vm1") as caught:
            await control.boot()
        assert "No such file or directory" in caught.value.message
        assert "/nowhere/vmlinux" in caught.value.message
        assert "\n" not in caught.value.message


@pytest.mark.row("B11")
@both_vmms
async def test_what_makes_no_sense_now_is_refused_before_it_is_asked(world: World, folder: str, vmm: Vmm) -> None:
    async with running(world, vmm, await make_spec(world, folder)) as (control, rules, _):
        for verb in (control.pause, control.resume, control.power_button, lambda: control.snapshot(folder)):
            with pytest.raises(RuntimeFailed):
                await verb()
        await control.boot()
        with pytest.raises(RuntimeFailed, match="already"):
            await control.boot()
        with pytest.raises(RuntimeFailed, match="not paused"):
            await control.snapshot(folder)
        await control.pause()
        with pytest.raises(RuntimeFailed, match="paused"):
            await control.power_button()
        assert rules.refused == []


@both_vmms
async def test_a_snapshot_that_is_none_or_anothers_is_refused(world: World, folder: str, vmm: Vmm) -> None:
    spec = await make_spec(world, folder)
    snapshot = f"{folder}/snapshot"
    await world.disk.make_directory(snapshot)
    restored = spec._replace(restore_from=snapshot)

    async def refused(spec: MachineSpec) -> str:
        async with running(world, vmm, spec) as (control, _, _):
            with pytest.raises(RuntimeFailed) as caught:
                await control.boot()
        return caught.value.message

    assert "no whole snapshot" in await refused(restored)
    async with running(world, vmm, spec) as (control, _, _):
        await control.boot()
        await control.pause()
        await control.snapshot(snapshot)
    assert "vcpus: 2" in await refused(restored._replace(vcpus=1))
    assert "memory" in await refused(restored._replace(memory_bytes=512 * MIB))
    assert "disks" in await refused(restored._replace(disks=spec.disks[:1]))
    assert "network interfaces" in await refused(restored._replace(nics=()))
    for file in (*vmm.snapshot_files, "machine.json"):
        good = await world.disk.read(f"{snapshot}/{file}")
        await world.disk.remove(f"{snapshot}/{file}")
        assert "restore vm1" in await refused(restored), file
        if file not in ("memory", "memory-ranges"):
            await world.disk.write(f"{snapshot}/{file}", b'{"dama')
            assert "restore vm1" in await refused(restored), file
        await world.disk.write(f"{snapshot}/{file}", good)
    other = FIRECRACKER if vmm is CLOUD_HYPERVISOR else CLOUD_HYPERVISOR
    async with running(world, other, restored) as (control, _, _):
        with pytest.raises(RuntimeFailed, match="driver"):
            await control.boot()


HOSTILE: Final = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "another shape": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n[1,2,3]",
    "no state": b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"state":123}',
    "too much": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * (5 << 20),
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://example.org/\r\nContent-Length: 0\r\n\r\n",
    "long words": b"HTTP/1.1 500 No\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20000,
    "nested": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100000,
}


@pytest.mark.row("B11")
@both_vmms
@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
async def test_an_answer_that_makes_no_sense_harms_nobody(world: World, folder: str, vmm: Vmm, raw: bytes) -> None:
    async with running(world, vmm, await make_spec(world, folder)) as (control, _, stage):
        stage.raw = raw
        for verb in (control.boot, control.status, control.pause):
            with pytest.raises(RuntimeFailed) as caught:
                await verb()
            assert len(caught.value.message) < 1000


@pytest.mark.virtual_time
@both_vmms
async def test_a_vmm_that_says_nothing_or_half_a_word_is_unavailable(world: World, folder: str, vmm: Vmm) -> None:
    loop = asyncio.get_running_loop()
    async with running(world, vmm, await make_spec(world, folder)) as (control, _, stage):
        await control.boot()
        for raw in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"):
            stage.raw = raw
            for verb in (control.pause, control.status):
                begun_s = loop.time()
                with pytest.raises(UnavailableError, match="did not answer"):
                    await verb()
                assert loop.time() - begun_s < 11.0


@pytest.mark.virtual_time
@both_vmms
async def test_a_vmm_that_never_listens_is_unavailable(world: World, folder: str, vmm: Vmm) -> None:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    with pytest.raises(UnavailableError, match="did not answer within 10 s"):
        await vmm.driver(world).connect(await make_spec(world, folder))
    assert 9.0 < loop.time() - begun_s < 11.0


@both_vmms
async def test_a_vmm_that_is_gone_is_unavailable(world: World, folder: str, vmm: Vmm) -> None:
    spec = await make_spec(world, folder)
    async with running(world, vmm, spec) as (control, _, _):
        await control.boot()
    with pytest.raises(UnavailableError, match="gone"):
        await control.pause()
    with pytest.raises(UnavailableError, match="gone"):
        await control.status()
    await control.quit()


@pytest.mark.row("B11")
@both_vmms
async def test_a_vmm_that_dies_at_any_request_of_its_boot_is_told_as_gone(world: World, folder: str, vmm: Vmm) -> None:
    spec = await make_spec(world, folder)
    async with running(world, vmm, spec) as (control, rules, _):
        await control.boot()
        n_requests = len(rules.asked)
    assert n_requests > 3
    for number in range(2, n_requests + 1):
        async with running(world, vmm, spec) as (control, _, stage):
            stage.dies_at = number
            with pytest.raises(UnavailableError, match="vm1 is gone"):
                await control.boot()
            with pytest.raises(UnavailableError, match="vm1 is gone"):
                await control.status()


@pytest.mark.row("B11")
@both_vmms
async def test_calls_at_the_same_time_break_no_rule(world: World, folder: str, vmm: Vmm) -> None:
    await world.disk.make_directory(f"{folder}/snapshot")
    async with running(world, vmm, await make_spec(world, folder)) as (control, rules, _):
        calls = [control.boot, control.pause, control.resume, control.power_button, control.pause, control.boot, control.resume]
        outcomes = await asyncio.gather(*(each() for each in calls), return_exceptions=True)
        assert [each for each in outcomes if each is not None and not isinstance(each, RuntimeFailed)] == []
        assert rules.refused == []
        assert [each.path for each in rules.asked].count("/actions" if vmm is FIRECRACKER else "/api/v1/vm.boot") >= 1


# --- any order of calls -----------------------------------------------------------------------------------------------

VERBS: Final = ("boot", "pause", "resume", "snapshot", "resize", "power_button", "status")


@pytest.mark.row("B11")
@both_vmms
@settings(max_examples=60)
@given(calls=st.lists(st.sampled_from(VERBS), max_size=14))
def test_no_order_of_calls_breaks_the_rules(vmm: Vmm, calls: list[str]) -> None:
    sim = make_sim_world()
    try:
        sim.loop.run_until_complete(called(sim.world, vmm, calls))
    finally:
        sim.close()


async def called(world: World, vmm: Vmm, calls: list[str]) -> None:
    """Make calls, and compare each with what a machine of that state can do."""
    await world.disk.make_directory("/tmp/snapshot")
    async with running(world, vmm, await make_spec(world, "/tmp")) as (control, rules, _):
        state = "unknown"
        for name in calls:
            possible = {
                "boot": state == "unknown",
                "snapshot": state == "paused",
                "power_button": state == "running",
                "status": True,
                "resize": state != "unknown" or vmm is FIRECRACKER,
            }.get(name, state != "unknown")
            try:
                await call(control, name)
            except RuntimeFailed:
                assert not possible, (name, state)
            else:
                assert possible, (name, state)
                state = {"boot": "running", "pause": "paused", "resume": "running"}.get(name, state)
            assert await control.status() == state
        assert rules.refused == []


async def call(control: Control, name: str) -> None:
    """Make one call."""
    if name == "snapshot":
        await control.snapshot("/tmp/snapshot")
    elif name == "resize":
        await control.resize(vcpus=3, memory_bytes=384 * MIB)
    else:
        await getattr(control, name)()


# --- as processes of their own ----------------------------------------------------------------------------------------


@pytest.mark.row("B11")
@both_vmms
async def test_a_process_is_steered_from_its_start_to_its_end(host_world: World, folder: str, vmm: Vmm) -> None:
    world = host_world
    driver = (FirecrackerDriver if vmm is FIRECRACKER else CloudHypervisorDriver)(world, kvm=with_kvm, command=vmm.fake)
    spec = await make_spec(world, folder)
    snapshot = f"{folder}/snapshot"
    await world.disk.make_directory(snapshot)
    with launched(await driver.plan(spec), f"{folder}/console") as process:
        control = await driver.connect(spec)
        await control.boot()
        await control.pause()
        await control.snapshot(snapshot)
        await control.quit()
        assert await ended(world, process) in (0, -9)
        with pytest.raises(UnavailableError):
            await control.status()
        await control.quit()
    restored = spec._replace(restore_from=snapshot)
    with launched(await driver.plan(restored), f"{folder}/console") as process:
        control = await driver.connect(restored)
        await control.boot()
        assert await control.status() == "running"
        await control.power_button()
        assert await ended(world, process) == 0


# --- transcripts ------------------------------------------------------------------------------------------------------


def line(asked: Asked, folder: str) -> str:
    """Return a request as it stands in a transcript."""
    body = "" if asked.body is None else msgspec.json.format(msgspec.json.encode(asked.body, order="sorted"), indent=2).decode() + "\n"
    return f"{asked.method} {asked.path} -> {asked.status}\n{body}".replace(folder, "FOLDER")


def compare(name: str, text: str) -> None:
    """Compare with the transcript of that name, or write it anew."""
    path = os.path.join(TRANSCRIPTS, f"{name}.txt")
    if os.environ.get("ISOPOD_REWRITE_TRANSCRIPTS") == "1":
        os.makedirs(TRANSCRIPTS, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    with open(path, encoding="utf-8") as file:
        assert file.read() == text
