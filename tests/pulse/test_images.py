"""The image of the metrics agent: the files that the Dockerfile puts into it, made by the same program, run as the manifests ask for it
and on isopod itself.

What builds them is this machine's Python here and Debian's in a container there; tests/pulse/test_images_built.py builds the whole.
"""

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.engine.seccomp import DEFAULT_PROFILE, load_profile
from isopod.pulse.pods import PodRow
from isopod.world.world import World
from tests.node.rig import HostBackend, Rig
from tests.project.sources import PROJECT
from tests.pulse.fake_cri import GrpcCri
from tests.pulse.images import Pod, archive, asker, confinement, events, load, stage, until
from tests.pulse.manifests import manifest
from tests.pulse.shims import FakeShims

NEEDED = ("curl", "ldconfig", "runc", "strip", "tar")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
pytestmark = [pytest.mark.host, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
TREE_BYTES_MAX = 120 << 20
IMAGE = "isopod/pulse:latest"
PORT = 8090


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the release image."""
    folder = tmp_path_factory.mktemp("image") / "tree"
    make = [sys.executable, "-m", "scripts.pulse_tree", "tree", str(folder)]
    done = subprocess.run(make, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200)
    try:
        assert done.returncode == 0, done.stderr
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def answering(runtime: GrpcCri) -> AsyncIterator[None]:
    """A container runtime that answers."""
    await runtime.start()
    try:
        yield
    finally:
        await runtime.stop()


@pytest.mark.row("K23")
@pytest.mark.slow
def test_the_image_has_what_runs_and_nothing_else(tree: Path) -> None:
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < TREE_BYTES_MAX
    assert sorted(path.name for path in (tree / "usr/bin").iterdir()) == ["kata-pulse", Path(sys.executable).resolve().name]
    packages = {path.name for path in (tree / "opt/isopod/lib").iterdir() if path.is_dir()}
    assert not packages & {"pip", "setuptools", "pytest", "mypy", "hypothesis", "cryptography"}
    assert not [
        path
        for path in tree.rglob("*")
        if path.name in ("tests", "testing", "conftest.py", "pip.conf") or path.suffix in (".c", ".h", ".a")
    ]
    assert {path.stat().st_mtime for path in files} == {0.0}
    assert {(path.stat().st_uid, path.stat().st_mode & 0o022) for path in files} == {(0, 0)}
    assert not [path for path in tree.rglob("*.py") if path.is_relative_to(tree / "opt") and not compiled(path).exists()]
    records = {path.name for path in (tree / "var/lib/dpkg/status.d").iterdir()}
    assert not records or records >= {"libc6", "libssl3", "python3.11-minimal", "libpython3.11-stdlib"}, "what scanners read"


def compiled(path: Path) -> Path:
    return path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"


@pytest.mark.row("K23")
@pytest.mark.slow
def test_the_image_trusts_whom_the_machine_trusts(tree: Path) -> None:
    code = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    done = subprocess.run(
        ["chroot", str(tree), str(Path(sys.executable).resolve()), "-IS", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    here = len(ssl.create_default_context(cafile="/etc/ssl/certs/ca-certificates.crt").get_ca_certs())
    assert int(done.stdout) == here > 0


@pytest.mark.row("K22")
@pytest.mark.row("K23")
def test_the_debug_image_has_a_shell_besides(tmp_path: Path) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("busybox-static is not installed")
    make = [sys.executable, "-m", "scripts.pulse_tree", "debug", str(tmp_path)]
    subprocess.run(make, cwd=PROJECT, capture_output=True, check=True, timeout=60)
    shell = ["chroot", str(tmp_path), "/usr/bin/sh", "-c", "echo $((6 * 7))"]
    assert subprocess.run(shell, capture_output=True, text=True, check=True, timeout=60).stdout == "42\n"


@pytest.mark.row("K21")
@pytest.mark.row("K22")
@pytest.mark.row("K23")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("daemonset.yaml", "agent"), ("daemonset.debug.yaml", "debug")])
async def test_it_runs_with_what_the_manifest_gives_it(host_world: World, folder: str, tree: Path, name: str, target: str) -> None:
    spec = manifest(name).spec.template.spec
    (container,) = spec.containers
    host = Path(folder) / "host"
    pod = Pod(Path(folder), tree, f"isopodt-{target}")
    pod.prepare(spec, stage(target), host=host, seccomp=await load_profile(host_world, DEFAULT_PROFILE, []))
    told = {variable.name: variable.value for variable in container.env}
    runtime = GrpcCri(f"{host}{told['RUNTIME_ENDPOINT']}")
    runtime.behaviour.pods = [PodRow("first", "uid-1", "web", "shop")]
    async with pod, answering(runtime):
        get = asker(["nsenter", f"--net=/proc/{pod.pid}/ns/net"], f"127.0.0.1:{container.ports[0].container_port}")
        # The root of sandboxes comes after the agent; only what it lies in is mounted.
        async with FakeShims(host_world, f"{host}/run/vc/sbs") as go, FakeShims(host_world, f"{host}/run/kata") as rust:
            await go.add("first")
            await rust.add("second")
            for probe in (container.readiness_probe, container.liveness_probe):
                await until(get, probe.http_get.path)
            whose = 'sandbox_id="first",cri_uid="uid-1",cri_name="web",cri_namespace="shop"'
            await until(get, "/metrics", f"kata_shim_threads{{{whose}", 'kata_shim_threads{sandbox_id="second"')
            await go.remove("first")
            found = confinement(pod.pid)
            assert {value for key, value in found.items() if key.startswith("Cap")} == {"0" * 16}
            assert (found["NoNewPrivs"], found["Seccomp"], found["Uid"].split()[0]) == ("1", "2", "0")
            await until(get, "/sandboxes", "ID: second")
            assert await pod.terminate() == 0
    (ended,) = events(pod.log, "shutdown.finished")
    assert ended["clean"] and ended["duration_s"] < 2
    assert bool(events(pod.log, "pulse.sandbox_found")) == (target == "debug"), "what is logged for debugging alone"


@pytest.mark.row("K21")
@pytest.mark.row("K23")
@pytest.mark.slow
async def test_it_runs_on_isopod_itself_as_root_and_as_nobody(host_rig: Rig, tree: Path) -> None:
    backend = host_rig.backend
    assert isinstance(backend, HostBackend)
    sandboxes = f"{host_rig.folder}/vc/sbs"
    async with host_rig as rig, FakeShims(rig.world, sandboxes) as shims:
        await shims.add("first")
        os.chmod(host_rig.folder, 0o755)
        assert await load(rig, archive(tree, IMAGE, stage("agent").config)) == [IMAGE]
        mounts = (m.Mount(source=f"{host_rig.folder}/vc", destination="/run/vc", read_only=True),)
        root = await rig.run_detached(image=IMAGE, name="root", network="bridge", mounts=mounts)
        nobody = await rig.run_detached(image=IMAGE, name="nobody", network="bridge", mounts=mounts, user="65534:65534")
        get, get_nobody = (asker(backend.enter, f"{record.network.ip_address}:{PORT}") for record in (root, nobody))
        await until(get, "/readyz", "/run/vc/sbs available")
        await until(get, "/metrics", 'kata_shim_threads{sandbox_id="first"')
        # Connecting needs the right to write to a socket, which is root's; nobody is told so, and then given it.
        await until(get_nobody, "/targets", "refused")
        assert "kata_shim_threads" not in (await get_nobody("/metrics"))[1]
        os.chmod(shims.shims["first"].socket, 0o666)
        await until(get_nobody, "/metrics", 'kata_shim_threads{sandbox_id="first"')
        assert root.pid is not None and nobody.pid is not None
        written = (path for path in Path(f"{rig.folder}/root/containers/{root.id}/upper").rglob("*") if not path.is_dir())
        assert {path.name for path in written} == {"hosts", "hostname", "resolv.conf"}, "what the engine writes, and nothing else"
        assert confinement(root.pid)["NoNewPrivs"] == "1"
        assert confinement(nobody.pid)["CapEff"] == "0" * 16
        for name in ("root", "nobody"):
            await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name=name, timeout_s=10.0))
            assert (await rig.inspect(name)).exit_code == 0
            (ended,) = events((await rig.logs(name)).stderr.decode(), "shutdown.finished")
            assert ended["clean"] and ended["duration_s"] < 2
