"""`isopod cp` against a real node and real containers: docker's rules for where a copy goes, there and back."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.node.rig import Rig
from tests.node.test_command_line import argv_of

pytestmark = pytest.mark.host


async def cp(rig: Rig, *words: str, code: int = 0, stdin: bytes = b"") -> tuple[bytes, str]:
    """Run `isopod cp` and return what it printed."""
    env = {"PATH": os.environ["PATH"], "ISOPOD_SOCKET": rig.config.paths["socket"]}
    done = await rig.world.processes.run(argv_of("cp", *words), stdin=stdin, env=env, timeout_s=50)
    assert b"Traceback" not in done.stderr
    assert done.returncode == code, done.stderr.decode()
    return done.stdout, done.stderr.decode()


@pytest.mark.row("V3")
async def test_where_a_copy_goes_and_what_it_is_called(host_rig: Rig) -> None:
    async with host_rig as rig:
        here = Path(rig.folder) / "here"
        (here / "site" / "sub").mkdir(parents=True)
        (here / "site" / "index").write_text("hello\n")
        (here / "site" / "sub" / "deep").write_text("deep\n")
        os.chown(here / "site" / "index", 1000, 2000)
        (here / "site" / "index").chmod(0o640)
        await rig.run_detached("sleep", "1000", name="web")
        site = str(here / "site")
        await cp(rig, site, "web:/www")  # is not there: becomes it
        await cp(rig, site, "web:/www")  # is there: goes into it
        await cp(rig, f"{site}/.", "web:/tmp")
        await cp(rig, f"{site}/index", "web:/tmp/renamed")
        await cp(rig, f"{site}/index", "web:tmp/sub/")
        found = await rig.exec("web", "ls", "/www", "/www/site", "/tmp", "/tmp/sub")
        assert found.stdout.split() == (b"/tmp: index renamed sub /tmp/sub: deep index /www: index site sub /www/site: index sub".split())
        ran = await rig.exec("web", "stat", "-c", "%u %g %a", "/www/index", "/tmp/renamed")
        assert ran.stdout == b"1000 2000 640\n" * 2

        await cp(rig, "web:/www", f"{here}/out")
        await cp(rig, "web:/www/.", f"{here}/out/sub")
        await cp(rig, "web:/www/sub/deep", f"{here}/out/index")
        assert (here / "out" / "sub" / "site" / "sub" / "deep").read_text() == "deep\n"
        assert (here / "out" / "index").read_text() == "deep\n"
        assert os.stat(here / "out" / "site" / "index").st_uid == os.geteuid()
        await cp(rig, "-a", "web:/www/index", f"{here}/kept")
        assert (os.stat(here / "kept").st_uid, os.stat(here / "kept").st_gid) == (1000, 2000)

        archive, _ = await cp(rig, "web:/www/sub", "-")
        assert subprocess.run(["tar", "-t"], input=archive, capture_output=True, check=True).stdout == b"sub/\nsub/deep\n"
        await cp(rig, "-", "web:/home", stdin=archive)
        assert (await rig.exec("web", "cat", "/home/sub/deep")).stdout == b"deep\n"


async def test_what_cannot_be_copied_says_why(host_rig: Rig) -> None:
    async with host_rig as rig:
        here = Path(rig.folder)
        (here / "file").write_text("x")
        await rig.run_detached("sleep", "1000", name="web")
        for words, code, said in (
            ((f"{here}/file", "nobody:/"), 1, "no such container: nobody"),
            ((f"{here}/file", "web:/nowhere/file"), 1, "no such path in web"),
            ((f"{here}/file", "web:/new/"), 2, "there is no such folder"),
            ((f"{here}/file/", "web:/etc"), 2, "it is no folder"),
            ((str(here), "web:/etc/notes"), 2, "it is no folder"),
            (("web:/nowhere", str(here)), 1, "no such file: web:/nowhere"),
            (("web:/etc/notes/", str(here)), 2, "it is no folder"),
            (("-", "web:/etc/notes"), 2, "no such folder"),
            (("-", "web:/etc"), 2, "no archive"),
        ):
            _, told = await cp(rig, *words, code=code, stdin=b"no archive at all\n" * 100)
            assert said in told, (words, told)
            assert len(told.splitlines()) <= 2, told
