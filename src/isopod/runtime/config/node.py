"""The node's configuration: defaults, then files, then the environment, then flags; the last one that speaks wins.

Pure: the files' texts and the environment come as arguments, nothing is read here. Every setting has one row, from which its
flag, its environment variable and its key follow, as the paths have theirs in `isopod.world.paths` (row R34).

Rules: an unknown key or a value that does not fit is refused, naming the key as the user wrote it and where. Settings stand at the top of
a file, paths in the table [paths].
"""

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from isopod.runtime.config.aliases import NODE
from isopod.runtime.config.cluster import ClusterSection
from isopod.runtime.config.grpc import GrpcSection
from isopod.runtime.config.layers import FileText, Origin
from isopod.runtime.config.loader import ConfigLoader, Loaded
from isopod.runtime.config.pulse import PulseSection
from isopod.runtime.config.records import RecordsSection
from isopod.runtime.config.schema import flatten, nest
from isopod.runtime.config.vm import VmSection
from isopod.world.network import TcpAddress, parse_address
from isopod.world.paths import CONFIG_FILE, PATHS, Row, resolve

Layout = Literal["isopod", "rtain"]
RuntimeChoice = Literal["auto", "crun", "runc"]
EventLoopKind = Literal["uvloop", "asyncio", "polling"]
LayerForm = Literal["auto", "erofs", "directory"]
LogLevel = Literal["debug", "info", "warning", "error"]
Prefix = Annotated[str, Meta(pattern="^([a-z][a-z0-9]{0,7})?$")]
PoolSize = Annotated[int, Meta(ge=0, le=256)]
ShardCount = Annotated[int, Meta(ge=0, le=64)]
GroupName = Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_.-]{0,31}$")]
AbsolutePath = Annotated[str, Meta(pattern=r"^/[^\x00]*$", extra={"want": "an absolute path"})]

DEFAULT_PREFIX: Final = "isopod"
SUBNET_PREFIX_LENGTH_MAX: Final = 30
CONFIG_VARIABLE: Final = "ISOPOD_CONFIG"
CONFIG_FLAG: Final = "--config"


class SettingRow(Row):
    """One setting that is not a path: its field of `NodeConfig`, and what help says."""

    __slots__ = ("want",)

    def __init__(self, name: str, want: str, help: str) -> None:  # noqa: A002  the field's word
        super().__init__(name, help)
        self.want: Final = want


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
    SettingRow("event_loop", "uvloop, asyncio or polling", "the event loop"),
    SettingRow("pool_size", "a whole number from 0 to 256", "prepared network namespaces kept ready"),
    SettingRow("shards", "a whole number from 0 to 64", "processes that share the work, 0 for one on each processor"),
    SettingRow(
        "telemetry",
        "unix:PATH, or a loopback address as 127.0.0.1:9100 (there is no password)",
        "where metrics, health and the dashboard are served",
    ),
    SettingRow("layers", "auto, erofs or directory", "how layers are kept: mounted from tar and index, or as folders"),
    SettingRow("default_subnet", "an IPv4 subnet such as 10.88.0.0/24", "the subnet of the network called bridge"),
)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node is told. `paths` holds every row of the path table, resolved."""

    layout: Layout = "isopod"
    runtime: RuntimeChoice = "auto"
    prefix: Prefix = ""
    socket_group: GroupName = "isopod"
    log_level: Annotated[LogLevel, Meta(extra={"live": True})] = "info"
    event_loop: EventLoopKind = "uvloop"
    pool_size: PoolSize = 8
    shards: ShardCount = 1
    telemetry: str = ""
    layers: LayerForm = "auto"
    default_subnet: str = "10.88.0.0/24"
    cluster: ClusterSection = ClusterSection()
    records: RecordsSection = RecordsSection()
    grpc: GrpcSection = GrpcSection()
    vm: VmSection = VmSection()
    pulse: PulseSection = PulseSection()
    paths: dict[str, str] = {}


def choose_file(*, flags: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, bool]:
    """Return the path of the config file, and whether someone asked for it by name (then it must exist)."""
    for source, key in ((flags, CONFIG_FLAG), (environment, CONFIG_VARIABLE)):
        if source.get(key):
            return source[key], True
    return CONFIG_FILE, False


def node_loader() -> ConfigLoader[Any]:  # the schema is made from two tables
    """Return the loader of what a node can be told: its settings, and the paths that were chosen, unresolved."""
    settings = [_field(field) for field in msgspec.structs.fields(NodeConfig) if field.name != "paths"]
    paths = msgspec.defstruct(
        "Paths",
        [(row.name, Annotated[AbsolutePath, Meta(description=row.help)] | None, None) for row in PATHS],
        frozen=True,
        forbid_unknown_fields=True,
    )
    schema = msgspec.defstruct("NodeSettings", [*settings, ("paths", paths, paths())], frozen=True, forbid_unknown_fields=True)
    return ConfigLoader(schema, aliases=NODE, short_sections=("paths",), checks=_CHECKS)


def load_node(
    *,
    files: Sequence[FileText] = (),
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Loaded[NodeConfig]:
    """Return the node's configuration with the origins of its values.

    Args:
        files: The configuration files, the later ones win.
        environment: The environment; only the variables of the tables are looked at, empty ones count as unset.
        flags: Values by flag ("--run-root"); `--config` is passed over.

    Raises:
        InvalidArgument: An unknown flag or key, or a value that does not fit, by the name the user gave it.
    """
    own_flags = {flag: text for flag, text in (flags or {}).items() if flag != CONFIG_FLAG}
    loaded = node_loader().load(files=files, environment=environment, flags=own_flags)
    settings = flatten(loaded.config)
    chosen = {key.removeprefix("paths."): str(value) for key, value in settings.items() if key.startswith("paths.") and value}
    told = {key: value for key, value in settings.items() if not key.startswith("paths.")}
    origins = dict(loaded.origins)
    _place_cluster(told, chosen, origins)
    paths = resolve(chosen, str(told["layout"]))
    if not told["cluster.data_dir"]:
        told["cluster.data_dir"] = f"{paths['root']}/cluster"
        origins["cluster.data_dir"] = Origin("default", f"made from paths.root ({origins.get('paths.root', 'default')})")
    if not told["prefix"]:
        told["prefix"] = derive_prefix(paths["root"])
        origins["prefix"] = Origin("default", f"made from paths.root ({origins.get('paths.root', 'default')})")
    config = msgspec.convert({**nest(told), "paths": paths}, NodeConfig)
    return Loaded(config, origins, loaded.notes, loaded.files)


def load_config(
    *,
    flags: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    file_text: str | None = None,
    file_name: str = CONFIG_FILE,
) -> NodeConfig:
    """Return the node's configuration from one file's text. Raises as `load_node`.

    Args:
        flags: Values by flag.
        environment: The environment.
        file_text: What the config file says, None if there is none.
        file_name: Its name, for its format and for errors.
    """
    files = [FileText(file_name, file_text)] if file_text is not None else []
    return load_node(files=files, environment=environment, flags=flags).config


def derive_prefix(root: str) -> str:
    """Return the prefix of the instance whose data lies at `root`: "isopod" in the default place, else one that only this root has.

    So two nodes on one machine never collide, although nobody gave them names.
    """
    if root == resolve({})["root"]:
        return DEFAULT_PREFIX
    return "iso" + hashlib.sha256(root.encode()).hexdigest()[:5]


def _place_cluster(told: dict[str, object], chosen: dict[str, str], origins: dict[str, Origin]) -> None:
    """Put everything of a node into the cluster's folder if that was given and the engine's was not, so that several nodes fit on one
    machine: its data, its socket, a run folder and a default subnet of its own."""
    folder = str(told["cluster.data_dir"])
    if not folder or "root" in chosen:
        return
    made = Origin("default", f"made from cluster.data_dir ({origins.get('cluster.data_dir', 'default')})")
    root = f"{folder}/engine"
    run_root = f"{folder}/run" if told["cluster.role"] == "control" else f"/run/{derive_prefix(root)}"
    for name, path in (("root", root), ("run_root", run_root), ("socket", f"{folder}/isopod.sock")):
        if name not in chosen:
            chosen[name] = path
            origins[f"paths.{name}"] = made
    node_id = told["cluster.node_id"]
    if "default_subnet" not in origins and isinstance(node_id, int) and 1 <= node_id <= 255:
        told["default_subnet"] = f"10.88.{node_id}.0/24"
        origins["default_subnet"] = Origin("default", "made from cluster.node_id")


def _field(field: msgspec.structs.FieldInfo) -> tuple[str, Any, Any]:  # a name, an annotation and its default
    """Return a field of `NodeConfig` with what its row says of it; a section has none and stays as it is."""
    for row in SETTINGS:
        if row.name == field.name:
            return field.name, Annotated[field.type, Meta(extra={"want": row.want}, description=row.help)], field.default
    return field.name, field.type, field.default


def _check_subnet(text: object) -> str:
    """Return a subnet in its plain spelling; ValueError if it has host bits, or no room for a gateway and a container."""
    subnet = ipaddress.IPv4Network(str(text))
    if "/" not in str(text) or subnet.prefixlen > SUBNET_PREFIX_LENGTH_MAX:
        raise ValueError(text)
    return str(subnet)


def _check_telemetry(text: object) -> str:
    """Return where to listen as it was written; ValueError if that is no place, or one that other machines reach: there is no password."""
    if text:
        address = parse_address(str(text))
        if isinstance(address, TcpAddress) and address.host != "localhost" and not ipaddress.ip_address(address.host).is_loopback:
            raise ValueError(text)
    return str(text)


_CHECKS: Final = {"default_subnet": _check_subnet, "telemetry": _check_telemetry}
