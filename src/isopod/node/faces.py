"""Faces: what a node starts beside itself, as its configuration says: the gRPC face, the metrics agent. Each is a process of its own."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from isopod.faces.grpc.process import GrpcFace
from isopod.faces.grpc.settings import FaceSettings
from isopod.node.cluster import cluster_config
from isopod.pulse.options import endpoint
from isopod.pulse.settings import Given, PulseSettings
from isopod.runtime.companion import Companion
from isopod.runtime.config import NodeConfig
from isopod.runtime.logger import Logger
from isopod.world.world import World

PULSE: Final = "isopod.pulse.main:serve"
_OWN_KEYS: Final = {"log_level": "log_level", "vm.monitor_root": "go_root", "paths.socket": "node_socket"}
"""What of the agent's settings the node answers by others of its own."""
_GIVEN_BY_NODE: Final = {"runtime_endpoint": "the node's default", "node_socket": "the node's default"}
"""Whose defaults are not the agent's."""


async def open_faces(
    world: World, config: NodeConfig, logger: Logger, *, origins: Mapping[str, str] | None = None
) -> tuple[Companion, ...]:
    """Start the faces that are asked for; return those that have to be stopped.

    Args:
        world: Where they run.
        config: What the node was told; its own socket is being served.
        logger: Told of their comings and goings.
        origins: Where settings were said that are no defaults, by key.

    Raises:
        InvalidArgument: One may not listen where it is told.
        IsopodError: One cannot be started.
    """
    faces: list[Companion] = []
    if config.grpc.listen:
        faces.append(GrpcFace(world, grpc_settings(config), logger))
    if config.pulse.listen:
        told = msgspec.json.encode(Given(pulse_settings(config), pulse_origins(origins or {})))
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
    has_engine = config.cluster.role != "control"
    own: dict[str, Any] = {  # of many types, which the struct's checks see
        "log_level": config.log_level,
        "go_root": config.vm.monitor_root or PulseSettings().go_root,
        "node_socket": config.paths["socket"] if has_engine else "",
    }
    told = msgspec.structs.asdict(config.pulse)
    told["runtime_endpoint"] = endpoint(config.pulse.runtime_endpoint or "none")  # unix:///PATH is taken as the flag takes it
    return PulseSettings(**told, **own)


def pulse_origins(origins: Mapping[str, str]) -> dict[str, str]:
    """Return who gave the agent's settings, by their names there, out of who gave the node's.

    Args:
        origins: By the node's keys ("pulse.view"), those that are no defaults.
    """
    found = dict(_GIVEN_BY_NODE)
    for key, origin in origins.items():
        name = _OWN_KEYS.get(key) or (key.removeprefix("pulse.") if key.startswith("pulse.") else "")
        if name:
            found[name] = f"the node's {origin}"
    return found


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
