"""The agent's image in tests: what the Dockerfile says about it, an archive of it, and runc as the kubelet would use it.

`Pod` starts a tree of files with exactly the user, capabilities, mounts and variables that a manifest asks for. What differs from a
cluster: the folders of the host lie below another one, and the network is a namespace with loopback only.
"""

import asyncio
import json
import re
import shlex
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import msgspec

from isopod.api import messages as m
from isopod.api import methods
from tests.engine.images.build import ImageSpec, docker_archive
from tests.node.rig import Rig
from tests.pulse.manifests import PULSE, Container, PodSpec

Json = dict[str, Any]
Get = Callable[[str], Awaitable[tuple[int, str]]]
LIMIT_S: Final = 60.0
_SIZES: Final = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


class Stage(NamedTuple):
    """What a stage of the Dockerfile says about its image."""

    user: str
    env: Mapping[str, str]
    entrypoint: tuple[str, ...]

    @property
    def config(self) -> Json:
        """The `config` of an image."""
        return {"User": self.user, "Env": [f"{key}={value}" for key, value in self.env.items()], "Entrypoint": list(self.entrypoint)}


def stage(name: str) -> Stage:
    """Read a stage, with what it has from the one that it is made from."""
    found: dict[str, Stage] = {"scratch": Stage("", {}, ())}
    current = ""
    text = (PULSE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for word, rest in (line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")):
        was = found.get(current, found["scratch"])
        if word == "FROM":
            source, current = (part for part in rest.split() if part != "AS")
            found[current] = found.get(source, found["scratch"])
        elif word == "USER":
            found[current] = was._replace(user=rest)
        elif word == "ENV":
            found[current] = was._replace(env={**was.env, **dict(pair.split("=", 1) for pair in shlex.split(rest))})
        elif word == "ENTRYPOINT":
            found[current] = was._replace(entrypoint=tuple(json.loads(rest)))
    return found[name]


def archive(tree: Path, name: str, config: Json) -> bytes:
    """Return what `docker save` would say of an image with the files of a tree."""
    made = subprocess.run(["tar", "--numeric-owner", "-C", str(tree), "-c", "."], capture_output=True, check=True, timeout=LIMIT_S)
    return docker_archive([ImageSpec([made.stdout], [name], config)])


async def load(rig: Rig, data: bytes) -> list[str]:
    """Give an archive to a node; return the names of its images."""
    async with rig.client.open(methods.IMAGE_LOAD, m.LoadImages(total_bytes=len(data))) as call:
        for start in range(0, len(data), 1 << 18):
            await call.send(m.Chunk(data=data[start : start + (1 << 18)]))
        call.end()
        reply = await call.reply()
    return [name for image in reply.images for name in image.names]


def asker(enter: Iterable[str], host: str) -> Get:
    """Return what asks an agent with curl: from a path to status and body; (0, "") if nobody listens.

    Args:
        enter: The words before a command that runs where the agent can be reached.
        host: Its address, with the port.
    """
    argv = [*enter, "curl", "--silent", "--max-time", "20", "--write-out", "\n%{http_code}"]

    async def get(path: str) -> tuple[int, str]:
        done = await output(*argv, f"http://{host}{path}")
        body, _, status = done.stdout.rpartition("\n")
        return int(status or 0), body

    return get


async def output(*argv: str, check: bool = False, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end while the loop goes on."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=check, timeout=LIMIT_S)

    return await asyncio.get_running_loop().run_in_executor(None, run)


async def until(get: Get, path: str, *texts: str) -> str:
    """Ask until the answer is a 200 that has all of these; a program that begins gives no event."""
    answer = (0, "")
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                answer = await get(path)
                if answer[0] == 200 and all(text in answer[1] for text in texts):
                    return answer[1]
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{path} never said {texts}: {answer}") from None


def confinement(pid: int) -> dict[str, str]:
    """Return the lines of /proc/PID/status that say what a process may do."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {key: value.strip() for key, value in pairs if key.startswith("Cap") or key in ("Uid", "Gid", "NoNewPrivs", "Seccomp")}


def events(log: str, event: str) -> list[Json]:
    """Return the agent's lines of a log that tell of an event: runc writes there too, in lines of its own form."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


# --- as the kubelet does -----------------------------------------------------------------------------------------------


def bundle_config(base: Json, spec: PodSpec, image: Stage, *, host: Path, seccomp: Json) -> Json:
    """Return the OCI configuration for the one container of a pod.

    Args:
        base: What `runc spec` writes: namespaces and the kernel's file systems.
        spec: The pod.
        image: Its image.
        host: Stands for the host's root: hostPath volumes lie below it.
        seccomp: The engine's default profile.
    """
    (container,) = spec.containers
    security = container.security_context
    assert security.seccomp_profile.type == "RuntimeDefault"
    assert security.capabilities.drop == ["ALL"]
    environment = {**image.env, **{variable.name: variable.value for variable in container.env}}
    process = {
        "terminal": False,
        "user": {"uid": security.run_as_user, "gid": security.run_as_group},
        "args": list(image.entrypoint),
        "env": [f"{key}={value}" for key, value in environment.items()],
        "cwd": "/",
        "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
        "noNewPrivileges": not security.allow_privilege_escalation,
    }
    limit = {"limit": _bytes(container.resources.limits["memory"])}
    linux = base["linux"] | {"seccomp": seccomp, "resources": {"memory": limit}, "cgroupsPath": "/isopodt-pulse"}
    return base | {
        "process": process,
        "root": {"path": base["root"]["path"], "readonly": security.read_only_root_filesystem},
        "mounts": base["mounts"] + _binds(spec, container, host),
        "linux": linux,
    }


def _binds(spec: PodSpec, container: Container, host: Path) -> list[Json]:
    volumes = {volume.name: volume.host_path for volume in spec.volumes}
    binds = []
    for mount in container.volume_mounts:
        source = host / volumes[mount.name].path.removeprefix("/")
        if volumes[mount.name].type == "DirectoryOrCreate":
            source.mkdir(parents=True, exist_ok=True)
        options = ["rbind", "ro" if mount.read_only else "rw", "rslave" if mount.mount_propagation == "HostToContainer" else "rprivate"]
        binds.append({"destination": mount.mount_path, "type": "bind", "source": str(source), "options": options})
    return binds


def _bytes(quantity: str) -> int:
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity)
    assert match, quantity
    return int(match.group(1)) * _SIZES[match.group(2)]


class Pod:
    """The container of a pod in runc; use as `async with`.

    Args:
        folder: For the bundle, runc's state and the log.
        tree: The image's files.
        name: The container's name.
    """

    def __init__(self, folder: Path, tree: Path, name: str) -> None:
        self._folder = folder
        self._tree = tree
        self._name = name
        self._runc = ["runc", "--root", f"{folder}/runc"]
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def prepare(self, spec: PodSpec, image: Stage, *, host: Path, seccomp: Json) -> None:
        """Write the bundle."""
        (self._folder / "bundle").mkdir()
        subprocess.run(["runc", "spec", "--bundle", f"{self._folder}/bundle"], check=True, timeout=LIMIT_S)
        path = self._folder / "bundle" / "config.json"
        base = json.loads(path.read_bytes())
        base["root"]["path"] = str(self._tree)
        path.write_bytes(msgspec.json.encode(bundle_config(base, spec, image, host=host, seccomp=seccomp)))

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self._folder / "log").read_text(encoding="utf-8")

    async def __aenter__(self) -> Self:
        """Start it."""
        with (self._folder / "log").open("wb") as log:
            argv = [*self._runc, "run", "--bundle", f"{self._folder}/bundle", self._name]
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        async with asyncio.timeout(LIMIT_S):
            while not self.pid:
                state = await output(*self._runc, "state", self._name)
                found = json.loads(state.stdout) if state.returncode == 0 else {}
                self.pid = found["pid"] if found.get("status") == "running" else 0
                assert self.pid or self._process.poll() is None, self.log
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it, however it stands."""
        await output(*self._runc, "delete", "--force", self._name)
        await self._ended()

    async def terminate(self) -> int:
        """Send SIGTERM to its first process, and return its exit code."""
        await output(*self._runc, "kill", self._name, "TERM", check=True)
        return await self._ended()

    async def _ended(self) -> int:
        assert self._process is not None
        return await asyncio.get_running_loop().run_in_executor(None, self._process.wait, LIMIT_S)
