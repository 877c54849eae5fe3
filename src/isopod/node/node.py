"""Node: an engine, a cluster's node, or both, served over RPC on a World, from locking its folders to the last phase of its shutdown.

The same class runs on the host and in the simulation; what is only the host's (arguments, signals, standard error) is in `main`.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from isopod.api import messages as m
from isopod.cluster.member import ClusterNode
from isopod.engine.engine import Engine, EngineSettings, VmSettings
from isopod.engine.metadata import RECORDS
from isopod.net.rpc import Server
from isopod.net.rpc.call import AnyHandler, AnyMethod
from isopod.node import shards
from isopod.node.cluster import ClusterServices, cluster_config
from isopod.node.faces import open_faces
from isopod.node.groups import RPC
from isopod.node.services import Services
from isopod.node.system import NodeFacts, SystemServices, no_engine_handlers
from isopod.runtime.config import NodeConfig
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Home, Registry, ShardMetrics, next_generation
from isopod.runtime.shards import ShardEvent, SmpConfig, SmpService
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource
from isopod.world.disk import Disk, OpenFile
from isopod.world.errors import AlreadyServing, InvalidArgument, from_os_error
from isopod.world.network import Listener, UnixAddress, parse_address
from isopod.world.world import World

DRAIN_S: Final = 2.0
"""How long calls may take to end by themselves. Those that follow a log or carry a terminal never do: their clients come back."""
SOCKET_MODE: Final = 0o660
OTHERS_WRITE: Final = 0o022
LOCK: Final = "node.lock"


def pin_of(config: NodeConfig) -> str:
    """Return where a node's private mount namespace is pinned."""
    return f"{config.paths['run_root']}/ns/mnt"


async def owner_of(disk: Disk, lock: str) -> int:
    """Return the pid that a node's lock file names; 0 if it names none: it is just being written, or gone."""
    try:
        return int(msgspec.json.decode(await disk.read(lock))["pid"])
    except (OSError, ValueError, KeyError, TypeError):  # the pid is only for a message
        return 0


class Node:
    """One node process.

    Args:
        world: What it runs on; the private mount namespace is entered already.
        config: What it was told.
        logger: Where it reports.
        facts: What it says of itself.
    """

    def __init__(self, world: World, config: NodeConfig, logger: Logger, facts: NodeFacts) -> None:
        self._world = world
        self._config = config
        self._logger = logger
        self._facts = facts
        self._locks: list[OpenFile] = []
        self._engine: Engine | None = None
        self._cluster: ClusterNode | None = None
        self._listener: Listener | None = None
        self._shutdown = ShutdownCoordinator(logger, world.clock)
        self._metrics_folder = f"{config.paths['run_root']}/metrics"
        self._metrics: Registry | None = None
        self._shards: SmpService | None = None
        self._telemetry: shards.Telemetry | None = None

    @property
    def shutdown(self) -> ShutdownCoordinator:
        """What leads it down; for whoever receives signals."""
        return self._shutdown

    @property
    def metrics(self) -> Registry:
        """The numbers of a started node."""
        if self._metrics is None:
            raise RuntimeError("the node was not started")
        return self._metrics

    @property
    def engine(self) -> Engine:
        """The engine of a started node."""
        if self._engine is None:
            raise RuntimeError("the node was not started")
        return self._engine

    @property
    def cluster(self) -> ClusterNode | None:
        """Its part of a cluster, None if it is in none."""
        return self._cluster

    @property
    def has_engine(self) -> bool:
        """Whether it runs containers."""
        return self._config.cluster.role != "control"

    async def start(self, *, socket_gid: int | None = None) -> None:
        """Lock, open the engine, listen.

        Args:
            socket_gid: The group that may use the API's socket, and the telemetry endpoint's; None for the process's own.

        Raises:
            AlreadyServing: Another node has the folders.
            IsopodError: What the engine raises.
        """
        try:
            await self._open(socket_gid)
        except BaseException:
            await self.stop("start failed")
            raise

    async def _open(self, socket_gid: int | None) -> None:
        paths = self._config.paths
        for folder in dict.fromkeys((paths["root"], paths["run_root"])):
            try:
                await self._lock(folder)
            except OSError as error:
                raise from_os_error(error, "lock", folder) from error
        metrics = self._metrics = await self._open_metrics()
        config = self._config
        handlers: dict[AnyMethod, AnyHandler] = no_engine_handlers()
        if self.has_engine:
            engine = self._engine = await self._open_engine(metrics)
            self._register("engine", ShutdownPhase.FINAL_CLEANUP, self._close_engine)
            handlers = dict(Services(self._world, engine).handlers())
        told = cluster_config(config)
        if told is not None:
            self._cluster = ClusterNode(self._world, told, self._logger, metrics)
        system = SystemServices(self._world, config, self._facts, engine=self._engine, cluster=self._cluster_facts)
        handlers |= {**system.handlers(), **ClusterServices(self._world, self._cluster).handlers()}
        server = Server(self._world, handlers, logger=self._logger, metrics=metrics)
        system.serve_on(server)
        self._register("calls", ShutdownPhase.DRAIN_CONNECTIONS, lambda: server.drain(DRAIN_S))
        self._register("connections", ShutdownPhase.STOP_REACTORS, server.close)
        await self._start_shards(metrics, socket_gid)
        try:
            self._listener = await server.listen(UnixAddress(paths["socket"]), mode=SOCKET_MODE, gid=socket_gid, group=RPC)
        except OSError as error:
            raise from_os_error(error, "listen on", paths["socket"]) from error
        self._register("listener", ShutdownPhase.STOP_ACCEPTING, self._listener.close)
        if self._cluster is not None:
            self._register("cluster", ShutdownPhase.STOP_TIMERS, self._cluster.stop)
            await self._cluster.start()
        for face in await open_faces(self._world, config, self._logger, origins=self._facts.origins):
            self._register(face.name, ShutdownPhase.STOP_ACCEPTING, face.stop)
        self._logger.info("node.ready", socket=paths["socket"], pid=self._world.processes.own_pid())

    async def _open_engine(self, metrics: Registry) -> Engine:
        config = self._config
        settings = EngineSettings(
            paths=config.paths,
            prefix=config.prefix,
            default_subnet=config.default_subnet,
            pool_size=config.pool_size,
            runtime=config.runtime,
            layer_form=config.layers,
            vm=VmSettings(**{**msgspec.structs.asdict(config.vm), "guest": config.vm.guest or self._facts.guest}),
            journal=RECORDS._replace(**msgspec.structs.asdict(config.records)),
        )
        return await Engine.open(self._world, settings, logger=self._logger, metrics=metrics)

    def _cluster_facts(self) -> m.ClusterFacts | None:
        if self._cluster is None:
            return None
        status = self._cluster.status()
        return m.ClusterFacts(
            id=status.cluster_id,
            node_id=status.node_id,
            state=status.state,
            leader_id=status.leader_id,
            address=self._cluster.advertised,
            voters=len(status.voters),
            nodes=len(status.nodes),
        )

    async def _open_metrics(self) -> Registry:
        """Return the registry of shard 0, on pages that the other shards read; those of an earlier node are removed first."""
        folder = self._metrics_folder
        try:
            await self._world.disk.remove_tree(folder)
            await self._world.disk.make_directory(folder)
            metrics = Registry(Home(self._world.pages, folder))
        except OSError as error:
            raise from_os_error(error, "make the metric pages in", folder) from error
        self._register("metric pages", ShutdownPhase.FINAL_CLEANUP, lambda: self._close_metrics(metrics))
        return metrics

    async def _close_metrics(self, metrics: Registry) -> None:
        metrics.close()
        await self._world.disk.remove_tree(self._metrics_folder)

    async def _start_shards(self, metrics: Registry, socket_gid: int | None) -> None:
        """Start the other shards and the telemetry endpoint, as far as they are asked for."""
        config = self._config
        smp_config = SmpConfig(n_shards=config.shards, pin="others", log_level=config.log_level, metrics_folder=self._metrics_folder)
        service = SmpService(
            self._world, smp_config, logger=self._logger, metrics=metrics, services=[shards.SERVE], on_event=self._on_shard
        )
        smp = await service.start()
        self._shards = service
        self._register("shards", ShutdownPhase.STOP_REACTORS, service.stop)
        telemetry = self._telemetry = shards.Telemetry(smp)
        await telemetry.start()
        self._register("telemetry", ShutdownPhase.STOP_METRICS, telemetry.close)
        self._shutdown.stopping.subscribe(telemetry.service.shut)
        if config.telemetry:
            address = parse_address(config.telemetry)
            try:
                listener = await service.listen(address, shards.TELEMETRY, mode=SOCKET_MODE, gid=socket_gid)
            except OSError as error:
                raise from_os_error(error, "listen on", config.telemetry) from error
            self._register("telemetry listener", ShutdownPhase.STOP_ACCEPTING, listener.close)
            self._logger.info("node.telemetry", address=str(listener.address), shards=service.n_shards)

    def _on_shard(self, event: ShardEvent) -> None:
        """Melt the metric pages of a restarted shard's past lives into one, so that restarts do not fill the folder."""
        if event.state != "up" or not event.n_restarts:
            return
        pages, folder = self._world.pages, self._metrics_folder
        reader = ShardMetrics(pages, folder)
        try:
            reader.retire(event.shard, before=next_generation(pages, folder, event.shard) - 1)
        except OSError as error:  # the folder is fuller than it need be; nothing is counted wrong
            self._logger.warning("node.metrics_not_retired", shard=event.shard, why=str(error))
        finally:
            reader.close()

    async def stop(self, reason: str) -> None:
        """Go down in phases; containers go on. With no container running, bridges, filter table and mount namespace go too."""
        await self._shutdown.shutdown(reason)
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    async def _close_engine(self) -> None:
        engine = self.engine
        await engine.close()
        if engine.is_idle:
            await engine.dispose()
            await self._world.kernel.release(pin_of(self._config))

    async def _lock(self, folder: str) -> None:
        disk = self._world.disk
        await disk.make_directory(folder, mode=0o711)
        found = await disk.stat(folder)
        if found is None or (self.has_engine and found.uid != 0) or found.mode & OTHERS_WRITE:
            raise InvalidArgument(
                "folder", folder, "it belongs to somebody else, or others may write to it", f"chown root {folder}; chmod 711 {folder}"
            )
        path = f"{folder}/{LOCK}"
        lock = await disk.lock(path, msgspec.json.encode({"pid": self._world.processes.own_pid()}))
        if lock is None:
            raise AlreadyServing(folder, await owner_of(disk, path))
        self._locks.append(lock)

    def _register(self, name: str, phase: ShutdownPhase, close: Callable[[], Awaitable[None]]) -> None:
        self._shutdown.register(ShutdownResource(name, phase, close))
