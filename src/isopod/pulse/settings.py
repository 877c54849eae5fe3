"""PulseSettings: what the agent is told, checked. Where it comes from is the caller's matter."""

import re
from typing import Final, Literal

import msgspec

from isopod.net.http.url import parse_url
from isopod.pulse.cadvisor import Part
from isopod.pulse.labels import given_labels
from isopod.world.errors import InvalidArgument
from isopod.world.network import parse_address
from isopod.world.tls import openssl_name

_CREDENTIALS: Final = re.compile("://[^/#]*@")
_PUSH_ABOVE_0: Final = ("push_interval_s", "push_timeout_s", "push_queue_bytes_max")
View = Literal["all", "kata", "cadvisor"]
TlsVersion = Literal["VersionTLS12", "VersionTLS13"]
LogLevel = Literal["debug", "info", "warning", "error"]


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
    view: View = "all"
    """What /metrics shows."""
    cadvisor_without: tuple[Part, ...] = ()
    """What is left out of the families under cAdvisor's names, where another agent tells of it too."""
    strict_compat: bool = False
    """Be kata-monitor to the letter: its families, codes and parameters."""
    base_units: bool = False
    """Whether kata_* families are shown in base units, with their right types and other names: see `base_units`."""
    merge_histograms: bool = False
    """Whether histograms are shown once for all sandboxes: see `histograms`."""
    shards: int = 0
    """Processes that serve, at most 64; 0 decides: one for every eight processors, at least one and at most four."""
    in_flight_max: int = 64
    request_s: float = 3.0
    """A whole request to a shim, from connecting to the body's end."""
    body_bytes_max: int = 16 << 20
    line_bytes_max: int = 64 << 10
    series_max: int = 20_000
    """Of one sandbox."""
    sandboxes_max: int = 20_000
    pause_after_s: float = 0.0
    """Shims are left alone after so long without a scrape, until the next one; 0 asks them always."""
    keep_rounds: int = 2
    """Failed rounds over which a sandbox's last figures are shown."""
    policy_file: str = ""
    """Relabelling, namespaces, budgets and intervals: see `policy`."""
    pod_labels: tuple[str, ...] = ()
    """Which labels of pods become labels label_NAME."""
    pod_annotations: tuple[str, ...] = ()
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    """Clients must show a certificate of this authority."""
    tls_min_version: TlsVersion = "VersionTLS12"
    tls_cipher_suites: tuple[str, ...] = ()
    """Of TLS 1.2, by their registered names; () for all that are sound."""
    token_file: str = ""
    """Requests must carry this file's token as their bearer."""
    basic_auth_file: str = ""
    """Or be of one of this file's users, with their password: see `basic_auth`."""
    enable_lifecycle: bool = False
    """Whether PUT /-/reload is answered."""
    pprof: bool = False
    """Whether /debug/ is passed on to shims."""
    push_url: str = ""
    """Where figures are sent by remote write, "" for nowhere."""
    push_interval_s: float = 60.0
    push_timeout_s: float = 30.0
    """A whole request to the receiver."""
    push_queue_bytes_max: int = 64 << 20
    """Of requests that wait to be sent, packed."""
    push_labels: tuple[str, ...] = ()
    """NAME=VALUE: for series that have no label of the name."""
    push_token_file: str = ""
    """Its first line is sent as the bearer token."""
    push_basic_file: str = ""
    """Its first line is USER:PASSWORD."""
    push_ca_file: str = ""
    """Who certifies the receiver; "" for those whom the machine trusts."""
    push_cert_file: str = ""
    """What is shown to a receiver that asks for a certificate."""
    push_key_file: str = ""

    def __post_init__(self) -> None:
        try:
            parse_address(self.listen)
        except ValueError as error:
            why = str(error).removeprefix(f"{self.listen!r}: ")
            raise InvalidArgument("listen address", self.listen, why, "for example: 127.0.0.1:8090 or unix:/run/pulse.sock") from None
        if not 0 < self.interval_s <= 86_400:
            raise InvalidArgument("metrics interval", self.interval_s, "must be above 0 and at most a day")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise InvalidArgument("TLS files", self.tls_cert_file or self.tls_key_file, "certificate and key go together")
        for suite in self.tls_cipher_suites:
            openssl_name(suite)
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise InvalidArgument("TLS client CA", self.tls_client_ca_file, "needs a certificate and key of the server")
        if not 0 <= self.shards <= 64:
            raise InvalidArgument("shards", self.shards, "must be from 0 to 64", "0 decides by the processors")
        for name in ("base_units", "merge_histograms"):
            if self.strict_compat and getattr(self, name):
                raise InvalidArgument(
                    name.replace("_", " "), "true", "kata-monitor shows no such families", "leave out this or strict compat"
                )
        if not self.pause_after_s >= 0:
            raise InvalidArgument("pause after", self.pause_after_s, "must be 0 or above")
        self._check_push()
        for name in ("in_flight_max", "request_s", "body_bytes_max", "line_bytes_max", "series_max", "sandboxes_max", *_PUSH_ABOVE_0):
            if not getattr(self, name) > 0:
                raise InvalidArgument(name.replace("_", " "), getattr(self, name), "must be above 0")

    def _check_push(self) -> None:
        given_labels(self.push_labels)
        files = (self.push_token_file, self.push_basic_file, self.push_ca_file, self.push_cert_file, self.push_key_file)
        if not self.push_url:
            if any(files) or self.push_labels:
                raise InvalidArgument(
                    "push URL", "", "what is told of pushing needs one", "for example: http://127.0.0.1:9090/api/v1/write"
                )
            return
        if self.pause_after_s:
            raise InvalidArgument(
                "pause after", self.pause_after_s, "what is pushed needs figures always", "leave out this or the push URL"
            )
        is_secure = self._pushes_securely()
        if self.push_token_file and self.push_basic_file:
            raise InvalidArgument("push token file", self.push_token_file, "a token and a password do not go together")
        if bool(self.push_cert_file) != bool(self.push_key_file):
            raise InvalidArgument("push TLS files", self.push_cert_file or self.push_key_file, "certificate and key go together")
        if not is_secure and (self.push_ca_file or self.push_cert_file):
            raise InvalidArgument("push URL", shown_url(self.push_url), "the files for TLS need https")

    def _pushes_securely(self) -> bool:
        try:
            return parse_url(self.push_url).is_secure
        except InvalidArgument as error:  # its message has the whole URL in front of the reason
            raise InvalidArgument("push URL", shown_url(self.push_url), error.message.rpartition(": ")[2], error.hint) from None


def shown_url(url: str) -> str:
    """Return a URL as it may be shown: what stands behind its question mark may be secret, and so is what stands before its @."""
    before, mark, _ = url.partition("?")
    before = _CREDENTIALS.sub("://...@", before)
    return f"{before}?..." if mark else before


class Given(msgspec.Struct, frozen=True):
    """Settings, and who gave those that are no defaults, by name: "flag --view", "variable RUST_LOG"."""

    settings: PulseSettings
    origins: dict[str, str] = {}
