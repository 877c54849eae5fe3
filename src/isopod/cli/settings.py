"""Where the node's socket is: flag, else environment, else the config file, else the default of the table of paths.

A config file that says nothing about it (by its plain text) is not parsed: `tomllib` costs three times the interpreter's start.
"""

from __future__ import annotations

from isopod.world.host import console
from isopod.world.paths import CONFIG_FILE, LAYOUTS, PATHS, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

_KEYS: Final = ("run_root", "socket", "root")
"""The settings of which the socket's path can be made."""


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
    configured = _config(console.environment("ISOPOD_CONFIG") or CONFIG_FILE)
    for row in PATHS:
        if row.name in _KEYS:
            value = console.environment(row.variable) or configured.get(row.key)
            if value:
                chosen[row.name] = value
    layout = console.environment("ISOPOD_LAYOUT") or configured.get("layout") or LAYOUTS[0]
    if layout not in LAYOUTS:
        from isopod.world.errors import InvalidArgument

        raise InvalidArgument("layout", layout, f"choose one of: {', '.join(LAYOUTS)}")
    return resolve(chosen, layout)["socket"]


def _config(path: str) -> dict[str, str]:
    """Return the settings of the config file that matter here, by key; {} without a file."""
    try:
        data = console.read_small_file(path)
    except OSError as error:
        from isopod.world.errors import from_os_error

        raise from_os_error(error, "read", path) from error
    if not data or not any(key.encode() in data for key in (*_KEYS, "layout")):
        return {}
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except ValueError as error:
        from isopod.world.errors import InvalidArgument

        raise InvalidArgument("configuration", path, f"not TOML: {error}") from error
    paths = document.get("paths")
    table = {**document, **(paths if isinstance(paths, dict) else {})}
    return {key: table[key] for key in (*_KEYS, "layout") if isinstance(table.get(key), str)}
