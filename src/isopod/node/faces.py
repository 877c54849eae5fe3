"""Faces: what a node starts beside itself, as its configuration says: the gRPC face, the metrics agent. Each is a process of its own."""

from typing import Final

import msgspec

from isopod.faces.grpc.process import GrpcFace
from isopod.faces.grpc.settings import FaceSettings
from isopod.node.cluster import cluster_config
from isopod.pulse.settings import PulseSettings
from isopod.runtime.companion import Companion
from isopod.runtime.config import NodeConfig
from isopod.runtime.logger import Logger
from isopod.world.world import World

PULSE: Final = "isopod.pulse.main:serve"


async def open_faces(world: World, config: NodeConfig, logger: Logger) -> tuple[Companion, ...]:
    """Start the faces that are asked for; return those that have to be stopped.

    Args:
        world: Where they run.
        config: What the node was told; its own socket is being served.
        logger: Told of their comings and goings.

    Raises:
        InvalidArgument: One may not listen where it is told.
        IsopodError: One cannot be started.
    """
    faces: list[Companion] = []
    if config.grpc.listen:
        faces.append(GrpcFace(world, grpc_settings(config), logger))
    if config.pulse.listen:
        told = msgspec.json.encode(pulse_settings(config))
        faces.append(Companion(world, logger, entry=PULSE, told=told, word="pulse"))
    for n_started, face in enumerate(faces):
        try:
            await face.start()
        except BaseException:
            for started in faces[:n_started]:
                await started.stop()
            raise
    return tuple(faces)


def pulse_settings(config: NodeConfig) -> PulseSettings:
    """Return what the metrics agent is told: the machines of this node are where its configuration says that they serve their metrics."""
    told = config.pulse
    has_engine = config.cluster.role != "control"
    return PulseSettings(
        listen=told.listen,
        runtime_endpoint=told.runtime_endpoint,
        log_level=config.log_level,
        interval_s=told.interval_s,
        go_root=config.vm.monitor_root or PulseSettings().go_root,
        node_socket=config.paths["socket"] if has_engine else "",
        view=told.view,
        tls_cert_file=told.tls_cert_file,
        tls_key_file=told.tls_key_file,
        tls_client_ca_file=told.tls_client_ca_file,
        token_file=told.token_file,
    )


def grpc_settings(config: NodeConfig) -> FaceSettings:
    """Return what the gRPC face is told."""
    told, cluster = config.grpc, cluster_config(config)
    return FaceSettings(
        listen=told.listen,
        socket=config.paths["socket"],
        node_id=cluster.node_id if cluster is not None else config.cluster.node_id,
        has_engine=config.cluster.role != "control",
        is_replicated=cluster is not None and cluster.role != "agent",
        cert_file=told.cert_file,
        key_file=told.key_file,
        ca_file=told.ca_file,
        vm_image=told.vm_image,
        vm_command=tuple(told.vm_command.split()),
        task_image=told.task_image,
        test_services=told.test_services,
        log_level=config.log_level,
    )
