"""The manifests of deploy/pulse as values: read strictly, so that a field that Kubernetes would refuse at its place is refused here."""

from pathlib import Path
from typing import Final, Literal

import msgspec
import yaml

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
PULSE: Final = DEPLOY / "pulse"


class _Closed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A part of a manifest: a field that Kubernetes does not know at this place is an error there, and so it is here."""


class Meta(_Closed):
    name: str
    namespace: str
    labels: dict[str, str] = {}


class ServiceAccount(_Closed, tag_field="kind", tag="ServiceAccount"):
    api_version: Literal["v1"]
    metadata: Meta
    automount_service_account_token: bool


class Variable(_Closed):
    name: str
    value: str


class Port(_Closed):
    name: str
    container_port: int


class HttpGet(_Closed):
    path: str
    port: str


class Probe(_Closed):
    http_get: HttpGet
    period_seconds: int
    failure_threshold: int = 3


class Resources(_Closed):
    requests: dict[Literal["cpu", "memory"], str]
    limits: dict[Literal["cpu", "memory"], str]


class Capabilities(_Closed):
    drop: list[str]


class Seccomp(_Closed):
    type: Literal["RuntimeDefault"]


class Security(_Closed):
    run_as_user: int
    run_as_group: int
    allow_privilege_escalation: bool
    read_only_root_filesystem: bool
    capabilities: Capabilities
    seccomp_profile: Seccomp


class Mount(_Closed):
    name: str
    mount_path: str
    read_only: bool
    mount_propagation: Literal["HostToContainer", "None"] = "None"


class Container(_Closed):
    name: str
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"]
    env: list[Variable]
    ports: list[Port]
    readiness_probe: Probe
    liveness_probe: Probe
    resources: Resources
    security_context: Security
    volume_mounts: list[Mount]


class HostPath(_Closed):
    path: str
    type: Literal["Directory", "DirectoryOrCreate", "Socket"]


class Volume(_Closed):
    name: str
    host_path: HostPath


class Toleration(_Closed):
    operator: Literal["Exists", "Equal"]


class PodSpec(_Closed):
    service_account_name: str
    enable_service_links: bool
    termination_grace_period_seconds: int
    node_selector: dict[str, str]
    automount_service_account_token: bool
    tolerations: list[Toleration]
    containers: list[Container]
    volumes: list[Volume]


class TemplateMeta(_Closed):
    labels: dict[str, str]
    annotations: dict[str, str]


class Template(_Closed):
    metadata: TemplateMeta
    spec: PodSpec


class Selector(_Closed):
    match_labels: dict[str, str]


class Rolling(_Closed):
    max_unavailable: str


class Strategy(_Closed):
    type: Literal["RollingUpdate", "OnDelete"]
    rolling_update: Rolling


class Spec(_Closed):
    selector: Selector
    update_strategy: Strategy
    template: Template


class DaemonSet(_Closed, tag_field="kind", tag="DaemonSet"):
    api_version: Literal["apps/v1"]
    metadata: Meta
    spec: Spec


def manifest(name: str) -> DaemonSet:
    """Return the DaemonSet of a file of deploy/pulse, with the account that it runs as checked."""
    parts = [msgspec.convert(part, ServiceAccount | DaemonSet) for part in yaml.safe_load_all((PULSE / name).read_text())]
    (found,) = (part for part in parts if isinstance(part, DaemonSet))
    (account,) = (part for part in parts if isinstance(part, ServiceAccount))
    assert found.spec.template.spec.service_account_name == account.metadata.name
    assert found.metadata.namespace == account.metadata.namespace
    return found


class Monitor(_Closed, tag_field="kind", tag="PodMonitor"):
    api_version: Literal["monitoring.coreos.com/v1"]
    metadata: Meta
    spec: "MonitorSpec"


class MonitorSpec(_Closed):
    selector: Selector
    pod_metrics_endpoints: list["Endpoint"]


class Endpoint(_Closed):
    port: str
    path: str
    interval: str
    scrape_timeout: str
    honor_labels: bool
    relabelings: list[dict[str, str | list[str]]] = []


def monitor() -> Monitor:
    """Return the PodMonitor."""
    return msgspec.convert(yaml.safe_load((PULSE / "podmonitor.yaml").read_text()), Monitor)
