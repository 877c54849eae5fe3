"""`isopod journal`: looking into the files of a stopped node, and mending them; exit codes, one-line errors, JSON."""

import json
import os
import signal
import subprocess
import sys
import sysconfig

import pytest

from isopod.journal import Journal, JournalSettings
from isopod.world.world import World
from tests.cli.scripted_node import SOURCE, TIMEOUT_S, environment, lines

LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; site = sys.argv.pop(1); "
    "sys.exit(main(sys.argv[1:], site_packages=site))"
)
SETTINGS = JournalSettings(segment_bytes=4096)


def journal(*words: str, cwd: str | None = None) -> "subprocess.CompletedProcess[bytes]":
    argv = [sys.executable, "-I", "-S", "-c", LAUNCH, SOURCE, sysconfig.get_paths()["purelib"], "journal", *words]
    return subprocess.run(argv, capture_output=True, timeout=TIMEOUT_S, env=environment(), cwd=cwd, check=False)


async def make(world: World, folder: str, *, n: int = 60, snapshot_lsn: int = 0) -> str:
    path = f"{folder}/metadata"
    made = await Journal.open(world, path, format="isopod test 1", settings=SETTINGS)
    for number in range(1, n + 1):
        await made.commit([(7, b'{"n": %d}' % number), (8, bytes([0, 255, number]) + b"x" * 60)])
    if snapshot_lsn:
        await made.snapshot(b'{"up to": %d}' % snapshot_lsn, snapshot_lsn)
    await made.close()
    return path


def damage(path: str, text: bytes) -> None:
    """Change one byte of a record, wherever it is stored plainly."""
    for folder, _, names in os.walk(path):
        for name in names:
            place = os.path.join(folder, name)
            with open(place, "r+b") as file:
                data = file.read()
                if text in data:
                    file.seek(data.index(text))
                    file.write(b"!")
                    return
    raise AssertionError("no such record")


@pytest.mark.row("R20")
async def test_verify(host_world: World, folder: str) -> None:
    path = await make(host_world, folder, snapshot_lsn=10)
    ended = journal("verify", path)
    assert ended.returncode == 0, ended.stderr
    rows = {line.split()[0]: line for line in lines(ended.stdout)}
    assert "isopod test 1" in rows["journal"] and "120 in 60 batches, lsn 1 to 120" in rows["records"]
    assert "success rate 1.0000" in rows["errors"] and "closed in order" in rows["end"]
    found = json.loads(journal("verify", "--format", "json", path).stdout)
    assert (found["is_valid"], found["error_count"], found["n_records"]) == (True, 0, 120)
    assert found["snapshots"] == [{"name": "snapshot-00000000000000000010.json", "lsn": 10, "why": ""}]

    damage(path, b'{"n": 60}')
    ended = journal("verify", path)
    assert ended.returncode == 5
    assert "(record 118, lsn 119): a record's checksum does not fit" in ended.stdout.decode()
    assert lines(ended.stderr) == [f"error: {path}: 1 error", f"hint: `isopod journal repair {path}` says what can be saved"]
    found = json.loads(journal("verify", "--format", "json", "metadata", cwd=folder).stdout)
    assert found["problems"][0]["record_index"] == 118 and found["n_lost"] == 2


async def test_dump(host_world: World, folder: str) -> None:
    path = await make(host_world, folder)
    ended = journal("dump", "--from", "3", "--limit", "2", path)
    assert ended.returncode == 0
    assert lines(ended.stdout)[0] == '3  kind 7  8 bytes  {"n": 2}'
    assert lines(ended.stdout)[1].startswith("4  kind 8  63 bytes  00ff027878")
    assert len(lines(ended.stdout)) == 2
    every = [json.loads(line) for line in lines(journal("dump", "--format", "json", path).stdout)]
    assert [each["lsn"] for each in every] == list(range(1, 121))
    assert every[118] == {"lsn": 119, "kind": 7, "n_bytes": 9, "text": '{"n": 60}'}
    assert set(every[119]) == {"lsn", "kind", "n_bytes", "base64"}

    damage(path, b'{"n": 59}')
    ended = journal("dump", path)
    assert ended.returncode == 5
    assert [line.split()[0] for line in lines(ended.stdout)] == [str(lsn) for lsn in range(1, 121) if lsn not in (117, 118)]
    assert "(lsn 117): a record's checksum does not fit" in ended.stderr.decode()


@pytest.mark.row("R26")
async def test_compact(host_world: World, folder: str) -> None:
    path = await make(host_world, folder, snapshot_lsn=90)
    ended = journal("compact", "--keep", "1", path)
    assert ended.returncode == 0, ended.stderr
    assert lines(ended.stdout) == [f"{path}: 90 records compacted, 30 left, 1 segment in the archive ({_archived(path, 1)} bytes)"]
    again = await Journal.open(host_world, path, format="isopod test 1", settings=SETTINGS)
    assert again.first_lsn == 91
    assert await again.load_snapshot() == (90, b'{"up to": 90}')
    assert [record.lsn async for record in again.read()] == list(range(91, 121))
    await again.close()
    assert journal("verify", path).returncode == 0
    assert os.stat(f"{path}/current.wal").st_size == 4096, "the size of its segments is its owner's"


async def test_compact_without_a_snapshot(host_world: World, folder: str) -> None:
    path = await make(host_world, folder)
    ended = journal("compact", path)
    assert ended.returncode == 1
    assert lines(ended.stderr)[0].startswith("error: journal ") and "without a snapshot" in lines(ended.stderr)[0]
    assert lines(ended.stderr)[1] == "hint: only what a snapshot covers can go"


async def test_repair(host_world: World, folder: str) -> None:
    path = await make(host_world, folder)
    assert journal("repair", path).returncode == 0, "nothing to do"
    damage(path, b'{"n": 59}')
    before = {name: os.stat(f"{path}/{name}").st_mtime_ns for name in os.listdir(path) if name != "lock"}
    ended = journal("repair", path)
    assert ended.returncode == 1
    text = ended.stdout.decode()
    assert "kept: lsn 1 to 116" in text and "lost: lsn 117 to 120 (4 records)" in text and "a Raft member" in text
    assert lines(ended.stderr) == ["nothing was changed; --yes does it"]
    assert {name: os.stat(f"{path}/{name}").st_mtime_ns for name in os.listdir(path) if name != "lock"} == before

    ended = journal("repair", "--yes", "--format", "json", path)
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert (made["way"], made["last_lsn"], made["lost_lsns"], made["is_done"]) == ("cut", 116, [117, 120], True)
    assert os.listdir(f"{path}/damaged-1")
    again = await Journal.open(host_world, path, format="isopod test 1", settings=SETTINGS)
    assert [record.lsn async for record in again.read()] == list(range(1, 117))
    await again.close()


async def test_a_journal_in_use(host_world: World, folder: str) -> None:
    path = f"{folder}/metadata"
    made = await Journal.open(host_world, path, format="isopod test 1", settings=SETTINGS)
    for verb in ("verify", "dump", "compact", "repair"):
        ended = journal(verb, path)
        assert ended.returncode == 1, verb
        assert lines(ended.stderr) == [
            f"error: journal {path} is in use by process {os.getpid()}",
            "hint: stop the node that uses it first",
        ]
    await made.close()


def test_what_is_no_journal(folder: str) -> None:
    for verb in ("verify", "dump", "compact", "repair"):
        ended = journal(verb, folder)
        assert ended.returncode == 5, verb
        assert lines(ended.stderr)[0] == f"error: {folder}: there is no journal in it"
        assert lines(ended.stderr)[1].startswith("hint: give the folder that holds current.wal")
        assert os.listdir(folder) == [], "nothing is left in a folder that is none of ours"
        ended = journal(verb, f"{folder}/missing")
        assert ended.returncode == 2 and b"there is no such folder" in ended.stderr
    assert journal("dump", "--limit", "x", folder).returncode == 2
    assert journal("verify").returncode == 2


def _archived(path: str, n: int) -> int:
    """Return the bytes of the oldest `n` archived segments."""
    names = sorted(os.listdir(f"{path}/archive"))[:n]
    return sum(os.stat(f"{path}/archive/{name}").st_size for name in names)


async def dumping(world: World, folder: str) -> "subprocess.Popen[bytes]":
    """Start a dump of more lines than a pipe holds, of which one was read."""
    made = await Journal.open(world, f"{folder}/long", format="isopod test 1")
    await made.commit([(7, b"x" * 40)] * 20_000)
    await made.close()
    argv = [sys.executable, "-I", "-S", "-c", LAUNCH, SOURCE, sysconfig.get_paths()["purelib"], "journal", "dump", f"{folder}/long"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"1  kind 7")
    return process


async def test_a_reader_that_goes_away_ends_a_dump_quietly(host_world: World, folder: str) -> None:
    process = await dumping(host_world, folder)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as err:
        assert err.read() == b""
    assert process.wait(TIMEOUT_S) == 141


async def test_an_interrupted_dump_ends_quietly(host_world: World, folder: str) -> None:
    process = await dumping(host_world, folder)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, b"")
