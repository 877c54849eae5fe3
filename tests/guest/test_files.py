"""Files of a guest: its layers, archives out and in, and the folders a hostile archive does not leave."""

import io
import tarfile

import pytest

from isopod.wire.agent import Kind, encode_json
from tests.guest.machine import Channel, Failed

pytestmark = [pytest.mark.host, pytest.mark.slow]

LONG = "/".join(["a-folder-with-a-rather-long-name"] * 8)


def make_tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of some members."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    """Return a member's head."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.uid, info.gid, info.mtime = kind, link, mode, 1000, 100, 1_000_000_000
    return info


def read_tar(data: bytes) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Return the members of a tar by name."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [(info, tar.extractfile(info) if info.isreg() else None) for info in tar]
        return {info.name: (info, file.read() if file is not None else b"") for info, file in files}


def test_layers_are_stacked_with_their_whiteouts(channel: Channel) -> None:
    assert channel.text("cat /replaced; ls /opaque").split("\n") == ["of the upper layer", "above", ""]
    assert channel.shell("test -e /gone").code == 1


def test_what_is_written_covers_a_layer_and_leaves_it_alone(channel: Channel) -> None:
    assert channel.text("echo new >/replaced; rm /plain; cat /replaced; ls /plain 2>&1 || true").startswith("new\nls: /plain: No such")


def test_a_file_is_archived_alone(channel: Channel) -> None:
    channel.text("mkdir -p /a; head -c 100000 /dev/zero | tr '\\0' x >/a/file; chown 1000:100 /a/file; chmod 4750 /a/file")
    facts, data = channel.archive("/a/file")
    assert facts == {"mode": 0o4750, "n_bytes": 100_000, "is_folder": False}
    members = read_tar(data)
    assert list(members) == ["file"]
    info, content = members["file"]
    assert (content, info.mode, info.uid, info.gid) == (b"x" * 100_000, 0o4750, 1000, 100)


def test_a_folder_is_archived_with_all_that_is_below(channel: Channel) -> None:
    script = f"mkdir -p /b/{LONG} /b/empty; echo deep >/b/{LONG}/file; ln -s ../nowhere /b/link; ln -s {LONG} /b/longlink; mkfifo /b/pipe"
    channel.text(f"{script}; touch -d '2001-09-09 01:46:40' /b/empty; chown 70000:3000000 /b/empty")
    facts, data = channel.archive("/b")
    assert facts["is_folder"] is True
    members = read_tar(data)
    assert members[f"b/{LONG}/file"][1] == b"deep\n"
    assert (members["b/link"][0].issym(), members["b/link"][0].linkname) == (True, "../nowhere")
    assert members["b/longlink"][0].linkname == LONG
    assert members["b/pipe"][0].isfifo()
    empty = members["b/empty"][0]
    assert (empty.uid, empty.gid, int(empty.mtime)) == (70_000, 3_000_000, 1_000_000_000)


def test_an_archive_larger_than_the_window_arrives_whole(channel: Channel) -> None:
    channel.text("seq 1 200000 >/big")
    _, data = channel.archive("/big")
    assert read_tar(data)["big"][1] == b"".join(b"%d\n" % number for number in range(1, 200_001))


@pytest.mark.parametrize(("path", "code"), [("/no/such", "not_found"), ("relative", "invalid"), ("/etc/passwd/x", "not_found")])
def test_what_cannot_be_archived_says_why(channel: Channel, path: str, code: str) -> None:
    with pytest.raises(Failed) as caught:
        channel.archive(path)
    assert caught.value.code == code


def test_an_archive_is_unpacked_with_owners_modes_and_links(channel: Channel) -> None:
    channel.text("mkdir -p /in")
    data = make_tar(
        (member("folder", tarfile.DIRTYPE, mode=0o750), b""),
        (member("folder/file", mode=0o4755), b"content"),
        (member("folder/hard", tarfile.LNKTYPE, "folder/file"), b""),
        (member("folder/soft", tarfile.SYMTYPE, "/etc/hosts"), b""),
        (member("folder/pipe", tarfile.FIFOTYPE, mode=0o600), b""),
        (member(f"{LONG}/far"), b"far"),
    )
    assert channel.extract("/in", data) == {}
    said = channel.text(
        "cd /in/folder; cat file; echo; stat -c '%a %u %g %h %Y' file; stat -c '%a %u' . ; readlink soft; test -p pipe && echo pipe"
    )
    assert said.splitlines() == ["content", "4755 1000 100 2 1000000000", "750 1000", "/etc/hosts", "pipe"]
    assert channel.text(f"cat /in/{LONG}/far") == "far"


def test_a_large_archive_goes_in_whole_and_comes_out_the_same(channel: Channel) -> None:
    channel.text("mkdir -p /round")
    content = bytes(range(256)) * 8000
    assert channel.extract("/round", make_tar((member("file"), content), form=tarfile.GNU_FORMAT)) == {}
    assert read_tar(channel.archive("/round/file")[1])["file"][1] == content


@pytest.mark.parametrize(
    "hostile",
    [
        [(member("../outside"), b"x")],
        [(member("a/../../outside"), b"x")],
        [(member("link", tarfile.SYMTYPE, "/jail-outside"), b""), (member("link/outside"), b"x")],
        [(member("link", tarfile.SYMTYPE, "../jail-outside"), b""), (member("link/outside"), b"x")],
        [(member("hard", tarfile.LNKTYPE, "../outside/secret"), b"")],
    ],
    ids=["upwards", "around", "absolute link", "relative link", "hard link"],
)
def test_a_hostile_archive_does_not_leave_its_folder(channel: Channel, hostile: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    channel.text("rm -rf /jail /jail-outside /outside; mkdir -p /jail /jail-outside")
    with pytest.raises(Failed):
        channel.extract("/jail", make_tar(*hostile))
    assert channel.text("ls /jail-outside; ls /outside 2>/dev/null || true") == ""


def test_an_absolute_name_lands_below_the_folder(channel: Channel) -> None:
    channel.text("mkdir -p /jail2")
    channel.extract("/jail2", make_tar((member("/abs/file"), b"x")))
    assert channel.text("cat /jail2/abs/file; ls /abs 2>/dev/null || true") == "x"


@pytest.mark.parametrize("damage", [b"no tar at all" * 100, make_tar((member("file"), b"x" * 5000))[:1500]], ids=["noise", "cut"])
def test_a_damaged_archive_is_an_error(channel: Channel, damage: bytes) -> None:
    channel.text("mkdir -p /damaged")
    with pytest.raises(Failed) as caught:
        channel.extract("/damaged", damage)
    assert caught.value.code == "failed"
    assert channel.run("/bin/true").code == 0


def test_a_missing_folder_is_told_before_the_end_of_the_archive(channel: Channel) -> None:
    stream = channel.new_stream()
    channel.send(encode_json(Kind.REQUEST, stream, {"op": "extract", "path": "/no/such"}))
    with pytest.raises(Failed) as caught:
        channel.answer(stream)
    assert caught.value.code == "not_found"


def test_a_link_of_the_image_leads_nowhere_but_into_the_root(channel: Channel) -> None:
    with pytest.raises(Failed) as caught:
        channel.extract("/escape", make_tar((member("file"), b"x")))
    assert caught.value.code == "not_found", "init's own files are not there"
