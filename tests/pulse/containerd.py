"""Debian's containerd for tests: it, its shims and its pods live in namespaces of their own and end together, however a test ends.

The first process of a PID namespace holds it, with private mounts (an own /run and /var/lib: containerd's shims, runc and CNI plugins write
there whatever the configuration says) and a private network, in which the CNI bridge is made. Killing that process kills all the rest, and
mounts, links and network namespaces go with it. What does not are the control groups: they are removed one by one.

The pods' image is made here of busybox, in the form that `docker save` writes. Nothing is fetched.
"""

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PROTO: Final = Path(__file__).parent / "cri_test.proto"
IMAGE: Final = "isopod.test/pause:1"
HANDLER: Final = "kata-qemu"
"""A second runtime handler, which is runc too."""
NEEDED: Final = ("containerd", "ctr", "containerd-shim-runc-v2", "runc", "unshare", "nsenter", "protoc")
PLUGINS: Final = "/usr/lib/cni"
BUSYBOX: Final = "/bin/busybox"
START_S: Final = 60.0
CALL_S: Final = 60.0
SERVICE: Final = "runtime.v1.RuntimeService"
HOST_NETWORK: Final = {"network": 2, "pid": 1}
OWN_NETWORK: Final = {"network": 0, "pid": 1}

_CONFIG: Final = """version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.restart",
]
[grpc]
  address = "{folder}/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
      runtime_type = "io.containerd.runc.v2"
"""
_NETWORK: Final = {
    "cniVersion": "0.4.0",
    "name": "test",
    "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": {"type": "host-local", "subnet": "10.244.9.0/24"}}],
}
_HOLD: Final = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
ip link set lo up
echo ready
exec sleep 600
"""


def missing() -> str:
    """Return what is not installed here, "" if nothing is."""
    tools = [name for name in NEEDED if shutil.which(name) is None]
    files = [path for path in (f"{PLUGINS}/bridge", f"{PLUGINS}/host-local", BUSYBOX) if not os.path.exists(path)]
    return " ".join(tools + files)


class Containerd:
    """A containerd, its pods and a client that makes them. Use as a context.

    Args:
        folder: For everything that it writes.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.socket = f"{folder}/c.sock"
        self.cgroup = f"isopod-cri-{os.getpid()}"
        self._holder: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._pool = DescriptorPool()

    async def __aenter__(self) -> Self:
        """Start it, and give it the image."""
        for name in ("cni", "logs"):
            os.mkdir(f"{self.folder}/{name}")
        text = _CONFIG.format(folder=self.folder, image=IMAGE, plugins=PLUGINS, handler=HANDLER)
        Path(f"{self.folder}/config.toml").write_text(text)
        Path(f"{self.folder}/cni/10-test.conflist").write_text(json.dumps(_NETWORK))
        Path(f"{self.folder}/pause.tar").write_bytes(pause_image())
        try:
            self._compile()
            self._hold()
            await self.start()
            self._inside(
                "ctr", "-a", self.socket, "-n", "k8s.io", "images", "import", "--snapshotter", "native", f"{self.folder}/pause.tar"
            )
            return self
        except BaseException:
            await self._end()
            raise

    async def __aexit__(self, *_: object) -> None:
        """End all of it."""
        await self._end()

    async def start(self) -> None:
        """Start the daemon, and wait for its socket."""
        with open(f"{self.folder}/log", "ab") as log:
            self._daemon = subprocess.Popen([*self._enter, "containerd", "--config", f"{self.folder}/config.toml"], stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not os.path.exists(self.socket):
            assert self._daemon.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            await asyncio.sleep(0.02)  # a socket that begins to listen gives no event; the limit above bounds the asking

    def kill(self) -> None:
        """Kill the daemon; its pods and their shims live on, and its socket's file stays behind."""
        assert self._daemon is not None
        for pid in _children(self._daemon.pid):  # nsenter waits for it
            os.kill(pid, signal.SIGKILL)
        self._daemon.wait(START_S)

    def log(self) -> str:
        return Path(f"{self.folder}/log").read_text(errors="replace")

    async def run_pod(self, name: str, *, uid: str, namespace: str = "shop", **told: Any) -> tuple[str, dict[str, Any]]:
        """Start a pod sandbox; return its id, and what it was made from."""
        security = {"namespace_options": told.pop("network", HOST_NETWORK)}
        handler = told.pop("handler", "")
        config = {
            "metadata": {"name": name, "uid": uid, "namespace": namespace, "attempt": 0},
            "log_directory": f"{self.folder}/logs",
            "linux": {"cgroup_parent": f"/{self.cgroup}", "security_context": security},
            **told,
        }
        reply = await self.call("RunPodSandbox", config=config, runtime_handler=handler)
        return str(reply.pod_sandbox_id), config

    async def run_container(self, pod: tuple[str, dict[str, Any]], name: str, command: Sequence[str] = (BUSYBOX, "sleep", "600")) -> str:
        """Start a container in a pod; return its id."""
        identifier, config = pod
        wanted = {
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": list(command),
            "log_path": f"{name}.log",
            "linux": {"security_context": config["linux"]["security_context"]},
        }
        made = await self.call("CreateContainer", pod_sandbox_id=identifier, config=wanted, sandbox_config=config)
        await self.call("StartContainer", container_id=made.container_id)
        return str(made.container_id)

    async def stop_container(self, identifier: str) -> None:
        await self.call("StopContainer", container_id=identifier, timeout=0)

    async def remove_pod(self, pod: tuple[str, dict[str, Any]]) -> None:
        """Stop and remove a pod with its containers."""
        await self.call("StopPodSandbox", pod_sandbox_id=pod[0])
        await self.call("RemovePodSandbox", pod_sandbox_id=pod[0])

    async def call(self, name: str, **fields: Any) -> Any:
        """Call a method of the CRI."""
        if self._channel is None:
            options = (("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1))
            self._channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options=options)
        method = self._pool.FindServiceByName(SERVICE).methods_by_name[name]
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        stub: Any = self._channel.unary_unary(f"/{SERVICE}/{name}")
        return reply.FromString(await stub(request(**fields).SerializeToString(), timeout=CALL_S, wait_for_ready=True))

    def left(self) -> list[str]:
        """Return what is left of it on the machine, once it has ended."""
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if self.folder in line]
        groups = [str(path) for path in _cgroups(self.cgroup)]
        return mounts + groups + [f"process {pid}" for pid in _processes(self.folder)]

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _enter(self) -> list[str]:
        assert self._holder is not None
        first = _children(self._holder.pid)[0]
        return ["nsenter", f"--target={first}", "--pid", "--mount", "--net"]

    def _hold(self) -> None:
        command = ["unshare", "--pid", "--mount", "--net", "--propagation", "private", "--fork", "--kill-child", "sh", "-c", _HOLD]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    def _inside(self, *argv: str) -> None:
        subprocess.run([*self._enter, *argv], check=True, capture_output=True, timeout=CALL_S)

    def _compile(self) -> None:
        target = f"{self.folder}/set"
        subprocess.run(["protoc", f"--proto_path={PROTO.parent}", f"--descriptor_set_out={target}", PROTO.name], check=True, timeout=60)
        for file in FileDescriptorSet.FromString(Path(target).read_bytes()).file:
            self._pool.Add(file)

    async def _end(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        if self._holder is not None:
            for pid in _children(self._holder.pid):
                os.kill(pid, signal.SIGKILL)  # the first process of its PID namespace: all others end with it
            self._holder.wait(START_S)
            assert self._holder.stdout is not None
            self._holder.stdout.close()
        if self._daemon is not None:
            self._daemon.wait(START_S)
        await _remove_cgroups(self.cgroup)


def pause_image() -> bytes:
    """Return an image with nothing but busybox, as `docker save` writes it."""
    layer = _tar({"bin/busybox": Path(BUSYBOX).read_bytes()})
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Entrypoint": [BUSYBOX, "sleep", "600"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    return _tar({"layer.tar": layer, "config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()})


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _processes(folder: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and folder.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
        except OSError:
            continue  # it has just ended
    return found


def _cgroups(name: str) -> list[Path]:
    """Return the groups of that name in all hierarchies, and those below, innermost first."""
    tops = [top / name for top in Path("/sys/fs/cgroup").iterdir() if top.is_dir() and not top.is_symlink()] + [
        Path("/sys/fs/cgroup") / name
    ]
    found = [Path(folder) for top in tops if top.is_dir() for folder, _, _ in os.walk(top)]
    return sorted(found, key=lambda path: -len(path.parts))


async def _remove_cgroups(name: str) -> None:
    until = time.monotonic() + START_S
    while groups := _cgroups(name):
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                assert time.monotonic() < until, f"{group} stays busy"
        await asyncio.sleep(0.02)  # the last processes are just ending; the limit above bounds the asking
