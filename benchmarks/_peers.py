"""The engines that are compared, each by its own command line and in the best configuration that works here.

Every engine offers the same few verbs as argument lists, so that a row is written once. Debian's podman and docker both run crun; docker's
daemon is one of the benchmark's own, with its own data and socket, without the user-land proxy. `trixie` is a newer podman in a root
file system made by debootstrap, entered by chroot(1), which adds about a millisecond to each of its commands.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from benchmarks._arena import CGROUP_WORD
from benchmarks._harness import OURS, PROJECT, CommandFailed

IMAGE: Final = "bench/busybox"
CRUN: Final = "/usr/bin/crun"
CGROUP_PARENT: Final = f"/{CGROUP_WORD}"
READY_DEADLINE_S: Final = 30.0
SETUP_DEADLINE_S: Final = 120.0
PACKAGES: Final = ("podman", "netavark", "aardvark-dns", "docker.io", "iptables", "tini", "crun", "conmon", "debootstrap")
TRIXIE_PACKAGES: Final = "podman,crun,conmon,netavark,aardvark-dns,nftables,iptables,catatonit,ca-certificates"
TRIXIE_ROOT: Final = PROJECT / "build" / "peers" / "trixie"
_POLICY: Final = Path("/usr/sbin/policy-rc.d")

Start = Callable[[Path, Path], str]


class Engine:
    """An engine with docker's command line: what to type for each measurement. Argument lists start with an absolute path.

    Args:
        name: Who it is, in the table.
        base: The program and the options that every command needs.
        start: Brings it up and gives it the image of the root file system (folder, tar); returns its version, "" for none.
        bridge: What its default bridge network is called.
        run_options: What every run needs besides.
        remove_options: What `rm -f` needs so that it kills at once, as the others do, instead of waiting for each container's grace.
        environment: For every command.
    """

    def __init__(
        self,
        name: str,
        base: Sequence[str],
        start: Start,
        *,
        bridge: str = "bridge",
        run_options: Sequence[str] = (),
        remove_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.environment = dict(environment or os.environ)
        self._base = list(base)
        self._start = start
        self._bridge = bridge
        self._run_options = list(run_options)
        self._remove_options = list(remove_options)

    def start(self, rootfs: Path, archive: Path) -> None:
        """Bring it up; a CommandFailed or OSError says why that did not work."""
        version = self._start(rootfs, archive)
        if version:
            self.name = f"{self.name} {version} + crun"

    def run(self, *, network: str, detach: str = "") -> list[str]:
        """Return the command line of `run --rm ... true`, or of a detached container of the name `detach` that sleeps."""
        network = self._bridge if network == "bridge" else network
        if detach:
            return [*self._base, "run", *self._run_options, "-d", "--name", detach, "--network", network, IMAGE, "/bin/sleep", "3600"]
        return [*self._base, "run", *self._run_options, "--rm", "--network", network, IMAGE, "/bin/true"]

    def execute(self, container: str) -> list[str]:
        """Return the command line of `exec CONTAINER true`."""
        return [*self._base, "exec", container, "/bin/true"]

    def listing(self) -> list[str]:
        """Return the command line of `ps`."""
        return [*self._base, "ps"]

    def remove(self, containers: Sequence[str]) -> list[str]:
        """Return the command line that removes running containers."""
        return [*self._base, "rm", "-f", *self._remove_options, *containers]

    def version(self) -> list[str]:
        """Return the command line that prints the client's version and talks to nobody."""
        return [*self._base, "--version"]


def isopod(folder: Path, settings: Mapping[str, str] | None = None) -> Engine:
    """Return our own node, as `isopod node` starts it, with its data in `folder`; `settings` are variables of its configuration."""
    places = {"ISOPOD_ROOT": f"{folder}/data", "ISOPOD_RUN_ROOT": f"{folder}/run", "ISOPOD_PREFIX": CGROUP_WORD}
    environment = os.environ | places | dict(settings or {})
    program = str(PROJECT / ".venv/bin/isopod")

    def start(rootfs: Path, archive: Path) -> str:
        del archive
        folder.mkdir(parents=True)
        _daemon([program, "node"], environment, folder / "node.log", ready=[program, "info"])
        quiet([program, "import", str(rootfs), IMAGE], environment)
        return ""

    return Engine(OURS, [program], start, environment=environment)


def podman(folder: Path) -> Engine:
    """Return Debian's podman with crun, cgroups without systemd, and storage of its own."""
    base = ["/usr/bin/podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--tmpdir", f"{folder}/tmp"]
    base += ["--runtime", CRUN, "--cgroup-manager", "cgroupfs", "--network-backend", "netavark"]
    base += ["--network-config-dir", f"{folder}/networks", "--storage-driver", "overlay", "--events-backend", "file"]

    def start(rootfs: Path, archive: Path) -> str:
        del rootfs
        folder.mkdir(parents=True)
        quiet([*base, "import", str(archive), IMAGE])
        return quiet([*base, "version", "--format", "{{.Client.Version}}"]).strip()

    return Engine("podman", base, start, bridge="podman", run_options=["--cgroup-parent", CGROUP_PARENT], remove_options=["--time", "0"])


def docker(folder: Path) -> Engine:
    """Return a docker daemon of the benchmark's own, with crun and without the user-land proxy."""
    base = ["/usr/bin/docker", "--host", f"unix://{folder}/docker.sock"]
    daemon = ["/usr/sbin/dockerd", "--host", f"unix://{folder}/docker.sock", "--data-root", f"{folder}/data"]
    daemon += ["--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/docker.pid", "--config-file", f"{folder}/daemon.json"]
    daemon += ["--storage-driver", "overlay2", "--add-runtime", f"crun={CRUN}", "--default-runtime", "crun"]
    daemon += ["--userland-proxy=false", "--cgroup-parent", CGROUP_PARENT]

    def start(rootfs: Path, archive: Path) -> str:
        del rootfs
        folder.mkdir(parents=True)
        (folder / "daemon.json").write_text("{}", encoding="ascii")
        _daemon(daemon, os.environ, folder / "dockerd.log", ready=[*base, "info"])
        quiet([*base, "import", str(archive), IMAGE])
        return quiet([*base, "version", "--format", "{{.Server.Version}}"]).strip()

    return Engine("docker", base, start)


def trixie(folder: Path) -> Engine:
    """Return a newer podman, in a root file system of its own."""
    base = ["/usr/sbin/chroot", str(TRIXIE_ROOT), "/usr/bin/podman", "--root", "/bench/root", "--runroot", "/bench/run"]
    base += ["--runtime", CRUN, "--cgroup-manager", "cgroupfs", "--events-backend", "file"]

    def start(rootfs: Path, archive: Path) -> str:
        del rootfs
        folder.mkdir(parents=True)
        (TRIXIE_ROOT / "bench").mkdir(exist_ok=True)
        # A root that is a mount point: podman remounts it in a namespace of its own.
        quiet(["/usr/bin/mount", "--bind", str(TRIXIE_ROOT), str(TRIXIE_ROOT)])
        for source, target in (("/proc", "proc"), ("/sys", "sys"), ("/dev", "dev"), (str(folder), "bench")):
            quiet(["/usr/bin/mount", "--rbind", source, str(TRIXIE_ROOT / target)])
        quiet(["/usr/bin/mount", "-t", "tmpfs", "none", str(TRIXIE_ROOT / "run")])
        shutil.copy(archive, folder / "image.tar")
        quiet([*base, "import", "/bench/image.tar", IMAGE])
        return quiet([*base, "version", "--format", "{{.Client.Version}}"]).strip()

    return Engine("podman", base, start, bridge="podman", run_options=["--cgroup-parent", CGROUP_PARENT], remove_options=["--time", "0"])


class Crun:
    """The OCI runtime by itself: the floor that no engine above it can pass. It knows `run` without a network, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.name = "crun"
        self.folder = folder
        self.environment = dict(os.environ)

    def start(self, rootfs: Path, archive: Path) -> None:
        """Write a bundle that runs /bin/true."""
        del archive
        self.folder.mkdir(parents=True)
        shutil.copytree(rootfs, self.folder / "rootfs", symlinks=True)
        quiet([CRUN, "spec", "--bundle", str(self.folder)], self.environment)
        path = self.folder / "config.json"
        spec = msgspec.json.decode(path.read_bytes())
        spec["process"] |= {"terminal": False, "args": ["/bin/true"]}
        spec["linux"]["cgroupsPath"] = f"{CGROUP_PARENT}/bare"
        path.write_bytes(msgspec.json.encode(spec))

    def run(self, *, network: str, detach: str = "") -> list[str]:
        """Return the command line of `crun run`; the spec asks for a network namespace of its own with nothing in it."""
        del network, detach
        return [CRUN, "--root", str(self.folder / "state"), "run", "--bundle", str(self.folder), "bench"]

    def version(self) -> list[str]:
        """Return the command line of --version."""
        return [CRUN, "--version"]


def install() -> list[str]:
    """Install the peers with apt, without letting any of their services start; return what could not be had, one line each."""
    missing = [package for package in PACKAGES if not _installed(package)]
    problems = []
    if missing:
        try:
            with _no_services():
                _apt_install(missing)
        except (CommandFailed, OSError) as error:
            problems.append(f"Debian's peers: {error}")
    if not (TRIXIE_ROOT / "usr/bin/podman").exists():
        try:
            _bootstrap_trixie()
        except (CommandFailed, OSError) as error:
            shutil.rmtree(TRIXIE_ROOT, ignore_errors=True)
            problems.append(f"trixie's podman: {error}")
    return problems


def quiet(argv: Sequence[str], environment: Mapping[str, str] | None = None, *, deadline_s: float = SETUP_DEADLINE_S) -> str:
    """Run a preparing command to its end and return its output; a failure is a CommandFailed that shows it."""
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=deadline_s
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(argv, -9, f"no end after {deadline_s:g} s") from error
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stderr or done.stdout)
    return done.stdout


def _daemon(argv: Sequence[str], environment: Mapping[str, str], log: Path, *, ready: Sequence[str]) -> None:
    """Start a daemon and return when the command `ready` succeeds."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + READY_DEADLINE_S
    while True:
        try:
            quiet(ready, environment, deadline_s=10)
            return
        except CommandFailed as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise CommandFailed(argv, process.wait(), f"{error}; {log.read_text(encoding='utf-8', errors='replace')[-300:]}") from error
        time.sleep(0.05)


def _installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package], capture_output=True, text=True, check=False)
    return done.stdout == "installed"


def _apt_install(packages: Sequence[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    argv = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    try:
        quiet(argv, environment, deadline_s=600)
    except CommandFailed:  # the package lists are absent or old
        quiet(["apt-get", "update", "-qq"], environment, deadline_s=300)
        quiet(argv, environment, deadline_s=600)


class _no_services:  # noqa: N801  a context manager, read as a phrase
    """While entered, package installation starts no service (policy-rc.d); a machine's own policy is left alone."""

    def __enter__(self) -> None:
        self._ours = not _POLICY.exists()
        if self._ours:
            _POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
            _POLICY.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self._ours:
            _POLICY.unlink()


def _bootstrap_trixie() -> None:
    TRIXIE_ROOT.parent.mkdir(parents=True, exist_ok=True)
    print("making a trixie root file system for its podman (some minutes, once)", flush=True)
    argv = ["/usr/sbin/debootstrap", "--variant=minbase", f"--include={TRIXIE_PACKAGES}", "trixie", str(TRIXIE_ROOT), _mirror()]
    quiet(argv, deadline_s=900)


def _mirror() -> str:
    """Return the address that this machine takes Debian's packages from."""
    sites = quiet(["apt-get", "indextargets", "--format", "$(SITE)", "Codename: bookworm", "Created-By: Packages"])
    if not sites:
        raise CommandFailed(["apt-get", "indextargets"], 0, "no package lists: apt-get update was never run")
    return sites.splitlines()[0]
