"""The shim with the real thing: QEMU without KVM, Debian's kernel, the agent."""

import shutil
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.shim.bench import Bench, is_alive, kill, wait_until
from tests.shim.test_monitor import Monitor

pytestmark = [pytest.mark.host, pytest.mark.slow]

GUEST = Path(sys.prefix, "share/isopod/guest")
WORDS = "console=ttyS0 reboot=t panic=-1 quiet loglevel=1 isopod.channel=serial pci=off tsc=reliable no_timer_check"


def host_khz() -> int:
    """What the guest cannot measure without KVM."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    return next(int(float(row.split(":")[1]) * 1000) for row in rows if row.startswith("cpu MHz"))


@pytest.fixture
def machine(bench: Bench) -> Bench:
    """A machine that boots."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or not (GUEST / "initrd.img").exists():
        pytest.skip("QEMU or the guest's files are missing: run make setup-vm")
    argv = f"""{qemu} -M microvm,acpi=on,pit=off,pic=off,rtc=on,pcie=off,isa-serial=on -accel tcg,tb-size=32 -cpu max -m 128 -smp 1
        -nodefaults -no-user-config -display none -no-reboot -kernel {GUEST}/vmlinux -initrd {GUEST}/initrd.img
        -chardev socket,id=console,fd=3 -serial chardev:console -device virtio-serial-device
        -chardev socket,id=agent,fd=4 -device virtserialport,chardev=agent,name=isopod.agent.0
        -chardev socket,id=qmp,fd=5,server=on,wait=off -mon chardev=qmp,mode=control -append""".split()
    bench.config |= {
        "argv": [*argv, f"{WORDS} tsc_early_khz={host_khz()}"],
        "files": [{"kind": "console"}, {"kind": "agent"}, {"kind": "listen", "path": f"{bench.folder}/qmp.sock"}],
        "monitor_socket": f"{bench.folder}/sbs/shim-monitor.sock",
        "hypervisor": "qemu",
    }
    return bench


def test_a_real_machine_boots_answers_and_stops(machine: Bench) -> None:
    with machine.start().connect() as client:
        hello = client.call("ready")
        assert hello["memory_bytes"] <= 128 << 20
        assert client.call("status")["main"] == "none"
        assert client.refusal("exec", argv=["/bin/true"])[0] == "invalid"  # it was not configured
        monitor = Monitor(machine.config["monitor_socket"])
        with monitor.socket:
            body = monitor.get("/metrics")[2]
            while "kata_shim_agent_answers 0" in body:  # a busy host: the guest has a second for its answer
                body = monitor.get("/metrics")[2]
        families = {family.name: family for family in text_string_to_metric_families(body)}
        (total,) = [sample.value for sample in families["kata_guest_meminfo"].samples if sample.labels["item"] == "mem_total"]
        assert 0 < total <= 128 << 20
        assert client.call("stop", timeout_s=60) == {}
        end = machine.end()
    assert (end["kind"], end["code"]) == ("stopped", 0)
    assert not (machine.folder / "qmp.sock").exists()


def test_a_real_machine_dies_with_its_shim(machine: Bench) -> None:
    machine.start()
    kill(machine.shim_pid)
    machine.wait()
    wait_until(lambda: not is_alive(machine.pid), "the machine's end")


@pytest.mark.row("V8")
def test_a_kernel_without_its_memory_file_system_panics(machine: Bench) -> None:
    argv = machine.config["argv"]
    del argv[argv.index("-initrd") : argv.index("-initrd") + 2]
    machine.start()
    end = machine.end()
    assert (end["kind"], end["why"].startswith("the guest's kernel panicked: ")) == ("panic", True), end


def test_an_option_that_qemu_does_not_know_is_told(machine: Bench) -> None:
    machine.config["argv"] += ["-device", "teapot"]
    machine.start()
    end = machine.end()
    assert (end["kind"], "teapot" in end["why"]) == ("vmm_failed", True), end
