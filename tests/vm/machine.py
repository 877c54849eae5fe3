"""A virtual machine that boots, runs pytest once, and is over: QEMU's process, its deadline, and what it leaves.

TCG is used even where /dev/kvm is: a nested one may not bring a guest up, and what is tested here is not speed.
The guest's clock: under TCG the kernel finds no reference to measure its time-stamp counter by and may hang; it is told the host's rate.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.vm.image import KERNEL, write_disk, write_memory_disk

QEMU: Final = "qemu-system-x86_64"
MEMORY_MIB: Final = 1536
RESULT_MIB: Final = 16


class Outcome(NamedTuple):
    """What came back."""

    files: Mapping[str, str]
    """What the guest wrote about its run, by name; empty if it never came so far."""
    console: str


def missing() -> str | None:
    """Return what keeps a machine from being started here, None if nothing does."""
    if shutil.which(QEMU) is None or not (KERNEL / "boot").is_dir():
        return f"no {QEMU} or no kernel in build/vm: run `make test-v2`, which fetches both"
    return "not root: the disk is made of root's files" if os.geteuid() != 0 else None


def boot(folder: Path, arguments: Sequence[str], timeout_s: float, *, n_nodes: int = 1) -> Outcome:
    """Boot a machine that runs `pytest *arguments` in the project's folder, and wait until it has ended.

    Args:
        folder: For its files.
        arguments: What pytest is given.
        timeout_s: How long it may take.
        n_nodes: Memory nodes, 1 or 2; of two each has one of the processors and half of the memory.

    Raises:
        subprocess.TimeoutExpired: It did not end in time; it was killed. The console is in the error's `output`.
    """
    write_memory_disk(folder / "memory.gz", KERNEL)
    write_disk(folder / "root.ext4", arguments)
    result, console = folder / "result.raw", folder / "console.log"
    with result.open("wb") as file:
        file.truncate(RESULT_MIB << 20)
    environment = {**os.environ, "TMPDIR": str(folder)}  # where QEMU keeps what the guest writes to its root disk
    with (folder / "qemu.log").open("wb") as log:
        command = _command(folder, n_nodes)
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = machine.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            error.output = _text(console)
            raise
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
                machine.wait(10)
    assert code == 0, f"qemu ended with {code}: {_text(folder / 'qemu.log')}"
    return Outcome(_unpack(result.read_bytes()), _text(console))


def _command(folder: Path, n_nodes: int) -> Sequence[str]:
    kernel = next(iter(sorted((KERNEL / "boot").glob("vmlinuz-*"))))
    words = f"console=ttyS0 reboot=t panic=-1 loglevel=4 tsc=reliable tsc_early_khz={_host_khz()} no_timer_check cgroup_no_v1=all"
    return (
        # Should this process be killed itself, the kernel kills the machine.
        *("setpriv", "--pdeathsig", "KILL"),
        *(QEMU, "-M", "q35", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-m", str(MEMORY_MIB)),
        *("-smp", f"2,sockets={n_nodes}"),
        *(word for node in range(n_nodes if n_nodes > 1 else 0) for word in _memory_node(node, n_nodes)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-initrd", str(folder / "memory.gz"), "-append", words, "-serial", f"file:{folder / 'console.log'}"),
        *("-drive", f"if=none,id=root,format=raw,file={folder / 'root.ext4'},snapshot=on,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=root"),
        *("-drive", f"if=none,id=result,format=raw,file={folder / 'result.raw'},cache=unsafe", "-device", "virtio-blk-pci,drive=result"),
        *("-device", "virtio-rng-pci"),
    )


def _memory_node(node: int, n_nodes: int) -> Sequence[str]:
    name = f"memory{node}"
    memory = f"memory-backend-ram,id={name},size={MEMORY_MIB // n_nodes}M"
    return ("-object", memory, "-numa", f"node,nodeid={node},cpus={node},memdev={name}")


def _host_khz() -> int:
    rate = re.search(r"^cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
    assert rate is not None, "/proc/cpuinfo does not tell the rate of the time-stamp counter"
    return int(float(rate.group(1)) * 1000)


def _unpack(data: bytes) -> Mapping[str, str]:
    if not data.strip(b"\0"):
        return {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = {member.name.removeprefix("./"): tar.extractfile(member) for member in tar if member.isreg()}
        return {name: file.read().decode("utf-8", "replace") for name, file in files.items() if file is not None}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
