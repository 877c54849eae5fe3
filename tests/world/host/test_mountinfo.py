"""Reading mountinfo."""

from isopod.world.host.mountinfo import Mount, at_and_below, is_below, parse, self_bind_at, topmost_at

TEXT = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 22 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=10k
41 30 0:25 /isopod/space /run/isopod/space rw,nosuid - tmpfs tmpfs rw
42 41 0:4 mnt:[4026532300] /run/isopod/space/mounts rw - nsfs nsfs rw
50 22 0:50 / /data rw master:3 - tmpfs tmpfs rw
51 50 0:51 / /data/a\040b rw - overlay overlay rw,lowerdir=/x
52 50 0:52 / /data rw - tmpfs tmpfs rw
53 22 0:53 / /database rw - tmpfs tmpfs rw
"""


def test_fields_are_read() -> None:
    mounts = parse(TEXT)
    assert mounts[3] == Mount(42, 41, "0:4", "mnt:[4026532300]", "/run/isopod/space/mounts", False, "nsfs", "nsfs", ("rw",))
    assert mounts[0].is_shared
    assert not mounts[4].is_shared
    assert mounts[5].target == "/data/a b"
    assert mounts[5].super_options == ("rw", "lowerdir=/x")


def test_a_name_that_only_begins_alike_is_not_below() -> None:
    assert is_below("/data", "/data")
    assert is_below("/data/x", "/data")
    assert is_below("/data/x", "/")
    assert not is_below("/database", "/data")


def test_unmounting_goes_from_the_deepest_and_the_latest() -> None:
    assert [mount.mount_id for mount in at_and_below(parse(TEXT), "/data")] == [51, 52, 50]


def test_of_stacked_mounts_the_uncovered_one_is_seen() -> None:
    found = topmost_at(parse(TEXT), "/data")
    assert found is not None
    assert found.mount_id == 52
    assert topmost_at(parse(TEXT), "/nothing") is None


def test_a_folder_bound_on_itself_is_told_from_another_file_system() -> None:
    mounts = parse(TEXT)
    found = self_bind_at(mounts, "/run/isopod/space")
    assert found is not None
    assert found.mount_id == 41
    assert self_bind_at(mounts, "/run") is None
    assert self_bind_at(mounts, "/data") is None
