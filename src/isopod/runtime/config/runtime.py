"""RuntimeConfig: the settings of an application on this runtime, with the reference's sections, keys, defaults and ranges.

A schema for whoever builds on `isopod.runtime` and `isopod.net`; the node's own is in `node.py`. A section that is None is not used.
Settings marked live are applied by a reload, all others need a restart.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from isopod.runtime.config.loader import ConfigConflict

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
TlsVersion = Literal["1.2", "1.3"]
Environment = Literal["development", "dev", "staging", "stage", "production", "prod", "test"]
_DATABASES: Final = "^(postgres|postgresql|mysql|sqlite)://"

Text = Annotated[str, Meta(min_length=1)]
QueueSize = Annotated[int, Meta(ge=1, le=1_000_000)]
Port = Annotated[int, Meta(ge=1, le=65535)]
File = Annotated[str, Meta(min_length=1, extra={"file": True, "want": "the path of a file"})]
Seconds = Annotated[int, Meta(ge=1, le=3600)]


class AppConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs."""

    name: Text = "isopod-app"
    version: Text = "0.1.0"
    environment: Environment = "development"
    instance_id: str | None = None


class ReactorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The event loop."""

    task_queue_size: QueueSize = 1024
    io_polling_timeout_ms: Annotated[int, Meta(ge=1, le=60_000)] = 100
    enable_io_uring: bool = True
    max_io_operations: QueueSize = 1024


class SmpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shards. `num_shards` 0: one for each CPU the process may use."""

    num_shards: Annotated[int, Meta(ge=0, le=1024)] = 0
    pin_threads: bool = True
    message_queue_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 1024
    enable_work_stealing: bool = False


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A database and its pool."""

    url: Annotated[str, Meta(pattern=_DATABASES, extra={"want": "postgres://, postgresql://, mysql:// or sqlite://", "secret": True})]
    max_connections: Annotated[int, Meta(ge=1, le=10_000)] = 10
    min_connections: Annotated[int, Meta(ge=1, le=10_000)] = 1
    connect_timeout_secs: Seconds = 30
    query_timeout_secs: Seconds = 30
    max_lifetime_secs: Annotated[int, Meta(ge=1)] | None = None
    idle_timeout_secs: Annotated[int, Meta(ge=1)] | None = None
    enable_logging: bool = False

    def __post_init__(self) -> None:
        if self.min_connections > self.max_connections:
            raise ConfigConflict("min_connections", f"want at most max_connections, {self.max_connections}")


class MetricsServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where metrics are served. Only this machine by default: the page has no password."""

    bind: Text = "127.0.0.1"
    port: Port = 8080
    enable_dashboard: bool = True


class FileExportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Snapshots written to files."""

    directory: Text
    format: Literal["json", "csv", "prometheus", "openmetrics", "influx"] = "json"
    rotation_interval_secs: Annotated[int, Meta(ge=1, le=86_400)] = 3600
    max_files: Annotated[int, Meta(ge=1, le=10_000)] = 24


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Collection and export of metrics."""

    enabled: bool = True
    export_interval_secs: Annotated[int, Meta(ge=1, le=86_400, extra={"live": True})] = 60
    http_server: MetricsServerConfig | None = None
    file_export: FileExportConfig | None = None


class LogFileConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs written to a file."""

    path: Text
    max_size_mb: Annotated[int, Meta(ge=1, le=10_240)] = 100
    max_files: Annotated[int, Meta(ge=1, le=10_000)] = 10


class LoggingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs."""

    level: Annotated[LogLevel, Meta(extra={"live": True})] = "info"
    format: LogFormat = "text"
    colored: bool = True
    structured: bool = True
    file: LogFileConfig | None = None


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server's certificate, and whose certificates it trusts."""

    cert_file: File
    key_file: File
    ca_file: File | None = None
    require_client_cert: bool = False
    min_version: TlsVersion = "1.2"
    cipher_suites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.require_client_cert and self.ca_file is None:
            raise ConfigConflict("require_client_cert", "want ca_file too: clients' certificates are checked against it")


class WebsocketConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of WebSocket connections."""

    max_message_size: Annotated[int, Meta(ge=1, le=100 << 20)] = 1 << 20
    max_frame_size: Annotated[int, Meta(ge=1, le=100 << 20)] = 64 << 10
    ping_interval_secs: Annotated[int, Meta(ge=1)] = 30
    connection_timeout_secs: Annotated[int, Meta(ge=1)] = 60
    max_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000

    def __post_init__(self) -> None:
        if self.max_frame_size > self.max_message_size:
            raise ConfigConflict("max_frame_size", f"want at most max_message_size, {self.max_message_size}")


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    app: AppConfig = AppConfig()
    reactor: ReactorConfig = ReactorConfig()
    smp: SmpConfig = SmpConfig()
    database: DatabaseConfig | None = None
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    tls: TlsConfig | None = None
    websocket: WebsocketConfig = WebsocketConfig()
