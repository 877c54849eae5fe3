"""What deploy/pulse ships: scripts that build, manifests that Kubernetes would take, and a unit that systemd understands."""

import ast
import difflib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from isopod.pulse.options import FLAGS
from isopod.pulse.settings import PulseSettings
from scripts.pulse_tree import DISTRIBUTIONS, PROJECT, requirements
from tests.pulse.manifests import DEPLOY, PULSE, manifest, monitor


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


@pytest.mark.row("K21")
@pytest.mark.parametrize("name", ["daemonset.yaml", "daemonset.debug.yaml"])
def test_the_agent_sees_both_roots_and_the_runtime_where_it_looks_for_them(name: str) -> None:
    spec = manifest(name).spec.template.spec
    (container,) = spec.containers
    told = {variable.name: variable.value for variable in container.env}
    places = {volume.name: volume.host_path for volume in spec.volumes}
    # A folder that is mounted by itself stays what it was when it is made anew on the node: what it lies in is mounted, where that can be.
    for path in (PulseSettings().go_root, PulseSettings().rust_root, told["RUNTIME_ENDPOINT"]):
        (mount,) = (mount for mount in container.volume_mounts if Path(path).is_relative_to(mount.mount_path))
        assert places[mount.name].path == mount.mount_path, "paths in logs and in /targets are the node's"
    assert {place.type for place in places.values()} == {"DirectoryOrCreate"}, "a node without one of the runtimes"
    assert spec.tolerations[0].operator == "Exists"
    assert spec.termination_grace_period_seconds > 2, "what the agent takes to end"
    assert not spec.enable_service_links, "a service called kata-pulse makes variables KATA_PULSE_*"


@pytest.mark.row("K22")
@pytest.mark.row("K23")
def test_the_debug_image_logs_at_trace() -> None:
    (container,) = manifest("daemonset.debug.yaml").spec.template.spec.containers
    assert {variable.name: variable.value for variable in container.env}["RUST_LOG"] == "trace"
    *_, debug = (PULSE / "Dockerfile").read_text().split("\nFROM ")
    assert debug.startswith("agent AS debug\n")
    assert "ENV RUST_LOG=trace" in debug


@pytest.mark.row("K21")
def test_the_two_daemon_sets_differ_in_their_names_and_their_log_alone() -> None:
    plain, debug = ((PULSE / name).read_text().splitlines() for name in ("daemonset.yaml", "daemonset.debug.yaml"))
    left = [line for line in difflib.ndiff(plain, debug) if line.startswith(("- ", "+ "))]
    assert left
    assert all(any(word in line for word in ("kata-pulse", "isopod/pulse", "info", "trace", "scrape", "#")) for line in left), left
    # Removing one must not remove what the other runs as, and no sandbox may count twice.
    assert manifest("daemonset.yaml").spec.template.spec.service_account_name == "kata-pulse"
    assert manifest("daemonset.debug.yaml").spec.template.spec.service_account_name == "kata-pulse-debug"
    assert manifest("daemonset.debug.yaml").spec.template.metadata.annotations["prometheus.io/scrape"] == "false"


@pytest.mark.row("K21")
def test_the_monitor_selects_the_agents_and_leaves_sandboxes_their_names() -> None:
    template = manifest("daemonset.yaml").spec.template
    found = monitor().spec
    assert template.metadata.labels.items() >= found.selector.match_labels.items()
    assert not manifest("daemonset.debug.yaml").spec.template.metadata.labels.items() >= found.selector.match_labels.items()
    (endpoint,) = found.pod_metrics_endpoints
    assert endpoint.port in {port.name for port in template.spec.containers[0].ports}
    assert endpoint.honor_labels, "namespace and pod are the sandbox's"


def fake_engine(folder: Path, name: str, *, answers: bool = True) -> Path:
    """Make an engine that says where it was started and with which words; one that does not answer fails at `info`."""
    program = folder / name
    program.write_text(f'#!/bin/sh\n[ "$1" != info ] || exit {0 if answers else 1}\npwd\nprintf "%s\\n" "$0" "$@"\n')
    program.chmod(0o755)
    return program


def built(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PULSE / script, *words],
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


@pytest.mark.row("K23")
@pytest.mark.parametrize(("script", "target", "tag"), [("build-docker.sh", "agent", "latest"), ("build-docker-debug.sh", "debug", "debug")])
def test_a_build_script_asks_the_engine_for_its_target(tmp_path: Path, script: str, target: str, tag: str) -> None:
    engine = fake_engine(tmp_path, "engine")
    ended = built(script, "--no-cache", ENGINE=str(engine), PATH="/usr/bin:/bin", BASE="localhost/base:12")
    folder, program, verb, *words, context = ended.stdout.splitlines()
    assert (Path(folder), program, verb, context) == (DEPLOY.parent, str(engine), "build", ".")
    assert words.pop() == "--no-cache", "its own words go on to the engine"
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert (told["--target"], told["--tag"], told["--build-arg"]) == (target, f"isopod/pulse:{tag}", "BASE=localhost/base:12")
    assert (DEPLOY.parent / told["--file"]).is_file()


@pytest.mark.row("K23")
def test_a_build_script_finds_an_engine_that_answers_or_says_what_to_do(tmp_path: Path) -> None:
    for name in ("dirname", "id", "sed"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    none = built("build-docker.sh", PATH=str(tmp_path))
    assert (none.returncode, none.stdout) == (1, "")
    assert "neither docker nor podman answers" in none.stderr and "ENGINE=" in none.stderr
    absent = built("build-docker.sh", PATH=str(tmp_path), ENGINE="nerdctl")
    assert (absent.returncode, absent.stderr) == (1, "build-docker.sh: ENGINE=nerdctl: no such program\n")
    fake_engine(tmp_path, "docker", answers=False)
    fake_engine(tmp_path, "podman")
    assert built("build-docker.sh", PATH=str(tmp_path)).stdout.splitlines()[1] == str(tmp_path / "podman")


@pytest.mark.row("K23")
def test_the_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    ignored = [line for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    lines = (PULSE / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]]
    assert sources
    assert [name for name in sources if not (DEPLOY.parent / name).exists() or any(fnmatch(name, pattern) for pattern in ignored)] == []


@pytest.mark.row("K23")
def test_the_image_has_the_locked_versions_of_what_the_agent_imports() -> None:
    wanted = requirements()
    assert set(wanted) <= set((DEPLOY.parent / "requirements.lock").read_text().splitlines())
    code = "import sys, isopod.node.pulse, isopod.pulse.cri_client, isopod.pulse.push, yaml; print(*sys.modules)"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(DEPLOY.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
    owners = importlib.metadata.packages_distributions()
    loaded = {name for module in done.stdout.split() for name in owners.get(module.partition(".")[0], ())}
    have = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in wanted}
    # google is several packages' folder; the others of them are for servers.
    needed = {re.sub(r"[-_.]+", "-", name).lower() for name in loaded} - {"isopod", "setuptools", "grpcio-reflection", "types-protobuf"}
    assert needed <= have


def test_a_tree_is_made_in_an_empty_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    make = [sys.executable, "-m", "scripts.pulse_tree", "tree", str(tmp_path)]
    ended = subprocess.run(make, cwd=DEPLOY.parent, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, f"pulse_tree: {tmp_path} is not empty\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.row("K23")
def test_the_script_that_makes_a_base_says_what_it_lacks(tmp_path: Path) -> None:
    for name in ("dirname", "id", "sed"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    # What it looks for besides, below /usr/sbin, is there on some machines: then it misses the engine.
    ended = built("make-base.sh", PATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("make-base.sh: ")
    assert any(word in ended.stderr for word in ("sudo", "apt-get install debootstrap", "ENGINE="))


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


@pytest.mark.row("K23")
def test_the_image_has_every_library_that_the_agent_imports_sooner_or_later() -> None:
    """What is imported in a function alone would be missed only when somebody asks for it."""
    distributions = importlib.metadata.packages_distributions()
    wanted: set[str] = set()
    for path in sorted((PROJECT / "src" / "isopod" / "pulse").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                wanted.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted.add(node.module.partition(".")[0])
    ours = {name for top in wanted - sys.stdlib_module_names - {"isopod", "google"} for name in distributions[top]}
    assert {"bcrypt", "msgspec", "PyYAML"} <= ours <= set(DISTRIBUTIONS)
