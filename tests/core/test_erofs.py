"""Layers kept as tar and EROFS index: mounted they show what unpacking makes, entry by entry, also of hostile archives; and the tools of
the EROFS project agree with what is written."""

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod import _core
from isopod.world.host import mountspace
from tests.core import erofs_utils, layers
from tests.core.layers import END, Facts, Limits, Member, device, entry, folder, hard_link, header, pax, symlink, tar
from tests.core.test_hostile import BLOBS, VALID, damaged, sparse, with_checksums
from tests.core.test_unpack import everything

pytestmark = [pytest.mark.host, pytest.mark.row("V4")]
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = Limits(unpacked_bytes_max=8 << 20, n_entries_max=100, entry_bytes_max=1 << 20)


class Shown(NamedTuple):
    """What became of a layer in one form: its tree, or why it was refused."""

    tree: dict[str, tuple[Facts, int]]
    refused: str = ""


@pytest.fixture(autouse=True)
def mounts(tmp_path: Path) -> Iterator[None]:
    """Unmount what a test leaves mounted."""
    try:
        yield
    finally:
        layers.chosen.form = "directory"
        mountspace.unmount_tree(str(tmp_path.resolve()))


def shown(data: bytes, target: Path, form: layers.Form, limits: Limits) -> Shown:
    """Take a layer in, look at all of it, and remove it again."""
    layers.chosen.form = form
    try:
        layers.unpack(data, target, limits=limits)
    except _core.ArchiveError as error:
        return Shown({}, repr(error.args))
    try:
        return Shown({name: (compared(facts), (target / name).lstat().st_nlink) for name, facts in layers.tree(target).items()})
    finally:
        layers.discard(target)


def compared(facts: Facts) -> Facts:
    """Leave out when a whiteout was made and whose it is: an archive does not say it, and nothing looks at it."""
    is_whiteout = stat.S_ISCHR(facts.mode) and facts.device == 0
    return facts._replace(mtime_ns=0, owner=(0, 0)) if is_whiteout else facts


def check_same(data: bytes, tmp_path: Path, limits: Limits = Limits()) -> Shown:  # noqa: B008 - an immutable tuple
    """Take a layer in in both forms, which must show the same."""
    one, other = (shown(data, tmp_path / "layer", form, limits) for form in ("directory", "erofs"))
    assert one == other
    return one


def index(data: bytes, target: Path, limits: Limits = Limits()) -> layers.Indexed:  # noqa: B008 - an immutable tuple
    """Write tar and index beside a target that is not made."""
    target.with_name("blob").write_bytes(data)
    fd = os.open(target.with_name("blob"), os.O_RDONLY)
    try:
        return layers.index_fd(fd, target, limits=limits)
    finally:
        os.close(fd)


VARIOUS = tar(
    folder("gone", mode=0o700, uid=5, mtime=1),
    entry("gone/.wh.file"),
    entry("gone/.wh..wh..opq"),
    folder("kept"),
    entry("kept/.wh.x"),
    entry(".wh.again"),
    folder("again", mtime=3),
    entry("twice", data=b"first"),
    entry("twice", data=b"second", mode=0o600),
    symlink("long", "l" * 1000),
    symlink("block", "b" * 512),
    entry("empty"),
    entry("odd", data=b"o" * 70_001),
    *[entry(f"kept/{number:03}-{'n' * number}", data=b"%d" % number) for number in range(200)],
    folder("attributed", pax_headers={"SCHILY.xattr.trusted.note": "x" * 900, "SCHILY.xattr.user.b": ""}),
    entry("attributed/f", data=b"f", pax_headers={f"SCHILY.xattr.user.{number}": "v" * number for number in range(60)}),
    symlink("attributed/s", "t" * 100, pax_headers={"SCHILY.xattr.trusted.note": "y" * 300}),
)


def test_both_forms_show_the_same(tmp_path: Path) -> None:
    assert len(check_same(everything(), tmp_path).tree) == 16
    found = check_same(VARIOUS, tmp_path).tree
    assert found["twice"][0].contents == b"second"
    assert found["again"][0].xattrs == (("trusted.overlay.opaque", b"y"),)
    assert stat.S_ISCHR(found["kept/x"][0].mode)
    assert len(found["attributed/f"][0].xattrs) == 60


NAMES = st.lists(st.sampled_from(["a", "b", "c", "s", "!", "n" * 255, ".x"]), min_size=1, max_size=4).map("/".join)
FACTS = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "uid": st.sampled_from([0, 1, 70_000, 4_000_000_000]),
        "gid": st.sampled_from([0, 70_000]),
        "mtime": st.sampled_from([0, 1, 1.5, -7, 1_700_000_000.25, 5_000_000_000]),
        "pax_headers": st.dictionaries(
            st.sampled_from(["user.a", "user.b", "trusted.c", "security.d", "odd.e"]).map("SCHILY.xattr.".__add__),
            st.text("xyz", max_size=40),
            max_size=3,
        ),
    }
)


@st.composite
def members(draw: st.DrawFn) -> Member:
    """Draw an entry: of any kind, in few places, so that they meet."""
    name = draw(NAMES)
    facts: dict[str, Any] = draw(FACTS)
    where, slash, last = name.rpartition("/")
    match draw(st.integers(0, 9)):
        case 0 | 1:
            return folder(name, **facts)
        case 2:
            return symlink(name, draw(st.sampled_from(["a", "../b", "/c", "a/b", "s", ".", "../../..", "t" * 600])), **facts)
        case 3:
            return hard_link(name, draw(NAMES))
        case 4:
            return device(name, tarfile.BLKTYPE, 7, 300, **facts)
        case 5:
            return entry(name, tarfile.FIFOTYPE, **facts)
        case 6:
            return entry(f"{where}{slash}.wh.{'x' if len(last) > 200 else last}")
        case 7:
            return entry(f"{where}{slash}.wh..wh..opq")
        case _:
            return entry(name, data=draw(st.sampled_from([b"", b"1", b"2" * 512, b"3" * 5000])), **facts)


@settings(UNHURRIED, max_examples=150)
@given(chosen=st.lists(members(), max_size=14))
def test_random_layers_show_the_same(tmp_path: Path, chosen: list[Member]) -> None:
    # After a refused entry there is nothing to compare, so what was refused is left out, one name after the other.
    while (found := check_same(tar(*chosen), tmp_path)).refused:
        n_before = len(chosen)
        chosen = [each for each in chosen if found.refused.split("'")[1].rstrip("/") != each[0].name]
        assert len(chosen) < n_before


@settings(UNHURRIED, max_examples=300)
@given(number=st.integers(0, 3), seed=st.integers(0, 1 << 32))
def test_damaged_layers_end_the_same(tmp_path: Path, number: int, seed: int) -> None:
    blob = with_checksums(damaged(VALID, seed)) if number == 3 else damaged(BLOBS[number], seed)
    try:
        check_same(blob, tmp_path, SMALL)
    except _core.NotIndexable as error:
        assert "512" in error.args[1]  # damage moved a hole
    assert [path.name for path in tmp_path.iterdir() if path.name != "blob"] == []
    layers.chosen.form = "directory"


def test_the_same_layer_gives_the_same_index(tmp_path: Path) -> None:
    one = index(VARIOUS, tmp_path / "one")
    two = index(gzip.compress(VARIOUS), tmp_path / "two")
    assert (one.index_digest, one.n_tar_bytes) == (two.index_digest, two.n_tar_bytes)
    assert (tmp_path / "one.tar").read_bytes() == VARIOUS == (tmp_path / "two.tar").read_bytes()


def test_what_follows_the_archive_is_kept_and_padded(tmp_path: Path) -> None:
    data = tar(entry("f", data=b"f")) + b"odd"
    found = index(data, tmp_path / "layer")
    assert found.n_tar_bytes == len(data) + 509
    assert found.layer.n_unpacked_bytes == len(data)
    assert (tmp_path / "layer.tar").read_bytes() == data + bytes(509)


def test_a_folder_of_100_000_names(tmp_path: Path) -> None:
    blocks = b"".join(header(b"d/%06d-%s" % (number, b"n" * (number % 40))) for number in range(100_000))
    layers.chosen.form = "erofs"
    layers.unpack(header(b"d/", b"5", mode=b"0000755\0") + blocks + END, tmp_path / "layer", limits=Limits(n_entries_max=200_000))
    names = os.listdir(tmp_path / "layer/d")
    assert len(set(names)) == 100_000
    for number in range(0, 100_000, 997):
        assert (tmp_path / f"layer/d/{number:06}-{'n' * (number % 40)}").lstat().st_size == 0
    for missing in ("", "a", "000000", "099999-", "zz"):
        assert f"{missing}!" not in names
        assert not (tmp_path / f"layer/d/{missing}!").exists()


def test_files_beyond_4_gib(tmp_path: Path) -> None:
    at = (9 << 29) + (1 << 20)
    data = sparse(("size", str(5 << 30)), ("map", f"0,1048576,{at},1048576"), data=b"a" * (1 << 20) + b"z" * (1 << 20)) + END
    layers.chosen.form = "erofs"
    layers.unpack(data, tmp_path / "layer", limits=Limits(entry_bytes_max=1 << 40, unpacked_bytes_max=1 << 40))
    with (tmp_path / "layer/f").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 5 << 30
        bytes_at = {0: b"a", (1 << 20) - 1: b"a", 1 << 20: b"\0", at - 1: b"\0", at: b"z", at + (1 << 20): b"\0"}
        for position, expected in bytes_at.items():
            file.seek(position)
            assert file.read(1) == expected, position


NOT_INDEXABLE = {
    "unaligned-hole": (sparse(("size", "9000"), ("map", "0,3,8000,3"), data=b"abcdef"), "multiple of 512"),
    "too-many-pieces": (sparse(("size", str(1 << 32)), ("map", "512,512"), data=bytes(512)), "pieces"),
    "large-attribute": (pax((b"SCHILY.xattr.user.a", bytes(65_536))) + header(b"f"), "larger than 65535"),
}


@pytest.mark.parametrize("name", NOT_INDEXABLE)
def test_what_an_index_cannot_say_is_told_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    data, why = NOT_INDEXABLE[name]
    with pytest.raises(_core.NotIndexable, match=why) as caught:
        index(data + END, tmp_path / "layer", Limits(entry_bytes_max=1 << 40, unpacked_bytes_max=1 << 40))
    assert caught.value.args[0] == "f"
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_a_damaged_superblock_and_a_missing_tar_are_refused(tmp_path: Path) -> None:
    index(tar(entry("f", data=b"f")), tmp_path / "layer")
    (tmp_path / "at").mkdir()
    whole = (tmp_path / "layer.erofs").read_bytes()
    for position in (1024, 1028, 1036, 1100, 1200, 1300, 1535):
        broken = bytearray(whole)
        broken[position] ^= 1
        (tmp_path / "broken.erofs").write_bytes(broken)
        with pytest.raises(OSError, match=r"message|argument"):
            _core.mount_erofs(str(tmp_path / "at"), str(tmp_path / "broken.erofs"), str(tmp_path / "layer.tar"))
    with pytest.raises(FileNotFoundError):
        _core.mount_erofs(str(tmp_path / "at"), str(tmp_path / "layer.erofs"), str(tmp_path / "none.tar"))
    assert os.listdir(tmp_path / "at") == []


def test_a_mount_is_read_only_and_paths_may_be_long(tmp_path: Path) -> None:
    assert _core.erofs_supported()
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    layers.chosen.form = "erofs"
    layers.unpack(tar(entry("f", data=b"f", mode=0o4755)), deep / "layer")
    assert (deep / "layer/f").read_bytes() == b"f"
    with pytest.raises(OSError, match="Read-only"):
        (deep / "layer/g").write_bytes(b"")
    flags = os.statvfs(deep / "layer").f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NOSUID


# --- beside the tools of the EROFS project ------------------------------------------------------------------------------


def honest() -> bytes:
    """Build an archive that names every folder, as mkfs.erofs gives those left out the time of its run."""
    return tar(
        folder("./", mode=0o755, mtime=9),
        folder("bin", mode=0o2711, uid=3, gid=4, mtime=1_600_000_000),
        entry("bin/tool", data=b"tool" * 1000, mode=0o6755, uid=70_000, gid=5_000_000, mtime=1_600_000_001),
        hard_link("bin/same", "bin/tool"),
        symlink("bin/link", "/../../etc/passwd", mode=0o777, uid=9, gid=8, mtime=1_600_000_002),
        folder("dev", mtime=2),
        device("dev/null", tarfile.CHRTYPE, 1, 3, mode=0o666, uid=1, mtime=3),
        device("dev/disk", tarfile.BLKTYPE, 4095, 1_048_575, mode=0o660, mtime=5),
        entry("dev/pipe", tarfile.FIFOTYPE, mode=0o622, mtime=6),
        entry("dev/.wh.gone"),
        folder("opaque", mtime=4),
        entry("opaque/.wh..wh..opq"),
        folder("many", mtime=8),
        *[entry(f"many/{number}{'m' * (number % 90)}", data=bytes([number % 256]) * number * 7, mtime=number) for number in range(300)],
        entry("noted", data=b"x", mtime=1, pax_headers={"SCHILY.xattr.user.note": "h\u00f6", "SCHILY.xattr.trusted.t": "v" * 300}),
    )


def without_marks(facts: Facts) -> Facts:
    """Leave out how mkfs.erofs marks folders that hold whiteouts: overlayfs does without."""
    return facts._replace(xattrs=tuple(each for each in facts.xattrs if each[0] != "trusted.overlay.origin"))


def test_mkfs_erofs_shows_the_same(tmp_path: Path) -> None:
    ours = shown(honest(), tmp_path / "layer", "erofs", Limits())
    (tmp_path / "layer.tar").write_bytes(honest())
    erofs_utils.run("mkfs.erofs", "--tar=i", "--aufs", str(tmp_path / "layer.erofs"), str(tmp_path / "layer.tar"))
    layers.mount(tmp_path / "layer")
    found = layers.tree(tmp_path / "layer")
    theirs = {name: (without_marks(compared(facts)), (tmp_path / "layer" / name).lstat().st_nlink) for name, facts in found.items()}
    assert theirs.keys() == ours.tree.keys()
    assert {name: facts for name, facts in theirs.items() if ours.tree[name] != facts} == {}


@pytest.mark.parametrize("which", ["honest", "all"])
def test_fsck_and_dump_of_the_project_agree(tmp_path: Path, which: str) -> None:
    done = index(honest() if which == "honest" else VARIOUS, tmp_path / "layer")
    # fsck.erofs 1.8 crashes over the checksum of any file system whose blocks are smaller than 1 KiB: it sees one without.
    image = bytearray((tmp_path / "layer.erofs").read_bytes())
    assert image[1032] == 3
    image[1032] = 2
    (tmp_path / "unsummed.erofs").write_bytes(image)
    device_option = f"--device={tmp_path / 'layer.tar'}"
    extracted = tmp_path / "extracted"
    erofs_utils.run("fsck.erofs", device_option, f"--extract={extracted}", "--xattrs", str(tmp_path / "unsummed.erofs"))
    facts = erofs_utils.run("dump.erofs", "-s", device_option, str(tmp_path / "layer.erofs"))
    assert "sb_csum mtime chunked_file device_table" in facts
    layers.chosen.form = "erofs"
    layers.mount(tmp_path / "layer")
    ours, theirs = layers.tree(tmp_path / "layer"), layers.tree(extracted)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if (ours[name].mode, ours[name].contents) != (theirs[name].mode, theirs[name].contents)] == []
    assert done.n_index_bytes == len(image)
