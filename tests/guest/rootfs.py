"""Roots for guests: busybox and what it needs, as images that a guest mounts.

The tree is two layers: the lower has busybox and files that the upper hides by whiteouts and an opaque folder.
"""

import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Final

BUSYBOX: Final = "/bin/busybox"
PASSWD: Final = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:100::/home/ann:/bin/sh\n"
GROUP: Final = "root:x:0:\nwheel:x:10:root,ann\nusers:x:100:\naudio:x:29:ann\n"


def make_layers(folder: Path) -> tuple[Path, Path]:
    """Write two EROFS images, the upper layer and the lower one, and return their paths."""
    lower, upper = folder / "lower", folder / "upper"
    _fill_lower(lower)
    _fill_upper(upper)
    return make_image(folder / "upper.erofs", upper), make_image(folder / "lower.erofs", lower)


def make_image(path: Path, tree: Path) -> Path:
    """Write an EROFS image of a tree."""
    subprocess.run(["mkfs.erofs", "--quiet", str(path), str(tree)], check=True, timeout=60, stdout=subprocess.DEVNULL)
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 4096) * 4096)
    return path


def make_tars(folder: Path) -> tuple[Path, Path]:
    """Write the same two layers as tars in the form of the OCI image specification, and return their paths."""
    lower, upper = folder / "lower", folder / "upper-oci"
    _fill_lower(lower)
    (upper / "opaque").mkdir(parents=True)
    for name, text in (
        ("replaced", "of the upper layer\n"),
        ("opaque/above", "of the upper layer\n"),
        (".wh.gone", ""),
        ("opaque/.wh..wh..opq", ""),
    ):
        (upper / name).write_text(text)
    for tree in (lower, upper):
        with tarfile.open(tree.with_suffix(".tar"), "w:", format=tarfile.PAX_FORMAT) as tar:
            tar.add(tree, arcname=".")
    return upper.with_suffix(".tar"), lower.with_suffix(".tar")


def make_ext4(path: Path, n_mib: int) -> Path:
    """Write an empty ext4 image."""
    with path.open("wb") as file:
        file.truncate(n_mib << 20)
    command = ["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path


def _fill_lower(tree: Path) -> None:
    for name in ("bin", "etc", "root", "home/ann", "tmp", "hidden", "opaque", "usr/local/bin"):
        (tree / name).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    listed = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True, timeout=10)
    for applet in listed.stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/passwd").write_text(PASSWD)
    (tree / "etc/group").write_text(GROUP)
    (tree / "gone").write_text("of the lower layer\n")
    (tree / "replaced").write_text("of the lower layer\n")
    (tree / "opaque/below").write_text("hidden by an opaque folder\n")
    (tree / "plain").write_text("not executable\n")
    script = tree / "usr/local/bin/script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    (tree / "escape").symlink_to("../../../../init")


def _fill_upper(tree: Path) -> None:
    (tree / "opaque").mkdir(parents=True)
    (tree / "replaced").write_text("of the upper layer\n")
    os.mknod(tree / "gone", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    (tree / "opaque/above").write_text("of the upper layer\n")
    os.setxattr(tree / "opaque", "trusted.overlay.opaque", b"y")
