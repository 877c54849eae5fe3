"""GrpcSection: the gRPC face of a node: the table [grpc] of the configuration file, ISOPOD_GRPC_*, and --grpc-* of `isopod node`.

Values and their form only; what they mean together, `isopod.faces.grpc.settings` checks.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

SECTION: Final = "grpc"
_PATH: Final = "an absolute path"
_PATTERN: Final = r"^(/[^\x00]*)?$"


def _meta(want: str, text: str) -> Meta:
    return Meta(description=text, extra={"want": want})


Listen = Annotated[str, _meta("HOST:PORT or unix:PATH", "where gRPC is served; beyond loopback only with the three files")]
CertFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of the certificate that is shown")]
KeyFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of its key")]
CaFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of the authority that clients must be certified by")]
VmImage = Annotated[str, _meta("an image's name", "what CreateVm makes a machine of if the request names no configuration")]
VmCommand = Annotated[str, _meta("words with blanks between them", "what such a machine runs; empty for what its image says")]
TaskImage = Annotated[str, _meta("an image's name", "what tasks run in")]
TestServices = Annotated[bool, _meta("true or false", "whether RaftConsensusService is served: for tests only")]


class GrpcSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings. Without `listen` there is no face."""

    listen: Listen = ""
    cert_file: CertFile = ""
    key_file: KeyFile = ""
    ca_file: CaFile = ""
    vm_image: VmImage = "isopod/busybox"
    vm_command: VmCommand = "sleep infinity"
    task_image: TaskImage = "isopod/busybox"
    test_services: TestServices = False
