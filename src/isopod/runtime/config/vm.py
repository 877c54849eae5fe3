"""VmSection: how virtual machines are run: the table [vm] of the configuration file, and ISOPOD_VM_*.

Values and their form only; what they mean, `isopod.engine.vm` says.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

SECTION: Final = "vm"
_BYTES: Final = "a whole number of bytes"
_SECONDS: Final = "a number of seconds"


def _meta(want: str, text: str) -> Meta:
    return Meta(description=text, extra={"want": want})


Folder = Annotated[
    str, Meta(pattern=r"^(/[^\x00]*)?$"), _meta("an absolute path", "the guest's kernel, its first file system and the shim")
]
Accelerator = Annotated[
    Literal["auto", "kvm", "tcg"], _meta("auto, kvm or tcg", "what runs their processors; auto boots a guest to find out whether KVM works")
]
TemplatesMax = Annotated[int, Meta(ge=0, le=1000), _meta("a whole number", "booted templates kept for quick starts; 0 for none")]
TemplateBytesMax = Annotated[int, Meta(ge=0), _meta(_BYTES, "what all templates together may take on the disk")]
MonitorRoot = Annotated[
    str,
    Meta(pattern=r"^(/[^\x00]*)?$"),
    _meta("an absolute path", "where each machine serves its metrics, at ID/shim-monitor.sock; empty for nowhere"),
]
Timeout = Annotated[float, Meta(ge=1, le=86_400), _meta(_SECONDS, "how long a guest may take to come up")]
Silence = Annotated[float, Meta(ge=5, le=86_400), _meta(_SECONDS, "how long a guest may say nothing before its machine is ended")]
FlakeInput = Annotated[
    str, Meta(min_length=1, max_length=500), _meta("a flake's address", "where microvm.nix comes from, for a bare module")
]


class VmSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings."""

    guest: Folder = ""
    accelerator: Accelerator = "auto"
    templates_max: TemplatesMax = 8
    template_bytes_max: TemplateBytesMax = 4 << 30
    monitor_root: MonitorRoot = "/run/vc/sbs"
    boot_timeout_s: Timeout = 60.0
    silent_timeout_s: Silence = 60.0
    microvm_nix: FlakeInput = "github:astro/microvm.nix"
