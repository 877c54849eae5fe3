"""PulseSettings: what the agent is told, checked. Where it comes from is the caller's matter."""

from typing import Literal

import msgspec

from isopod.world.errors import InvalidArgument
from isopod.world.network import parse_address

LogLevel = Literal["trace", "debug", "info", "warning", "error"]


class PulseSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent does. Times are in seconds."""

    listen: str = "127.0.0.1:8090"
    """"HOST:PORT" or "unix:PATH"."""
    runtime_endpoint: str = "/run/containerd/containerd.sock"
    """The CRI's socket; "" asks none."""
    log_level: LogLevel = "info"
    interval_s: float = 60.0
    """How often each sandbox is asked."""
    go_root: str = "/run/vc/sbs"
    rust_root: str = "/run/kata"
    node_socket: str = ""
    """The socket of an isopod node whose containers and machines are shown too; "" for none."""
    view: Literal["all", "kata", "cadvisor"] = "all"
    """What /metrics shows."""
    strict_compat: bool = False
    """Be kata-monitor to the letter: its families, codes and parameters."""
    shards: int = 0
    """Processes that serve; 0 for one."""
    in_flight_max: int = 64
    request_s: float = 3.0
    """A whole request to a shim, from connecting to the body's end."""
    body_bytes_max: int = 16 << 20
    line_bytes_max: int = 64 << 10
    series_max: int = 20_000
    """Of one sandbox."""
    sandboxes_max: int = 20_000
    keep_rounds: int = 2
    """Failed rounds over which a sandbox's last figures are shown."""
    pod_labels: tuple[str, ...] = ()
    """Which labels of pods become labels label_NAME."""
    pod_annotations: tuple[str, ...] = ()
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    """Clients must show a certificate of this authority."""
    tls_min_version: Literal["VersionTLS12", "VersionTLS13"] = "VersionTLS12"
    token_file: str = ""
    """Requests must carry this file's token as their bearer."""
    pprof: bool = False
    """Whether /debug/ is passed on to shims."""

    def __post_init__(self) -> None:
        try:
            parse_address(self.listen)
        except ValueError as error:
            raise InvalidArgument("listen address", self.listen, str(error)) from None
        if not 0 < self.interval_s <= 86_400:
            raise InvalidArgument("metrics interval", self.interval_s, "must be above 0 and at most a day")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise InvalidArgument("TLS files", self.tls_cert_file or self.tls_key_file, "certificate and key go together")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise InvalidArgument("TLS client CA", self.tls_client_ca_file, "needs a certificate and key of the server")
        for name in ("in_flight_max", "request_s", "body_bytes_max", "line_bytes_max", "series_max", "sandboxes_max"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(name.replace("_", " "), getattr(self, name), "must be above 0")
