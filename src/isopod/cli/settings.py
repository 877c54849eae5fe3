"""Where the node's socket is: flag, else environment, else the config file, else the default of the table of paths.

A config file or drop-in that says nothing about it (by its plain text) is not parsed: `tomllib` costs three times the interpreter's start.
"""

from __future__ import annotations

from isopod.world.host import console
from isopod.world.paths import CONFIG_FILE, LAYOUTS, PATHS, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_KEYS: Final = ("run_root", "socket", "root")
"""The settings of which the socket's path can be made."""
_ENDINGS: Final = ("toml", "yaml", "yml", "json")


def socket_path(flag: str) -> str:
    """Return the path of the node's socket.

    Args:
        flag: What --socket says, "" if it was not given.

    Raises:
        InvalidArgument: The config file or a layout makes no sense.
        UnavailableError: The config file cannot be read.
    """
    chosen: dict[str, str] = {}
    direct = flag or console.environment("ISOPOD_SOCKET")
    if direct:
        return direct
    layout = ""
    configured = _config(console.environment("ISOPOD_CONFIG") or "")
    for row in PATHS:
        if row.name in _KEYS:
            value = console.environment(row.variable) or configured.get(row.key)
            if value:
                chosen[row.name] = value
    data_dir = console.environment("ISOPOD_CLUSTER_DATA_DIR") or configured.get("data_dir")
    if data_dir and "root" not in chosen and "socket" not in chosen:
        return f"{data_dir}/isopod.sock"  # a cluster's node keeps everything of its own there
    layout = console.environment("ISOPOD_LAYOUT") or configured.get("layout") or LAYOUTS[0]
    if layout not in LAYOUTS:
        from isopod.world.errors import InvalidArgument

        raise InvalidArgument("layout", layout, f"choose one of: {', '.join(LAYOUTS)}")
    return resolve(chosen, layout)["socket"]


def _config(path: str) -> dict[str, str]:
    """Return the settings of the configuration that matter here, by key; {} without a file.

    Args:
        path: The file somebody named; "" to take the first there is at the default's place.
    """
    stem = CONFIG_FILE.rpartition(".")[0]
    candidates = [path] if path else [f"{stem}.{ending}" for ending in _ENDINGS]
    found: dict[str, str] = {}
    for candidate in candidates:
        data = _read(candidate)
        if data is not None:
            found.update(_settings(candidate, data))
            stem = candidate.rpartition(".")[0]
            break
    for name in console.names(stem + ".d"):
        if name.rpartition(".")[2] in _ENDINGS and not name.startswith("."):
            found.update(_settings(f"{stem}.d/{name}", _read(f"{stem}.d/{name}") or b""))
    return found


def _read(path: str) -> bytes | None:
    try:
        return console.read_small_file(path)
    except OSError as error:
        from isopod.world.errors import from_os_error

        raise from_os_error(error, "read", path) from error


def _settings(path: str, data: bytes) -> dict[str, str]:
    """Return what one file says about the keys that matter; most say nothing, and are not parsed."""
    if not any(key.encode() in data for key in (*_KEYS, "layout", "data_dir")):
        return {}
    try:
        document = _parse(path, data.decode())
    except ValueError as error:
        from isopod.world.errors import InvalidArgument

        kind = {"json": "JSON"}.get(path.rpartition(".")[2], "TOML")
        raise InvalidArgument("configuration", path, f"not {kind}: {error}") from error
    if not isinstance(document, dict):
        return {}
    paths = document.get("paths")
    cluster = document.get("cluster")
    table = {**document, **(paths if isinstance(paths, dict) else {})}
    table["data_dir"] = cluster.get("data_dir") if isinstance(cluster, dict) else None
    return {key: value for key in (*_KEYS, "layout", "data_dir") if isinstance(value := table.get(key), str)}


def _parse(path: str, text: str) -> object:
    ending = path.rpartition(".")[2]
    if ending == "json":
        import json

        return json.loads(text)
    if ending in ("yaml", "yml"):
        # This interpreter knows no installed packages, and YAML is none of its own.
        from isopod.world.errors import InvalidArgument

        raise InvalidArgument(
            "configuration", path, "it may say where the socket is, but this command reads TOML and JSON only", "say so: set ISOPOD_SOCKET"
        )
    import tomllib

    return tomllib.loads(text)
