"""The verbs of the contract, one row each: from this table come the server's dispatch, the client's calls and the reference.

`sends` is what the client may stream, `receives` what the server may; None means no stream in that direction.
"""

from typing import Final

from isopod.api import machines, usage
from isopod.api import messages as m
from isopod.wire.service import Method

SYSTEM_VERSION: Final = Method("system.version", m.Empty, m.Version)
SYSTEM_TASKS: Final = Method("system.tasks", m.Empty, m.TaskList)
SYSTEM_INFO: Final = Method("system.info", m.Empty, m.NodeInfo)
SYSTEM_USAGE: Final = Method("system.usage", m.Empty, m.SystemUsage)
SYSTEM_BACKUP: Final = Method("system.backup", m.Empty, m.BackedUp, receives=m.Chunk)
SYSTEM_RENDER: Final = Method("system.render", m.RenderRequest, m.Rendered)

CONTAINER_RUN: Final = Method("container.run", m.RunContainer, m.Ran, sends=m.AttachInput, receives=m.AttachOutput)
CONTAINER_CREATE: Final = Method("container.create", m.ContainerSpec, m.Container)
CONTAINER_START: Final = Method("container.start", m.StartContainer, m.Ran, sends=m.AttachInput, receives=m.AttachOutput)
CONTAINER_WAIT: Final = Method("container.wait", m.ContainerName, m.Ran)
CONTAINER_STOP: Final = Method("container.stop", m.StopContainer, m.Container)
CONTAINER_KILL: Final = Method("container.kill", m.KillContainer, m.Empty)
CONTAINER_REMOVE: Final = Method("container.remove", m.RemoveContainer, m.Empty)
CONTAINER_LIST: Final = Method("container.list", m.ListContainers, m.ContainerList)
CONTAINER_INSPECT: Final = Method("container.inspect", m.ContainerName, m.Container)
CONTAINER_EXEC: Final = Method("container.exec", m.ExecContainer, m.Ran, sends=m.AttachInput, receives=m.AttachOutput)
CONTAINER_LOGS: Final = Method("container.logs", m.LogsRequest, m.Empty, receives=m.LogOutput)
CONTAINER_COMMIT: Final = Method("container.commit", m.CommitContainer, m.Image)
CONTAINER_PAUSE: Final = Method("container.pause", m.ContainerName, m.Container)
CONTAINER_UNPAUSE: Final = Method("container.unpause", m.ContainerName, m.Container)
CONTAINER_RESTART: Final = Method("container.restart", m.RestartContainer, m.Container)
CONTAINER_UPDATE: Final = Method("container.update", m.UpdateContainer, m.UpdatedContainer)
CONTAINER_EVENTS: Final = Method("container.events", m.EventsRequest, m.Empty, receives=m.EventOutput)
CONTAINER_STAT_PATH: Final = Method("container.stat_path", machines.StatPath, machines.PathFacts)
CONTAINER_COPY_FROM: Final = Method("container.copy_from", machines.CopyFrom, m.Empty, receives=m.Chunk)
CONTAINER_COPY_TO: Final = Method("container.copy_to", machines.CopyTo, m.Empty, sends=m.Chunk)
CONTAINER_STATS: Final = Method("container.stats", usage.StatsRequest, usage.UsageList)

VM_STATUS: Final = Method("vm.status", m.ContainerName, machines.VmState)
VM_CONSOLE: Final = Method("vm.console", machines.VmConsole, m.Empty, sends=m.AttachInput, receives=m.AttachOutput)
VM_SNAPSHOT: Final = Method("vm.snapshot", machines.VmSnapshotRequest, machines.VmSnapshot)
VM_SNAPSHOT_REMOVE: Final = Method("vm.snapshot_remove", machines.VmSnapshotRequest, m.Empty)
VM_RESTORE: Final = Method("vm.restore", machines.VmSnapshotRequest, m.Container)
VM_RESIZE: Final = Method("vm.resize", machines.ResizeVm, m.UpdatedContainer)
VM_UPDATE: Final = Method("vm.update", m.ContainerName, machines.VmBuild)

IMAGE_LIST: Final = Method("image.list", m.Empty, m.ImageList)
IMAGE_INSPECT: Final = Method("image.inspect", m.ImageNameRequest, m.Image)
IMAGE_REMOVE: Final = Method("image.remove", m.RemoveImage, m.RemovedImage)
IMAGE_IMPORT: Final = Method("image.import", m.ImportImage, m.Image, sends=m.Chunk, receives=m.Progress)
IMAGE_LOAD: Final = Method("image.load", m.LoadImages, m.LoadedImages, sends=m.Chunk, receives=m.Progress)

NETWORK_CREATE: Final = Method("network.create", m.NetworkSpec, m.NetworkRecord)
NETWORK_LIST: Final = Method("network.list", m.Empty, m.NetworkList)
NETWORK_INSPECT: Final = Method("network.inspect", m.NetworkNameRequest, m.NetworkRecord)
NETWORK_REMOVE: Final = Method("network.remove", m.NetworkNameRequest, m.Empty)
NETWORK_CONNECT: Final = Method("network.connect", m.ConnectNetwork, m.UpdatedContainer)
NETWORK_DISCONNECT: Final = Method("network.disconnect", m.ConnectNetwork, m.UpdatedContainer)

METHODS: Final = tuple(value for name, value in sorted(globals().items()) if isinstance(value, Method))
