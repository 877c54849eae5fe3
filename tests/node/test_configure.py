"""A node's configuration while it runs: SIGHUP and changed files apply what is live, and report the rest."""

import asyncio
import json
import os
import signal

import pytest

from isopod.node.configure import check_file, follow, read_again, read_configuration, stop_following
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument, UsageError
from isopod.world.host import daemon
from isopod.world.world import World


@pytest.mark.host
@pytest.mark.row("S23")
async def test_sighup_and_changed_files_are_followed(host_world: World, folder: str) -> None:
    path = f"{folder}/node.yaml"
    await host_world.disk.write(path, b"log_level: info\n")
    lines: list[bytes] = []
    logger = Logger(lines.append, host_world.clock)
    flags = {"--config": path}
    loaded = read_configuration(flags, {})
    assert loaded == await read_again(host_world.disk, flags, {})
    following = asyncio.create_task(follow(host_world, loaded, flags, logger))
    await asyncio.sleep(0)
    await host_world.disk.write(path, b"log_level: debug\npool_size: 1\n")
    while logger.level != "debug":  # by the watch, or by the signal
        if following.done():
            following.result()
        await host_world.disk.write(path, b"log_level: debug\npool_size: 1\n")
        await asyncio.sleep(0.02)
    events = [json.loads(line) for line in lines]
    reloaded = next(event for event in events if event["event"] == "config.reloaded")
    assert (reloaded["applied"], reloaded["needs_restart"]) == (["log_level"], ["pool_size"])
    await host_world.disk.write(path, b"log_level: [")
    os.kill(os.getpid(), signal.SIGHUP)
    while not any(json.loads(line)["event"] == "config.refused" for line in lines):
        await asyncio.sleep(0.01)
    assert logger.level == "debug"
    await stop_following(following)


@pytest.mark.host
async def test_a_storm_of_hangups_makes_no_tasks(host_world: World, folder: str) -> None:
    path = f"{folder}/node.toml"
    await host_world.disk.write(path, b'log_level = "info"\n')
    flags = {"--config": path}
    lines: list[bytes] = []
    logger = Logger(lines.append, host_world.clock)
    following = asyncio.create_task(follow(host_world, read_configuration(flags, {}), flags, logger))
    while "config-reload" not in [task.get_name() for task in asyncio.all_tasks()]:
        await asyncio.sleep(0.001)
    n_before = len(asyncio.all_tasks())
    n_most = 0
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)
        n_most = max(n_most, len(asyncio.all_tasks()))
    assert n_most == n_before
    await host_world.disk.write(path, b'log_level = "debug"\n')
    os.kill(os.getpid(), signal.SIGHUP)
    while logger.level != "debug":
        await asyncio.sleep(0.001)
    await stop_following(following)


@pytest.mark.host
def test_files_that_cannot_be_read_are_named(folder: str) -> None:
    with pytest.raises(InvalidArgument, match="no such file"):
        read_configuration({}, {"ISOPOD_CONFIG": f"{folder}/none.toml"})
    with pytest.raises(UsageError, match=f"cannot read config file {folder}"):
        read_configuration({"--config": folder}, {})
    with open(f"{folder}/big.toml", "wb") as file:
        file.write(b"#" * (daemon.CONFIG_BYTES_MAX + 10))
    with pytest.raises(InvalidArgument, match="larger than 1 MiB"):
        check_file(f"{folder}/big.toml")
    assert daemon.list_names(f"{folder}/none") == []


@pytest.mark.host
async def test_standard_error_that_is_full_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        total = 0
        while written := daemon.write_some_stderr(b"x" * 10_000):
            total += written
        assert total > 10_000
        assert daemon.write_some_stderr(b"y") == 0
        os.read(reader, 8192)
        assert daemon.write_some_stderr(b"y" * 5000) >= 4096
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            daemon.write_some_stderr(b"z")
    finally:
        os.dup2(kept, 2)
        for fd in (kept, writer):
            os.close(fd)
