"""SmpConfig: how many shards, where, and how they talk."""

from typing import Literal

import msgspec

from isopod.runtime.logger import Level
from isopod.runtime.shards.credits import NONLOCAL_REQUESTS_MAX
from isopod.world.shards import MESSAGE_BYTES_MAX, RING_BYTES, ChannelKind, ChannelSettings


class RestartPolicy(msgspec.Struct, frozen=True):
    """When a shard that died is started again.

    Args:
        backoff_s: The pause before the first restart; it doubles with each quick death.
        backoff_max_s: Its bound.
        jitter: Up to which part of the pause is left out, by chance, so that shards that died together do not return together.
        quick_s: A shard that lived shorter than this died quickly; one that lived longer begins a new count.
        n_quick_deaths_max: After so many in a row it is given up: calls to it raise `ShardLost`.
    """

    backoff_s: float = 0.1
    backoff_max_s: float = 5.0
    jitter: float = 0.5
    quick_s: float = 10.0
    n_quick_deaths_max: int = 5


class SmpConfig(msgspec.Struct, frozen=True):
    """Settings of all shards.

    Args:
        n_shards: How many, the one that starts the others included; 0 for one on each processor we may use.
        pin: Which shards are bound to a processor of their own: all, all but shard 0 (programs it starts would inherit that), none.
        channel: How messages travel between two shards.
        ring_bytes: The size of a ring, each way.
        message_bytes_max: The longest message.
        spin_s: How long a reader of a ring looks on before it sleeps; 0 never.
        max_nonlocal_requests: Credits of the default service group.
        call_timeout_s: How long a call may take that says nothing else.
        start_timeout_s: How long a shard may take to start.
        stop_grace_s: How long calls and services may take to end when the shards stop; afterwards processes are killed.
        log_level: Of the other shards' loggers.
        metrics_folder: Where the shards' metrics have their pages, an absolute path; "" keeps each shard's in its own memory.
        restart: When dead shards return.
    """

    n_shards: int = 1
    pin: Literal["all", "others", "none"] = "all"
    channel: ChannelKind = "auto"
    ring_bytes: int = RING_BYTES
    message_bytes_max: int = MESSAGE_BYTES_MAX
    spin_s: float = 0.0
    max_nonlocal_requests: int = NONLOCAL_REQUESTS_MAX
    call_timeout_s: float = 30.0
    start_timeout_s: float = 30.0
    stop_grace_s: float = 5.0
    log_level: Level = "info"
    metrics_folder: str = ""
    restart: RestartPolicy = RestartPolicy()

    @property
    def channel_settings(self) -> ChannelSettings:
        """What the port needs to know."""
        return ChannelSettings(self.channel, self.ring_bytes, self.message_bytes_max, self.spin_s)
