"""Creation: from what a client asks for to a container's first record. Everything is checked here, before anything exists."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from isopod.api.messages import Container, ContainerSpec, Endpoint, HealthCheck, Image, ImageConfig, Mount, Resources, VmOptions, VmSettings
from isopod.engine.network.ports import check_ports
from isopod.world.errors import InvalidArgument
from isopod.world.ids import SHORT_ID_CHARS, check_name
from isopod.world.units import CPUS_MAX
from isopod.world.world import World

MEMORY_BYTES_MIN: Final = 6 << 20
"""Below this the OCI runtime itself does not come up inside the group."""
VM_MEMORY_BYTES: Final = 256 << 20
"""What a virtual machine has if nobody says."""
VM_MEMORY_BYTES_MIN: Final = 128 << 20
"""Below this the guest's kernel does not come up with its file systems."""
VM_MEMORY_BYTES_MAX: Final = 1 << 44
VM_VCPUS_MAX: Final = 255
VM_DISK_BYTES: Final = 10 << 30
"""Sparse: it takes what is written."""
VM_DISK_BYTES_MIN: Final = 16 << 20
VM_DISK_BYTES_MAX: Final = 16 << 40
_VM_CONFIG_CHARS_MAX: Final = 4096
_ARGUMENTS_MAX: Final = 8192
_TEXT_CHARS_MAX: Final = 128 << 10
LABELS_MAX: Final = 1024
NETWORK_BYTES_PER_S_MIN: Final = 8 << 10
"""Below this a few packets take seconds, and a name is asked for in vain."""
NETWORK_BYTES_PER_S_MAX: Final = 100 << 30
LABEL_CHARS_MAX: Final = 64 << 10
MOUNTS_MAX: Final = 256
HEALTH_S_MIN: Final = 0.1
HEALTH_S_MAX: Final = 86_400.0
HEALTH_RETRIES_MAX: Final = 1000
_PROTECTED: Final = ("/", "/proc", "/sys", "/dev")


def image_of(spec: ContainerSpec, resolve: Callable[[str], Image]) -> Image | None:
    """Return the image that a container is to be made of, None for a virtual machine that is made from its configuration.

    Raises:
        NotFound, InvalidArgument: As `resolve` says.
        InvalidArgument: There is neither an image nor a configuration, or both.
    """
    config = spec.vm.config if spec.isolation == "vm" else ""
    if config and spec.image:
        raise InvalidArgument("image", spec.image, "a machine with a configuration has its own", "leave one of them out")
    if spec.isolation == "vm" and not config and not spec.image:
        raise InvalidArgument("virtual machine", spec.name, "neither an image nor a configuration is given", "add --image or --config")
    return None if config else resolve(spec.image)


def first_record(spec: ContainerSpec, image: Image | None, *, identifier: str, now_ns: int, boot_id: str) -> Container:
    """Return the record of a container to be created.

    Args:
        spec: What was asked for.
        image: The image it resolved to, if it is made of one.
        identifier: The new id.
        now_ns: The time of creation.
        boot_id: The kernel's boot.

    Raises:
        InvalidArgument: Something in the spec is malformed or out of range.
    """
    name = check_name("container name", spec.name) if spec.name else identifier[:SHORT_ID_CHARS]
    hostname = check_name("hostname", spec.hostname) if spec.hostname else identifier[:SHORT_ID_CHARS]
    config = image.config if image is not None else ImageConfig()
    check_resources(spec.resources)
    check_labels(spec.labels)
    working_dir = spec.working_dir or config.working_dir or "/"
    check_command(spec.command, spec.env, working_dir)
    check_mounts(spec.mounts)
    check_health(spec.health_check)
    check_ports(spec.ports, spec.network)
    return Container(
        id=identifier,
        name=name,
        created_at_ns=now_ns,
        updated_at_ns=now_ns,
        image=spec.image,
        image_id=image.id if image is not None else "",
        command=_command(spec, config),
        working_dir=working_dir,
        user=spec.user or config.user,
        hostname=hostname,
        env={**config.env, **spec.env},
        labels={**config.labels, **spec.labels},
        isolation=spec.isolation,
        vm=machine_of(spec.vm, spec.resources) if spec.isolation == "vm" else None,
        terminal=spec.terminal,
        stdin_open=spec.stdin_open,
        auto_remove=spec.auto_remove,
        boot_id=boot_id,
        network=Endpoint(network=spec.network),
        ports=spec.ports,
        resources=spec.resources,
        mounts=spec.mounts,
        health_check=spec.health_check,
    )


def machine_of(options: VmOptions, resources: Resources) -> VmSettings:
    """Return what a virtual machine has: what was asked for, else what the limits of the same name say, else the usual.

    Raises:
        InvalidArgument: A value is out of range.
    """
    asked = options.memory_bytes or resources.memory_bytes_max or VM_MEMORY_BYTES
    memory = (asked + (1 << 20) - 1) >> 20 << 20  # whole MiB
    vcpus = options.vcpus if options.vcpus is not None else math.ceil(resources.cpus or 1)
    disk = options.disk_bytes if options.disk_bytes is not None else VM_DISK_BYTES
    check_machine(vcpus=vcpus, memory_bytes=memory, disk_bytes=disk)
    if "\0" in options.config or len(options.config) > _VM_CONFIG_CHARS_MAX:
        raise InvalidArgument("configuration", options.config[:80], "too long, or it holds a NUL")
    return VmSettings(
        driver=options.driver,
        machine=options.machine,
        vcpus=vcpus,
        memory_bytes=memory,
        disk_bytes=disk,
        config=options.config,
        cold=options.cold,
    )


def check_machine(*, vcpus: int, memory_bytes: int, disk_bytes: int = VM_DISK_BYTES) -> None:
    """Check what a virtual machine is to have.

    Raises:
        InvalidArgument: A value is out of range.
    """
    if not 1 <= vcpus <= VM_VCPUS_MAX:
        raise InvalidArgument("vcpus", vcpus, f"want 1 to {VM_VCPUS_MAX}")
    if not VM_MEMORY_BYTES_MIN <= memory_bytes <= VM_MEMORY_BYTES_MAX:
        raise InvalidArgument(
            "memory of a virtual machine", memory_bytes, f"want at least {VM_MEMORY_BYTES_MIN >> 20}m, its kernel included"
        )
    if not VM_DISK_BYTES_MIN <= disk_bytes <= VM_DISK_BYTES_MAX:
        why = f"want {VM_DISK_BYTES_MIN >> 20}m to {VM_DISK_BYTES_MAX >> 40}t"
        raise InvalidArgument("disk of a virtual machine", disk_bytes, why)


async def check_sources(world: World, mounts: Iterable[Mount]) -> None:
    """Check that what is to be mounted exists on the host.

    Raises:
        InvalidArgument: A source is missing.
    """
    for mount in mounts:
        if mount.kind != "bind":
            continue
        try:
            found = await world.disk.stat(mount.source)
        except OSError as error:  # too long, a loop of links: what the user named, not a failure of the disk
            raise InvalidArgument("volume", mount.source[:80], error.strerror or "cannot be looked at") from error
        if found is None:
            raise InvalidArgument("volume", mount.source, "no such file or folder on the host", "create it first")


def check_command(command: Iterable[str], env: Mapping[str, str], working_dir: str) -> None:
    """Check what a command is started with.

    Raises:
        InvalidArgument: A text holds a NUL or is too long, a variable has no name, or the working directory is relative.
    """
    _check_texts((*command, working_dir))
    check_env(env)
    if not working_dir.startswith("/"):
        raise InvalidArgument("working directory", working_dir, "want an absolute path")


def _command(spec: ContainerSpec, config: ImageConfig) -> tuple[str, ...]:
    command = (*config.entrypoint, *(spec.command or config.command))
    if not command and spec.isolation == "vm":
        return ()  # it is up until it is stopped
    if not command or not command[0]:
        raise InvalidArgument("command", "", f"neither given nor set by image {spec.image}", "add one: isopod run IMAGE COMMAND")
    return command


def check_resources(resources: Resources) -> None:
    """Check limits.

    Raises:
        InvalidArgument: One is out of range.
    """
    memory, cpus, pids = resources.memory_bytes_max, resources.cpus, resources.pids_max
    if memory is not None and memory < MEMORY_BYTES_MIN:
        raise InvalidArgument("memory limit", memory, f"want at least {MEMORY_BYTES_MIN >> 20}m")
    if cpus is not None and not 0.01 <= cpus <= CPUS_MAX:
        raise InvalidArgument("cpus", cpus, f"want 0.01 to {CPUS_MAX:g}")
    if pids is not None and not 1 <= pids <= 4_194_304:
        raise InvalidArgument("pids limit", pids, "want 1 to 4194304")
    if resources.disk_bytes_max is not None:
        raise InvalidArgument("disk limit", resources.disk_bytes_max, "no storage driver here can enforce one")
    for rate in (resources.network_in_bytes_per_s, resources.network_out_bytes_per_s):
        if rate is not None and not NETWORK_BYTES_PER_S_MIN <= rate <= NETWORK_BYTES_PER_S_MAX:
            bounds = f"{NETWORK_BYTES_PER_S_MIN >> 10}k to {NETWORK_BYTES_PER_S_MAX >> 30}g"
            raise InvalidArgument("network rate", rate, f"want {bounds} bytes a second")


def check_env(env: Mapping[str, str]) -> None:
    """Check environment variables.

    Raises:
        InvalidArgument: One has no name, a "=" in it, a NUL, or there is too much of them.
    """
    _check_texts((*env, *env.values()))
    for key in env:
        if not key or "=" in key:
            raise InvalidArgument("environment variable", key, "want KEY=VALUE")


def check_labels(labels: Mapping[str, str]) -> None:
    """Check labels.

    Raises:
        InvalidArgument: One has no name, a NUL, is too long, or there are too many.
    """
    if len(labels) > LABELS_MAX:
        raise InvalidArgument("labels", len(labels), f"want at most {LABELS_MAX}")
    for key, value in labels.items():
        if not key or "\0" in key + value or len(key) + len(value) > LABEL_CHARS_MAX:
            raise InvalidArgument("label", key[:40], "it has no name, holds a NUL, or is too long", "want KEY=VALUE")


def check_health(check: HealthCheck | None) -> None:
    """Check a health check.

    Raises:
        InvalidArgument: It has no command, or a value is out of range.
    """
    if check is None:
        return
    _check_texts(check.command)
    if not check.command or not check.command[0]:
        raise InvalidArgument("health check", "", "it has no command", "for example --health-cmd 'test -e /ready'")
    for name, value, least in (
        ("interval", check.interval_s, HEALTH_S_MIN),
        ("timeout", check.timeout_s, HEALTH_S_MIN),
        ("start period", check.start_period_s, 0.0),
    ):
        if not least <= value <= HEALTH_S_MAX:
            raise InvalidArgument(f"health {name}", f"{value:g}", f"want {least:g} to {HEALTH_S_MAX:g} seconds")
    if not 1 <= check.retries <= HEALTH_RETRIES_MAX:
        raise InvalidArgument("health retries", check.retries, f"want 1 to {HEALTH_RETRIES_MAX}")


def check_mounts(mounts: Sequence[Mount]) -> None:
    """Check mounts on their own, and that no two have the same place.

    Raises:
        InvalidArgument: A place is relative, protected, leads upwards or is given twice; a source is relative.
    """
    if len(mounts) > MOUNTS_MAX:
        raise InvalidArgument("mounts", len(mounts), f"want at most {MOUNTS_MAX}")
    seen: list[str] = []
    for mount in mounts:
        destination = _check_mount(mount)
        if destination in seen:
            raise InvalidArgument("mount destination", mount.destination, "given twice")
        seen.append(destination)


def place_of(destination: str) -> str:
    """Return the one spelling of a mount's place inside the container."""
    return "/" + "/".join(part for part in destination.split("/") if part not in ("", "."))


def _check_mount(mount: Mount) -> str:
    _check_texts((mount.source, mount.destination))
    destination = place_of(mount.destination)
    if not mount.destination.startswith("/") or ".." in mount.destination.split("/"):
        raise InvalidArgument("mount destination", mount.destination, "want an absolute path without '..'")
    if destination in _PROTECTED or destination.startswith(("/proc/", "/sys/")):
        raise InvalidArgument("mount destination", mount.destination, "isopod keeps that place")
    if mount.kind == "volume":
        raise InvalidArgument("volume", mount.source, "named volumes do not exist yet", "give an absolute host path: -v /HOST:/CONT")
    if mount.kind == "bind" and (not mount.source.startswith("/") or ".." in mount.source.split("/")):
        raise InvalidArgument("volume", mount.source, "want an absolute host path without '..'", "for example -v /data:/data:ro")
    return destination


def _check_texts(texts: Iterable[str]) -> None:
    for n_texts, text in enumerate(texts, 1):
        if "\0" in text or len(text) > _TEXT_CHARS_MAX or n_texts > _ARGUMENTS_MAX:
            raise InvalidArgument("argument", text[:40], "holds a NUL, or is too long, or there are too many")
