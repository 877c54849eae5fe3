"""`isopod node`: one node in the foreground, on the host, until SIGTERM or SIGINT.

Errors go to standard error as the two lines every isopod command prints; events as JSON lines. A second signal, or SIGQUIT, makes it stop
waiting for anything on the way down; SIGUSR1 logs how far that is, SIGUSR2 all metrics; SIGHUP reads the configuration anew, as a change
of its files does. Containers go on either way.
"""

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from isopod import __version__
from isopod.node.configure import follow, read_configuration, stop_following
from isopod.node.node import Node, pin_of
from isopod.node.system import NodeFacts
from isopod.runtime.config import Loaded, NodeConfig
from isopod.runtime.logger import Logger
from isopod.runtime.logsinks import BoundedSink
from isopod.runtime.scheduling import current_group, default_group
from isopod.runtime.shutdown import ShutdownSignals
from isopod.runtime.stalls import StallDetector
from isopod.world.errors import InvalidArgument, IsopodError, Unsupported, from_os_error
from isopod.world.host import console, daemon
from isopod.world.host.loop import loop_facts, new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World

SWITCHES: Final = ("--join-cluster", "--init-primary", "--init-secondary")
"""Flags that need no value."""
SEVERAL: Final = {"--peer": "--peers", "--peers": "--peers", "--join": "--join"}
"""Flags that may stand several times, and what they are called in the configuration."""


def main(argv: Sequence[str]) -> int:
    """Run a node.

    Args:
        argv: Flags and values: "--root", "/data" or "--root=/data".

    Returns:
        The exit code: 0 after a signal, else that of the error.
    """
    try:
        daemon.set_umask()
        flags = _flags(argv)
        loaded = _configure(flags)
        config = loaded.config
        loop = new_loop(config.event_loop)
        world = make_host_world()
        sink = BoundedSink(daemon.write_some_stderr)
        logger = Logger(sink, world.clock, level=config.log_level, context=_where)
        for note in loaded.notes:
            logger.warning("config.note", note=note)
        return daemon.run(loop, _serve(world, loaded, logger, flags=flags, sink=sink))
    except IsopodError as error:
        daemon.write_stderr(describe(error).encode(errors="replace"))
        return error.exit_code


def describe(error: IsopodError) -> str:
    """Return an error as its user sees it: one line, and a hint where there is one."""
    hint = f"hint: {error.hint}\n" if error.hint else ""
    return f"error: {error.message}\n{hint}"


def _where() -> Mapping[str, object]:
    """Return what a log line says of where it was written: its scheduling group, if it is not the usual one."""
    group = current_group()
    return {} if group is default_group() else {"group": group.name}


async def _serve(world: World, loaded: Loaded[NodeConfig], logger: Logger, *, flags: Mapping[str, str], sink: BoundedSink) -> int:
    config = loaded.config
    # The namespace comes first: entering it needs a process that has no other thread yet.
    has_engine = config.cluster.role != "control"
    pinned_before = await _enter_namespace(world, config) if has_engine else True
    kind, why = loop_facts() if config.event_loop == "uvloop" else (config.event_loop, "asked for")
    # Beside the interpreter's packages. (Its prefix would be the distribution's: a launcher with -S looks at no virtual environment.)
    guest = f"{sys.executable.rpartition('/bin/')[0]}/share/isopod/guest"
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    facts = NodeFacts(started_at_ns=world.clock.now_ns(), event_loop=f"{kind} ({why})", core=__version__, guest=guest, origins=origins)
    node = Node(world, config, logger, facts)
    try:
        await node.start(socket_gid=daemon.group_id(config.socket_group))
    except BaseException:
        if not pinned_before:  # it is ours alone, and nothing runs in it
            await world.kernel.release(pin_of(config))
        raise
    signals = ShutdownSignals(node.shutdown, logger, node.metrics)
    stalls = StallDetector(logger, world.clock, node.metrics)
    following = asyncio.get_running_loop().create_task(follow(world, loaded, flags, logger), name="config-follow")
    with daemon.handle_signals(signals):
        stalls.start()
        try:
            if node.cluster is not None:
                node.cluster.failed.add_done_callback(lambda _: signals.stop("cluster"))
            await node.stop(await signals.wait())
            if node.cluster is not None:
                node.cluster.failed.result()  # what ended it, if that was the cluster
        finally:
            stalls.stop()
            await stop_following(following)
            await sink.close()
    return 0


async def _enter_namespace(world: World, config: NodeConfig) -> bool:
    """Enter the private mount namespace; return whether it was there before."""
    run_root = config.paths["run_root"]
    pinned_before = True
    try:
        pinned_before = await world.disk.stat(pin_of(config)) is not None
        await world.disk.make_directory(run_root, mode=0o711)
        await world.disk.make_directory(f"{run_root}/ns")
        await world.kernel.prepare(pin_of(config))
    except OSError as error:
        if not pinned_before:
            with contextlib.suppress(OSError):  # why it failed is what counts
                await world.kernel.release(pin_of(config))
        raise from_os_error(error, "set up the mount namespace below", run_root) from error
    return pinned_before


def _configure(flags: Mapping[str, str]) -> Loaded[NodeConfig]:
    loaded = read_configuration(flags, daemon.environment())
    if not daemon.is_root() and loaded.config.cluster.role != "control":
        hint = "run it as root: sudo isopod node; or without containers: --role control"
        raise Unsupported("a node without root", "it makes mounts, namespaces and control groups", hint)
    return loaded


def _flags(argv: Sequence[str]) -> Mapping[str, str]:
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise InvalidArgument("argument", word, "unexpected", "see `isopod node --help`")
        if not equals and flag in SWITCHES:
            flags[flag] = "true"
            continue
        if not equals and not words:
            raise InvalidArgument("flag", flag, "unknown, or it wants a value", "see `isopod node --help`")
        value = value if equals else words.pop(0)
        if flag in SEVERAL:
            flag = SEVERAL[flag]
            value = f"{flags[flag]},{value}" if flag in flags else value
        flags[flag] = console.absolute(value) if flag == "--data-dir" and value else value
    return flags
