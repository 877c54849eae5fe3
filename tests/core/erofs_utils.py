"""Debian trixie's erofs-utils (1.8), which nobody need install: unpacked below build/peers when they are first wanted, else skipped.

The release that Debian bookworm has knows no blocks of 512 bytes. The packages are named with their digests; when the mirror has newer
ones in their place, the tests that need them skip and say so.
"""

import fcntl
import hashlib
import subprocess
import urllib.request
from pathlib import Path
from typing import Final

import pytest

FOLDER: Final = Path(__file__).resolve().parents[2] / "build/peers/erofs"
TIMEOUT_S: Final = 20.0
PACKAGES: Final = {
    "e/erofs-utils/erofs-utils_1.8.6-1_amd64.deb": "81042b8c0c3eb63699aa7d0763dceedc675a747d9f5cfebf914b4160233f411e",
    "l/lz4/liblz4-1_1.10.0-4_amd64.deb": "c31ec4c7c82755a38b2f3fe066fc0c5518cc91a601a268fbcd19bdacb1f22e1e",
    "x/xz-utils/liblzma5_5.8.1-1+deb13u1_amd64.deb": "1cfcc6e0dc36f438a79b6e2189facdb9d150b08f57d190a60e01c98075c7f896",
    "libz/libzstd/libzstd1_1.5.7+dfsg-1_amd64.deb": "2f6a2aeacfc925eba8b00ac9139bc4bfccf8cacb09eb93de067074b26948eef9",
    "libd/libdeflate/libdeflate0_1.23-2_amd64.deb": "5fe37fb79d53f5c91da6ba3ac4c1a8453e1f2b1ff0e0ea45189c5338bbfdbf82",
    "libs/libselinux/libselinux1_3.8.1-1_amd64.deb": "68bb8d32bd8d6d7d2f5952a169db03d1484b46ae1e52abccdec42a19dccea5d5",
    "u/util-linux/libuuid1_2.41.5-0+deb13u1_amd64.deb": "c1bf4c4c3ff48c57fabf93307dfb56996b60cfa33927afc4158b5db36fb2721e",
    "p/pcre2/libpcre2-8-0_10.46-1~deb13u2_amd64.deb": "1252b96a5bc44bb5db982bef8eb18e54f5047cede2aff641bce4f8e1edb91c3e",
    "z/zlib/zlib1g_1.3.dfsg+really1.3.1-1+b1_amd64.deb": "015be740d6236ad114582dea500c1d907f29e16d6db00566ca32fb68d71ac90d",
    "g/glibc/libc6_2.41-12+deb13u4_amd64.deb": "967aa62605721081c3eb2a17650611a792aa802d76a6511d1840242623d204c9",
    "x/xxhash/libxxhash0_0.8.3-2_amd64.deb": "81da7064d56fc044f5db4bb3c1e80ff50a4986dcbbf80d958eeca565b44c157f",
    "g/gcc-14/libgcc-s1_14.2.0-19_amd64.deb": "3c71917b490d1a17aed43196a2787a256ecf060526cdb20216a74bedc061b150",
}


def run(program: str, *arguments: str) -> str:
    """Run one of the programs with its own libraries; return its output. Fails the test if it fails, skips it if there is none."""
    root = _unpacked()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    done = subprocess.run([*loader, str(root / "usr/bin" / program), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{program}: {done.returncode} {done.stderr or done.stdout}"
    return done.stdout


def _unpacked() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("wb") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / "whole").exists():
            _unpack()
            (FOLDER / "whole").touch()
    return FOLDER / "root"


def _unpack() -> None:
    site = _mirror()
    for name, digest in PACKAGES.items():
        path = FOLDER / name.rpartition("/")[2]
        try:
            data = path.read_bytes() if path.exists() else _fetch(f"{site}/pool/main/{name}")
        except OSError as error:
            pytest.skip(f"Debian trixie's erofs-utils cannot be fetched ({name}: {error})")
        if hashlib.sha256(data).hexdigest() != digest:
            pytest.skip(f"Debian trixie has another {name}")
        path.write_bytes(data)
        subprocess.run(["dpkg-deb", "-x", str(path), str(FOLDER / "root")], check=True, timeout=60)


def _mirror() -> str:
    """Return where this machine takes Debian's packages from."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    try:
        sites = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S, check=False).stdout.split()
    except FileNotFoundError:
        pytest.skip("no apt here: Debian's erofs-utils cannot be fetched")
    found = [site for site in sites if site.rstrip("/").endswith("/debian")]
    if not found:
        pytest.skip("apt knows no mirror of Debian's packages: apt-get update was never run")
    return found[0].rstrip("/")


def _fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read()
    return data
