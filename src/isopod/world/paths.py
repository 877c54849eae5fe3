"""The one table of paths (row R34): each has a default, a flag of `isopod node`, an environment variable and a config key.

Precedence: flag, environment, config file, default. `layout = "rtain"` (or ISOPOD_LAYOUT) gives the reference's places.
A plain class and no import at run time (`typing` alone costs 5-9 ms): the lean command line reads the socket's row from here.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Row:
    """One setting of a node: its name, from which its flag, its variable and its key follow, and what help says."""

    __slots__ = ("help", "name")

    def __init__(self, name: str, help: str) -> None:  # noqa: A002  the field's word
        self.name: Final = name
        self.help: Final = help

    @property
    def flag(self) -> str:
        """The flag of `isopod node`: --run-root."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable: ISOPOD_RUN_ROOT."""
        return "ISOPOD_" + self.name.upper()

    @property
    def key(self) -> str:
        """The key in the config file, in its section: run_root."""
        return self.name


class PathRow(Row):
    """One path setting, in the config file's table [paths]. Defaults may use {root} and {run_root}."""

    __slots__ = ("default", "rtain")

    def __init__(self, name: str, default: str, rtain: str, help: str) -> None:  # noqa: A002  the field's word
        super().__init__(name, help)
        self.default: Final = default
        self.rtain: Final = rtain


PATHS: Final = (
    PathRow("root", "/var/lib/isopod", "/tmp/rtain", "durable data: images, containers, networks"),  # noqa: S108
    PathRow("run_root", "/run/isopod", "/tmp/rtain/run", "what need not survive a reboot: bundles, sockets of containers"),  # noqa: S108
    PathRow("socket", "{run_root}/isopod.sock", "/tmp/rtain_daemons.sock", "the daemon's Unix socket"),  # noqa: S108
    PathRow("images", "{root}/images", "{root}/images", "layers and image records"),
    PathRow("containers", "{root}/containers", "{root}/containers", "writable layers and logs of containers"),
    PathRow("networks", "{root}/net/networks", "{root}/net/networks", "the file of the defined networks"),
    PathRow("metadata", "{root}/metadata", "{root}/metadata", "sandbox records"),
    PathRow("wal", "{metadata}/current.wal", "{metadata}/current.wal", "the journal's current segment"),
    PathRow("archive", "{metadata}/archive", "{metadata}/archive", "rotated journal segments (wal-*.log)"),
    PathRow("snapshots", "{metadata}/snapshots", "{metadata}/snapshots", "snapshots (snapshot-*.json)"),
)

CONFIG_FILE: Final = "/etc/isopod/config.toml"
LAYOUTS: Final = ("isopod", "rtain")


def resolve(chosen: dict[str, str], layout: str = "isopod") -> dict[str, str]:
    """Return every path, in the table's order.

    Args:
        chosen: What flags, environment and config say, by name, already merged.
        layout: "isopod" or "rtain".

    Raises:
        KeyError: `chosen` names a path that is not in the table.
    """
    unknown = [name for name in chosen if name not in {row.name for row in PATHS}]
    if unknown:
        raise KeyError(unknown[0])
    paths: dict[str, str] = {}
    for row in PATHS:
        template = chosen.get(row.name) or (row.rtain if layout == "rtain" else row.default)
        paths[row.name] = template.format_map(paths) if row.name not in chosen else template
    return paths
