"""Configuration: layered settings of any schema, with origins, validation that names the key, a builder, and live reload.

A schema is a msgspec Struct (`schema`); `ConfigLoader` makes a configuration of it from defaults, files, drop-ins, environment and flags
(`loader`, `layers`, `files`, `texts`); `RuntimeConfig` is the schema of applications on this runtime, `NodeConfig` the node's.
Pure but for `ConfigLoader.read` and `LiveConfig.watch`, which use the disk port.
"""

from isopod.runtime.config.aliases import SEASTAR, Alias
from isopod.runtime.config.builder import ConfigBuilder
from isopod.runtime.config.files import drop_in_folder, run_search, search_disk
from isopod.runtime.config.layers import FileText, Origin
from isopod.runtime.config.loader import ConfigConflict, ConfigLoader, Loaded
from isopod.runtime.config.node import (
    CONFIG_FLAG,
    CONFIG_VARIABLE,
    SETTINGS,
    EventLoopKind,
    LogLevel,
    NodeConfig,
    SettingRow,
    choose_file,
    derive_prefix,
    load_config,
    load_node,
    node_loader,
)
from isopod.runtime.config.reload import Change, LiveConfig, Outcome, diff
from isopod.runtime.config.runtime import RuntimeConfig
from isopod.runtime.config.show import show

__all__ = [
    "CONFIG_FLAG",
    "CONFIG_VARIABLE",
    "SEASTAR",
    "SETTINGS",
    "Alias",
    "Change",
    "ConfigBuilder",
    "ConfigConflict",
    "ConfigLoader",
    "EventLoopKind",
    "FileText",
    "LiveConfig",
    "Loaded",
    "LogLevel",
    "NodeConfig",
    "Origin",
    "Outcome",
    "RuntimeConfig",
    "SettingRow",
    "choose_file",
    "derive_prefix",
    "diff",
    "drop_in_folder",
    "load_config",
    "load_node",
    "node_loader",
    "run_search",
    "search_disk",
    "show",
]
