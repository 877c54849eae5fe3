"""Schema: the messages and services of proto/*.proto, as set-up compiled them.

`make setup` has protoc write all descriptors into one file beside this module. Classes are made from it when the face starts, so that no
generated code is kept and any protobuf runtime will do. The file is not part of the sources; a test compares it with what
protoc makes of the sources now.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from isopod.world.disk import Disk
from isopod.world.errors import BadRecord, ToolMissing

FILE: Final = f"{__file__.rpartition('/')[0]}/blixard.binpb"
"""Where set-up writes the descriptors."""
MessageClass = Any
"""A class that is made at run time: it has no type of its own to be named by."""


class Method(NamedTuple):
    """One call of a service."""

    service: str
    """The full name: "blixard.ClusterService"."""
    name: str
    request: MessageClass
    reply: MessageClass

    @property
    def path(self) -> str:
        """As it stands in requests."""
        return f"/{self.service}/{self.name}"


class Schema:
    """All messages and calls.

    Args:
        descriptors: A serialized FileDescriptorSet, in which a file comes after those it imports.

    Raises:
        BadRecord: It is none.
    """

    def __init__(self, descriptors: bytes) -> None:
        self.pool = DescriptorPool()
        self._services: dict[str, tuple[Method, ...]] = {}
        try:
            files = FileDescriptorSet.FromString(descriptors).file
            for file in files:
                self.pool.Add(file)
            found = [self.pool.FindFileByName(file.name) for file in files]
        except (DecodeError, TypeError, KeyError) as error:
            raise BadRecord(FILE, f"it holds no descriptors: {error}", "make it again: make setup") from error
        for descriptor in found:
            for service in descriptor.services_by_name.values():
                self._services[service.full_name] = tuple(
                    Method(service.full_name, each.name, GetMessageClass(each.input_type), GetMessageClass(each.output_type))
                    for each in service.methods
                )

    @property
    def services(self) -> Mapping[str, tuple[Method, ...]]:
        """The calls of each service, by its full name."""
        return self._services


async def load_schema(disk: Disk, path: str = FILE) -> Schema:
    """Return the schema that set-up compiled.

    Raises:
        ToolMissing: It has not.
        BadRecord: The file is damaged.
    """
    try:
        return Schema(await disk.read(path, n_bytes_max=1 << 20))
    except FileNotFoundError as error:
        raise ToolMissing(f"{path} (compiled from proto/ by `make setup`)", "protobuf-compiler") from error
