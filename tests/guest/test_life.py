"""A guest from boot to power off: roots in other forms, disks that stay, limits, snapshots, and the ways to end."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from isopod.wire.agent import MAIN_STREAM, Kind, encode
from isopod.world.world import World
from tests.guest import machine, rootfs
from tests.guest.conftest import LAYERS, open_machine
from tests.guest.machine import Disk, Failed, Machine

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _possible() -> None:
    absent = machine.missing()
    if absent is not None:
        pytest.skip(absent)


def test_what_was_written_is_there_after_the_next_boot(folder: str) -> None:
    here = Path(folder)
    upper, lower = rootfs.make_layers(here)
    disk, data = rootfs.make_ext4(here / "upper.img", 64), rootfs.make_ext4(here / "data.img", 16)
    fixed = rootfs.make_ext4(here / "fixed.img", 16)
    disks = [Disk(upper, "l0i"), Disk(lower, "l1i"), Disk(disk, "upper", read_only=False), Disk(data, "d0", read_only=False)]
    disks.append(Disk(fixed, "d1"))
    mounts = [
        {"kind": "tmpfs", "tag": "", "path": "/mem", "n_bytes": 1 << 20},
        {"kind": "disk", "tag": "d0", "path": "/mem/data"},
        {"kind": "disk", "tag": "d1", "path": "/fixed", "read_only": True},
    ]
    wanted = machine.configuration(LAYERS, upper="upper", mounts=mounts, pids_max=20)
    with machine.booted(here, disks) as first:
        first.channel.request("configure", **wanted)
        first.channel.text("echo kept >/file; rm /replaced; echo data >/mem/data/file; sync")
        assert first.channel.text("cat /mem/data/file; touch /fixed/x 2>&1 || true").startswith("data\ntouch: /fixed/x: Read-only")
        assert first.channel.shell("head -c 2000000 /dev/zero >/mem/big").code != 0, "the memory has a bound"
        crowd = "for i in $(seq 40); do sleep 60 & done; wait"
        assert b"can't fork" in first.channel.shell(crowd).stderr, "the limit of processes holds"
        assert first.channel.request("sync") == {}
        assert first.channel.request("poweroff") == {}
        assert first.wait_gone() == 0
    for image in (disk, data):
        checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", str(image)], check=False, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout
    with machine.booted(here, disks) as second:
        second.channel.request("configure", **wanted)
        assert second.channel.text("cat /file /mem/data/file; ls /replaced 2>/dev/null || true") == "kept\ndata\n"
        # Nothing is unmounted this time: the journal has to do.
        second.channel.text("echo later >/file; sync")
    with machine.booted(here, disks) as third:
        third.channel.request("configure", **wanted)
        assert third.channel.text("cat /file") == "later\n"


@pytest.mark.row("V4")
async def test_a_layer_is_a_tar_and_its_index(host_world: World, folder: str) -> None:
    here = Path(folder)
    disks = []
    for number, tar in enumerate(rootfs.make_tars(here)):
        await host_world.disk.index_layer(str(tar), str(here / f"{number}.data"), str(here / f"{number}.index"))
        disks += [Disk(here / f"{number}.index", f"l{number}i"), Disk(here / f"{number}.data", f"l{number}t")]
    with machine.booted(here, disks) as booted:
        booted.channel.request("configure", **machine.configuration([["l0i", "l0t"], ["l1i", "l1t"]]))
        assert booted.channel.text("cat /replaced; ls /opaque; id -un").split("\n") == ["of the upper layer", "above", "root", ""]
        assert booted.channel.shell("test -e /gone").code == 1


def test_what_cannot_be_configured_says_why_and_can_be_tried_again(folder: str) -> None:
    here = Path(folder)
    upper, lower = rootfs.make_layers(here)
    noise = here / "noise"
    noise.write_bytes(bytes(1 << 20))
    with machine.booted(here, [Disk(upper, "l0i"), Disk(lower, "l1i"), Disk(noise, "noise", read_only=False)]) as booted:
        channel = booted.channel
        with pytest.raises(Failed, match="not configured"):
            channel.begin("/bin/true")
        cases: list[tuple[dict[str, object], str]] = [
            ({"layers": []}, "invalid"),
            ({"layers": [["noise", None]]}, "failed"),
            ({"upper": "noise"}, "failed"),
            ({"upper": "absent"}, "not_found"),
            ({"entropy": "xyz"}, "invalid"),
            ({"network": {"mac": "02:00:00:00:00:05", "address": "10.88.0.5"}}, "invalid"),
            ({"mounts": [{"kind": "virtiofs", "tag": "absent", "path": "/share"}]}, "failed"),
            ({"mounts": [{"kind": "virtiofs", "tag": "t", "path": "/f", "file": "../x"}]}, "invalid"),
            ({"mounts": [{"kind": "disk", "tag": "noise", "path": "/d"}]}, "failed"),
            ({"mounts": [{"kind": "tmpfs", "path": "relative"}]}, "invalid"),
        ]
        for changed, code in cases:
            with pytest.raises(Failed) as caught:
                channel.request("configure", **{**machine.configuration(LAYERS), **changed})
            assert caught.value.code == code, (changed, caught.value)
        assert channel.request("configure", **machine.configuration(LAYERS, network=None)) == {}
        assert channel.text("ls /sys/class/net; cat /sys/class/net/eth0/operstate").split() == ["eth0", "lo", "down"]


def test_the_main_command_ends_with_ctrl_alt_del_and_the_machine_with_it() -> None:
    with open_machine() as booted:
        script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.1; done"
        channel = booted.channel
        channel.begin("/bin/sh", "-c", script, op="start", stream=MAIN_STREAM)
        channel.wait(lambda: channel.output(MAIN_STREAM) == b"ready\n", "it is not ready")
        keys = [{"type": "key", "data": {"down": True, "key": {"type": "qcode", "data": key}}} for key in ("ctrl", "alt", "delete")]
        booted.command("input-send-event", events=keys)
        ended = channel.end(MAIN_STREAM)
        assert (ended.stdout, ended.code) == (b"ready\nbye\n", 4)
        assert booted.wait_gone() == 0


def test_poweroff_ends_all_that_runs_at_once() -> None:
    with open_machine() as booted:
        booted.channel.begin("/bin/sh", "-c", "trap '' TERM INT; while :; do sleep 1; done", op="start", stream=MAIN_STREAM)
        booted.channel.begin("/bin/sh", "-c", "(while :; do sleep 1; done) & wait")
        assert booted.channel.request("poweroff") == {}
        assert booted.wait_gone() == 0
        assert "panic" not in booted.console.read_text(errors="replace")


@pytest.mark.row("V6")
def test_clones_of_a_template_differ_in_all_that_must(folder: str) -> None:
    here = Path(folder)
    upper, lower = rootfs.make_layers(here)
    disks, template = [Disk(upper, "l0i"), Disk(lower, "l1i")], here / "template"
    with machine.booted(here, disks) as first:
        assert first.channel.request("prepare", layers=LAYERS) == {}
        first.snapshot(template)
    said, boots = [], []
    for number in (6, 7):
        clone = Machine(here, disks, incoming=f"exec:cat {template}")
        try:
            clone.open_monitor()
            clone.resume()
            clone.channel.greet()
            network = {"mac": f"02:00:00:00:00:0{number}", "address": f"10.88.1.{number}/16", "gateway": "10.88.0.1", "mtu": 1500}
            # Years ahead of the template's clock, and of each other's: a clock that nobody had set would not show it.
            told_s = number * 300_000_000
            wanted = machine.configuration(LAYERS, hostname=f"clone-{number}", network=network, time_ns=told_s * 10**9)
            assert clone.channel.request("configure", **wanted) == {}
            random = clone.channel.text("head -c 32 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid")
            facts = clone.channel.text("date +%s; hostname; cat /sys/class/net/eth0/address; ip -4 -o addr show eth0; ip route | head -n 1")
            lines = facts.splitlines()
            assert 0 <= int(lines[0]) - told_s < 60
            assert lines[1:3] == [f"clone-{number}", network["mac"]]
            assert f"10.88.1.{number}/16" in lines[3]
            assert machine.MAC not in facts
            assert lines[4].startswith("default via 10.88.0.1 dev eth0")
            said += random.splitlines()
            boots.append(clone.channel.text("cat /proc/sys/kernel/random/boot_id"))
        finally:
            clone.close()
    assert len(set(said)) == 4, "no two numbers that were drawn are the same"
    assert boots[0] == boots[1], "both come from one boot: what differs was renewed"


@pytest.mark.row("V6")
def test_a_running_machine_and_its_copy_go_on_after_its_snapshot(folder: str) -> None:
    here = Path(folder)
    upper, lower = rootfs.make_layers(here)
    disks, state = [Disk(upper, "l0i"), Disk(lower, "l1i")], here / "state"
    with machine.booted(here, disks) as first:
        first.channel.request("configure", **machine.configuration(LAYERS))
        first.channel.begin("/bin/sh", "-c", "n=0; while read x; do n=$((n+1)); echo $n; done; exit 9", op="start", stream=1, stdin=True)
        first.channel.write(MAIN_STREAM, b"\n")
        first.channel.wait(lambda: first.channel.output(MAIN_STREAM) == b"1\n", "it does not count")
        first.snapshot(state)
        first.resume()
        for number in (2, 3):
            first.channel.write(MAIN_STREAM, b"\n")
            counted = b"".join(b"%d\n" % each for each in range(1, number + 1))
            first.channel.wait(lambda counted=counted: first.channel.output(MAIN_STREAM) == counted, "the original does not go on")
        drawn = first.channel.text("head -c 32 /dev/urandom | md5sum")
        lines = first.channel.text("hostname; cat /sys/class/net/eth0/address; ip -4 -o addr show eth0; date +%s").splitlines()
        assert lines[:2] == ["guest-a", machine.MAC], "the original stays who it is"
        assert "10.88.0.5/24" in lines[2]
        assert abs(int(lines[3]) - time.time()) < 30
    second = Machine(here, disks, incoming=f"exec:cat {state}")
    try:
        second.open_monitor()
        second.resume()
        channel = second.channel
        assert channel.greet()["main"] == "running"
        network = {"mac": "02:00:00:00:00:09", "address": "10.88.0.9/24", "gateway": "10.88.0.1", "mtu": 1500}
        kept: dict[str, Any] = {
            "hostname": "again",
            "hosts": "127.0.0.1 localhost\n",
            "resolv": "nameserver 10.0.0.1\n",
            "entropy": "00ff" * 16,
        }
        assert channel.request("renew", time_ns=2_000_000_000 * 10**9, network=network, **kept) == {}
        assert channel.text("head -c 32 /dev/urandom | md5sum") != drawn
        said = channel.text("date +%s; hostname; cat /etc/hostname /etc/resolv.conf; ip -4 -o addr show eth0; ip route | wc -l")
        lines = said.splitlines()
        assert 0 <= int(lines[0]) - 2_000_000_000 < 60
        assert lines[1:4] == ["again", "again", "nameserver 10.0.0.1"]
        assert "10.88.0.9/24" in lines[4]
        assert "10.88.0.5" not in said
        assert lines[5] == "2"
        assert channel.text("cat /sys/class/net/eth0/address") == "02:00:00:00:00:09\n"
        channel.write(MAIN_STREAM, b"\n")
        channel.wait(lambda: channel.output(MAIN_STREAM) == b"2\n", "it does not go on counting")
        channel.send(encode(Kind.STDIN_END, MAIN_STREAM))
        assert channel.end(MAIN_STREAM).code == 9
    finally:
        second.close()


def test_with_vsock_the_agent_listens_and_stays(folder: str) -> None:
    booting = Machine(Path(folder), [], words=("loglevel=7", "isopod.channel=vsock"))
    try:
        said = ""
        until = time.monotonic() + machine.WAIT_S
        while "PF_VSOCK" not in said:
            assert time.monotonic() < until, said
            assert booting.process.poll() is None, said
            time.sleep(0.05)
            said = booting.console.read_text(errors="replace") if booting.console.exists() else ""
        with pytest.raises(subprocess.TimeoutExpired):
            # An agent that could not listen powers the machine off.
            booting.process.wait(2)
        assert "cannot begin" not in booting.console.read_text(errors="replace")
    finally:
        booting.close()
