"""The images of the metrics agent, built whole by their scripts on a Debian from debootstrap, and run by podman and by isopod.

`make test-images`; takes five minutes and Debian's archive, the registries of Python and of Rust. Not a part of the other suites, which run
the same files as tests/pulse/test_images.py makes them.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.errors import CommandNotRunnable
from isopod.world.world import World
from tests.node.rig import HostBackend, Rig
from tests.pulse.images import asker, confinement, events, load, output, until
from tests.pulse.manifests import PULSE
from tests.pulse.shims import FakeShims

NEEDED = ("curl", "debootstrap", "podman", "unshare")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not os.environ.get("ISOPOD_IMAGES"), reason="builds for minutes: make test-images, which sets ISOPOD_IMAGES=1"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
BUILD_S = 2000
IMAGE_BYTES_MAX = 120 << 20
# crun refuses v1 controllers beside a unified hierarchy: podman gets a view of the machine without the latter.
WITHOUT_UNIFIED = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    'if [ -d /sys/fs/cgroup/memory ] && mountpoint -q /sys/fs/cgroup/unified; then umount -l /sys/fs/cgroup/unified; fi; exec "$@"',
    "sh",
)
AS_THE_MANIFEST_SAYS = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=0:0")
# podman asks for more open files than a container of this test may have anywhere, and leaves the group above its containers' groups.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--cgroups=disabled")


class Podman(NamedTuple):
    """A podman with storage of its own, in which both images are."""

    environment: dict[str, str]

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run a command of it."""
        argv = [*WITHOUT_UNIFIED, "podman", *words]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False, timeout=BUILD_S)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Make the base, then the images."""
    folder = tmp_path_factory.mktemp("podman")
    (folder / "tmp").mkdir()
    (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n')
    mine = {"CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf", "TMPDIR": f"{folder}/tmp", "BUILDAH_ISOLATION": "chroot"}
    made = Podman(os.environ | mine | {"ENGINE": "podman", "BASE": "localhost/isopod-test-base:12"})
    try:
        script("make-base.sh", made.environment["BASE"], environment=made.environment)
        for name in ("build-docker.sh", "build-docker-debug.sh"):
            script(name, environment=made.environment)
        yield made
    finally:
        subprocess.run(["umount", f"{folder}/graph/overlay"], capture_output=True, check=False, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def script(name: str, *words: str, environment: dict[str, str]) -> None:
    done = subprocess.run([PULSE / name, *words], env=environment, capture_output=True, text=True, check=False, timeout=BUILD_S)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.row("K23")
def test_the_images_are_small(podman: Podman) -> None:
    sizes = {tag: int(podman("image", "inspect", "--format", "{{.Size}}", f"isopod/pulse:{tag}")) for tag in ("latest", "debug")}
    print(sizes)  # noqa: T201 - shown with -s
    assert max(sizes.values()) < IMAGE_BYTES_MAX


@pytest.mark.row("K21")
@pytest.mark.row("K22")
@pytest.mark.row("K23")
@pytest.mark.parametrize("tag", ["latest", "debug"])
async def test_podman_runs_it_confined(podman: Podman, host_world: World, folder: str, tag: str) -> None:
    name = f"isopodt-{tag}"
    words = ["run", "--rm", "--name", name, "--network=none", *AS_THE_MANIFEST_SAYS, *LIMITS, "-v", f"{folder}/vc:/run/vc:ro"]
    async with FakeShims(host_world, f"{folder}/vc/sbs") as shims:
        await shims.add("first")
        with open(f"{folder}/log", "wb") as log:
            argv = [*WITHOUT_UNIFIED, "podman", *words, f"isopod/pulse:{tag}"]
            process = subprocess.Popen(argv, env=podman.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            pid = await started(podman, name, process)
            get = asker(["nsenter", f"--net=/proc/{pid}/ns/net"], "127.0.0.1:8090")
            await until(get, "/readyz", "/run/vc/sbs available")
            await until(get, "/metrics", 'kata_shim_threads{sandbox_id="first"')
            assert confinement(pid)["CapEff"] == "0" * 16
            assert confinement(pid)["NoNewPrivs"] == "1"
            await shims.remove("first")
            os.kill(pid, 15)
            assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 60) == 0
        finally:
            podman("rm", "--force", "--ignore", "--time", "0", name)
            process.wait(60)
    text = Path(f"{folder}/log").read_text(encoding="utf-8")
    (ended,) = events(text, "shutdown.finished")
    assert ended["duration_s"] < 2
    assert bool(events(text, "pulse.sandbox_found")) == (tag == "debug")


async def started(podman: Podman, name: str, process: subprocess.Popen[bytes]) -> int:
    """Return the pid of a container's first process once it runs."""
    async with asyncio.timeout(60):
        while True:
            words = (await output("podman", "inspect", "--format", "{{.State.Pid}}", name, environment=podman.environment)).stdout.split()
            if words and int(words[0]) > 0:
                return int(words[0])
            assert process.poll() is None
            await asyncio.sleep(0.1)


@pytest.mark.row("K21")
@pytest.mark.row("K22")
@pytest.mark.row("K23")
@pytest.mark.parametrize("tag", ["latest", "debug"])
async def test_isopod_loads_and_runs_it(podman: Podman, host_rig: Rig, tag: str) -> None:
    assert isinstance(host_rig.backend, HostBackend)
    enter, folder = host_rig.backend.enter, host_rig.folder
    podman("save", "--output", f"{folder}/image.tar", f"isopod/pulse:{tag}")
    async with host_rig as rig, FakeShims(rig.world, f"{folder}/vc/sbs") as shims:
        await shims.add("first")
        (image,) = await load(rig, Path(f"{folder}/image.tar").read_bytes())
        mounts = (m.Mount(source=f"{folder}/vc", destination="/run/vc", read_only=True),)
        record = await rig.run_detached(image=image, name="agent", network="bridge", mounts=mounts)
        get = asker(enter, f"{record.network.ip_address}:8090")
        await until(get, "/readyz", "/run/vc/sbs available")
        await until(get, "/metrics", 'kata_shim_threads{sandbox_id="first"')
        await until(get, "/sandboxes", "ID: first")
        if tag == "debug":
            assert (await rig.exec("agent", "sh", "-c", "exit 7")).exit_code == 7
        else:
            with pytest.raises(CommandNotRunnable):
                await rig.exec("agent", "sh", "-c", "exit 7")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="agent", timeout_s=10.0))
        assert (await rig.inspect("agent")).exit_code == 0
        log = (await rig.logs("agent")).stderr.decode()
        assert bool(events(log, "pulse.sandbox_found")) == (tag == "debug")
