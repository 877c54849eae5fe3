"""Pack what a microVM boots: the kernel, uncompressed, and its memory file system with the agent and the modules it inserts.

The kernel package's `vmlinuz` is a bzImage whose payload is zstd; what is inside is an ELF file with a PVH entry, which QEMU, Firecracker
and Cloud Hypervisor start directly. Modules are kept as they are inserted: decompressed, and without debug data, type data and signature
(the agent is the only one who inserts any, and with them it takes several times as long where each instruction is translated).

Sources: Documentation/arch/x86/boot.rst (setup_sects, payload_offset), Documentation/driver-api/early-userspace/buffer-format.rst (cpio
"newc"), modinfo(8).
"""

import argparse
import hashlib
import json
import lzma
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

MODULES: Final = ("virtio_mmio", "virtio_blk", "erofs", "overlay", "virtio_net", "virtio_rng", "virtio_balloon")
"""What the agent inserts, besides what these need: the channel's bus first, the sandbox's disks and root, the link, the rest."""
VSOCK_MODULES: Final = ("vmw_vsock_virtio_transport",)
"""What it inserts as well where the host is reached by vsock."""
UNUSED_SECTIONS: Final = ("--strip-debug", "--remove-section=.BTF", "--remove-section=.BTF.base")
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
INITRD_BYTES_MAX: Final = 3 << 20
DEADLINE_S: Final = 120
_DIRECTORY: Final = stat.S_IFDIR | 0o755
_PROGRAM: Final = stat.S_IFREG | 0o755
_FILE: Final = stat.S_IFREG | 0o644
_DEVICE: Final = stat.S_IFCHR | 0o600


class Entry(NamedTuple):
    """One name of the memory file system."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number."""


def main(arguments: Sequence[str]) -> None:
    """Write the folder that machines boot from.

    Args:
        arguments: As `--help` says.
    """
    parser = argparse.ArgumentParser(description="Pack what a microVM boots.")
    for name in ("kernel", "agent", "shim", "to"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--stamp", required=True)
    given = parser.parse_args(arguments)
    place: Path = given.to
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".guest-", dir=place.parent))
    try:
        _fill(new, given)
        new.chmod(0o755)
        _replace(new, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def extract_vmlinux(image: bytes) -> bytes:
    """Return the ELF file inside a bzImage whose payload is zstd.

    Raises:
        ValueError: It is no such image.
    """
    if image[0x202:0x206] != b"HdrS":
        # The magic "HdrS" lies at 0x202, see boot.rst.
        raise ValueError("no bzImage")
    n_setup_sectors = image[0x1F1] or 4
    offset, n_bytes = struct.unpack_from("<II", image, 0x248)
    start = (n_setup_sectors + 1) * 512 + offset
    # The last four bytes are the unpacked size, for the kernel's own unpacker.
    payload, size = image[start : start + n_bytes - 4], struct.unpack_from("<I", image, start + n_bytes - 4)[0]
    if not payload.startswith(ZSTD_MAGIC):
        raise ValueError("the kernel is not compressed with zstd")
    unpacked = subprocess.run(["zstd", "-dqc"], input=payload, stdout=subprocess.PIPE, check=True, timeout=DEADLINE_S).stdout
    if len(unpacked) != size or not unpacked.startswith(b"\x7fELF"):
        raise ValueError("the kernel's payload is damaged")
    return unpacked


def resolve(kernel: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return modules by name, each after those it needs. What is built into the kernel needs none.

    Raises:
        ValueError: The kernel has no such module, nor is it built in.
    """
    files = {_plain(path.name.split(".ko")[0]): path for path in sorted(kernel.glob("lib/modules/*/kernel/**/*.ko*"))}
    builtin = {_plain(Path(line).stem) for path in kernel.glob("lib/modules/*/modules.builtin") for line in path.read_text().split()}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or (name in builtin and name not in files):
            return
        if name not in files:
            raise ValueError(f"the kernel has no module {name}")
        packed = files[name].read_bytes()
        data = lzma.decompress(packed) if files[name].suffix == ".xz" else packed
        said = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in (said.group(1).decode() if said else "").split(","):
            if needed:
                add(_plain(needed))
        found[name] = _strip(data)

    for name in wanted:
        add(name)
    return found


def pack(entries: Iterable[Entry]) -> bytes:
    """Return a cpio archive in the form the kernel unpacks."""
    rows = [*entries, Entry("TRAILER!!!", 0)]
    return b"".join(_cpio_entry(number, entry) for number, entry in enumerate(rows, 1))


def memory_disk(agent: bytes, modules: dict[str, bytes], vsock: dict[str, bytes]) -> list[Entry]:
    """Return what the memory file system holds.

    Args:
        agent: The program that is `/init`.
        modules: What is always inserted, in order.
        vsock: What is inserted as well for vsock, in order; those of `modules` do not count again.
    """
    extra = {name: data for name, data in vsock.items() if name not in modules}
    lists = (("order", modules), ("order.vsock", extra))
    return [
        *(Entry(name, _DIRECTORY) for name in ("dev", "proc", "sys", "modules")),
        # The kernel opens the first for its first program; Rust's library wants the second if there is none.
        Entry("dev/console", _DEVICE, device=(5, 1)),
        Entry("dev/null", _DEVICE, device=(1, 3)),
        Entry("init", _PROGRAM, agent),
        *(Entry(f"modules/{name}.ko", _FILE, data) for name, data in (*modules.items(), *extra.items())),
        *(Entry(f"modules/{name}", _FILE, "".join(f"{line}\n" for line in lines).encode()) for name, lines in lists),
    ]


def _fill(folder: Path, given: argparse.Namespace) -> None:
    image = next(iter(sorted((given.kernel / "boot").glob("vmlinuz-*"))))
    vmlinux = extract_vmlinux(image.read_bytes())
    modules, vsock = resolve(given.kernel, MODULES), resolve(given.kernel, (*MODULES, *VSOCK_MODULES))
    initrd = _compressed(pack(memory_disk(given.agent.read_bytes(), modules, vsock)))
    if len(initrd) > INITRD_BYTES_MAX:
        raise ValueError(f"the memory file system has {len(initrd)} bytes, more than {INITRD_BYTES_MAX}")
    (folder / "vmlinux").write_bytes(vmlinux)
    (folder / "initrd.img").write_bytes(initrd)
    shutil.copy(given.shim, folder / "isopod-shim")
    facts = {
        "kernel": image.name.removeprefix("vmlinuz-"),
        "agent": _agent_version(),
        "digest": "sha256:" + hashlib.sha256(vmlinux + initrd).hexdigest(),
    }
    (folder / "guest.json").write_text(json.dumps(facts) + "\n", encoding="ascii")
    (folder / "stamp").write_text(given.stamp + "\n", encoding="ascii")
    sys.stderr.write(
        f"guest: kernel {facts['kernel']} {len(vmlinux) / 1e6:.1f} MB, initrd {len(initrd) / 1e6:.2f} MB"
        f" (at most {INITRD_BYTES_MAX / 1e6:.1f}), agent {given.agent.stat().st_size / 1e3:.0f} kB, {len(vsock)} modules\n"
    )


def _agent_version() -> str:
    text = (Path(__file__).resolve().parents[1] / "rust/guest/Cargo.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise ValueError("rust/guest/Cargo.toml names no version")
    return found.group(1)


def _replace(new: Path, place: Path) -> None:
    """Put a folder where another one may be. A rename over a folder that is not empty is refused, so the old one goes aside first."""
    old = Path(tempfile.mkdtemp(prefix=".guest-", dir=place.parent))
    try:
        if place.exists():
            place.rename(old / "old")
        new.rename(place)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _compressed(data: bytes) -> bytes:
    """Return it as lz4 in the form the kernel reads ("legacy" frames): unpacking costs a translated processor little."""
    return subprocess.run(["lz4", "-lq9", "-c"], input=data, stdout=subprocess.PIPE, check=True, timeout=DEADLINE_S).stdout


def _strip(module: bytes) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".ko") as file:
        file.write(module)
        file.flush()
        subprocess.run(["objcopy", *UNUSED_SECTIONS, file.name], check=True, timeout=DEADLINE_S)
        return Path(file.name).read_bytes()


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _cpio_entry(number: int, entry: Entry) -> bytes:
    name = entry.name.encode()
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


if __name__ == "__main__":
    main(sys.argv[1:])
