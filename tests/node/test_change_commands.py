"""The commands that change, choose, watch, save and restore containers, typed against a real node."""

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from tests.node.rig import Rig
from tests.node.test_command_line import Done, argv_of, isopod

pytestmark = pytest.mark.host


async def ok(rig: Rig, *words: str) -> str:
    done = await isopod(rig, *words)
    assert done.code == 0, done
    return done.out


def limit_of(rig: Rig, identifier: str) -> str:
    """Return the memory limit that the kernel has for a container, on cgroup v1 or v2."""
    places = (
        Path(f"/sys/fs/cgroup/memory/{rig.config.prefix}/{identifier}/memory.limit_in_bytes"),
        Path(f"/sys/fs/cgroup/{rig.config.prefix}/{identifier}/memory.max"),
    )
    return next(place.read_text(encoding="utf-8").strip() for place in places if place.exists())


@pytest.mark.row("R11", "R16", "R35")
async def test_update_reaches_the_kernel_and_the_record(host_rig: Rig) -> None:
    async with host_rig as rig:
        identifier = (await ok(rig, "run", "-d", "--name", "box", "-m", "64m", "isopod/busybox", "sleep", "1000")).strip()
        assert await ok(rig, "update", "--memory", "96m", "--cpus", "0.5", "--pids", "30", "-l", "tier=web", "-e", "A=B", "box") == "box\n"
        assert limit_of(rig, identifier) == str(96 << 20)
        record = json.loads(await ok(rig, "inspect", "box"))
        limits = {name: value for name, value in record["resources"].items() if value is not None}
        assert limits == {"memory_bytes_max": 96 << 20, "cpus": 0.5, "pids_max": 30}
        assert (record["labels"], record["env"]["A"]) == ({"tier": "web"}, "B")
        done = await isopod(
            rig, "update", "--env-rm", "A", "--label-rm", "tier", "--memory", "-1", "--cpus=-1", "--pids-limit", "-1", "box"
        )
        assert (done.code, "next start" in done.err) == (0, True)
        assert int(limit_of(rig, identifier).replace("max", "9" * 18)) > 1 << 50
        record = json.loads(await ok(rig, "inspect", "box"))
        assert (record["labels"], "A" in record["env"], record["resources"]["cpus"]) == ({}, False, None)
        for words, code, line in (
            (("update", "box"), 2, "nothing to change"),
            (("update", "--memory", "1", "box"), 2, "memory limit '1'"),
            (("update", "--label-rm", "x", "box"), 1, "no such label: x"),
            (("update", "-v", "/etc:/x", "box"), 1, "box is running"),
            (("update", "--cpus", "0.5", "nobody"), 1, "no such container: nobody"),
            (("update", "--pids", "many", "box"), 2, "many"),
        ):
            done = await isopod(rig, *words)
            assert done.code == code, done
            assert line in done.err
        assert "128.0 MiB" not in await ok(rig, "stats", "--no-stream")


@pytest.mark.row("R15", "R28", "R29")
async def test_states_filters_and_sums(host_rig: Rig) -> None:
    async with host_rig as rig:
        await ok(rig, "run", "-d", "--name", "web", "-l", "tier=web", "-m", "64m", "isopod/busybox", "sleep", "1000")
        await ok(rig, "run", "--name", "job", "-l", "tier=job", "--network", "none", "isopod/busybox", "true")
        assert await ok(rig, "pause", "web") == "web\n"
        assert "(paused)" in await ok(rig, "ps")
        assert await ok(rig, "unpause", "web") == "web\n"
        assert await ok(rig, "restart", "-t", "0", "web", "job") == "web\njob\n"
        await ok(rig, "wait", "job")
        names = [row["name"] for row in json.loads(await ok(rig, "ps", "--filter", "status=stopped", "--format", "json"))]
        assert names == ["job"]
        assert len((await ok(rig, "ps", "-q", "-f", "label=tier=web", "-f", "name=w*")).split()) == 1
        assert len((await ok(rig, "ps", "-aq", "--filter", "label=tier")).split()) == 2
        assert (await ok(rig, "ps", "-q", "--filter", "memory=1k", "--sort", "memory")).count("\n") == 1
        assert await ok(rig, "ps", "-q", "--filter", "memory=1g") == ""
        assert (await ok(rig, "ps", "-q", "--last", "1")).count("\n") == 1
        for words in (("-f", "colour=red"), ("-f", "status"), ("-f", "status=dancing"), ("--last", "x"), ("--sort", "size")):
            assert (await isopod(rig, "ps", *words)).code == 2, words
        table = await ok(rig, "stats")
        assert table.splitlines()[0].split()[:4] == ["ID", "NAME", "STATUS", "MEMORY"]
        assert "64.0 MiB" in table
        text = await ok(rig, "system", "df")
        assert "running: 1" in text
        assert "memory unlimited: 1" in text
        total = json.loads(await ok(rig, "system", "df", "--format", "json"))
        assert total["measured"]["memory_bytes"] > 0


@pytest.mark.row("R17")
async def test_networks_by_commands(host_rig: Rig) -> None:
    async with host_rig as rig:
        await ok(rig, "network", "create", "--subnet", "10.77.0.0/24", "backend")
        await ok(rig, "run", "-d", "--name", "box", "isopod/busybox", "sleep", "1000")
        assert (await isopod(rig, "network", "connect", "backend", "box")).code == 1
        assert await ok(rig, "network", "disconnect", "bridge", "box") == "box\n"
        done = await isopod(rig, "network", "connect", "backend", "box")
        assert (done.code, done.out, done.err) == (0, "box\n", "")
        assert "10.77.0." in await ok(rig, "exec", "box", "ip", "addr")
        await ok(rig, "exec", "box", "ping", "-c", "1", "-w", "5", "10.77.0.1")
        await ok(rig, "restart", "-t", "0", "box")
        assert "10.77.0." in await ok(rig, "exec", "box", "ip", "addr")
        await ok(rig, "rm", "-f", "box")
        await ok(rig, "network", "rm", "backend")


@pytest.mark.row("R30")
async def test_events_are_printed_and_go_on_when_the_node_comes_back(host_rig: Rig, tmp_path: Path) -> None:
    async with host_rig as rig:
        said = tmp_path / "events"
        with said.open("wb") as out:
            env = {"PATH": "/usr/bin:/bin", "ISOPOD_SOCKET": rig.config.paths["socket"]}
            words = argv_of("events", "--since", "0", "--format", "json")
            watching = subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL, env=env)
        try:
            await ok(rig, "run", "--rm", "--name", "one", "--network", "none", "isopod/busybox", "true")
            await _wait_for(said, '"deleted"')
            await rig.kill()
            await rig.start()
            await ok(rig, "create", "--name", "two", "isopod/busybox", "true")
            await _wait_for(said, '"two"')
        finally:
            watching.kill()
            watching.wait()
        events = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
        assert [(event["name"], event["kind"]) for event in events] == [
            *(("one", kind) for kind in ("created", "status", "status", "status", "deleted")),
            ("two", "created"),
        ]
        text = await ok(rig, "events", "--since", "1h", "--until", "0s", "--filter", "container=one", "--filter", "event=status")
        assert [line.split(" ", 2)[2] for line in text.splitlines()] == [
            "one status created -> starting",
            "one status starting -> running",
            "one status running -> exited (0)",
        ]
        assert (await isopod(rig, "events", "--cursor", "999999")).code == 2
        assert (await isopod(rig, "events", "--filter", "colour=red")).code == 2


async def test_backup_and_restore_by_commands(host_rig: Rig, tmp_path: Path) -> None:
    async with host_rig as rig:
        await ok(rig, "create", "--name", "kept", "isopod/busybox", "true")
        file = str(tmp_path / "saved")
        assert "1 containers up to record 1, sha256:" in await ok(rig, "backup", file)
        assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o600
        await ok(rig, "rm", "kept")
        await ok(rig, "create", "--name", "later", "isopod/busybox", "true")
        paths = rig.config.paths
        folders = ("--root", paths["root"], "--run-root", paths["run_root"])
        running = await restore(rig, *folders, file)
        assert (running.code, "another isopod node" in running.err) == (4, True)
        await rig.stop()
        (tmp_path / "cut").write_bytes((tmp_path / "saved").read_bytes()[:-9])
        assert (await restore(rig, *folders, str(tmp_path / "cut"))).code == 5
        assert (await restore(rig, *folders, str(tmp_path / "nothing"))).code == 1
        done = await restore(rig, *folders, file)
        assert (done.code, done.out) == (0, "1 containers as of record 1\n")
        assert "before-restore-1" in done.err
        await rig.start()
        assert [record.name for record in await rig.list()] == ["kept"]
        bad = await isopod(rig, "backup", "/nonexistent/folder/file")
        assert (bad.code, "no such folder: /nonexistent/folder" in bad.err) == (1, True)


async def restore(rig: Rig, *words: str) -> Done:
    """Run `isopod restore`: it needs the installed packages."""
    program = "import sys; from isopod.cli.main import main; sys.exit(main(sys.argv[1:]))"
    src = argv_of()[4].split("'")[1]
    argv = [argv_of()[0], "-c", program, "restore", *words]
    done = await rig.world.processes.run(argv, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": src}, timeout_s=50)
    assert b"Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


async def _wait_for(path: Path, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in path.read_text(encoding="utf-8"):
            await asyncio.sleep(0.02)  # another process's file tells nobody
