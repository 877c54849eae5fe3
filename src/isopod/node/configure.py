"""Where a node's configuration comes from on this machine: the files, the environment and the flags; at the start and again on a reload.

Used by `isopod node`, and by `isopod config`, which shows what a node would be told without starting one.
"""

import asyncio
from collections.abc import Mapping

from isopod.runtime.config import LiveConfig, Loaded, NodeConfig, choose_file, drop_in_folder, load_node, node_loader, run_search
from isopod.runtime.config.files import Search, search_disk
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.disk import Disk
from isopod.world.host import daemon
from isopod.world.world import World


def read_configuration(flags: Mapping[str, str], environment: Mapping[str, str]) -> Loaded[NodeConfig]:
    """Return a node's configuration with the origins of its values, by blocking calls: before there is a loop.

    Args:
        flags: Values by flag; `--config` names the file.
        environment: The environment.

    Raises:
        InvalidArgument: Something in it makes no sense.
        UsageError: A file cannot be read.
    """
    files = run_search(_search(flags, environment), daemon.read_bytes, daemon.list_names)
    return load_node(files=files, environment=environment, flags=flags)


async def read_again(disk: Disk, flags: Mapping[str, str], environment: Mapping[str, str]) -> Loaded[NodeConfig]:
    """Return the same, over a World's disk: for a reload. Raises as `read_configuration`."""
    return load_node(files=await search_disk(_search(flags, environment), disk), environment=environment, flags=flags)


def check_file(path: str) -> Loaded[NodeConfig]:
    """Return what one file alone makes of a node, its drop-ins left out. Raises as `read_configuration`."""
    files = run_search(node_loader().search(path), daemon.read_bytes, lambda _: [])
    return load_node(files=files)


async def follow(world: World, loaded: Loaded[NodeConfig], flags: Mapping[str, str], logger: Logger) -> None:
    """Apply changes of the configuration while the node runs, until cancelled: when its files change, and on SIGHUP.

    Args:
        world: Its disk.
        loaded: What the node was started with.
        flags: Likewise.
        logger: Where reloads are reported; its level is the setting that is live.
    """
    environment = dict(daemon.environment())
    live = LiveConfig(loaded, lambda: read_again(world.disk, flags, environment), logger)
    live.subscribe("log_level", logger.set_level)  # type: ignore[arg-type]  # the schema has checked it
    path, _ = choose_file(flags=flags, environment=environment)
    asked = asyncio.Event()
    async with TaskGroup("config") as group:
        with daemon.on_hangup(asked.set):
            group.create_task(_reload_when_asked(live, asked), name="config-reload")
            await live.watch(world.disk, [path.rpartition("/")[0] or "/", drop_in_folder(path)])


async def _reload_when_asked(live: LiveConfig[NodeConfig], asked: asyncio.Event) -> None:
    """Reload for every SIGHUP; for those that come during a reload, once more after it."""
    while True:
        await asked.wait()
        asked.clear()
        await live.reload()


async def stop_following(task: "asyncio.Task[None]") -> None:
    """End what `follow` does."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _search(flags: Mapping[str, str], environment: Mapping[str, str]) -> Search:
    path, asked = choose_file(flags=flags, environment=environment)
    return node_loader().search(path if asked else "")
