"""A program for tests of the private mount namespace: a "node" that is told on stdin, line by line, what to do, and answers on stdout."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Final

from isopod.world.host.mountinfo import read_own
from isopod.world.host.world import make_host_world
from isopod.world.world import World

Answer = list[str]


async def prepare(world: World, pin: str) -> Answer:
    await world.kernel.prepare(pin)
    return []


async def release(world: World, pin: str) -> Answer:
    await world.kernel.release(pin)
    return []


async def tmpfs(world: World, path: str) -> Answer:
    await world.kernel.mount_tmpfs(path, n_bytes=1 << 20)
    return []


async def mounts(world: World, folder: str) -> Answer:
    return [mount.target for mount in read_own() if mount.target.startswith(folder)]


async def kinds(world: World, kind: str) -> Answer:
    return [mount.target for mount in read_own() if mount.kind == kind]


async def namespace(world: World, _: str) -> Answer:
    return [os.readlink("/proc/self/ns/mnt")]


async def mode(world: World, _: str) -> Answer:
    return [world.kernel.cgroup_facts().mode]


async def names(world: World, path: str) -> Answer:
    return list(await world.disk.list(path))


async def sync(world: World, path: str) -> Answer:
    """Start a thread of the workers."""
    await world.disk.sync_directory(path)
    return []


COMMANDS: Final[dict[str, Callable[[World, str], Awaitable[Answer]]]] = {
    command.__name__: command for command in (prepare, release, tmpfs, mounts, kinds, namespace, mode, names, sync)
}


def main() -> None:
    """Obey until the end of stdin."""
    world = make_host_world()
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            name, argument = json.loads(line)
            try:
                answer = {"answer": runner.run(_call(world, name, argument))}
            except OSError as error:
                answer = {"error": [str(error.errno), str(error)]}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    world.close()


async def _call(world: World, name: str, argument: str) -> Answer:
    return await COMMANDS[name](world, argument)


if __name__ == "__main__":
    main()
