"""The references' environment variables, and the setting each of them is here: the one table.

An alias speaks as the variable it stands for would; where both are set, isopod's own wins and the loader says so. `words` translates the
values that are spelled differently.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

_LEVELS: Final[Mapping[str, str]] = {"trace": "debug", "warn": "warning"}


class Alias(NamedTuple):
    """A variable of a reference: the key it sets, and words of its values that are other words here."""

    variable: str
    key: str
    words: Mapping[str, str] = {}


_SEASTAR: Final[Mapping[str, tuple[str, ...]]] = {
    "app": ("name", "version", "environment", "instance_id"),
    "reactor": ("task_queue_size", "io_polling_timeout_ms", "enable_io_uring", "max_io_operations"),
    "smp": ("num_shards", "pin_threads", "message_queue_size", "enable_work_stealing"),
    "database": ("url", "max_connections", "min_connections", "connect_timeout_secs", "query_timeout_secs", "enable_logging"),
    "metrics": ("enabled", "export_interval_secs"),
    "logging": ("level", "format", "colored", "structured"),
    "tls": ("cert_file", "key_file", "ca_file", "require_client_cert", "min_version"),
    "websocket": ("max_message_size", "max_frame_size", "ping_interval_secs", "connection_timeout_secs", "max_connections"),
}
_SECTION_WORDS: Final[Mapping[str, str]] = {"logging": "log"}

SEASTAR: Final = tuple(
    Alias(
        f"SEASTAR_{_SECTION_WORDS.get(section, section)}_{name}".upper(),
        f"{section}.{name}",
        _LEVELS if (section, name) == ("logging", "level") else {},
    )
    for section, names in _SEASTAR.items()
    for name in names
)
"""The variables of Seastar-RS."""

NODE: Final = (
    Alias("SEASTAR_LOG_LEVEL", "log_level", _LEVELS),
    Alias("RUST_LOG", "log_level", _LEVELS),
)
"""Those that mean something to a node, by the node's own keys."""
