"""What the set-up packs: the kernel out of its image, modules in an order that works, an archive the kernel reads."""

import struct
import subprocess
from pathlib import Path

import pytest

from scripts.guest_image import INITRD_BYTES_MAX, MODULES, VSOCK_MODULES, Entry, extract_vmlinux, memory_disk, pack, resolve
from tests.guest.machine import GUEST

KERNEL = Path(__file__).resolve().parents[2] / "build/vm/kernel"
needs_kernel = pytest.mark.skipif(not (KERNEL / "boot").is_dir(), reason="no kernel in build/vm: run `make setup-vm`")


def bz_image(payload: bytes, n_bytes: int) -> bytes:
    """Return the least that a bzImage is made of."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 0, len(payload) + 4)
    return bytes(head) + payload + struct.pack("<I", n_bytes)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True, timeout=10).stdout


@pytest.mark.host
def test_the_kernel_is_taken_out_of_its_image() -> None:
    kernel = b"\x7fELF" + bytes(5000)
    assert extract_vmlinux(bz_image(zstd(kernel), len(kernel))) == kernel


@pytest.mark.host
@pytest.mark.parametrize(
    ("image", "why"),
    [
        (bytes(4096), "no bzImage"),
        (bz_image(b"\x1f\x8b" + bytes(100), 1), "not compressed with zstd"),
        (bz_image(zstd(b"\x7fELF"), 5), "damaged"),
        (bz_image(zstd(b"MZ  "), 4), "damaged"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        extract_vmlinux(image)


@needs_kernel
@pytest.mark.host
def test_modules_come_after_what_they_need() -> None:
    order = list(resolve(KERNEL, (*MODULES, *VSOCK_MODULES)))
    assert order[0] == "virtio_mmio", "the channel's bus is inserted first"
    assert set(MODULES) | set(VSOCK_MODULES) <= set(order)
    pairs = (("libcrc32c", "erofs"), ("net_failover", "virtio_net"), ("failover", "net_failover"))
    for first, second in (*pairs, ("vsock", "vmw_vsock_virtio_transport_common")):
        assert order.index(first) < order.index(second)


@needs_kernel
def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no module no_such"):
        resolve(KERNEL, ["no_such"])
    assert resolve(KERNEL, ["ext4"]) == {}, "it is built in"


def test_the_archive_is_read_by_others(tmp_path: Path) -> None:
    entries = memory_disk(b"agent", {"a": b"1", "b": b"22"}, {"a": b"1", "c": b"333"})
    entries.append(Entry("odd", 0o100600, b"12345"))
    (tmp_path / "archive").write_bytes(pack(entries))
    with (tmp_path / "archive").open("rb") as archive:
        subprocess.run(["/bin/busybox", "cpio", "-id"], stdin=archive, cwd=tmp_path, check=True, timeout=10, stderr=subprocess.DEVNULL)
    assert (tmp_path / "modules/order").read_text() == "a\nb\n"
    assert (tmp_path / "modules/order.vsock").read_text() == "c\n"
    assert (tmp_path / "modules/c.ko").read_bytes() == b"333"
    assert (tmp_path / "init").read_bytes() == b"agent"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "odd").read_bytes() == b"12345"


@pytest.mark.skipif(not (GUEST / "initrd.img").exists(), reason="no guest: run `make setup-vm`")
def test_the_memory_file_system_keeps_its_budget() -> None:
    assert (GUEST / "initrd.img").stat().st_size <= INITRD_BYTES_MAX
    assert (GUEST / "vmlinux").read_bytes()[:4] == b"\x7fELF"
