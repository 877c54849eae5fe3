"""The node's configuration: defaults, then the file, then the environment, then flags; the last one that speaks wins.

Pure: the file's text and the environment come as arguments, nothing is read here. Every setting has one row, from which its
flag, its environment variable and its key follow, as the paths have theirs in `isopod.world.paths` (row R34).

Rules: an unknown key or a value that does not fit is refused, naming the key as the user wrote it and where. The file is TOML:
settings at the top, paths in the table [paths].
"""

import hashlib
import ipaddress
import tomllib
from collections.abc import Mapping
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from isopod.world.errors import InvalidArgument
from isopod.world.paths import CONFIG_FILE, PATHS, PathRow, resolve

Layout = Literal["isopod", "rtain"]
RuntimeChoice = Literal["auto", "crun", "runc"]
EventLoopKind = Literal["uvloop", "asyncio"]
LogLevel = Literal["debug", "info", "warning", "error"]
Prefix = Annotated[str, msgspec.Meta(pattern="^([a-z][a-z0-9]{0,7})?$")]
PoolSize = Annotated[int, msgspec.Meta(ge=0, le=256)]
GroupName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z_][A-Za-z0-9_.-]{0,31}$")]

DEFAULT_PREFIX: Final = "isopod"
SUBNET_PREFIX_LENGTH_MAX: Final = 30
CONFIG_VARIABLE: Final = "ISOPOD_CONFIG"
CONFIG_FLAG: Final = "--config"


class SettingRow(NamedTuple):
    """One setting that is not a path: its field of `NodeConfig`, and what help says."""

    name: str
    want: str
    help: str

    @property
    def flag(self) -> str:
        """The flag of `isopod node`: --pool-size."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable: ISOPOD_POOL_SIZE."""
        return "ISOPOD_" + self.name.upper()

    @property
    def key(self) -> str:
        """The key at the top of the config file: pool_size."""
        return self.name


SETTINGS: Final = (
    SettingRow("layout", "isopod or rtain", "where files go by default"),
    SettingRow("runtime", "auto, crun or runc", "the OCI runtime"),
    SettingRow(
        "prefix",
        "1-8 small letters and digits, a letter first",
        "begins the names of bridges, tables and cgroups (by default made from the root)",
    ),
    SettingRow("socket_group", "a group's name", "the group that may use the socket"),
    SettingRow("log_level", "debug, info, warning or error", "the least level logged"),
    SettingRow("event_loop", "uvloop or asyncio", "the event loop"),
    SettingRow("pool_size", "a whole number from 0 to 256", "prepared network namespaces kept ready"),
    SettingRow("default_subnet", "an IPv4 subnet such as 10.88.0.0/24", "the subnet of the network called bridge"),
)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node is told. `paths` holds every row of the path table, resolved."""

    layout: Layout = "isopod"
    runtime: RuntimeChoice = "auto"
    prefix: Prefix = ""
    socket_group: GroupName = "isopod"
    log_level: LogLevel = "info"
    event_loop: EventLoopKind = "uvloop"
    pool_size: PoolSize = 8
    default_subnet: str = "10.88.0.0/24"
    paths: dict[str, str] = {}


class _Source(NamedTuple):
    """One layer: settings and paths by name, and how a user calls each (for errors)."""

    values: Mapping[str, object]
    paths: Mapping[str, str]
    called: Mapping[str, str]


def choose_file(*, flags: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, bool]:
    """Return the path of the config file, and whether someone asked for it by name (then it must exist)."""
    for source, key in ((flags, CONFIG_FLAG), (environment, CONFIG_VARIABLE)):
        if source.get(key):
            return source[key], True
    return CONFIG_FILE, False


def load_config(
    *,
    flags: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    file_text: str | None = None,
    file_name: str = CONFIG_FILE,
) -> NodeConfig:
    """Return the node's configuration.

    Args:
        flags: Values by flag ("--run-root"); `--config` is passed over.
        environment: The environment; only the variables of the tables are looked at, empty ones count as unset.
        file_text: What the config file says, None if there is none.
        file_name: Its name, for errors.

    Raises:
        InvalidArgument: An unknown flag or key, or a value that does not fit, by the name the user gave it.
    """
    sources = (
        _file_source(file_text, file_name),
        _text_source({row.variable: row for row in _rows()}, environment or {}),
        _flag_source(flags or {}),
    )
    settings: dict[str, object] = {}
    chosen: dict[str, str] = {}
    for source in sources:
        for name, value in source.values.items():
            settings[name] = _check_setting(name, value, source.called[name])
        for name, path in source.paths.items():
            chosen[name] = _check_path(path, source.called[name])
    layout = str(settings.get("layout", "isopod"))
    paths = resolve(chosen, layout)
    settings["prefix"] = settings.get("prefix") or derive_prefix(paths["root"])
    return msgspec.convert({**settings, "paths": paths}, NodeConfig)


def derive_prefix(root: str) -> str:
    """Return the prefix of the instance whose data lies at `root`: "isopod" in the default place, else one that only this root has.

    So two nodes on one machine never collide, although nobody gave them names.
    """
    if root == resolve({})["root"]:
        return DEFAULT_PREFIX
    return "iso" + hashlib.sha256(root.encode()).hexdigest()[:5]


def _rows() -> tuple[SettingRow | PathRow, ...]:
    return (*SETTINGS, *PATHS)


def _text_source(rows: Mapping[str, SettingRow | PathRow], texts: Mapping[str, str]) -> _Source:
    """Return the layer of values that come as text under the names in `rows`."""
    values: dict[str, object] = {}
    paths: dict[str, str] = {}
    called: dict[str, str] = {}
    for key, row in rows.items():
        text = texts.get(key, "")
        if not text:
            continue
        called[row.name] = key
        if isinstance(row, PathRow):
            paths[row.name] = text
        else:
            values[row.name] = text
    return _Source(values, paths, called)


def _flag_source(flags: Mapping[str, str]) -> _Source:
    rows = {row.flag: row for row in _rows()}
    for flag, text in flags.items():
        if flag == CONFIG_FLAG:
            continue
        if flag not in rows:
            raise InvalidArgument("flag", flag, "unknown", "see `isopod node --help`")
        if not text:
            raise InvalidArgument(flag, text, "must not be empty")
    return _text_source(rows, flags)


def _file_source(text: str | None, file_name: str) -> _Source:
    try:
        table = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument("config file", file_name, f"not TOML: {error}") from None
    paths = table.pop("paths", {})
    if not isinstance(paths, dict):
        raise InvalidArgument(f"paths in {file_name}", paths, "want a table: [paths]")
    _refuse_unknown(table, [row.key for row in SETTINGS], "", file_name)
    _refuse_unknown(paths, [row.key for row in PATHS], "paths.", file_name)
    called = {name: f"{name} in {file_name}" for name in table} | {name: f"paths.{name} in {file_name}" for name in paths}
    for name, value in paths.items():
        if not isinstance(value, str):
            raise InvalidArgument(called[name], value, "want an absolute path")
    return _Source(table, paths, called)


def _refuse_unknown(table: Mapping[str, object], known: list[str], prefix: str, file_name: str) -> None:
    for key in table:
        if key not in known:
            hint = f"known are: {', '.join(prefix + name for name in known)}"
            raise InvalidArgument(f"key in {file_name}", prefix + key, "unknown", hint)


def _check_setting(name: str, value: object, called: str) -> object:
    """Return a setting's value in its own type. Texts of flags and variables become numbers; a file's types must fit."""
    row = next(row for row in SETTINGS if row.name == name)
    # A one-field conversion instead of the whole struct: so the error can name the key of the layer that spoke.
    lax = isinstance(value, str) and not called.startswith(f"{name} in ")
    try:
        converted = getattr(msgspec.convert({name: value}, NodeConfig, strict=not lax), name)
        return _check_subnet(converted) if name == "default_subnet" else converted
    except (msgspec.ValidationError, ValueError):
        raise InvalidArgument(called, value, f"want {row.want}") from None


def _check_subnet(text: str) -> str:
    """Return a subnet in its plain spelling; ValueError if it has host bits, or no room for a gateway and a container."""
    subnet = ipaddress.IPv4Network(text)
    if "/" not in text or subnet.prefixlen > SUBNET_PREFIX_LENGTH_MAX:
        raise ValueError(text)
    return str(subnet)


def _check_path(path: str, called: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(called, path, "want an absolute path")
    return path
