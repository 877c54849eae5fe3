"""Hostile and damaged archives: refused with the entry named, nothing left of them, nothing outside touched."""

import gzip
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod import _core
from tests.core import layers
from tests.core.layers import END, Limits, device, entry, folder, hard_link, header, padded, pax, symlink, tar, unpack

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("form")]


def attribute(name: str) -> bytes:
    return pax((b"SCHILY.xattr." + name.encode(), b"y")) + header(b"f")


def attributes(n_attributes: int, name: str = "a") -> bytes:
    return pax(*((b"SCHILY.xattr.user.%s%d" % (name.encode(), number), b"") for number in range(n_attributes)))


def sparse(*records: tuple[str, str], data: bytes = b"") -> bytes:
    fields = [(b"GNU.sparse." + key.encode(), value.encode()) for key, value in records]
    return pax(*fields) + header(b"f", size=b"%011o\0" % len(data)) + padded(data)


ESCAPES = {
    "parent": (tar(entry("../evil")), "../evil", '".."'),
    "parent-inside": (tar(entry("a/../../evil")), "a/../../evil", '".."'),
    "parent-at-the-end": (tar(folder("a/..")), "a/../", '".."'),
    "absolute": (tar(entry("/etc/evil")), "/etc/evil", "absolute"),
    "link-to-parent": (tar(hard_link("f", "../outside")), "f", '".."'),
    "link-to-absolute": (tar(hard_link("f", "/outside")), "f", "absolute"),
    "link-to-nothing": (tar(hard_link("f", "missing")), "f", "no earlier entry"),
    "link-to-nothing-in-nothing": (tar(hard_link("f", "missing/g")), "f", "no earlier entry"),
    "link-to-folder": (tar(folder("d"), hard_link("f", "d")), "f", "is a folder"),
    "link-to-root": (tar(hard_link("f", "./")), "f", "no earlier entry"),
    "link-to-whiteout": (tar(entry(".wh.g"), hard_link("f", "g")), "f", "no earlier entry"),
    "link-into-what-it-replaces": (tar(entry("d/f"), hard_link("d", "d/f")), "d", "no earlier entry"),
    "link-through-symlink": (tar(symlink("s", "/../../.."), hard_link("f", "s/outside")), "f", "no earlier entry"),
    "through-symlink": (tar(symlink("s", "/outside"), entry("s/evil")), "s/evil", "neither a folder nor a link"),
    "through-relative-symlink": (tar(symlink("s", "../outside"), entry("s/evil")), "s/evil", "neither a folder nor a link"),
    "through-file": (tar(entry("f"), entry("f/g")), "f/g", "neither a folder nor a link"),
    "through-loop": (tar(symlink("a", "b"), symlink("b", "a"), entry("a/f")), "a/f", "too many links"),
    "through-magic-link": (tar(symlink("p", "/proc/self/cwd"), entry("p/f")), "p/f", "neither a folder nor a link"),
    "root-as-file": (tar(entry("./")), "./", "root must be a folder"),
    "root-as-link": (tar(symlink(".", "/etc")), ".", "root must be a folder"),
    "no-name": (header(b"") + END, "", "no name"),
    "name-with-nul": (pax((b"path", b"a\0b")) + header(b"f") + END, "PaxHeaders/x", "NUL"),
    "long-name-with-nul": (
        header(b"././@LongLink", b"L", size=b"00000000003\0") + padded(b"a\0b") + header(b"f") + END,
        "././@LongLink",
        "NUL",
    ),
    "long-component": (tar(entry("n" * 256)), "n" * 256, "too long"),
    "empty-link": (tar(symlink("s", "")), "s", "no target"),
}

TRICKS = {
    "whiteout-device": (tar(device("f", tarfile.CHRTYPE, 0, 0)), "f", "0/0"),
    "whiteout-block-device": (tar(device("f", tarfile.BLKTYPE, 0, 0)), "f", "0/0"),
    "whiteout-by-overflow": (header(b"f", b"3", major=b"0010000\0", minor=b"0000000\0") + END, "f", "out of range"),
    "whiteout-by-overflowing-minor": (header(b"f", b"3", major=b"0000000\0", minor=b"4000000\0") + END, "f", "out of range"),
    "aufs-names": (tar(entry(".wh..wh.aufs")), ".wh..wh.aufs", "reserved"),
    "aufs-folders": (tar(folder(".wh..wh.plnk")), ".wh..wh.plnk/", "must be a file"),
    "in-whiteout": (tar(entry(".wh.d/f")), ".wh.d/f", "reserved"),
    "whiteout-of-nothing": (tar(entry("d/.wh.")), "d/.wh.", "reserved"),
    "whiteout-of-itself": (tar(entry("d/.wh..")), "d/.wh..", "reserved"),
    "whiteout-of-parent": (tar(entry("d/.wh...")), "d/.wh...", "reserved"),
    "whiteout-link": (tar(symlink(".wh.f", "x")), ".wh.f", "must be a file"),
    "whiteout-device-name": (tar(device(".wh.f", tarfile.CHRTYPE, 1, 3)), ".wh.f", "must be a file"),
    "opaque-attribute": (attribute("trusted.overlay.opaque") + END, "f", "trusted.overlay.opaque"),
    "redirect-attribute": (attribute("trusted.overlay.redirect") + END, "f", "trusted.overlay.redirect"),
    "attribute-without-name": (attribute("") + END, "f", "cannot be set"),
    "attribute-name-too-long": (attribute("user." + "x" * 251) + END, "f", "longer than 255 bytes"),
    "attribute-too-large": (pax((b"SCHILY.xattr.user.a", bytes((64 << 10) + 1))) + header(b"f") + END, "f", "larger than 64 KiB"),
    "too-many-attributes": (attributes(1025) + header(b"f") + END, "f", "more than 1024 attributes"),
    "too-many-attributes-in-two": (attributes(1000) + attributes(25, "b") + header(b"f") + END, "f", "more than 1024 attributes"),
    "attribute-bomb": (attributes(30_000) * 3 + header(b"f") + END, "f", "more than 1024 attributes"),
    "attribute-senseless": (attribute("security.capability") + END, "f", "cannot be set"),
    "volume": (header(b"f", b"V") + END, "f", "'V'"),
    "continued": (header(b"f", b"M") + END, "f", "'M'"),
    "dump": (header(b"f", b"D") + END, "f", "'D'"),
    "unknown": (header(b"f", b"\xff") + END, "f", "not supported"),
    "global-path": (pax((b"path", b"x"), kind=b"g") + header(b"f") + END, "PaxHeaders/x", "global header"),
    "user-out-of-range": (pax((b"uid", b"4294967295")) + header(b"f") + END, "f", "out of range"),
    "user-far-out-of-range": (pax((b"uid", b"99999999999999999999")) + header(b"f") + END, "PaxHeaders/x", "too large"),
    "headers-without-end": (pax((b"comment", b"x")) * 40 + header(b"f") + END, "PaxHeaders/x", "too many extended headers"),
    "header-of-nothing": (pax((b"path", b"x")) + END, "", "ends after an extended header"),
    "overlapping-parts": (sparse(("size", "99"), ("map", "0,4,2,4"), data=b"12345678") + END, "f", "overlap"),
    "part-outside": (sparse(("size", "4"), ("map", "2,4"), data=b"1234") + END, "f", "outside"),
    "parts-without-data": (sparse(("size", "9"), ("map", "0,4")) + END, "f", "do not add up"),
    "parts-overflow": (sparse(("size", "9"), ("map", "18446744073709551615,1"), data=b"1") + END, "f", "outside"),
    "too-many-parts": (sparse(("major", "1"), ("realsize", "9"), data=padded(b"999999999\n")) + END, "f", "too many parts"),
    "map-without-end": (sparse(("major", "1"), ("realsize", "9"), data=b"1\n1") + END, "f", "incomplete"),
    "old-map-of-nothing": (
        header(b"f", b"S", magic=b"ustar  \0", rest=bytes(137) + b"\1" + b"00000000000\0") + b"\1" * 512,
        "f",
        "sparse|trailing|octal",
    ),
}

SMALL = Limits(unpacked_bytes_max=100_000, n_entries_max=5, entry_bytes_max=20_000, path_bytes_max=50)

OVERSIZE = {
    "entries": (tar(*(entry(f"f{number}") for number in range(6))), "f5", "more than 5 entries"),
    "entry": (tar(entry("a"), entry("big", data=bytes(20_001))), "big", "more than 20000 bytes in one file"),
    "total": (tar(*(entry(f"f{number}", data=bytes(20_000)) for number in range(5)), entry("g")), "f4", "more than 100000 bytes"),
    "trailing": (tar(entry("f")) + bytes(100_000), "", "more than 100000 bytes"),
    "holes": (sparse(("size", "20001"), ("map", "")) + END, "f", "more than 20000 bytes in one file"),
    "all-holes": (sparse(("size", "20000"), ("map", "")) * 6 + END, "f", "more than 5 entries|bytes in all files"),
    "name": (tar(entry("n" * 51)), "n" * 51, "more than 50 bytes in a name"),
    "link": (tar(symlink("s", "t" * 51)), "s", "more than 50 bytes in a name"),
    "huge-header": (header(b"x", b"x", size=b"77777777777\0") + END, "x", "too large"),
    "huge-name": (header(b"l", b"L", size=b"77777777777\0") + END, "l", "too large"),
}

DAMAGE = {
    "empty": (b"", "", "truncated"),
    "short": (bytes(511), "", "truncated"),
    "no-tar": (b"this is no tar " * 100, "", "checksum"),
    "checksum": (bytearray(tar(entry("f"))).replace(b"f", b"g", 1), "g", "checksum"),
    "no-end": (header(b"f"), "", "truncated"),
    "cut-data": (header(b"f", size=b"00000001000\0") + bytes(100), "f", "truncated"),
    "cut-padding": (header(b"f", size=b"00000000010\0") + bytes(10), "f", "truncated"),
    "cut-extended": (pax((b"path", b"x"))[:-1], "PaxHeaders/x", "truncated"),
    "size-not-octal": (header(b"f", size=b"0000000009x\0") + END, "f", "octal"),
    "size-with-rest": (header(b"f", size=b"12 34567890\0") + END, "f", "trailing"),
    "size-negative": (header(b"f", size=b"\xff" * 12) + END, "f", "negative"),
    "size-beyond-64-bits": (header(b"f", size=b"\x80" + b"\x7f" * 11) + END, "f", "too large"),
    "size-absurd": (header(b"f", size=b"\x80\0\0\0\x7f" + b"\xff" * 7) + END, "f", "more than"),
    "record-length": (header(b"p", b"x", size=b"00000000012\0") + padded(b"99 path=x\n") + END, "p", "damaged"),
    "gzip-cut": (gzip.compress(tar(entry("f", data=os.urandom(5000))))[:-9], "", "truncated"),
    "gzip-checksum": (gzip.compress(tar(entry("f")))[:-8] + bytes(8), "", "damaged"),
    "gzip-garbage-after": (gzip.compress(tar(entry("f"))) + b"garbage" * 10, "", "damaged"),
    "zstd-cut": (zstandard.compress(tar(entry("f", data=os.urandom(5000))))[:-9], "", "truncated"),
    "xz": (b"\xfd7zXZ\0" + bytes(600), "", "xz"),
    "bzip2": (b"BZh91AY&SY" + bytes(600), "", "bzip2"),
}


def check_refused(tmp_path: Path, data: bytes, name: str, why: str, limits: Limits) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"untouched")
    before = layers.tree(outside)
    with pytest.raises(_core.ArchiveError, match=why) as caught:
        unpack(data, tmp_path / "layer", limits=limits)
    assert caught.value.args[0] == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]
    assert layers.tree(outside) == before


@pytest.mark.parametrize("case", ESCAPES)
def test_escapes(tmp_path: Path, case: str) -> None:
    check_refused(tmp_path, *ESCAPES[case], limits=Limits())


@pytest.mark.parametrize("case", TRICKS)
def test_tricks(tmp_path: Path, case: str) -> None:
    check_refused(tmp_path, *TRICKS[case], limits=Limits())


@pytest.mark.parametrize("case", OVERSIZE)
def test_oversize(tmp_path: Path, case: str) -> None:
    check_refused(tmp_path, *OVERSIZE[case], limits=SMALL)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(tmp_path: Path, case: str) -> None:
    data, name, why = DAMAGE[case]
    check_refused(tmp_path, bytes(data), name, why, limits=Limits())


def test_links_to_real_folders_outside_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for target in (str(outside), "../outside", "../../../../../../../../../.." + str(outside)):
        with pytest.raises(_core.ArchiveError):
            unpack(tar(symlink("s", target), entry("s/evil")), tmp_path / "layer")
    # The same names made inside are what the links mean.
    unpack(tar(symlink("s", str(outside)), folder(str(outside).lstrip("/")), entry("s/good")), tmp_path / "layer")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "layer" / str(outside).lstrip("/") / "good").exists()


def test_as_many_attributes_as_allowed(tmp_path: Path) -> None:
    # They reach the file system, whose own limit names one of them, or take all.
    data = attributes(1024) + attributes(1024) + header(b"f") + END
    try:
        unpack(data, tmp_path / "layer")
    except (_core.ArchiveError, OSError) as error:
        assert "1024 attributes" not in str(error)
    else:
        assert len(os.listxattr(tmp_path / "layer/f")) == 1024


@pytest.mark.parametrize("form", ["directory"], indirect=True)
def test_paths_of_folders_are_bounded(tmp_path: Path) -> None:
    # Each is kept until the end, for its time: an archive of some kilobytes could fill the memory.
    name = "/".join(["n" * 240] * 16)
    one = pax((b"path", name.encode())) + header(b"d", b"5")
    blob = gzip.compress(one * 36_000 + END, compresslevel=1)
    assert len(blob) < 2 << 20
    with pytest.raises(_core.ArchiveError, match="paths of all folders") as caught:
        unpack(blob, tmp_path / "layer", limits=Limits(n_entries_max=1_000_000))
    assert caught.value.args[0] == name
    assert not (tmp_path / "layer").exists()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_bombs_by_ratio(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    blob = compress(tar(entry("f", data=bytes(80 << 20))))
    with pytest.raises(_core.ArchiveError, match="more than 50 times") as caught:
        unpack(blob, tmp_path / "layer", limits=Limits(ratio_max=50))
    assert caught.value.args[0] == "f"
    assert not (tmp_path / "layer").exists()


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(tar(entry("f", data=bytes(2 << 20))))
    script = """
where = sys.argv[1]
os.mkdir(where + "/small")
_core.mount_tmpfs(where + "/small", 1 << 20)
with open(where + "/blob", "rb") as blob:
    try:
        _core.unpack_layer(blob.fileno(), where + "/small/layer", 0, None, 1 << 30, 100, 1 << 30, 4096, 1000, None)
    except OSError as error:
        print(json.dumps([error.errno, error.filename, os.listdir(where + "/small")]))
"""
    assert layers.in_namespaces(script, str(tmp_path)) == [28, "f", []]


VALID = (
    tar(
        folder("d", mode=0o750),
        entry("d/f", data=b"data" * 300, pax_headers={"SCHILY.xattr.user.a": "b"}),
        hard_link("d/g", "d/f"),
        symlink("s", "d"),
        entry("s/.wh.x"),
        entry("d/.wh..wh..opq"),
        device("n", tarfile.CHRTYPE, 1, 3),
        entry("p" * 150, tarfile.FIFOTYPE),
    )
    + sparse(("size", "9000"), ("map", "0,512,8192,3"), data=b"abcde" * 103)
    + END
)
BLOBS = [VALID, gzip.compress(VALID, mtime=0), zstandard.compress(VALID)]


def damaged(blob: bytes, seed: int) -> bytes:
    """Flip, cut out, double and overwrite some bytes."""
    chance = random.Random(seed)
    data = bytearray(blob)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data))
        end = min(len(data), at + chance.choice([1, 8, 512]))
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
                data += b"\0"
            case 2:
                del data[at:end]
                data += b"\0"
            case 3:
                data[at:at] = data[at:end]
            case _:
                data[at:end] = chance.randbytes(end - at)
    return bytes(data)


def with_checksums(data: bytes) -> bytes:
    """Make the checksum of every block that looks like a header right, so that damage gets past it."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b"        "
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 3), seed=st.integers(0, 1 << 32))
def test_damage_at_random(tmp_path: Path, number: int, seed: int) -> None:
    blob = with_checksums(damaged(VALID, seed)) if number == 3 else damaged(BLOBS[number], seed)
    target = tmp_path / "layer"
    outside = tmp_path / "canary"
    outside.write_bytes(b"untouched")
    try:
        unpack(blob, target, limits=Limits(unpacked_bytes_max=8 << 20, n_entries_max=100, entry_bytes_max=1 << 20))
        layers.discard(target)
    except _core.ArchiveError as error:
        assert all(isinstance(argument, str) for argument in error.args)
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert outside.read_bytes() == b"untouched"
