"""Logs as the real conmon writes them: its pieces, its rotation. A shell script stands in for the OCI runtime: no container is needed."""

import asyncio
import os
import shutil
import subprocess
from contextlib import aclosing
from pathlib import Path

import pytest

from isopod.api.messages import Cursor, LogOutput, LogsRequest, Stderr, Stdout
from isopod.engine.logs import read_logs
from isopod.world.world import World

pytestmark = [
    pytest.mark.host,
    pytest.mark.row("R8"),
    pytest.mark.skipif(shutil.which("conmon") is None, reason="conmon is not installed"),
]

NEWLINE = b"\n"
RUNTIME = """#!/bin/sh
# The part of an OCI runtime that conmon needs: "create" starts the command and writes its pid.
for argument; do
    [ "$previous" = --pid-file ] && pid_file=$argument
    previous=$argument
done
case "$*" in
*create*)
    sh -c '{script}' &
    printf %s $! >"$pid_file"
    ;;
esac
"""


def supervise(folder: str, script: str, *, log_bytes_max: int) -> "subprocess.Popen[bytes]":
    """Start conmon over a script; it ends with it."""
    runtime = Path(folder, "runtime")
    runtime.write_text(RUNTIME.replace("{script}", script))
    runtime.chmod(0o755)
    for name in ("bundle", "exits"):
        Path(folder, name).mkdir()
    command = ["conmon", "--api-version", "1", "-c", "c", "-u", "c", "-r", str(runtime), "-b", f"{folder}/bundle", "-p", f"{folder}/pid"]
    logging = ["--exit-dir", f"{folder}/exits", "-l", f"k8s-file:{folder}/log", "--log-size-max", str(log_bytes_max), "--sync"]
    sockets = ["--socket-dir-path", folder, "--full-attach"]
    return subprocess.Popen([*command, *logging, *sockets], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def follow(world: World, folder: str, script: str, *, log_bytes_max: int) -> list[LogOutput]:
    """Run a script under conmon and return all that a follower got until conmon ended."""
    ended = asyncio.Event()
    found: list[LogOutput] = []

    async def read() -> None:
        async with aclosing(read_logs(world, f"{folder}/log", LogsRequest(name="c", follow=True), ended=ended)) as items:
            async for item in items:
                found.append(item)
                Path(folder, f"seen.{text_of(found, Stdout).count(NEWLINE)}").touch()

    reader = asyncio.ensure_future(read())
    supervisor = supervise(folder, script, log_bytes_max=log_bytes_max)
    identity = world.processes.identify(supervisor.pid)
    if identity is not None:
        async with asyncio.timeout(40):
            await world.processes.wait_gone(identity)
    supervisor.wait()
    ended.set()
    async with asyncio.timeout(40):
        await reader
    return found


def text_of(items: list[LogOutput], kind: type[Stdout] | type[Stderr]) -> bytes:
    return b"".join(item.data for item in items if isinstance(item, kind) and not isinstance(item, Cursor))


async def test_what_conmon_writes_is_what_was_printed(host_world: World, folder: str) -> None:
    script = 'printf "one\\ntwo\\n"; echo bad >&2; printf half; sleep 0.1; echo " line"; head -c 20000 /dev/zero | tr "\\\\0" x; '
    script += 'echo; printf "no end"'
    items = await follow(host_world, folder, script, log_bytes_max=1 << 20)
    assert text_of(items, Stdout) == b"one\ntwo\nhalf line\n" + b"x" * 20000 + b"\nno end"
    assert text_of(items, Stderr) == b"bad\n"


async def test_a_follower_goes_on_when_conmon_begins_a_new_file(host_world: World, folder: str) -> None:
    """The script waits for the follower after every twentieth line: who is slower than a whole file loses what conmon dropped."""
    n_lines, log_bytes_max = 400, 8000
    wait = f"while [ ! -e {folder}/seen.$n ]; do sleep 0.01; done"
    script = f"n=0; while [ $n -lt {n_lines} ]; do echo number $n; n=$((n + 1)); if [ $((n % 20)) = 0 ]; then {wait}; fi; done"
    items = await follow(host_world, folder, script, log_bytes_max=log_bytes_max)
    assert os.stat(f"{folder}/log").st_size <= log_bytes_max  # there was more than one file
    numbers = [int(line.split()[1]) for line in text_of(items, Stdout).splitlines()]
    assert numbers == list(range(n_lines))
