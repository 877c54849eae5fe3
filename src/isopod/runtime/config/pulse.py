"""PulseSection: the metrics agent that a node runs beside itself: the table [pulse] of the configuration file, and ISOPOD_PULSE_*.

Values and their form only; what they mean together, `isopod.pulse.settings` checks.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

SECTION: Final = "pulse"
_PATH: Final = "an absolute path"
_PATTERN: Final = r"^(/[^\x00]*)?$"


def _meta(want: str, text: str) -> Meta:
    return Meta(description=text, extra={"want": want})


Listen = Annotated[str, _meta("HOST:PORT or unix:PATH", "where metrics of sandboxes are served; empty for nowhere")]
RuntimeEndpoint = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "the socket of a CRI runtime whose pods are shown too")]
Interval = Annotated[float, Meta(gt=0, le=86_400), _meta("a number of seconds", "how often each sandbox is asked")]
View = Annotated[Literal["all", "kata", "cadvisor"], _meta("all, kata or cadvisor", "which families /metrics shows")]
CertFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of the certificate that is shown")]
KeyFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of its key")]
ClientCaFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "PEM of the authority that clients must be certified by")]
TokenFile = Annotated[str, Meta(pattern=_PATTERN), _meta(_PATH, "the file with the token that requests must carry")]


class PulseSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings. Without `listen` there is no agent."""

    listen: Listen = ""
    runtime_endpoint: RuntimeEndpoint = ""
    interval_s: Interval = 60.0
    view: View = "all"
    tls_cert_file: CertFile = ""
    tls_key_file: KeyFile = ""
    tls_client_ca_file: ClientCaFile = ""
    token_file: TokenFile = ""
