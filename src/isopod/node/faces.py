"""Faces: what a node starts for programs that speak another protocol, as its configuration says. Each is a process of its own."""

from isopod.faces.grpc.process import GrpcFace
from isopod.faces.grpc.settings import FaceSettings
from isopod.node.cluster import cluster_config
from isopod.runtime.config import NodeConfig
from isopod.runtime.logger import Logger
from isopod.world.world import World


async def open_faces(world: World, config: NodeConfig, logger: Logger) -> tuple[GrpcFace, ...]:
    """Start the faces that are asked for; return those that have to be stopped.

    Args:
        world: Where they run.
        config: What the node was told; its own socket is being served.
        logger: Told of their comings and goings.

    Raises:
        InvalidArgument: One may not listen where it is told.
        IsopodError: One cannot be started.
    """
    if not config.grpc.listen:
        return ()
    face = GrpcFace(world, grpc_settings(config), logger)
    await face.start()
    return (face,)


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
