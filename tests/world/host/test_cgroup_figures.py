"""More of what control groups count: the kernel's files of both versions as they are written, and what a real group did."""

import os
from pathlib import Path

import pytest

from isopod.world.host import cgroup_figures
from isopod.world.host.cgroups import Layout
from isopod.world.kernel import CgroupFigures, DiskFigures

V1_BYTES = "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 12288\n254:0 Async 0\n254:0 Discard 0\n254:0 Total 12288\nTotal 12288\n"
V1_TIMES = "254:0 Read 1\n254:0 Write 2\n254:0 Total 3\nTotal 3\n"
V2_IO = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n"


def layout(root: Path, mode: str) -> Layout:
    if mode == "v2":
        return Layout("v2", (), str(root), (), "")
    return Layout("v1", tuple((name, str(root / name)) for name in ("blkio", "cpu", "memory")), None, (), "")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_v1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "memory/g/memory.usage_in_bytes": "100000\n",
            "memory/g/memory.stat": "cache 1\ntotal_cache 60000\ntotal_rss 30000\ntotal_swap 500\ntotal_inactive_file 20000\n",
            "memory/g/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            "cpu/g/cpu.stat": "nr_periods 10\nnr_throttled 4\nthrottled_time 5000000\n",
            "blkio/g/blkio.throttle.io_service_bytes_recursive": V1_BYTES.replace("254:0", "999:9"),
            "blkio/g/blkio.throttle.io_serviced_recursive": V1_TIMES.replace("254:0", "999:9"),
        },
    )
    disks = (DiskFigures("999:9", 1, 4096, 2, 8192, 0.0),)
    assert cgroup_figures.measure(layout(tmp_path, "v1"), "/g", None) == CgroupFigures(
        80000, 30000, 60000, 500, 3, 10, 4, 5_000_000, disks, ()
    )


def test_v2(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "g/memory.current": "100000\n",
            "g/memory.stat": "anon 30000\nfile 60000\ninactive_file 20000\n",
            "g/memory.swap.current": "500\n",
            "g/memory.events": "low 0\noom 4\noom_kill 3\n",
            "g/cpu.stat": "usage_usec 9\nnr_periods 10\nnr_throttled 4\nthrottled_usec 5000\n",
            "g/io.stat": V2_IO.replace("254:0", "999:9"),
        },
    )
    disks = (DiskFigures("999:9", 1, 4096, 2, 8192, 0.0),)
    assert cgroup_figures.measure(layout(tmp_path, "v2"), "/g", None) == CgroupFigures(
        80000, 30000, 60000, 500, 3, 10, 4, 5_000_000, disks, ()
    )


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_what_is_missing_is_nothing(tmp_path: Path, mode: str) -> None:
    assert cgroup_figures.measure(layout(tmp_path, mode), "/g", None) == (0, 0, 0, 0, 0, 0, 0, 0, (), ())
    write(tmp_path, {"g/memory.stat": "anon x\n", "memory/g/memory.stat": "total_rss\n"})
    assert cgroup_figures.measure(layout(tmp_path, mode), "/g", None).rss_bytes == 0


def test_memory_that_is_all_unused_pages_is_no_working_set(tmp_path: Path) -> None:
    write(tmp_path, {"g/memory.current": "10\n", "g/memory.stat": "inactive_file 20\n"})
    assert cgroup_figures.measure(layout(tmp_path, "v2"), "/g", None).working_set_bytes == 0


def test_disks_have_their_names() -> None:
    numbers = sorted(os.listdir("/sys/dev/block"))
    if not numbers:
        pytest.skip("this machine has no block device")
    name = os.path.basename(os.readlink(f"/sys/dev/block/{numbers[0]}"))
    found = cgroup_figures._named(cgroup_figures.parse_io_stat(f"{numbers[0]} rbytes=1 wbytes=2 rios=3 wios=4\n"))
    assert found == (DiskFigures(name, 3, 1, 4, 2, 0.0),)


def test_a_process_that_has_ended_sees_no_interface() -> None:
    assert cgroup_figures.interfaces_of(2**22 + 1) == ()
