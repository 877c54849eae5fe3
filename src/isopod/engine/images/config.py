"""The OCI image configuration: the JSON whose digest is an image's id, read and written.

Reading is strict about what isopod uses (types, NUL characters, the signal) and blind to the rest; `null` means absent, as docker writes
it. Writing for a commit begins with the base's own JSON, so that fields isopod does not know (exposed ports, volumes, health checks)
stay with the image.

Source: OCI image specification 1.1, config.md; docker's image specification 1.2 for what may be null.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from isopod.api.messages import ImageConfig
from isopod.engine.images.signals import SIGTERM, parse_signal, signal_name
from isopod.world.errors import BadArchive

Json = dict[str, Any]  # a base image's own JSON: nested and open-ended

CONFIG_BYTES_MAX: Final = 4 << 20
N_LAYERS_MAX: Final = 127
"""Docker's bound too; overlayfs takes 500."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "i386": "386",
    "loongarch64": "loong64",
}


class ParsedConfig(NamedTuple):
    """What isopod takes from an image configuration."""

    architecture: str
    operating_system: str
    created_at_ns: int | None
    diff_ids: tuple[str, ...]
    """From the bottom up."""
    created_by: tuple[str, ...]
    """Parallel to `diff_ids`; "" where the history does not say."""
    config: ImageConfig


class History(NamedTuple):
    """One line of an image's history."""

    created_at_ns: int
    created_by: str


class _Process(msgspec.Struct, frozen=True):
    env: list[str] | None = msgspec.field(name="Env", default=None)
    entrypoint: list[str] | None = msgspec.field(name="Entrypoint", default=None)
    command: list[str] | None = msgspec.field(name="Cmd", default=None)
    working_dir: str | None = msgspec.field(name="WorkingDir", default=None)
    user: str | None = msgspec.field(name="User", default=None)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)
    stop_signal: str | None = msgspec.field(name="StopSignal", default=None)


class _Rootfs(msgspec.Struct, frozen=True):
    diff_ids: list[str] | None = None


class _HistoryLine(msgspec.Struct, frozen=True):
    created_by: str | None = None
    empty_layer: bool | None = None


class _Document(msgspec.Struct, frozen=True):
    rootfs: _Rootfs
    architecture: str | None = None
    os: str | None = None
    created: datetime | None = None
    config: _Process | None = None
    history: list[_HistoryLine] | None = None


def digest_bytes(data: bytes) -> str:
    """Return "sha256:..." of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def oci_architecture(machine: str) -> str:
    """Return the OCI name ("amd64") of what the kernel calls a machine ("x86_64"). Unknown ones have one name only."""
    return _ARCHITECTURES.get(machine, machine)


def parse_config(data: bytes, file: str) -> ParsedConfig:
    """Read an image configuration.

    Args:
        data: The JSON.
        file: The name of the archive's file it came from, for errors.

    Raises:
        BadArchive: Not such a JSON, or it says what no container can be given.
    """
    try:
        data.decode()  # msgspec looks at the texts it keeps; the store keeps all
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadArchive(file, f"not an image configuration: {error}") from error
    except RecursionError:
        raise BadArchive(file, "not an image configuration: nested too deeply") from None
    diff_ids = tuple(document.rootfs.diff_ids or ())
    for diff_id in diff_ids:
        check_digest(diff_id, file)
    if len(diff_ids) > N_LAYERS_MAX:
        raise BadArchive(file, f"more than {N_LAYERS_MAX} layers")
    return ParsedConfig(
        architecture=document.architecture or "",
        operating_system=document.os or "",
        created_at_ns=_to_ns(document.created) if document.created else None,
        diff_ids=diff_ids,
        created_by=_created_by(document.history or [], len(diff_ids)),
        config=_process(document.config or _Process(), file),
    )


def check_digest(digest: str, file: str) -> str:
    """Return the digest unchanged if it is a SHA-256 one, the only kind read here; the result is one safe path component.

    Raises:
        BadArchive: It is not.
    """
    digits = digest.removeprefix("sha256:")
    if len(digest) != 71 or len(digits) != 64 or not all(c in "0123456789abcdef" for c in digits):
        raise BadArchive(file, f"{digest[:100]!r} is not a sha256 digest")
    return digest


def write_config(architecture: str, config: ImageConfig, diff_id: str, history: History) -> bytes:
    """Return the configuration of a new image of one layer."""
    created = _to_text(history.created_at_ns)
    document = {
        "created": created,
        "architecture": architecture,
        "os": "linux",
        "config": _process_json({}, config),
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": history.created_by}],
    }
    return msgspec.json.encode(document)


def extend_config(base: bytes, config: ImageConfig, diff_id: str, history: History) -> bytes:
    """Return the configuration of an image that adds one layer to another.

    Args:
        base: The other's configuration, as `parse_config` accepted it.
        config: What the new image says about its containers.
        diff_id: The new layer.
        history: The line for it.
    """
    document: Json = msgspec.json.decode(base)
    created = _to_text(history.created_at_ns)
    rootfs, lines = document["rootfs"], document.get("history") or []
    document["created"] = created
    document["config"] = _process_json(document.get("config") or {}, config)
    document["rootfs"] = {**rootfs, "diff_ids": [*(rootfs.get("diff_ids") or []), diff_id]}
    document["history"] = [*lines, {"created": created, "created_by": history.created_by}]
    return msgspec.json.encode(document)


def _process(process: _Process, file: str) -> ImageConfig:
    env = dict(entry.partition("=")[::2] for entry in process.env or [] if not entry.startswith("="))
    texts: Sequence[str] = [*env, *env.values(), *(process.entrypoint or []), *(process.command or [])]
    if any("\0" in text for text in (*texts, process.working_dir or "", process.user or "")):
        raise BadArchive(file, "a text that holds a NUL character")
    stop_signal = parse_signal(process.stop_signal) if process.stop_signal else SIGTERM
    if stop_signal is None:
        raise BadArchive(file, f"unknown stop signal {process.stop_signal!r}")
    working_dir = process.working_dir or "/"
    return ImageConfig(
        env=env,
        entrypoint=tuple(process.entrypoint or ()),
        command=tuple(process.command or ()),
        working_dir=working_dir if working_dir.startswith("/") else f"/{working_dir}",
        user=process.user or "",
        labels=process.labels or {},
        stop_signal=stop_signal,
    )


def _process_json(before: Json, config: ImageConfig) -> Json:
    return {
        **before,
        "Env": [f"{name}={value}" for name, value in config.env.items()],
        "Entrypoint": list(config.entrypoint) or None,
        "Cmd": list(config.command) or None,
        "WorkingDir": config.working_dir,
        "User": config.user,
        "Labels": config.labels or None,
        "StopSignal": signal_name(config.stop_signal),
    }


def _created_by(history: Sequence[_HistoryLine], n_layers: int) -> tuple[str, ...]:
    lines = [line.created_by or "" for line in history if not line.empty_layer]
    return tuple(lines) if len(lines) == n_layers else ("",) * n_layers


def _to_ns(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0, (aware - _EPOCH) // timedelta(microseconds=1) * 1000)


def _to_text(at_ns: int) -> str:
    seconds, rest_ns = divmod(at_ns, 1_000_000_000)
    moment = _EPOCH + timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest_ns:09d}Z"
