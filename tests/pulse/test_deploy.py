"""What deploy/pulse ships: scripts that build, manifests that Kubernetes would take, and a unit that systemd understands."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import yaml

from isopod.pulse.options import FLAGS

DEPLOY = Path(__file__).parents[2] / "deploy"
PULSE = DEPLOY / "pulse"


class _Closed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A part of a manifest: a field that Kubernetes does not know at this place is an error there, and so it is here."""


class _Meta(_Closed):
    name: str
    namespace: str
    labels: dict[str, str] = {}


class _ServiceAccount(_Closed, tag_field="kind", tag="ServiceAccount"):
    api_version: Literal["v1"]
    metadata: _Meta
    automount_service_account_token: bool


class _Variable(_Closed):
    name: str
    value: str


class _Port(_Closed):
    name: str
    container_port: int


class _HttpGet(_Closed):
    path: str
    port: str


class _Probe(_Closed):
    http_get: _HttpGet
    period_seconds: int
    failure_threshold: int = 3


class _Resources(_Closed):
    requests: dict[Literal["cpu", "memory"], str]
    limits: dict[Literal["cpu", "memory"], str]


class _Capabilities(_Closed):
    drop: list[str]


class _Seccomp(_Closed):
    type: Literal["RuntimeDefault"]


class _Security(_Closed):
    run_as_user: int
    allow_privilege_escalation: bool
    read_only_root_filesystem: bool
    capabilities: _Capabilities
    seccomp_profile: _Seccomp


class _Mount(_Closed):
    name: str
    mount_path: str
    read_only: bool
    mount_propagation: Literal["HostToContainer", "None"] = "None"


class _Container(_Closed):
    name: str
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"]
    env: list[_Variable]
    ports: list[_Port]
    readiness_probe: _Probe
    liveness_probe: _Probe
    resources: _Resources
    security_context: _Security
    volume_mounts: list[_Mount]


class _HostPath(_Closed):
    path: str
    type: Literal["Directory", "DirectoryOrCreate", "Socket"]


class _Volume(_Closed):
    name: str
    host_path: _HostPath


class _Toleration(_Closed):
    operator: Literal["Exists", "Equal"]


class _PodSpec(_Closed):
    service_account_name: str
    automount_service_account_token: bool
    tolerations: list[_Toleration]
    containers: list[_Container]
    volumes: list[_Volume]


class _TemplateMeta(_Closed):
    labels: dict[str, str]
    annotations: dict[str, str]


class _Template(_Closed):
    metadata: _TemplateMeta
    spec: _PodSpec


class _Selector(_Closed):
    match_labels: dict[str, str]


class _Rolling(_Closed):
    max_unavailable: str


class _Strategy(_Closed):
    type: Literal["RollingUpdate", "OnDelete"]
    rolling_update: _Rolling


class _Spec(_Closed):
    selector: _Selector
    update_strategy: _Strategy
    template: _Template


class _DaemonSet(_Closed, tag_field="kind", tag="DaemonSet"):
    api_version: Literal["apps/v1"]
    metadata: _Meta
    spec: _Spec


def manifest(name: str) -> _DaemonSet:
    parts = [msgspec.convert(part, _ServiceAccount | _DaemonSet) for part in yaml.safe_load_all((PULSE / name).read_text())]
    (found,) = (part for part in parts if isinstance(part, _DaemonSet))
    (account,) = (part for part in parts if isinstance(part, _ServiceAccount))
    assert found.spec.template.spec.service_account_name == account.metadata.name
    assert found.metadata.namespace == account.metadata.namespace
    return found


@pytest.mark.row("K21")
@pytest.mark.row("K23")
@pytest.mark.parametrize("name", ["daemonset.yaml", "daemonset.debug.yaml"])
def test_a_manifest_holds_together(name: str) -> None:
    found = manifest(name)
    template = found.spec.template
    assert template.metadata.labels.items() >= found.spec.selector.match_labels.items()
    (container,) = template.spec.containers
    assert {mount.name for mount in container.volume_mounts} == {volume.name for volume in template.spec.volumes}
    ports = {port.name: port.container_port for port in container.ports}
    for probe in (container.readiness_probe, container.liveness_probe):
        assert probe.http_get.port in ports
    told = {variable.name: variable.value for variable in container.env}
    known = {flag.variable for flag in FLAGS if flag.variable}
    assert set(told) == known, "one agent for each node, told by its environment"
    assert told["KATA_PULSE_LISTEN"] == f"0.0.0.0:{ports['metrics']}"


@pytest.mark.row("K21")
@pytest.mark.parametrize("name", ["daemonset.yaml", "daemonset.debug.yaml"])
def test_the_agent_gets_no_privilege_and_writes_nothing(name: str) -> None:
    (container,) = manifest(name).spec.template.spec.containers
    security = container.security_context
    assert security.capabilities.drop == ["ALL"]
    assert security.read_only_root_filesystem
    assert not security.allow_privilege_escalation
    assert all(mount.read_only for mount in container.volume_mounts)


@pytest.mark.row("K22")
@pytest.mark.row("K23")
def test_the_debug_image_logs_at_trace() -> None:
    (container,) = manifest("daemonset.debug.yaml").spec.template.spec.containers
    assert {variable.name: variable.value for variable in container.env}["RUST_LOG"] == "trace"
    *_, debug = (PULSE / "Dockerfile").read_text().split("\nFROM ")
    assert debug.startswith("agent AS debug\n")
    assert "ENV RUST_LOG=trace" in debug


@pytest.mark.row("K23")
@pytest.mark.parametrize(("script", "target", "tag"), [("build-docker.sh", "agent", "latest"), ("build-docker-debug.sh", "debug", "debug")])
def test_a_build_script_asks_the_builder_for_its_target(tmp_path: Path, script: str, target: str, tag: str) -> None:
    builder = tmp_path / "builder"
    builder.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    environment = {"DOCKER": str(builder), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([PULSE / script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    folder, verb, *words = ended.stdout.splitlines()
    assert (Path(folder), verb) == (DEPLOY.parent, "build")
    told: dict[str, Any] = dict(zip(words[::2], words[1::2], strict=False))
    assert (told["--target"], told["--tag"], words[-1]) == (target, f"isopod/pulse:{tag}", ".")
    assert (DEPLOY.parent / told["--file"]).is_file()


def test_the_unit_is_understood_by_systemd(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "isopod-pulse.service"
    unit.write_text((DEPLOY / "systemd" / "isopod-pulse.service").read_text().replace("@ISOPOD@", "/bin/true"))
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert str(unit.name) not in ended.stderr, ended.stderr
