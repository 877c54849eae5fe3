"""What a guest is made of: a memory file system with the kernel's modules, and a disk with this project and what it runs on.

The disk holds no distribution: the programs named below, the libraries that ldd(1) says they need, this machine's Python and the
project's virtual environment. All is copied with its times, so that compiled Python files stay valid, and what is not compiled yet is
compiled here: compiling is slow in a guest.
Sources: Documentation/driver-api/early-userspace/buffer-format.rst (cpio "newc"), modinfo(8), mke2fs(8) (-d).
"""

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
KERNEL: Final = PROJECT / "build/vm/kernel"
INSIDE: Final = "isopod"
"""Where the project lies on the guest's disk."""
DISK_MIB: Final = 1024
MODULES: Final = (
    *("virtio_pci", "virtio_blk", "virtio_rng", "overlay", "veth", "bridge", "tun", "erofs", "loop"),
    *("nf_tables", "nft_ct", "nft_nat", "nft_masq", "nft_chain_nat", "nft_redir", "nft_reject_inet", "nft_fib_inet", "nft_limit"),
)
PROGRAMS: Final = (
    *("dash", "busybox", "python3.11", "env", "cat", "sleep", "mount", "umount", "nsenter", "unshare", "tar"),
    *("crun", "runc", "conmon", "ip", "nft"),
)
FOLDERS: Final = (
    "dev",
    "etc",
    "opt/busybox",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "var/lib",
)
DATA: Final = (
    "/usr/share/containers",
    "/etc/containers",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/ld.so.conf.d",
)
COMPILED: Final = ("src", "tests/node", "tests/vm", "tests/world")
"""What of the project is compiled before it goes there."""
WITHOUT: Final = (
    "mypy*",
    "*__mypyc*",
    "pip",
    "setuptools",
    "pkg_resources",
    "grimp",
    "rich",
    "ruff*",
    "maturin*",
    "importlinter",
    "*.so.debug",
)
"""What of the virtual environment no test of a node needs."""


def modules(kernel: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return modules by name, each after those it depends on. One that is built into the kernel, or unknown to it, is left out."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in sorted(kernel.glob("lib/modules/*/kernel/**/*.ko*"))}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name not in files:
            return
        data = files[name].read_bytes()
        data = lzma.decompress(data) if files[name].suffix == ".xz" else data
        said = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in (said.group(1).decode() if said else "").split(","):
            add(needed.replace("-", "_"))
        found[name] = data

    for name in wanted:
        add(name)
    return found


def write_memory_disk(path: Path, kernel: Path) -> None:
    """Write the compressed cpio archive that the kernel unpacks first."""
    files: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules", "root")]
    files.append(("bin/busybox", stat.S_IFREG | 0o755, Path("/bin/busybox").read_bytes()))
    files.append(("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    files.append(("init", stat.S_IFREG | 0o755, (PROJECT / "tests/vm/guest/init.sh").read_bytes()))
    for number, (name, data) in enumerate(modules(kernel, MODULES).items()):
        files.append((f"modules/{number:03}-{name}.ko", stat.S_IFREG | 0o644, data))
    files.append(("TRAILER!!!", 0, b""))
    path.write_bytes(gzip.compress(b"".join(_cpio_entry(number, *file) for number, file in enumerate(files, 1)), 1))


def write_disk(path: Path, arguments: Sequence[str]) -> None:
    """Write the ext4 image of the guest's root. Its tree is built beside it, and removed.

    Args:
        path: The image.
        arguments: What pytest is given; no argument has a line's end in it.
    """
    tree = path.with_suffix(".tree")
    try:
        _fill(tree)
        (tree / "arguments").write_text("\n".join(arguments), encoding="utf-8")
        with path.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        command = ["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(tree), str(path)]
        subprocess.run(command, check=True, timeout=120)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _cpio_entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _fill(tree: Path) -> None:
    for folder in FOLDERS:
        (tree / folder).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    programs = list(map(_program, PROGRAMS))
    for program in programs:
        _copy(tree, program)
    (tree / "usr/bin/sh").symlink_to("dash")
    (tree / "usr/bin/python3").symlink_to("python3.11")
    standard = tree / "usr/lib/python3.11"
    shutil.copytree("/usr/lib/python3.11", standard, symlinks=True, ignore=shutil.ignore_patterns("config-3.11-*", "test"))
    _copy_environment(tree / INSIDE / ".venv")
    for name in ("src", "tests", "pyproject.toml", "docs", "scripts"):
        _copy_any(PROJECT / name, tree / INSIDE / name)
    _compile(tree)
    for name in DATA:
        _copy_any(Path(name), tree / name.lstrip("/"))
    libraries = [str(path) for place in (tree / INSIDE, standard) for path in place.rglob("*.so")]
    for library in sorted(set(_libraries([*programs, *libraries]))):
        _copy(tree, library)
    # What a tool looks for by a library's plain name (ctypes, "libc.so.6") is found through the cache.
    subprocess.run(["/sbin/ldconfig", "-r", str(tree)], check=True, timeout=60)


def _copy_environment(target: Path) -> None:
    source = Path(sys.prefix)
    ignored = shutil.ignore_patterns(*WITHOUT)
    shutil.copytree(source / "lib", target / "lib", symlinks=True, ignore=ignored)
    shutil.copy2(source / "pyvenv.cfg", target / "pyvenv.cfg")
    (target / "bin").mkdir()
    (target / "bin/python").symlink_to("/usr/bin/python3.11")


def _compile(tree: Path) -> None:
    """Compile what has no valid compiled file yet, with the paths that it will have there. What cannot be fails there."""
    folders = [str(tree / INSIDE / name) for name in COMPILED]
    command = [sys.executable, "-m", "compileall", "-q", "-s", str(tree), "-p", "/", *folders]
    subprocess.run(command, check=False, capture_output=True, timeout=120)


def _copy(tree: Path, path: str) -> None:
    place = tree / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, place)


def _copy_any(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.exists():
        shutil.copy2(source, target)


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin")
    assert path is not None, f"{name} is not installed: run `make setup`"
    return path


def _libraries(files: Sequence[str]) -> Iterator[str]:
    """Yield the shared libraries that files need. ldd says on stderr which of them are static, and then exits with 1."""
    environment = {**os.environ, "LC_ALL": "C"}
    said = subprocess.run(["/usr/bin/ldd", *files], check=False, capture_output=True, text=True, timeout=60, env=environment)
    for match in re.finditer(r"^\t(?:\S+ => )?(/\S+) \(0x", said.stdout, re.MULTILINE):
        if not match.group(1).startswith(str(PROJECT)):
            yield match.group(1)
