"""A flake whose runner starts QEMU with isopod's own kernel: built offline, booted, seen through its console, shut down by its runner."""

import os
import re
import shutil
import sys
from typing import Final

import pytest

from isopod.engine.vm.guest import kernel_words
from isopod.world.world import World
from tests.engine.vm.fakes.flakes import need_nix, nix_driver, runner, write_flake
from tests.engine.vm.fakes.launch import ended, launched
from tests.engine.vm.test_drivers_nix import machine, wait_for_text

KERNEL: Final = f"{sys.prefix}/share/isopod/guest/vmlinux"
RUN: Final = """\
#!/bin/bash
set -eou pipefail
exec -a microvm@vm1 QEMU -M microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on -accel tcg,tb-size=32 -cpu max -m 128 -smp 1 \\
  -nodefaults -no-user-config -display none -no-reboot -serial stdio -qmp unix:vm1.sock,server=on,wait=off -kernel KERNEL -append "WORDS"
"""
SHUTDOWN: Final = """\
#!/bin/bash
exec python3 -c '
import socket
qmp = socket.socket(socket.AF_UNIX)
qmp.connect("vm1.sock")
qmp.sendall(b"{\\"execute\\": \\"qmp_capabilities\\"} {\\"execute\\": \\"quit\\"}")
while qmp.recv(4096):
    pass
'
"""


def host_khz() -> int:
    """Return how fast the host's processor runs."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found = re.search(r"cpu MHz\s*:\s*(\d+)\.(\d{3})", file.read())
    return int(found[1] + found[2]) if found else 0


@pytest.mark.row("B11")
@pytest.mark.slow
async def test_a_flakes_runner_boots_a_kernel(host_world: World, folder: str) -> None:
    need_nix()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("needs qemu-system-x86_64 (apt-get install qemu-system-x86)")
    if not os.path.exists(KERNEL):
        pytest.skip(f"needs {KERNEL} (make setup-vm)")
    words = " ".join((*(word for word in kernel_words("tcg", host_khz()) if not word.startswith("panic=")), "panic=0", "pci=off"))
    script = RUN.replace("QEMU", qemu).replace("KERNEL", KERNEL).replace("WORDS", words)
    driver = nix_driver(host_world, folder)
    spec = machine(f"{folder}/bundle", write_flake(f"{folder}/flake", {"vm1": runner(run=script, shutdown=SHUTDOWN)}))
    await host_world.disk.make_directory(spec.folder)
    plan = await driver.plan(spec)
    with launched(plan, f"{folder}/console") as process:
        await host_world.disk.write(f"{spec.folder}/pid", b"%d" % process.pid)
        await wait_for_text(host_world, f"{folder}/console", "Unable to mount root fs")
        control = await driver.connect(spec)
        assert await control.status() == "running"
        await control.power_button()
        assert await ended(host_world, process) == 0
        assert await control.status() == "shutdown"
