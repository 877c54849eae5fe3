"""PulseSection: the metrics agent that a node runs beside itself: the table [pulse] of the configuration file, and ISOPOD_PULSE_*.

It has every setting that `isopod pulse` has as a flag, under the same name, but for those that the node itself answers (`log_level`,
`go_root`, `node_socket`). Values and their form only; what they mean together, `isopod.pulse.settings` checks.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

SECTION: Final = "pulse"
_PATTERN: Final = r"^(/[^\x00]*)?$"


def _meta(want: str, text: str) -> Meta:
    return Meta(description=text, extra={"want": want})


def _path(text: str) -> Meta:
    return Meta(pattern=_PATTERN, description=text, extra={"want": "an absolute path"})


def _seconds(text: str) -> Meta:
    return Meta(gt=0, le=86_400, description=text, extra={"want": "a number of seconds"})


Part = Literal["cpu", "memory", "network", "disk", "process", "spec", "time", "containers"]
TlsVersion = Literal["VersionTLS12", "VersionTLS13"]
Listen = Annotated[str, _meta("HOST:PORT or unix:PATH", "where metrics of sandboxes are served; empty for nowhere")]
RuntimeEndpoint = Annotated[
    str,
    Meta(
        pattern=r"^(none|(unix:(//)?)?/[^\x00]*)?$",
        description="the socket of a CRI runtime whose pods are shown too",
        extra={"want": "an absolute path, unix:///PATH, or none"},
    ),
]
Interval = Annotated[float, _seconds("how often each sandbox is asked")]
RustRoot = Annotated[str, _path("where Kata's shim in Rust has a folder for each sandbox")]
View = Annotated[Literal["all", "kata", "cadvisor"], _meta("all, kata or cadvisor", "which families /metrics shows")]
CadvisorWithout = Annotated[tuple[Part, ...], _meta("a list of parts", "what is left out of container_*: cpu, memory, network, ...")]
StrictCompat = Annotated[bool, _meta("true or false", "be kata-monitor to the letter")]
BaseUnits = Annotated[bool, _meta("true or false", "show kata_* in seconds and bytes, under names that say so")]
MergeHistograms = Annotated[bool, _meta("true or false", "show histograms once for all sandboxes")]
PodLabels = Annotated[tuple[str, ...], _meta("a list of names", "labels of pods that become labels of their series (label_NAME)")]
PodAnnotations = Annotated[tuple[str, ...], _meta("a list of names", "the same of annotations (annotation_NAME)")]
PolicyFile = Annotated[str, _path("relabelling, budgets and intervals; read again when it changes")]
PauseAfter = Annotated[
    float, Meta(ge=0, le=86_400), _meta("a number of seconds, or 0", "how long without a scrape shims are asked; 0 for always")
]
KeepRounds = Annotated[int, Meta(ge=0, le=86_400), _meta("a whole number", "failed rounds over which last figures are shown")]
Shards = Annotated[
    int, Meta(ge=0, le=64), _meta("a whole number from 0 to 64", "processes that serve scrapes; 0 decides by the processors")
]
InFlight = Annotated[int, Meta(ge=1, le=86_400), _meta("a whole number above 0", "shims that are asked at one time")]
Request = Annotated[float, _seconds("what a shim has for a whole answer")]
CertFile = Annotated[str, _path("PEM of the certificate that is shown")]
KeyFile = Annotated[str, _path("PEM of its key")]
ClientCaFile = Annotated[str, _path("PEM of the authority that clients must be certified by")]
TlsMinVersion = Annotated[TlsVersion, _meta("VersionTLS12 or VersionTLS13", "the least version of TLS")]
CipherSuites = Annotated[tuple[str, ...], _meta("a list of names", "suites of TLS 1.2, by their registered names; else all sound ones")]
TokenFile = Annotated[str, _path("the file with the token that requests must carry")]
BasicAuthFile = Annotated[str, _path("the file with lines USER:HASH (bcrypt) of those who may ask by password")]
EnableLifecycle = Annotated[bool, _meta("true or false", "answer PUT /-/reload")]
Pprof = Annotated[bool, _meta("true or false", "pass /debug/ on to shims")]
PushUrl = Annotated[
    str,
    Meta(
        description="send all figures there by Prometheus' remote write",
        extra={"want": "an http or https URL", "hides_query": True},
    ),
]
PushInterval = Annotated[float, _seconds("how often they are sent")]
PushTimeout = Annotated[float, _seconds("what the receiver has for a whole request")]
PushQueueBytes = Annotated[int, Meta(ge=1, le=10**12), _meta("a whole number above 0", "of requests that wait to be sent")]
PushLabels = Annotated[tuple[str, ...], _meta("a list of NAME=VALUE", "labels for series that have none of the name")]
PushTokenFile = Annotated[str, _path("the file with the token that is sent as the bearer")]
PushBasicFile = Annotated[str, _path("the file with USER:PASSWORD, instead of a token")]
PushCaFile = Annotated[str, _path("PEM of the authority that certifies the receiver")]
PushCertFile = Annotated[str, _path("PEM of the certificate that is shown to it")]
PushKeyFile = Annotated[str, _path("PEM of its key")]


class PulseSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings. Without `listen` there is no agent."""

    listen: Listen = ""
    runtime_endpoint: RuntimeEndpoint = ""
    interval_s: Interval = 60.0
    rust_root: RustRoot = "/run/kata"
    view: View = "all"
    cadvisor_without: CadvisorWithout = ()
    strict_compat: StrictCompat = False
    base_units: BaseUnits = False
    merge_histograms: MergeHistograms = False
    pod_labels: PodLabels = ()
    pod_annotations: PodAnnotations = ()
    policy_file: PolicyFile = ""
    pause_after_s: PauseAfter = 0.0
    keep_rounds: KeepRounds = 2
    shards: Shards = 0
    in_flight_max: InFlight = 64
    request_s: Request = 3.0
    tls_cert_file: CertFile = ""
    tls_key_file: KeyFile = ""
    tls_client_ca_file: ClientCaFile = ""
    tls_min_version: TlsMinVersion = "VersionTLS12"
    tls_cipher_suites: CipherSuites = ()
    token_file: TokenFile = ""
    basic_auth_file: BasicAuthFile = ""
    enable_lifecycle: EnableLifecycle = False
    pprof: Pprof = False
    push_url: PushUrl = ""
    push_interval_s: PushInterval = 60.0
    push_timeout_s: PushTimeout = 30.0
    push_queue_bytes_max: PushQueueBytes = 64 << 20
    push_labels: PushLabels = ()
    push_token_file: PushTokenFile = ""
    push_basic_file: PushBasicFile = ""
    push_ca_file: PushCaFile = ""
    push_cert_file: PushCertFile = ""
    push_key_file: PushKeyFile = ""
